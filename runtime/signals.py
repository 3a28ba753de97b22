"""Stopping on request: a signal becomes a flag that the training loop reads between steps."""

import os
import signal
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""SIGTERM comes from schedulers (preemption, a job's time limit), SIGINT from Ctrl-C."""
QUIT_WITHIN_S = 2.0
"""After a second SIGINT, what the main thread may take to leave by itself. It cannot while it
compiles a program, which takes minutes."""


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class StopRequest:
    """Context manager that remembers SIGTERM and SIGINT instead of dying of them.

    The first signal only sets the flag: the loop finishes its step, saves and leaves. A second
    SIGINT raises KeyboardInterrupt at once, for a person who does not want to wait. Leaving the
    context puts the previous handlers back. Use it in the main thread, where Python delivers
    signals. The flag is this process's own; processes of one run agree on it elsewhere.

    Python's handlers wait for the main thread, which may be inside a compilation. A thread that
    reads the numbers of signals as they come answers at once, and keeps the promise that a second
    SIGINT quits.

    Args:
      say: takes the line that answers a signal, from that thread.
    """

    def __init__(self, say: Callable[[str], None] = _to_stderr):
        self._say = say
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._leaves = threading.Event()

    @property
    def requested(self) -> bool:
        """True from the first signal on."""
        return self._received is not None

    @property
    def signal_name(self) -> str:
        """Name of the first signal, such as SIGTERM; empty before one came."""
        return self._received.name if self._received else ""

    def __enter__(self) -> "StopRequest":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._leaves.set()
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)

    def _handle(self, number: int, _frame: types.FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            self._leaves.set()
            raise KeyboardInterrupt
        self._received = self._received or signal.Signals(number)

    def _answer(self) -> None:
        """Say what each signal does; runs in a thread until the context is left."""
        asked = False
        while number := os.read(self._reader, 1):
            if number[0] not in STOP_SIGNALS:
                continue
            name = signal.Signals(number[0]).name
            if not asked:
                again = "; again to quit now" if name == "SIGINT" else ", then saving"
                self._say(f"{name}: finishing this step{again}")
            elif name == "SIGINT" and not self._leaves.wait(QUIT_WITHIN_S):
                self._say("SIGINT: quitting; the step in progress is lost")
                os._exit(128 + signal.SIGINT)
            asked = True
