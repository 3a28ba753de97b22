"""Stopping on request: a signal becomes a flag that the training loop reads between steps."""

import signal
import types
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""SIGTERM comes from schedulers (preemption, a job's time limit), SIGINT from Ctrl-C."""


class StopRequest:
    """Context manager that remembers SIGTERM and SIGINT instead of dying of them.

    The first signal only sets the flag: the loop finishes its step, saves and leaves. A second
    SIGINT raises KeyboardInterrupt at once, for a person who does not want to wait. Leaving the
    context puts the previous handlers back. Use it in the main thread, where Python delivers
    signals. The flag is this process's own; processes of one run agree on it elsewhere.
    """

    def __init__(self):
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """True from the first signal on."""
        return self._received is not None

    @property
    def signal_name(self) -> str:
        """Name of the first signal, such as SIGTERM; empty before one came."""
        return self._received.name if self._received else ""

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: types.FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = self._received or signal.Signals(number)
