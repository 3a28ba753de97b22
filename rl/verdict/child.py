"""A Python process beside this one that answers in lines of JSON, and can be stopped at any time.

The child is a fresh interpreter that runs one module of this project: nothing is forked, the main
program is not imported again, and what the child prints cannot mix with what it answers.
"""

import contextlib
import json
import os
import pathlib
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

GRACE = 0.5
"""Seconds from TERM to KILL, and for an orderly end."""
_ROOT = str(pathlib.Path(__file__).resolve().parents[2])


class ChildError(Exception):
    """The child's process ended, or said something that is no answer."""


class Child:
    """Runs `python -m module arguments...` in a process group of its own."""

    def __init__(self, module: str, *arguments: str, folder: str | None = None):
        """folder: for temporary files; None leaves the system's."""
        paths = [_ROOT, os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if folder:
            environment["TMPDIR"] = folder
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self._rest = b""

    def fileno(self) -> int:
        """Becomes readable when `read` has something to return or to raise."""
        assert self._process.stdout
        return self._process.stdout.fileno()

    def send(self, message: object) -> None:
        """Gives it work; ChildError if it does not take any."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildError(self._how()) from None

    def read(self) -> list[Any]:
        """Answers that have arrived (perhaps none yet, if one has arrived in part)."""
        read = os.read(self.fileno(), 1 << 16)
        if not read:
            raise ChildError(self._how())
        *lines, self._rest = (self._rest + read).split(b"\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            raise ChildError(f"answered {lines[0][:80]!r}") from None

    def wait(self, seconds: float) -> Any:
        """The next answer; TimeoutError if it does not come in time."""
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            while (left := end - time.monotonic()) > 0:
                if selector.select(left) and (answers := self.read()):
                    assert len(answers) == 1
                    return answers[0]
        raise TimeoutError(f"no answer in {seconds:g} s")

    def close(self) -> None:
        """Lets an idle child end by itself; one that does not is stopped."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        self.kill()

    def terminate(self) -> None:
        """Sends TERM to it and to what it started in its group, and does not wait."""
        self._signal(signal.SIGTERM)

    def kill(self, grace: float = GRACE) -> None:
        """Stops it and what it started in its group, TERM `grace` seconds before KILL, reaps it."""
        for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, GRACE)):
            if self._process.poll() is None:
                self._signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(seconds)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _how(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        status = self._process.returncode
        if status is None:
            return "closed its output"
        return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


def serve(answer: Callable[[Any], Iterable[Any]], memory_bytes: int, seconds: float) -> None:
    """The child's side: answers every line of standard input until it closes.

    answer: work -> answers. One answer that takes more than `seconds` ends the process, even if
    nobody is left to stop it. What `answer` prints goes to standard error.
    """
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    for line in requests:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends the process
        for message in answer(json.loads(line)):
            answers.write(json.dumps(message).encode() + b"\n")
            answers.flush()
            signal.setitimer(signal.ITIMER_REAL, seconds)
        signal.setitimer(signal.ITIMER_REAL, 0)
