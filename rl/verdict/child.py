"""A Python process that answers in lines of JSON, and can be stopped at any time.

The child is a fresh interpreter that runs one module of this project: nothing is forked, the main
program is not imported again, and what the child prints cannot mix with what it answers. It has a
process group and a folder for temporary files of its own, and both end with it.

Not `pebble` 5.2, whose pools do most of this: three of its workers that ignore TERM took 9 s to
stop, programs that a stopped task had started went on, a worker whose owner was killed went on, and
what a task prints goes to the training's output (all measured).
"""

import contextlib
import json
import os
import pathlib
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

GRACE = 0.5
"""Seconds from TERM to KILL, and for an orderly end."""
_ROOT = str(pathlib.Path(__file__).resolve().parents[2])


class ChildError(Exception):
    """The child's process ended, or said something that is no answer."""


class Child:
    """Runs `python -m module arguments...`."""

    def __init__(self, module: str, *arguments: str):
        paths = [_ROOT, os.environ.get("PYTHONPATH", "")]
        self._folder = tempfile.mkdtemp(prefix="child-")
        self._rest = b""
        self.asked = 0
        """Messages that it was sent."""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                    "TMPDIR": self._folder,
                },
                start_new_session=True,
            )
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    @property
    def status(self) -> int | None:
        """Its exit status, -signal if a signal ended it; None while it runs."""
        return self._process.poll()

    def ask(self, message: object, seconds: float) -> Any:
        """Its answer to a message; TimeoutError if it does not come in time, ChildError if the
        child has ended."""
        assert self._process.stdin
        self.asked += 1
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildError(self._how()) from None
        return self.wait(seconds)

    def wait(self, seconds: float) -> Any:
        """The next line that it says, as `ask`."""
        assert self._process.stdout
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while selector.select(max(0.0, end - time.monotonic())):
                read = os.read(self._process.stdout.fileno(), 1 << 16)
                if not read:
                    raise ChildError(self._how())
                line, newline, self._rest = (self._rest + read).partition(b"\n")
                if newline:
                    return _decoded(line)
                self._rest = line
        raise TimeoutError(f"no answer in {seconds:g} s")

    def signal(self, number: int) -> None:
        """Sends it, and what it started in its group, a signal."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def end(self, orderly: bool = False) -> None:
        """Stops it and what it started in its group, TERM before KILL, and reaps it.

        orderly: first lets it end by itself, as an idle one does.
        """
        pipes = (self._process.stdin, self._process.stdout)
        if orderly:
            _close(pipes[0])
            self._ended(GRACE)
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.signal(number)
            self._ended(GRACE)
        self._process.wait()
        for pipe in pipes:
            _close(pipe)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ended(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def _how(self) -> str:
        self._ended(GRACE)
        status = self._process.returncode
        if status is None:
            return "closed its output"
        return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


def _decoded(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        raise ChildError(f"answered {line[:80]!r}") from None


def _close(pipe: Any) -> None:
    with contextlib.suppress(BrokenPipeError):
        pipe.close()


def serve(answer: Callable[[Any], Any], memory_bytes: int, seconds: float) -> None:
    """The child's side: answers every line of standard input until it closes.

    One answer that takes more than `seconds` ends the process, even if nobody is left to stop it.
    What `answer` prints goes to standard error.
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
        answers.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)
