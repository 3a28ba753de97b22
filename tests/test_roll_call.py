"""How processes meet before JAX does: who is missing, and who contradicts whom."""

import contextlib
import socket
import threading
import time

import pytest

from runtime.processes import join_processes
from runtime.roll_call import roll_call
from tests.test_processes import free_port


def meet(*processes: tuple[int, int], within: float = 20) -> dict[int, str]:
    """What each of these (process id, number of processes) hears; "" when all is well."""
    coordinator, heard = f"localhost:{free_port()}", {}

    def one(position: int, process_id: int, num_processes: int):
        try:
            roll_call(coordinator, num_processes, process_id, within)
            heard[position] = ""
        except ValueError as error:
            heard[position] = str(error)

    threads = [threading.Thread(target=one, args=(i, *p)) for i, p in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


def test_all_come():
    assert set(meet((2, 3), (0, 3), (1, 3)).values()) == {""}


def test_those_who_are_missing_are_named():
    heard = meet((0, 4), (2, 4), within=0.5)
    assert "2 of 4 processes came within 0.5 s; missing: 1, 3" in heard[0]
    assert heard[1] == heard[0]


def test_process_0_is_missing():
    assert "process 0 at localhost" in meet((1, 2), within=0.5)[0]


@pytest.mark.parametrize(
    ("processes", "says"),
    [
        (((0, 2), (1, 4)), "process 1 was started with --num-processes 4, process 0 with 2"),
        (((0, 2), (3, 4)), "process 3 was started with --num-processes 4, process 0 with 2"),
        (((0, 3), (1, 3), (1, 3)), "two processes were started with --process-id 1"),
    ],
)
def test_processes_that_contradict_each_other_are_refused(processes, says):
    assert all(says in message for message in meet(*processes).values())


def test_strangers_on_the_port_are_passed_over():
    coordinator = f"localhost:{free_port()}"
    first = threading.Thread(target=roll_call, args=(coordinator, 2, 0, 20))
    first.start()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionRefusedError):
            host, _, port = coordinator.partition(":")
            socket.create_connection((host, int(port))).close()
            break
    roll_call(coordinator, 2, 1, 20)
    first.join()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("host:1", 0, 0), "needs --num-processes"),
        (("host:1", 2, 2), "which counts from 0"),
        (("host", 2, 1), "give HOST:PORT"),
        (("host:1", 2, 1, 0), "give 1 second or more"),
    ],
)
def test_arguments_that_cannot_be_met(arguments, says):
    with pytest.raises(ValueError, match=says):
        join_processes("auto", *arguments)
