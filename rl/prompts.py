"""Prompts of a run as a function of (seed, rollout), encoded and measured, and answers decoded."""

import abc
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.randomness import DOCUMENT_ORDER, random_permutation
from data.tokenizer import NoTokenError, Tokenizer
from generation.chat import encode_chat, opens_thought
from rl.config import RLConfig
from rl.jsonl import MAX_SHOWN
from rl.problems import Problem, Prompt, split_problems
from rl.prompt_files import read_prompts
from rl.tasks.task import Task
from rl.verdict.rules import check_problem, check_tests

SAMPLE, EVALUATE, EVALUATE_GREEDY, TRACES = range(4)
"""Purposes of sampler seeds."""
MEASURED = 1000
"""Prompts of a task that are measured before a run begins."""
_SHOWN = 60
"""Characters of a prompt in a message."""


class Questions(NamedTuple):
    """Prompts with their token ids, int32 [n] each."""

    problems: list[Problem]
    ids: list[np.ndarray]


class Prompts(abc.ABC):
    """Source of prompts, with the tokenizer of prompts and answers."""

    tokenizer: Tokenizer
    seed: int

    @abc.abstractmethod
    def rollout(self, number: int, count: int) -> Questions:
        """Prompts of rollout `number`, a function of that and the seed alone."""

    @abc.abstractmethod
    def held_out(self, count: int) -> Questions:
        """At most `count` distinct problems that no training prompt is about."""

    @abc.abstractmethod
    def to_measure(self, train: int, held_out: int) -> tuple[list[Problem], list[Problem]]:
        """Prompts to train on and prompts held out whose lengths stand for those of a whole run:
        the first `train`, and `held_out` of those for evaluation."""

    def texts(self, answers: Sequence[np.ndarray]) -> list[str]:
        """Texts of answers, without the end token."""
        return [self.tokenizer.decode(ids, skip_special=True) for ids in answers]

    def _questions(self, problems: list[Problem]) -> Questions:
        return Questions(problems, [encode_prompt(self.tokenizer, problem) for problem in problems])


@dataclasses.dataclass(frozen=True)
class FilePrompts(Prompts):
    """Prompts of a file (`rl/prompt_files.py`), each once per epoch in an order of the epoch's
    own."""

    train: Sequence[Problem]
    kept: Sequence[Problem]
    """For evaluation only."""
    tokenizer: Tokenizer
    seed: int

    def rollout(self, number: int, count: int) -> Questions:
        """Prompts number * count onwards of the endless sequence of epochs."""
        places = [divmod(number * count + i, len(self.train)) for i in range(count)]
        orders = {epoch: self._order(epoch) for epoch, _ in places}
        return self._questions([self.train[int(orders[epoch][at])] for epoch, at in places])

    def held_out(self, count: int) -> Questions:
        """The first `count` problems for evaluation, or all."""
        return self._questions(list(self.kept[:count]))

    def to_measure(self, train: int, held_out: int) -> tuple[list[Problem], list[Problem]]:
        """The whole file, however much of it the run asks."""
        return list(self.train), list(self.kept)

    def _order(self, epoch: int) -> np.ndarray:
        return random_permutation(self.seed, DOCUMENT_ORDER, epoch, len(self.train))


@dataclasses.dataclass(frozen=True)
class TaskPrompts(Prompts):
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
        if not self.task.held_out:
            return self._questions([])
        return self._questions(self.task.distinct_prompts(self.seed, count))

    def to_measure(self, train: int, held_out: int) -> tuple[list[Problem], list[Problem]]:
        """MEASURED prompts to train on at most: a task's prompts are endless, and alike."""
        first = range(min(train, MEASURED))
        asked = [self.task.prompt(self.seed, index, "train") for index in first]
        kept = held_out if self.task.held_out else 0
        return asked, self.task.distinct_prompts(self.seed, kept)


ASK = (
    "The user asks and the assistant answers. It first thinks about the question between <think> "
    "and </think>, and then gives the result between <answer> and </answer>.\nUser: {}\nAssistant:"
)
"""A dialogue that asks for reasoning and says nothing about its content (R1 report, table 1)."""


def in_template(problem: Problem, template: str) -> Problem:
    """The problem with its text asked as `rl.template` says; conversations stay as they are."""
    if template == "plain" or not isinstance(problem.prompt, str):
        return problem
    asked: Prompt = ASK.format(problem.prompt)
    if template == "chat":
        asked = [{"role": "user", "content": problem.prompt}]
    return dataclasses.replace(problem, prompt=asked, name=problem.key)


