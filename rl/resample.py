"""DAPO's dynamic sampling: more prompts are asked in place of groups that have nothing to compare.

A group whose answers all got the same reward has no gradient, and the better a policy gets, the
more groups are like that (DAPO, section 3.2, eq. 11). The loop asks further rounds of prompts until
enough groups differ inside, or `rl.resample` rounds are used up; then groups that do not differ
fill the batch, and `dynamic_sampling` leaves them out of the loss.

Letters: A answers, P prompts of a round.
"""

import dataclasses
from collections.abc import Sequence
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
    """Prompts with their answers and what these are worth; groups of equal size, in order."""

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
    places = [(i, p) for i, asked in enumerate(rounds) for p in range(len(asked.questions.ids))]
    useful = np.concatenate([differing(asked, config) for asked in rounds])
    order = np.argsort(~useful, kind="stable")[:prompts]
    return _take(rounds, [places[at] for at in order])


def _take(rounds: Sequence[Asked], places: Sequence[tuple[int, int]]) -> Asked:
    """The groups at (round, prompt), in this order."""
    size = rounds[0].group_size

    def prompts_of(field: Any) -> list:
        return [field(rounds[i])[p] for i, p in places]

    def answers_of(field: Any) -> list:
        return [x for i, p in places for x in field(rounds[i])[p * size : (p + 1) * size]]

    def maybe(name: str) -> list | None:
        values = [getattr(asked.rollout, name) for asked in rounds]
        return None if values[0] is None else answers_of(lambda asked: getattr(asked.rollout, name))

    first = rounds[0].scores
    return Asked(
        Questions(
            prompts_of(lambda asked: asked.questions.problems),
            prompts_of(lambda asked: asked.questions.ids),
        ),
        Rollout(
            tokens=answers_of(lambda asked: asked.rollout.tokens),
            logps=answers_of(lambda asked: asked.rollout.logps),
            truncated=np.array(answers_of(lambda asked: asked.rollout.truncated)),
            routes=maybe("routes"),
            seconds=sum(asked.rollout.seconds for asked in rounds),
            passes=sum(asked.rollout.passes for asked in rounds),
            kept=maybe("kept"),
        ),
        answers_of(lambda asked: asked.texts),
        dataclasses.replace(
            first,
            parts={
                name: np.array(answers_of(lambda asked, name=name: asked.scores.parts[name]))
                for name in first.parts
            },
            correct=np.array(answers_of(lambda asked: asked.scores.correct)),
        ),
    )
