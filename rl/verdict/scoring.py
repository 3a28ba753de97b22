"""What an answer is worth: its rewards by part, and what people want to see beside them.

Letters: A answers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from rl.config import CodeLimits, RLConfig
from rl.problems import Problem
from rl.prompts import rewards_of
from rl.stopping import RolloutStoppedError, Stop, never
from rl.tasks.task import Task, summary
from rl.verdict.pool import CODE, CODE_MARGIN, Judge, Pool, named


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of the answers of a rollout."""

    parts: dict[str, np.ndarray]
    """Rewards by name, float64 [A]; NaN where an answer cannot be scored."""
    weights: dict[str, float]
    """Weight of each part in the reward; parts of weight 0 are only watched."""
    correct: np.ndarray | None
    """bool [A]; None where no reward says what is right."""
    quality: dict[str, float]
    """accuracy, format, step_accuracy (`rl/tasks/task.py:summary`), or fewer of these."""
    failures: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    """Reward -> kind of failure -> answers, for rewards that ran elsewhere
    (`rl/verdict/pool.py`)."""
    messages: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    """Reward -> kind of failure -> what the first said."""

    @property
    def rewards(self) -> np.ndarray:
        """Weighted sum, float64 [A]."""
        return sum(
            (self.weights[name] * part for name, part in self.parts.items() if self.weights[name]),
            np.zeros(self.answers),
        )

    @property
    def answers(self) -> int:
        """Number of answers, A."""
        return len(next(iter(self.parts.values())))


class Scorer(Protocol):
    """What scores answers, by whatever rules and in whatever processes."""

    def __call__(
        self, problems: Sequence[Problem], texts: Sequence[str], lengths: np.ndarray,
        stop: Stop = ..., /,
    ) -> Scores:  # fmt: skip
        """Scores of a problem, a text and its length in tokens per answer. RolloutStoppedError
        soon after `stop()` says true."""
        ...


@dataclasses.dataclass(frozen=True)
class TaskScorer:
    """Scores by the task's own verifier."""

    task: Task
    rl: RLConfig

    def __call__(
        self, problems: Sequence[Problem], texts: Sequence[str], lengths: np.ndarray,
        stop: Stop = never,
    ) -> Scores:  # fmt: skip
        """Scores of the answers; never raises because of a text. See `Scorer`."""
        seen = []
        for problem, text in zip(problems, texts, strict=True):
            if stop():
                raise RolloutStoppedError
            seen.append(self.task.inspect(problem, text))
        correct = np.array([item["correct"] for item in seen], bool)
        parts = {
            "accuracy": correct.astype(np.float64),
            "format": np.array([item["format_ok"] for item in seen], np.float64),
        }
        weights = {"accuracy": 1.0, "format": self.rl.format_weight}
        add_overlong(parts, weights, lengths, self.rl)
        if seen and "language" in seen[0]:
            parts["language"] = np.array([item["language"] for item in seen], np.float64)
            weights["language"] = self.rl.language_weight
        quality = summary(seen)
        del quality["steps"]
        return Scores(parts, weights, correct, quality)


@dataclasses.dataclass(frozen=True)
class JudgeScorer:
    """Scores by rewards in processes of their own, beside a task's verifier if there is one.

    A reward that fails on an answer is worth 0 there and is counted. An answer is correct if its
    part "accuracy" is 1; without that part nobody knows. With several processes the first one
    judges for all.
    """

    judge: Judge
    weights: dict[str, float]
    """Of the judge's parts, by name."""
    rl: RLConfig
    own: TaskScorer | None = None

    def __call__(
        self, problems: Sequence[Problem], texts: Sequence[str], lengths: np.ndarray,
        stop: Stop = never,
    ) -> Scores:  # fmt: skip
        """Scores of the answers; never raises because of a text or of a reward. See `Scorer`."""
        values, failures, messages = self._judge_once(problems, texts, stop)
        parts = {name: values[i] for i, name in enumerate(self.weights)}
        if self.own is not None:
            known = self.own(problems, texts, lengths, stop)
            return dataclasses.replace(
                known, parts=known.parts | parts, weights=known.weights | self.weights,
                failures=failures, messages=messages,
            )  # fmt: skip
        weights = dict(self.weights)
        add_overlong(parts, weights, lengths, self.rl)
        right = parts["accuracy"] == 1 if "accuracy" in parts else None
        quality = {} if right is None else {"accuracy": float(right.mean())}
        if "format" in parts:
            quality["format"] = float(parts["format"].mean())
        return Scores(parts, weights, right, quality, failures, messages)

    def _judge_once(self, problems: Sequence[Problem], texts: Sequence[str], stop: Stop):
        """Values [rewards, A] on every process; failures and messages on the first."""
        values, failures, messages = np.zeros((len(self.weights), len(texts))), {}, {}
        if jax.process_index() == 0:
            judged = self.judge.score(problems, texts, stop)
            values = np.stack([judged.parts[name] for name in self.weights])
            failures, messages = judged.failures, judged.examples
        if jax.process_count() > 1:
            values = np.asarray(multihost_utils.broadcast_one_to_all(values.astype(np.float32)))
        return values.astype(np.float64), failures, messages


