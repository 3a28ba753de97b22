"""How a rollout under way is given up: whoever waits asks `stop()` from time to time."""

from collections.abc import Callable

Stop = Callable[[], bool]
"""True from the moment on at which somebody asked for it."""
POLL_S = 0.2
"""How often a wait for something else asks."""


class RolloutStoppedError(Exception):
    """A rollout was given up because somebody asked for it; its answers are lost."""


def never() -> bool:
    """The `Stop` of a rollout that nobody stops."""
    return False
