"""Problems, each a prompt with the facts that its verifier needs, and the share held out."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from data.split import is_held_out

Prompt = str | list[dict[str, str]]
"""A text to continue, or the messages of a conversation."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt with the facts about its answer; `dataclasses.asdict` of it is JSON."""

    prompt: Prompt
    answer: dict[str, Any]
    """Facts that the verifier needs: numbers, texts and lists, as JSON has them."""
    task: str = ""
    """Name of the task, or of the reward that a file of prompts asks for."""
    name: str = ""
    """Name of the problem; '' takes the prompt itself. Two wordings of one problem share it."""
    opened: bool = True
    """Whether the chat template opens the answer to a conversation with <think>; a text says so
    itself."""

    @property
    def key(self) -> str:
        """Text whose hash decides the side of the split."""
        if self.name or isinstance(self.prompt, str):
            return self.name or str(self.prompt)
        return json.dumps(self.prompt, sort_keys=True)


def held_out(problem: Problem, share: float) -> bool:
    """Whether the problem is for evaluation only, by a hash of its key: no seed moves it, and no
    problem is on both sides. share: 0..1, share of problems."""
    return is_held_out(problem.key, share)


def split_problems(
    problems: Iterable[Problem], share: float
) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on and problems held out, both in the order given.

    Raises ValueError if nothing is left to train on, or if share > 0 holds out nothing.
    """
    train: list[Problem] = []
    kept: list[Problem] = []
    for problem in problems:
        (kept if held_out(problem, share) else train).append(problem)
    total = len(train) + len(kept)
    if not train:
        raise ValueError(
            f"all {total} prompts are held out (share {share}) and none is left to train on; "
            "lower the share or add prompts"
        )
    if share > 0 and not kept:
        raise ValueError(
            f"none of {total} prompts is held out (share {share} keeps about {share * total:.1f}); "
            "raise the share, add prompts, or give 0 to go without evaluation"
        )
    return train, kept
