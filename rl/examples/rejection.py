"""Rejection sampling: the choice of sampled answers to train on (R1 report, 2.3.3).

R1 samples several answers to every prompt, keeps the correct ones, and leaves out chains of thought
that mix languages, are too long or hard to read. Answers left out are counted by their reason.

Letters: A answers, prompt after prompt.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rl.evaluate import lengths
from rl.problems import Problem
from rl.prompts import TRACES, Questions, TaskPrompts, sampler_seed
from rl.rollout import Rollout, Sampler
from rl.stopping import Stop, never
from rl.verdict.scoring import Scorer, Scores

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

    @property
    def digest(self) -> str:
        """Digest of problem and text; blanks around a text make no difference."""
        content = f"{len(self.problem.key)}:{self.problem.key}{self.text.strip()}".encode()
        return hashlib.blake2b(content, digest_size=16).hexdigest()


class Round(NamedTuple):
    """Answers of one round of sampling."""

    attempts: Sequence[Attempt]
    seed: int
    """Seed of the draws."""
    step: int
    """Step of the policy."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Limits on the correct answers that are kept."""

    per_prompt: int = 4
    """Most answers to one problem; the first ones are kept. 0: all."""
    max_tokens: int = 0
    """Longest answer, its end token included; 0: any."""


@dataclasses.dataclass
class Kept:
    """Answers kept in earlier rounds; `select` adds to them."""

    digests: set[str] = dataclasses.field(default_factory=set)
    per_problem: Counter[str] = dataclasses.field(default_factory=Counter)

    def add(self, key: str, digest: str) -> None:
        """Count an answer to the problem `key`."""
        self.digests.add(digest)
        self.per_problem[key] += 1


def attempts(
    questions: Questions, rollout: Rollout, texts: Sequence[str], scores: Scores
) -> list[Attempt]:
    """The answers of a rollout with their scores, in its order."""
    count = len(rollout.tokens)
    assert count % len(questions.ids) == 0, (count, len(questions.ids))
    group = count // len(questions.ids)
    rewards_A = scores.rewards
    assert scores.correct is not None
    return [
        Attempt(
            problem=questions.problems[a // group],
            prompt=questions.ids[a // group],
            answer=rollout.tokens[a],
            text=texts[a],
            correct=bool(scores.correct[a]),
            reward=float(rewards_A[a]),
        )
        for a in range(count)
    ]


def sampled_round(
    number: int,
    prompts: TaskPrompts,
    sampler: Sampler,
    scorer: Scorer,
    *,
    count: int,
    group_size: int,
    step: int,
    stop: Stop = never,
) -> Round:
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
    return Round(attempts(questions, rollout, texts, scores), seed, step)


def select(
    found: Sequence[Attempt],
    selection: Selection,
    filters: Mapping[str, Filter],
    end_ids: Sequence[int],
    kept: Kept,
) -> tuple[list[Attempt], Counter[str]]:
    """The answers to train on, in their order, and the number of answers by fate.

    Fates, each answer having the first that fits: wrong; unfinished (its last token is none of
    end_ids); long; the name of the filter that it fails; repeated (the text of an earlier one);
    surplus (beyond per_prompt); kept. `kept` holds the answers of earlier rounds, and takes these
    too.
    """
    fates: Counter[str] = Counter()
    chosen = []
    for attempt in found:
        fate = _fate(attempt, selection, filters, end_ids, kept)
        fates[fate] += 1
        if fate == "kept":
            kept.add(attempt.problem.key, attempt.digest)
            chosen.append(attempt)
    return chosen, fates


def _fate(
    attempt: Attempt,
    selection: Selection,
    filters: Mapping[str, Filter],
    end_ids: Sequence[int],
    kept: Kept,
) -> str:
    if not attempt.correct:
        return "wrong"
    if not len(attempt.answer) or attempt.answer[-1] not in end_ids:
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
