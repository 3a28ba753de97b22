"""Several processes of one program: they meet, and none waits forever for one that is gone.

Three things end a program whose process was lost. A collective of Gloo fails at once; one of NCCL
never returns; and JAX's coordination service, which hears a heartbeat of every process, aborts the
others some time after the last one. Whichever comes first, people are told here which process it
was and how to go on, and the process ends with status LOST.
"""

import atexit
import contextlib
import ctypes
import functools
import itertools
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from runtime.roll_call import roll_call

LOST = 3
"""Exit status of a process that ended because of another."""

JOIN_WITHIN_S = 300
LOST_AFTER_S = 20

_POLL_S = 0.5
_STALE_S = 4.0
"""A process counts as silent when its pulse, every _POLL_S, has not come for so long."""
_EVIDENCE_S = 8.0
"""Longest time to look for somebody else's end after a collective failed."""
_GRACE_S = 2.0
"""What this process may need to say itself what it already heard of another."""
_LONGEST_WAIT_MS = 7 * 24 * 3600 * 1000
_PULSE, _END, _LEFT = "meshseek/pulse", "meshseek/end", "left"


def join_processes(
    mode: str,
    coordinator: str,
    num_processes: int,
    process_id: int,
    join_within: int = JOIN_WITHIN_S,
    lost_after: int = LOST_AFTER_S,
) -> None:
    """Meet the other processes of the program, if there are any. Call before JAX is first used.

    Args:
      mode: "off", "on" (JAX detects the cluster) or "auto": on under Slurm and Open MPI, and with
        a `coordinator`.
      coordinator: HOST:PORT of process 0, which the next two arguments belong to.
      join_within: seconds to wait for all to come.
      lost_after: seconds without a heartbeat after which a process counts as lost.
    Errors: ValueError for a coordinator without its arguments, and for processes that do not come.
    """
    launched = any(name in os.environ for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    if mode == "off" or not (coordinator or launched or mode == "on"):
        return
    if join_within < 1 or lost_after < 1:
        raise ValueError(
            f"--join-within {join_within}, --lost-after {lost_after}: give 1 second or more"
        )
    given: dict[str, Any] = {}
    if coordinator:
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise ValueError(
                f"--coordinator {coordinator} needs --num-processes (is {num_processes}) and "
                f"--process-id (is {process_id}), which counts from 0"
            )
        roll_call(coordinator, num_processes, process_id, join_within)
        given = {
            "coordinator_address": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
        }
    _keep_stdout()
    watch = _Watch(lost_after)
    _on_abort(watch.aborted)
    jax.distributed.initialize(
        **given, initialization_timeout=join_within, heartbeat_timeout_seconds=lost_after
    )
    watch.start()


def _keep_stdout() -> None:
    """Leave standard output to Python: what Gloo's threads write there, in torn lines, goes to
    standard error."""
    out = sys.stdout
    if out is None:  # closed by whoever started this process
        return
    out.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(own, "w", 1, out.encoding, out.errors)  # noqa: SIM115


def barrier(name: str) -> None:
    """Return when all processes are here, each `name` once. No device takes part, so it may take
    as long as it likes: a collective gives up on those that come late."""
    if _Watch.current is not None:
        _Watch.current.barrier(name)


def exchange(name: str, value: str) -> list[str]:
    """What every process says under `name`, by its number; all of them ask, each `name` once."""
    return [value] if _Watch.current is None else _Watch.current.exchange(name, value)


def connect(mesh: Mesh) -> None:
    """Let the devices of every combination of mesh axes meet, where they do so over Gloo.

    They would at the first collective of each, and Gloo fails when one comes 30 s after another,
    which happens when processes compile a large program at unlike speed.
    """
    if _Watch.current is None or mesh.devices.flat[0].platform != "cpu":
        return
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    for size in range(1, len(axes) + 1):
        for group in itertools.combinations(axes, size):
            rest = tuple(axis for axis in axes if axis not in group)
            meet = jax.shard_map(
                functools.partial(jax.lax.psum, axis_name=group),
                mesh=mesh,
                in_specs=PartitionSpec(tuple(axes)),
                out_specs=PartitionSpec(rest or None),
            )
            barrier(f"connect {group}")
            jax.block_until_ready(jax.jit(meet)(np.zeros(mesh.size, np.float32)))


def fetch(x: jax.Array) -> np.ndarray:
    """All of an array on every process, whose devices may hold only a part; all of them ask."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def together(
    program: str, main: Callable[[], int], refusals: tuple[type[Exception], ...] = ()
) -> int:
    """Exit status of `main`; when it fails in one of several processes, all of them end.

    Args:
      program: what people started, to begin messages with.
      refusals: errors whose message is for people: it goes to stderr, and the status is 2.
    In one of several processes a failure does not return but ends the process, because JAX would
    wait for the others at exit.
    """
    _Watch.program = program
    try:
        return main()
    except refusals as error:
        if _Watch.current is not None and _from_jax(error):
            _Watch.current.blame_others(_first_line(error))
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        status, reason = 2, _first_line(error)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        status, reason = 130, "interrupted"
    except BaseException as error:
        if _Watch.current is None:
            raise
        if _from_jax(error):
            _Watch.current.blame_others(_first_line(error))
        traceback.print_exc()
        status, reason = 1, f"{type(error).__name__}: {_first_line(error)}"
    if _Watch.current is not None:
        _Watch.current.failed(reason, status)
    return status


def when_lost(remedy: Callable[[], str]) -> None:
    """What to tell people, besides who was lost: called when it has happened."""
    _Watch.remedies[:] = [remedy]


class _Watch:
    """What this process knows of the others, through the store of JAX's coordination service.

    A thread gives a pulse and reads those of the others. A pulse that stops is no reason to end
    anything (Python may be busy); it only tells who is meant when something else failed.
    """

    current: "_Watch | None" = None
    program = ""
    remedies: ClassVar[list[Callable[[], str]]] = []

    def __init__(self, lost_after: int):
        self._lost_after = lost_after
        self._client: Any = None
        self._index, self._count = 0, 1
        self._heard: dict[int, tuple[str, float]] = {}  # last pulse, and when it changed
        self._ends: dict[int, str] = {}  # what processes said when they ended
        self._stop = threading.Event()
        self._reporting = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def start(self) -> None:
        """Begin, once JAX is connected."""
        state = distributed.global_state
        self._index, self._count = state.process_id, state.num_processes
        self._client = state.client
        if self._count == 1:
            return
        now = time.monotonic()
        self._heard = dict.fromkeys(range(self._count), ("", now))
        _Watch.current = self
        self._thread.start()
        atexit.register(self._close)  # runs before JAX disconnects

    def barrier(self, name: str) -> None:
        """Wait for all; a process that ends meanwhile ends this one, too."""
        self._client.wait_at_barrier(f"meshseek/{name}", _LONGEST_WAIT_MS)

    def exchange(self, name: str, value: str) -> list[str]:
        """Tell all others, hear all others."""
        key = f"meshseek/say/{name}"
        self._set(f"{key}/{self._index}", value)
        self.barrier(name)
        said = {int(k.rpartition("/")[2]): v for k, v in self._client.key_value_dir_get(key)}
        return [said[i] for i in range(self._count)]

    # ---- Listening ----

    def _watch(self) -> None:
        beat = 0
        while not self._stop.wait(_POLL_S):
            beat += 1
            try:
                self._set(f"{_PULSE}/{self._index}", str(beat))
                self._listen()
            except jax.errors.JaxRuntimeError:
                continue  # JAX aborts the process, and `aborted` tells why
            if self._ends.keys() - {self._index}:
                # Processes that fail alike each say so themselves.
                if not self._stop.wait(_GRACE_S) and self._index not in self._ends:
                    self._end(next(iter(self._ends.values())))
                return

    def _listen(self) -> None:
        now = time.monotonic()
        for key, pulse in self._client.key_value_dir_get(_PULSE):
            i = int(key.rpartition("/")[2])
            if self._heard[i][0] != pulse:
                self._heard[i] = pulse, now
        for key, said in self._client.key_value_dir_get(_END):
            self._ends.setdefault(int(key.rpartition("/")[2]), said)

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set(key, value, allow_overwrite=True)

    def _silent(self) -> dict[int, float]:
        """Processes without a pulse, and for how many seconds."""
        now = time.monotonic()
        ages = {i: now - at for i, (pulse, at) in self._heard.items() if pulse != _LEFT}
        return {i: age for i, age in ages.items() if age > _STALE_S and i != self._index}

    def _who_is_silent(self) -> str:
        """A sentence about them; "" when there are none."""
        silent = self._silent()
        if not silent:
            return ""
        names = ", ".join(map(str, sorted(silent)))
        subject = (
            f"process {names} of {self._count} was"
            if len(silent) == 1
            else (f"processes {names} of {self._count} were")
        )
        return f"{subject} lost: no sign of life for {max(silent.values()):.0f} s"

    # ---- Ending ----

    def blame_others(self, what_failed: str) -> None:
        """End with LOST if another process is why an operation failed; else return."""
        start = time.monotonic()
        while time.monotonic() - start < _EVIDENCE_S:
            said = [text for i, text in self._ends.items() if i != self._index]
            reason = said[0] if said else self._who_is_silent()
            if reason:
                self._end(reason, f"what failed here: {what_failed}")
            time.sleep(_POLL_S)

    def failed(self, reason: str, status: int) -> None:
        """End this process of its own error, and the others for it."""
        self._tell(f"process {self._index} of {self._count} failed: {reason}")
        self.leave(status)

    def _tell(self, sentence: str) -> None:
        self._ends[self._index] = sentence
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._set(f"{_END}/{self._index}", sentence)

    def leave(self, status: int) -> None:
        """End this process at once; process 0, whose end would hide the reason, last."""
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=_GRACE_S)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._set(f"{_PULSE}/{self._index}", _LEFT)
            deadline = time.monotonic() + _STALE_S + _GRACE_S
            while self._index == 0 and time.monotonic() < deadline and self._others():
                time.sleep(_POLL_S / 2)
                self._listen()
        _exit(status)

    def _others(self) -> list[int]:
        """Other processes that are neither silent nor gone."""
        gone = self._silent().keys() | {i for i, (p, _) in self._heard.items() if p == _LEFT}
        return [i for i in range(self._count) if i != self._index and i not in gone]

    def _report(self, reason: str, *details: str) -> None:
        """Say why the program ends; one thread at a time, and the process ends after it."""
        if not self._reporting.acquire(blocking=False):
            time.sleep(2 * (_STALE_S + _GRACE_S))
            os._exit(LOST)
        try:
            remedy = "".join(remedy() for remedy in _Watch.remedies)
        except OSError as error:
            remedy = str(error)
        name = _Watch.program or os.path.basename(sys.argv[0])
        lines = [f"{name}: {line}\n" for line in (reason, *details, remedy) if line]
        print("\n" + "".join(lines), end="", file=sys.stderr, flush=True)

    def _end(self, reason: str, *details: str) -> None:
        """End with LOST, and let the others do the same for the same reason."""
        self._report(reason, *details)
        self._tell(reason)
        self.leave(LOST)

    def aborted(self) -> None:
        """JAX gave up and is about to abort. Ends with LOST if that is somebody else's fault.

        The store is not asked any more: JAX may be holding its locks.
        """
        said = [text for i, text in self._ends.items() if i != self._index]
        if self._client is None:
            reason = "the processes did not meet; the lines above say why"
        elif said:
            reason = said[0]
        elif self._stop.is_set():
            reason = "another process was lost while the program was ending"
        else:
            reason = self._who_is_silent()
            if not reason and self._unreachable():
                reason = f"process 0 of {self._count} was lost: it no longer answers"
        if reason:
            self._report(reason)
            _exit(LOST)

    def _unreachable(self) -> bool:
        """Whether process 0 is another process that accepts no connection."""
        address = distributed.global_state.coordinator_address
        if self._index == 0 or address is None:
            return False
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
        except OSError:
            return True
        return False

    def _close(self) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._set(f"{_PULSE}/{self._index}", _LEFT)


def _from_jax(error: BaseException | None) -> bool:
    """Whether it was JAX that failed, as it does when another process is gone."""
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__
    return error is not None


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return lines[0][:500]


def _exit(status: int) -> None:
    """End now: what Python and JAX do at exit would wait for processes that are gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


_handlers: list[Any] = []
"""C functions made of Python ones live as long as they are referred to."""


def _on_abort(tell: Callable[[], None]) -> None:
    """Call `tell` when C++ code calls abort(); if it returns, the process aborts as ever.

    JAX offers no other way in: its own callback for a lost process cannot be a Python function
    (0.11.2: std::bad_cast). Python's handlers of signals run too late for abort().
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p

    def handle(number: int) -> None:
        libc.signal(number, None)  # SIG_DFL
        try:
            tell()
        except Exception:
            traceback.print_exc()

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    _handlers.append(handler)
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