def judge_scorer(rl: RLConfig, task: Task | None) -> JudgeScorer:
    """Starts the workers; ValueError, before any of them runs, for a reward that cannot be loaded
    or that an option of the run gives a second time.

    Close `judge` when done.
    """
    asked = rewards_of(rl) or [("accuracy", 1.0)]
    chosen = [named(function, weight, rl.reward_timeout) for function, weight in asked]
    _check_names(rl, {one.name: one.function for one in chosen}, task)
    if rl.format_weight and task is None:
        chosen.append(named("format", rl.format_weight, rl.reward_timeout))
    own = None if task is None else TaskScorer(task, rl)
    if own and (taken := {"accuracy", "format", "language"} & {one.name for one in chosen}):
        raise ValueError(
            f"rl.rewards names {', '.join(sorted(taken))}, which task {task and task.name} judges "
            "itself; weigh that by rl.format_weight and rl.language_weight, and name others here"
        )
    if rl.template == "r1_zero":
        tags = {"answer_tags": True}
        chosen = [
            dataclasses.replace(one, options=tags) if one.function == "format" else one
            for one in chosen
        ]
    limits = dataclasses.asdict(rl.code) | {"unsafe": rl.unsafe_code}
    seconds = max(rl.reward_timeout, rl.code.total_seconds + CODE_MARGIN)
    chosen = [
        dataclasses.replace(one, options=limits, seconds=seconds) if one.function in CODE else one
        for one in chosen
    ]
    longest = rl.code.total_seconds / CodeLimits.total_seconds
    patience = max(1.0, rl.reward_timeout / RLConfig.reward_timeout, longest)
    judge = Judge(chosen, Pool(batch_seconds=Pool.batch_seconds * patience))
    return JudgeScorer(judge, {one.name: one.weight for one in chosen}, rl, own)


def _check_names(rl: RLConfig, functions: dict[str, str], task: Task | None) -> None:
    # A reward named twice would be left out or replaced, and the run would not say so.
    if rl.format_weight and task is None and "format" in functions:
        raise ValueError(
            f"rl.rewards names {functions['format']} and rl.format_weight={rl.format_weight} adds "
            "format too; give its weight in rl.rewards alone, as format=WEIGHT, or name your "
            "function otherwise"
        )
    if rl.overlong_buffer and "overlong" in functions:
        raise ValueError(
            f"rl.rewards names {functions['overlong']} and rl.overlong_buffer={rl.overlong_buffer} "
            "adds a reward overlong too; name your function otherwise, or set rl.overlong_buffer 0"
        )


def add_overlong(
    parts: dict[str, np.ndarray], weights: dict[str, float], lengths: np.ndarray, rl: RLConfig
) -> None:
    """Adds the part that punishes answers near the length limit, if the run has one."""
    if rl.overlong_buffer:
        parts["overlong"] = soft_overlong(lengths, rl.max_new_tokens, rl.overlong_buffer)
        weights["overlong"] = 1.0


def soft_overlong(lengths_A: np.ndarray, max_tokens: int, buffer: int) -> np.ndarray:
    """DAPO's soft over-long punishment (DAPO, eq. 13), float64 [A], -1..0.

    lengths_A: of the answers in tokens, the end token included. 0 up to max_tokens - buffer, then
    falling by 1/buffer per token, -1 beyond max_tokens. ValueError unless
    0 < buffer <= max_tokens.
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(
            f"buffer is {buffer} and max_tokens is {max_tokens}; give a buffer of 1 to max_tokens "
            "tokens"
        )
    over_A = np.asarray(lengths_A, np.float64) - (max_tokens - buffer)
    return -np.clip(over_A / buffer, 0.0, 1.0)
