"""Giving up a rollout under way: code that waits asks `stop()` from time to time."""

from collections.abc import Callable

Stop = Callable[[], bool]
"""True once a stop was asked for."""
POLL_S = 0.2
"""Seconds between two questions of a wait for something else."""


class RolloutStoppedError(Exception):
    """A rollout given up because a stop was asked for; its answers are lost."""


def never() -> bool:
    """The `Stop` of a rollout that nobody stops."""
    return False