def file_prompts(config: RLConfig, tokenizer: Tokenizer, seed: int) -> FilePrompts:
    """The prompts of the file `rl.prompts`.

    Raises ValueError that lists every line that cannot be used or judged, and for a split that
    leaves one side empty.
    """
    named = {name for name, _ in rewards_of(config)}
    judged = not named or "accuracy" in named

    def check(problem: Problem) -> None:
        if judged:
            check_problem(problem, config.code)
        if "code" in named:
            check_tests(problem, config.code)

    found = read_prompts(Path(config.prompts), need_answers=judged, check=check)
    problems = [in_template(problem, config.template) for problem in found]
    asked = next((p.prompt for p in problems if not isinstance(p.prompt, str)), None)
    if asked and tokenizer.conventions.template:
        thinks = opens_thought(tokenizer, asked)
        problems = [dataclasses.replace(problem, opened=thinks) for problem in problems]
    return FilePrompts(*split_problems(problems, config.held_out), tokenizer, seed)


def rewards_of(config: RLConfig) -> list[tuple[str, float]]:
    """(function, weight) of every reward that `rl.rewards` names. ValueError for a wrong weight."""
    found = []
    for text in config.rewards:
        name, sign, weight = text.partition("=")
        try:
            found.append((name, float(weight) if sign else 1.0))
        except ValueError:
            raise ValueError(f"rl.rewards: {text!r}; give NAME=WEIGHT, a number") from None
    return found


def judges_code(config: RLConfig, prompts: Prompts) -> bool:
    """Whether answers are programs that a reward runs: `code`, or accuracy of such problems."""
    names = {name for name, _ in rewards_of(config)}
    if "code" in names:
        return True
    if not isinstance(prompts, FilePrompts) or (names and "accuracy" not in names):
        return False
    return any(problem.task == "code" for problem in (*prompts.train, *prompts.kept))


def encode_prompt(tokenizer: Tokenizer, problem: Problem) -> np.ndarray:
    """Ids, int32 [n], of a text to continue, after the token that texts begin with; or of a
    conversation through the chat template, asked to think.

    Raises ValueError for a character that the tokenizer has no token for, and for a conversation
    if it lacks the template's tokens.
    """
    try:
        if isinstance(problem.prompt, str):
            return tokenizer.encode_prompt(problem.prompt)
        return encode_chat(tokenizer, problem.prompt, think=True)
    except NoTokenError as error:
        raise ValueError(
            f"prompt {shown(problem)} cannot be read: {error}. Change the prompt, or take another "
            "tokenizer"
        ) from None


def marks_in(prompts: Prompts) -> list[str]:
    """Names of marks in the texts of a file, which are letters there."""
    if not isinstance(prompts, FilePrompts):
        return []
    problems = (*prompts.train, *prompts.kept)
    return sorted({x for p in problems for x in prompts.tokenizer.marks_in(str(p.prompt))})


def shown(problem: Problem) -> str:
    """Name of the problem in messages: quoted, and cut where it is long."""
    return repr(problem.key if len(problem.key) <= _SHOWN else problem.key[:_SHOWN] + "..")


def sampler_seed(seed: int, purpose: int, number: int) -> int:
    """Seed of the draws of rollout or step `number`, 31 bits; no two uses share one."""
    words = np.random.SeedSequence((seed, purpose, number)).generate_state(1)
    return int(words[0]) & 0x7FFFFFFF


def misfits(
    tokenizer: Tokenizer, problems: Sequence[Problem], budget: int, rooms: dict[str, int]
) -> list[str]:
    """A line about every prompt that cannot be read, or not be answered in `budget` tokens.

    rooms: name of an option -> tokens of prompt and answer that it has room for.
    """
    wrong = []
    name, room = min(rooms.items(), key=lambda item: item[1])
    for problem in problems:
        try:
            count = len(encode_prompt(tokenizer, problem))
        except ValueError as error:
            wrong.append(str(error))
            continue
        if not count:
            wrong.append(f"prompt {shown(problem)} has no token")
        elif count + budget > room:
            wrong.append(
                f"prompt {shown(problem)} has {count} tokens, with rl.max_new_tokens={budget} "
                f"{count + budget}; {name} has room for {room}"
            )
    return wrong


def refuse(wrong: Sequence[str], count: int) -> None:
    """Raise ValueError with the lines `wrong` of `misfits`, if there is one, of `count` prompts."""
    if wrong:
        more = [f"and {len(wrong) - MAX_SHOWN} more"] if len(wrong) > MAX_SHOWN else []
        raise ValueError(
            f"{len(wrong)} of {count} prompts cannot be asked; lower --rl.max-new-tokens, give "
            "more room, or leave them out\n  " + "\n  ".join([*wrong[:MAX_SHOWN], *more])
        )
