"""Prompts of a run as a function of (seed, rollout), and texts to tokens and back."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.tokenizer import Tokenizer
from generation.prompts import encode_chat
from rl.records import Record
from rl.tasks.task import Side, Task

SAMPLE, EVALUATE, EVALUATE_GREEDY, TRACES = range(4)
"""Purposes of sampler seeds."""


class Questions(NamedTuple):
    """Prompts with their token ids, int32 [n] each."""

    records: list[Record]
    ids: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class TaskPrompts:
    """Prompts of a task: an endless list to train on, and distinct problems held out."""

    task: Task
    tokenizer: Tokenizer
    seed: int

    def rollout(self, number: int, count: int) -> Questions:
        """Prompts of rollout `number`, a function of that and the seed alone."""
        first = number * count
        return self._questions(
            [self.task.prompt(self.seed, first + i, "train") for i in range(count)]
        )

    def held_out(self, count: int) -> Questions:
        """`count` distinct problems that no training prompt is about."""
        side: Side = "held_out"
        return self._questions(self.task.distinct_prompts(self.seed, count, side))

    def _questions(self, records: list[Record]) -> Questions:
        return Questions(records, [encode_prompt(self.tokenizer, record) for record in records])

    def texts(self, answers: Sequence[np.ndarray]) -> list[str]:
        """Texts of answers, without the end token."""
        return [self.tokenizer.decode(ids, skip_special=True) for ids in answers]


def encode_prompt(tokenizer: Tokenizer, record: Record) -> np.ndarray:
    """Ids of a text to continue as they are; a conversation through the chat template."""
    if isinstance(record.prompt, str):
        return tokenizer.encode(record.prompt)
    return encode_chat(tokenizer, record.prompt, think=True)


def sampler_seed(seed: int, purpose: int, number: int) -> int:
    """Seed of the draws of rollout or step `number`, 31 bits; no two uses share one."""
    words = np.random.SeedSequence((seed, purpose, number)).generate_state(1)
    return int(words[0]) & 0x7FFFFFFF
