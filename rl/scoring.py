"""What an answer is worth: its rewards by part, and what people want to see beside them.

Letters: A answers.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from rl.config import RLConfig
from rl.length import soft_overlong
from rl.records import Record
from rl.tasks.task import Task, summary


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of the answers of a rollout."""

    parts: dict[str, np.ndarray]
    """Rewards by name, float64 [A]; NaN where an answer cannot be scored."""
    weights: dict[str, float]
    """Weight of each part in the reward; parts of weight 0 are only watched."""
    correct: np.ndarray
    """bool [A]."""
    quality: dict[str, float]
    """accuracy, format, step_accuracy (`rl/tasks/task.py:summary`), or fewer of these."""

    @property
    def rewards(self) -> np.ndarray:
        """Weighted sum, float64 [A]."""
        return sum(
            (self.weights[name] * part for name, part in self.parts.items() if self.weights[name]),
            np.zeros(len(self.correct)),
        )


Scorer = Callable[[Sequence[Record], Sequence[str], np.ndarray], Scores]
"""`scorer(records, texts, lengths)`: a record, a text and its length in tokens per answer. What
scores answers by other rules, in processes of its own say, has this form too."""


@dataclasses.dataclass(frozen=True)
class TaskScorer:
    """Scores by the task's own verifier."""

    task: Task
    rl: RLConfig

    def __call__(
        self, records: Sequence[Record], texts: Sequence[str], lengths: np.ndarray
    ) -> Scores:
        """Scores of the answers; never raises because of a text."""
        seen = [self.task.inspect(r, text) for r, text in zip(records, texts, strict=True)]
        correct = np.array([item["correct"] for item in seen], bool)
        parts = {
            "accuracy": correct.astype(np.float64),
            "format": np.array([item["format_ok"] for item in seen], np.float64),
        }
        weights = {"accuracy": 1.0, "format": self.rl.format_weight}
        if self.rl.overlong_buffer:
            limit, buffer = self.rl.max_new_tokens, self.rl.overlong_buffer
            parts["overlong"] = soft_overlong(lengths, limit, buffer)
            weights["overlong"] = 1.0
        if seen and "language" in seen[0]:
            parts["language"] = np.array([item["language"] for item in seen], np.float64)
            weights["language"] = self.rl.language_weight
        quality = summary(seen)
        del quality["steps"]
        return Scores(parts, weights, correct, quality)
