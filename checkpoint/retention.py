"""Checkpoints that stay: the newest, and the best by held-out loss."""

import math
from collections.abc import Sequence

from orbax.checkpoint import checkpoint_managers as policies


class KeepNewestAndBest(policies.PreservationPolicy):
    """Keeps the `keep` newest checkpoints and, besides, the `keep_best` with the lowest loss.

    A step this object was not told about (a folder that cannot be restored, somebody else's) does
    not count against `keep` and is not deleted: it is not ours to judge.
    """

    def __init__(self, keep: int, keep_best: int):
        self._keep = keep
        self._keep_best = keep_best
        self._losses: dict[int, float] = {}

    def note(self, step: int, loss: float | None) -> None:
        """A good checkpoint of `step`; only a finite held-out loss can make it one of the best."""
        self._losses[step] = loss if loss is not None and math.isfinite(loss) else math.inf

    def forget(self, step: int) -> None:
        """The checkpoint of `step` turned out not to be good."""
        self._losses.pop(step, None)

    def knows(self, step: int) -> bool:
        """True for a step that was noted and not forgotten."""
        return step in self._losses

    def kept(self, steps: Sequence[int]) -> set[int]:
        """The steps out of `steps` that stay."""
        good = sorted(step for step in steps if step in self._losses)
        newest = good[-self._keep :]
        rated = [step for step in good if math.isfinite(self._losses[step])]
        # Of equal losses the newer one, which has seen more data.
        best = sorted(rated, key=lambda step: (self._losses[step], -step))[: self._keep_best]
        return {*newest, *best, *(step for step in steps if step not in self._losses)}

    def should_preserve(
        self,
        checkpoints: Sequence[policies.PolicyCheckpointInfo],
        *,
        context: policies.PreservationContext,
    ) -> Sequence[bool]:
        """Orbax asks after each save; one answer per checkpoint."""
        del context
        kept = self.kept([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]
