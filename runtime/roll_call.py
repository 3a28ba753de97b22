"""Do all processes come, and do they agree? Asked before JAX waits for them.

JAX ends a process that waited in vain with a stack trace that says who asked, not who is missing.
So the processes first meet by name on the coordinator's port, which process 0 then leaves to JAX:
each says its number and how many it expects, and hears "ok" or what is wrong.
"""

import contextlib
import socket
import time

_HELLO = "meshseek"
_RETRY_S = 0.2
_MAX_LINE = 1000


def roll_call(coordinator: str, num_processes: int, process_id: int, within: float) -> None:
    """Return when all processes are there, each of them having called this.

    Args:
      coordinator: HOST:PORT of process 0.
      within: seconds to wait for the others.
    Errors: ValueError that names who is missing, who came twice, or who expects another number.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator {coordinator!r}: give HOST:PORT, such as host0:9000")
    deadline = time.monotonic() + within
    if process_id == 0:
        _call(int(port), num_processes, deadline, within)
    else:
        hello = f"{_HELLO} {process_id} {num_processes}\n"
        _answer(host.strip("[]"), int(port), hello, deadline, within)


def _call(port: int, num_processes: int, deadline: float, within: float) -> None:
    """Process 0: hear every process, then tell all of them the result."""
    present: set[int] = set()
    connections, wrong = [], ""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(port))
        while not wrong and len(present) < num_processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection = stack.enter_context(server.accept()[0])
            except TimeoutError:
                wrong = _missing(present, num_processes, within)
                break
            connection.settimeout(_MAX_LINE / 1000)
            word, *numbers = _read_line(connection).split() or [""]
            if word != _HELLO or len(numbers) != 2 or not all(n.isdigit() for n in numbers):
                continue  # a port scanner, or another program
            number, expected = map(int, numbers)
            wrong = _disagreement(number, expected, present, num_processes)
            present.add(number)
            connections.append(connection)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(f"{_HELLO} {wrong or 'ok'}\n".encode())
    if wrong:
        raise ValueError(wrong)


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on port {port} ({error.strerror}); choose another port in "
            "--coordinator, for all processes"
        ) from None


def _disagreement(number: int, expected: int, present, num_processes: int) -> str:
    """What is wrong with a process that has just come; "" when nothing is."""
    if expected != num_processes:
        return (
            f"process {number} was started with --num-processes {expected}, process 0 with "
            f"{num_processes}; start all with the same number"
        )
    if number in present or not 0 < number < num_processes:
        return f"two processes were started with --process-id {number}; each needs its own"
    return ""


def _missing(present, num_processes: int, within: float) -> str:
    absent = [str(i) for i in range(1, num_processes) if i not in present]
    names = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
    return (
        f"{len(present) + 1} of {num_processes} processes came within {within:g} s; missing: "
        f"{names}. Start them, correct --num-processes, or wait longer with --join-within"
    )


def _answer(host: str, port: int, hello: str, deadline: float, within: float) -> None:
    """Another process: report to process 0 and hear the result."""
    reason = "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                connection.sendall(hello.encode())
                # Process 0 may have started, and give up, later than this one.
                connection.settimeout(within + 5)
                word, _, reply = _read_line(connection).partition(" ")
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(_RETRY_S)
            continue
        if word == _HELLO and reply == "ok":
            return
        if word == _HELLO:
            raise ValueError(reply)
        reason = "something else answers there" if word else "the connection was closed"
        time.sleep(_RETRY_S)
    raise ValueError(
        f"process 0 at {host}:{port} did not answer within {within:g} s ({reason}); start it, fix "
        "--coordinator, or wait longer with --join-within"
    )


def _read_line(connection: socket.socket) -> str:
    """One line without its end; what came of it when the other side closes or is silent."""
    data = b""
    with contextlib.suppress(OSError):
        while not data.endswith(b"\n") and len(data) < _MAX_LINE:
            chunk = connection.recv(_MAX_LINE)
            if not chunk:
                break
            data += chunk
    return data.decode("utf-8", errors="replace").strip()
