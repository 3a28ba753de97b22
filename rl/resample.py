"""DAPO's dynamic sampling: further prompts in place of groups that have nothing to compare.

A group whose answers all got the same reward has no gradient, and the better a policy gets, the
more groups are like that (DAPO, section 3.2, eq. 11). The loop asks further rounds of prompts until
enough groups differ inside, or `rl.resample` rounds are used up; then groups that do not differ
fill the batch, and `dynamic_sampling` leaves them out of the loss.

Letters: A answers, P prompts of a round.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from rl.advantages import group_advantages, informative_groups
from rl.config import GRPOConfig
from rl.prompts import Questions
from rl.rollout import Rollout
from rl.verdict.scoring import Scores


@dataclasses.dataclass(frozen=True)
class Asked:
    """Prompts with their answers and scores; groups of equal size, in order."""

    questions: Questions
    rollout: Rollout
    texts: list[str]
    scores: Scores

    @property
    def group_size(self) -> int:
        """Answers of each prompt."""
        return len(self.texts) // len(self.questions.ids)


def reward_arrays(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Rewards by part and answer, fp32 [parts, A], and their weights, fp32 [parts]."""
    parts = np.stack(list(scores.parts.values())).astype(np.float32)
    return parts, np.array([scores.weights[name] for name in scores.parts], np.float32)


def differing(asked: Asked, config: GRPOConfig) -> np.ndarray:
    """Groups whose answers differ in their advantage, bool [P]."""
    rewards, weights = map(jnp.asarray, reward_arrays(asked.scores))
    advantages_A, _ = group_advantages(rewards, weights, config)
    return np.asarray(informative_groups(advantages_A, config.group_size))


def choose(rounds: Sequence[Asked], config: GRPOConfig, prompts: int) -> Asked:
    """`prompts` groups of these rounds: those that differ first, each kind in its order."""
    groups = [(asked, p) for asked in rounds for p in range(len(asked.questions.ids))]
    useful = np.concatenate([differing(asked, config) for asked in rounds])
    chosen = [groups[at] for at in np.argsort(~useful, kind="stable")[:prompts]]
    size, first = rounds[0].group_size, rounds[0]

    def answers(field: Callable[[Asked], Any]) -> list:
        """Values of the chosen groups' answers."""
        return [x for asked, p in chosen for x in field(asked)[p * size : (p + 1) * size]]

    def recorded(name: str) -> list | None:
        """`answers` of a field of the rollout, where it was recorded."""
        there = getattr(first.rollout, name) is not None
        return answers(lambda asked: getattr(asked.rollout, name)) if there else None

    rollout = Rollout(
        tokens=answers(lambda asked: asked.rollout.tokens),
        logps=answers(lambda asked: asked.rollout.logps),
        truncated=np.array(answers(lambda asked: asked.rollout.truncated)),
        routes=recorded("routes"),
        seconds=sum(asked.rollout.seconds for asked in rounds),
        passes=sum(asked.rollout.passes for asked in rounds),
        kept=recorded("kept"),
    )
    parts = {
        name: np.array(answers(lambda asked, name=name: asked.scores.parts[name]))
        for name in first.scores.parts
    }
    known = first.scores.correct is not None
    correct = np.array(answers(lambda asked: asked.scores.correct)) if known else None
    return Asked(
        Questions(
            [asked.questions.problems[p] for asked, p in chosen],
            [asked.questions.ids[p] for asked, p in chosen],
        ),
        rollout,
        answers(lambda asked: asked.texts),
        dataclasses.replace(first.scores, parts=parts, correct=correct),
    )
