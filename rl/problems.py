"""Problems, each a prompt with the facts that its verifier needs, and the share held out."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from data.split import is_held_out, unit_hash

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

    Where the hash would hold out none, the problem of the lowest hash is held out; where it would
    hold out all, that of the highest is not; with all that share its key. Raises ValueError if
    share > 0 and there are no two problems.
    """
    problems = list(problems)
    sides = {problem.key: held_out(problem, share) for problem in problems}
    if share > 0 and len(set(sides.values())) < 2:
        if len(sides) < 2:
            raise ValueError(
                f"{len(problems)} prompts about {len(sides)} problem cannot be split; add prompts "
                "about others, or give --rl.held-out 0 to go without evaluation"
            )
        by_hash = sorted(sides, key=lambda key: unit_hash(key, "held-out"))
        kept = set(by_hash[:-1] if all(sides.values()) else by_hash[:1])
        sides = {key: key in kept for key in sides}
    train = [problem for problem in problems if not sides[problem.key]]
    return train, [problem for problem in problems if sides[problem.key]]
