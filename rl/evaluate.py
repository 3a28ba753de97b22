"""Held-out accuracy of a policy, at temperature 1 and greedily: neither alone tells enough."""

import dataclasses
from collections.abc import Callable

import numpy as np

from rl.prompts import EVALUATE, EVALUATE_GREEDY, Prompts, Questions, sampler_seed
from rl.rollout import Publishable, Rollout
from rl.stopping import Stop, never
from rl.verdict.scoring import Scorer, Scores


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The same prompts every time, answered once by each sampler.

    Draws at temperature 1 depend on (seed, step), so that a resumed run measures what the other
    would have measured.
    """

    questions: Questions
    prompts: Prompts
    scorer: Scorer
    drawn: Publishable
    """At temperature 1."""
    greedy: Publishable

    def __call__(
        self, step: int, policy: Publishable, stop: Stop = never,
        failed: Callable[[Scores], float] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Metrics of the policy that was published last; see `training/metrics.py`, eval/.

        failed: failed rewards per answer, and says what failed; None only counts.
        RolloutStoppedError soon after `stop()` says true.
        """
        record = {"eval/failed_rewards": 0.0}
        for sampler, purpose in ((self.drawn, EVALUATE), (self.greedy, EVALUATE_GREEDY)):
            sampler.borrow(policy)
            seed = sampler_seed(self.prompts.seed, purpose, step)
            rollout = sampler(self.questions.ids, 1, seed, stop)
            texts = self.prompts.texts(rollout.tokens)
            scores = self.scorer(self.questions.problems, texts, lengths(rollout), stop)
            record["eval/failed_rewards"] += (failed or failed_rewards)(scores) / 2
            if purpose == EVALUATE_GREEDY:
                record["eval/accuracy_greedy"] = float(scores.correct.mean())
            else:
                record |= {
                    f"eval/{name}": value for name, value in describe(rollout, scores).items()
                }
        return record


def failed_rewards(scores: Scores) -> float:
    """Failed rewards per answer."""
    total = sum(count for kinds in scores.failures.values() for count in kinds.values())
    return total / len(scores.correct)


def lengths(rollout: Rollout) -> np.ndarray:
    """Tokens of every answer, its end token included, int64 [A]."""
    return np.array([len(answer) for answer in rollout.tokens])


def describe(rollout: Rollout, scores: Scores) -> dict[str, float]:
    """accuracy, format and step_accuracy, length and length_correct (tokens, mean over answers and
    over correct ones; NaN for none), truncated (share)."""
    tokens_A = lengths(rollout)
    correct = scores.correct
    return {
        **scores.quality,
        "length": float(tokens_A.mean()),
        "length_correct": float(tokens_A[correct].mean()) if correct.any() else float("nan"),
        "truncated": float(rollout.truncated.mean()),
    }
