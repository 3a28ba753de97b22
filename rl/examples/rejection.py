"""Rejection sampling: which of many sampled answers become training data (R1 report, 2.3.3).

R1 samples several answers to every prompt, keeps the correct ones, and leaves out chains of thought
that mix languages, are too long or hard to read. What is left out is counted by its reason.

Letters: A answers, prompt after prompt.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data.tokenizer import Tokenizer
from rl.evaluate import lengths
from rl.examples.conversations import encode_conversation, encode_pair
from rl.problems import Problem
from rl.prompts import TRACES, Questions, TaskPrompts, sampler_seed
from rl.rollout import Rollout, Sampler
from rl.stopping import Stop, never
from rl.verdict import rules as rewards
from rl.verdict.answers import OPEN
from rl.verdict.scoring import Scorer

Filter = Callable[[Problem, str], bool]
"""(problem, text of the answer) -> whether to keep it."""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One answer to one prompt, and the verifier's word on it."""

    problem: Problem
    prompt: np.ndarray
    """Token ids of the prompt, int32 [n]."""
    answer: np.ndarray
    """Token ids of the answer, its end token included, int32 [n]."""
    text: str
    """The answer without its end token."""
    correct: bool
    reward: float
    opened: bool = False
    """The prompt ends with <think> and a line break, as the chat template opens an answer."""

    @property
    def digest(self) -> str:
        """Equal for two answers to one problem whose texts are the same but for blanks around."""
        return digest(self.problem.key, self.text)


class Round(NamedTuple):
    """Answers of one round of sampling."""

    attempts: Sequence[Attempt]
    seed: int
    """Of the draws."""
    step: int
    """Of the policy."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which correct answers are kept."""

    per_prompt: int = 4
    """Most answers to one problem; the first ones are kept. 0: all."""
    max_tokens: int = 0
    """Longest answer, its end token included; 0: any."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(
                    f"selection: {field.name} is {getattr(self, field.name)}; give 0 or more"
                )


@dataclasses.dataclass
class Kept:
    """What earlier rounds have kept; `select` adds to it."""

    digests: set[str] = dataclasses.field(default_factory=set)
    per_problem: Counter[str] = dataclasses.field(default_factory=Counter)

    def add(self, key: str, of_answer: str) -> None:
        """Count an answer to the problem `key`."""
        self.digests.add(of_answer)
        self.per_problem[key] += 1


def digest(key: str, text: str) -> str:
    """What decides whether two answers are one: problem and text, blanks around left out."""
    content = f"{len(key)}:{key}{text.strip()}".encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def attempts(
    questions: Questions, rollout: Rollout, texts: Sequence[str], correct_A: np.ndarray,
    rewards_A: np.ndarray,
) -> list[Attempt]:  # fmt: skip
    """The answers of a rollout with their scores, in its order."""
    count = len(rollout.tokens)
    assert count % len(questions.ids) == 0, (count, len(questions.ids))
    group = count // len(questions.ids)
    return [
        Attempt(
            questions.problems[a // group], questions.ids[a // group], rollout.tokens[a], texts[a],
            bool(correct_A[a]), float(rewards_A[a]),
            opened=not isinstance(questions.problems[a // group].prompt, str),
        )
        for a in range(count)
    ]  # fmt: skip


def sampled_round(
    number: int, prompts: TaskPrompts, sampler: Sampler, scorer: Scorer, *,
    count: int, group_size: int, step: int, stop: Stop = never,
) -> Round:  # fmt: skip
    """Answers of a policy (or of a server) to training prompts, `group_size` to each of `count`.

    A function of the number, the prompts' seed and the policy, whose step is only noted.
    RolloutStoppedError soon after `stop()` says true.
    """
    questions = prompts.rollout(number, count)
    seed = sampler_seed(prompts.seed, TRACES, number)
    rollout = sampler(questions.ids, group_size, seed, stop)
    texts = prompts.texts(rollout.tokens)
    problems = [problem for problem in questions.problems for _ in range(group_size)]
    scores = scorer(problems, texts, lengths(rollout), stop)
    found = attempts(questions, rollout, texts, scores.correct, scores.rewards)
    return Round(found, seed, step)


def attempt_of_text(
    tokenizer: Tokenizer, problem: Problem, text: str, correct: bool, reward: float
) -> Attempt:
    """An answer that only exists as text: a demonstration's, or of a teacher with other tokens.

    To a conversation, the text is the whole answer, `<think>` and what follows it included.
    ValueError for an empty answer, and for reasoning that does not end.
    """
    if isinstance(problem.prompt, str):
        example = encode_pair(tokenizer, problem.prompt, text)
    else:
        answer = {"role": "assistant", "content": text}
        example = encode_conversation(tokenizer, [*problem.prompt, answer])[-1]
    start = len(example.ids) - int(np.argmin(example.learned[::-1]))  # where the last turn begins
    return Attempt(problem, example.ids[:start], example.ids[start:], text, correct, reward)


def select(
    found: Sequence[Attempt], selection: Selection, filters: Mapping[str, Filter], eos_id: int,
    kept: Kept,
) -> tuple[list[Attempt], Counter[str]]:  # fmt: skip
    """The answers to train on, in their order, and how many there are by fate.

    Fates, each answer having the first that fits: wrong; unfinished (does not end with eos_id);
    long; the name of the filter that it fails; repeated (the text of an earlier one); surplus
    (beyond per_prompt); kept. Reads what earlier rounds have kept in `kept`, and adds to it.
    """
    fates: Counter[str] = Counter()
    chosen = []
    for attempt in found:
        fate = _fate(attempt, selection, filters, eos_id, kept)
        fates[fate] += 1
        if fate == "kept":
            kept.add(attempt.problem.key, attempt.digest)
            chosen.append(attempt)
    return chosen, fates


def _fate(
    attempt: Attempt, selection: Selection, filters: Mapping[str, Filter], eos_id: int, kept: Kept
) -> str:
    if not attempt.correct:
        return "wrong"
    if not len(attempt.answer) or attempt.answer[-1] != eos_id:
        return "unfinished"
    if selection.max_tokens and len(attempt.answer) > selection.max_tokens:
        return "long"
    for name, keep in filters.items():
        if not keep(attempt.problem, attempt.text):
            return name
    if attempt.digest in kept.digests:
        return "repeated"
    if selection.per_prompt and kept.per_problem[attempt.problem.key] >= selection.per_prompt:
        return "surplus"
    return "kept"


def well_formed(problem: Problem, text: str) -> bool:
    """Filter: `<think>reasoning</think>answer`, or the same after a prompt that opened it.

    An answer to a conversation may be whole, as demonstrations are (see `attempt_of_text`).
    """
    if not isinstance(problem.prompt, str):
        text = text.lstrip().removeprefix(OPEN)
    return rewards.format(problem, text) == 1.0


def in_language(share: float = 1.0) -> Filter:
    """Filter: at least this share of the chain of thought's words is in the problem's language."""
    if not 0 <= share <= 1:
        raise ValueError(f"a share of words in the language of {share}; give a number in 0..1")
    return lambda problem, text: rewards.language(problem, text) >= share
