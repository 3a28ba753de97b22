"""Tasks with a verifier: prompts, demonstrations for a base corpus, a score.

A task is a frozen dataclass of its options; prompts and demonstrations are functions of a random
generator or of (seed, index). Texts are short and in few characters, so that a model of a million
weights can learn them. A text ends with END in the corpus; a tokenizer's own end may take its
place.
"""

import abc
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from rl.problems import Problem, held_out

END = "\n"
"""End of a text."""

Side = Literal["train", "held_out"]
Inspection = dict[str, Any]
"""correct (bool), format_ok (bool), steps and steps_right (int): steps of reasoning written, and
those that are right given what stands before them. Tasks add entries of their own."""

MAX_DRAWS = 10_000
"""Draws before a side of the split is called empty."""
_STREAMS = {"train": 0, "held_out": 1, "corpus": 2}


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """Prompts whose answers a program can check."""

    name: ClassVar[str]

    held_out: float = dataclasses.field(default=0.1, kw_only=True)
    """Share of the problems that are for evaluation only: no training prompt, no corpus line."""

    def __post_init__(self):
        check_number(self, "held_out", 0, 0.9)

    @property
    @abc.abstractmethod
    def vocabulary(self) -> tuple[str, ...]:
        """Characters of prompts and demonstrations (a tag is one entry), END last; no entry
        twice."""

    @abc.abstractmethod
    def sample_prompt(self, rng: np.random.Generator) -> Problem:
        """A problem drawn at random, of either side of the split."""

    @abc.abstractmethod
    def demonstrate(self, problem: Problem, rng: np.random.Generator) -> str:
        """Answer of the base corpus to the prompt, without END; it may be wrong."""

    @abc.abstractmethod
    def inspect(self, problem: Problem, text: str) -> Inspection:
        """Findings on an answer. Takes any text: never raises, in time at most proportional to the
        text."""

    def verify(self, problem: Problem, text: str) -> float:
        """1.0 if the answer in `text` is right, otherwise 0.0."""
        return float(self.inspect(problem, text)["correct"])

    def draw(self, rng: np.random.Generator, side: Side = "train") -> Problem:
        """A problem of one side of the split; ValueError if that side seems to be empty."""
        for _ in range(MAX_DRAWS):
            problem = self.sample_prompt(rng)
            if held_out(problem, self.held_out) == (side == "held_out"):
                return problem
        raise ValueError(
            f"task {self.name}: none of {MAX_DRAWS} prompts drawn is on the side {side!r} with "
            f"held_out={self.held_out}; raise or lower that, or make the problems larger"
        )

    def prompt(self, seed: int, index: int, side: Side = "train") -> Problem:
        """Prompt number `index` of an endless list; a function of its arguments alone."""
        return self.draw(np.random.default_rng((seed, _STREAMS[side], index)), side)

    def distinct_prompts(self, seed: int, count: int, side: Side = "held_out") -> list[Problem]:
        """`count` prompts, no problem twice; ValueError if the task does not have so many."""
        found: dict[str, Problem] = {}
        for index in range(20 * count + 100):
            if len(found) == count:
                break
            problem = self.prompt(seed, index, side)
            found.setdefault(problem.key, problem)
        if len(found) < count:
            raise ValueError(
                f"task {self.name} has about {len(found)} different problems on the side {side!r}, "
                f"not {count}; ask for fewer, or make the problems larger"
            )
        return list(found.values())

    def corpus(self, seed: int, start: int = 0, end: str = END) -> Iterator[str]:
        """Documents `start`, `start` + 1, ... of an endless corpus: a training prompt, a
        demonstration, the end; each depends on its number and the seed alone."""
        for index in itertools.count(start):
            rng = np.random.default_rng((seed, _STREAMS["corpus"], index))
            problem = self.draw(rng)
            assert isinstance(problem.prompt, str)
            yield problem.prompt + self.demonstrate(problem, rng) + end


def answer_text(text: str) -> str:
    """The answer without the END that closes it."""
    return text.removesuffix(END)


def summary(inspections: Sequence[Inspection]) -> dict[str, float]:
    """accuracy, format (shares of the texts), step_accuracy (share of the steps written that are
    right; nan where none is written) and steps (per text).

    They belong together: length may rise while accuracy and steps fall, which is no learning.
    """
    if not inspections:
        raise ValueError("a summary needs at least one inspected answer, got none")
    steps = sum(item["steps"] for item in inspections)
    right = sum(item["steps_right"] for item in inspections)
    count = len(inspections)
    return {
        "accuracy": sum(item["correct"] for item in inspections) / count,
        "format": sum(item["format_ok"] for item in inspections) / count,
        "step_accuracy": right / steps if steps else float("nan"),
        "steps": steps / count,
    }


def check_number(task: Task, field: str, least: float, most: float) -> None:
    """Raises ValueError unless the option lies in least..most (nan does not)."""
    value = getattr(task, field)
    if not least <= value <= most:
        raise ValueError(f"task {task.name}: {field}={value}; give a number in {least}..{most}")
