"""Sums, differences and products of long numbers, at once or as done on paper.

Prompt `347+582:`; answer `>929`, with or without the work before it. Sums and differences go column
by column from the right: `7+2+0=09` adds two digits and what is carried, and writes what to carry
on and the digit; `4-8-0=16` borrows one. Products add up one row per digit: `47*2=94,47*80=3760,
94+3760=3854`.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from rl.problems import Problem
from rl.tasks.task import END, Inspection, Task, answer_text, check_number

_STEP = re.compile(r"[0-9]{1,40}(?:[-+*][0-9]{1,40}){1,2}=[0-9]{1,40}")
_MAX_STEP = 200


@dataclasses.dataclass(frozen=True)
class Arithmetic(Task):
    """Options of the problems and of their demonstrations."""

    name: ClassVar[str] = "arithmetic"

    digits: int = 3
    """Numbers are drawn below 10**n, n evenly from 1..digits."""
    signs: str = "+-*"
    """Operations to draw from. Differences are never negative."""
    share_of_chains: float = 0.3
    """Share of the demonstrations that write the work."""
    noise: float = 0.06
    """Chance that a step of a demonstration has a wrong last digit; the work goes on with it."""

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "digits", 1, 15)
        check_number(self, "share_of_chains", 0, 1)
        check_number(self, "noise", 0, 1)
        if not self.signs or not {*self.signs} <= {*"+-*"} or len({*self.signs}) < len(self.signs):
            raise ValueError(
                f"task {self.name}: signs={self.signs!r}; give each of + - * at most once, one at "
                "least"
            )

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return (*"0123456789+-*=,:>", END)

    def sample_prompt(self, rng: np.random.Generator) -> Problem:
        sign = self.signs[rng.integers(len(self.signs))]
        a, b = (int(rng.integers(10 ** int(rng.integers(1, self.digits + 1)))) for _ in "ab")
        if sign == "-":
            a, b = max(a, b), min(a, b)
        value = {"+": a + b, "-": a - b, "*": a * b}[sign]
        answer = {"a": a, "sign": sign, "b": b, "value": value}
        low, high = sorted((a, b))
        return Problem(f"{a}{sign}{b}:", answer, self.name, f"{low}{sign}{high}")

    def demonstrate(self, problem: Problem, rng: np.random.Generator) -> str:
        if rng.random() >= self.share_of_chains:
            return f">{problem.answer['value']}"
        written: list[str] = []
        while (step := next_step(problem, written)) is not None:
            if rng.random() < self.noise:
                step = step[:-1] + str((int(step[-1]) + int(rng.integers(1, 10))) % 10)
            written.append(step)
        return f"{','.join(written)}>{conclusion(problem, written)}"

    def inspect(self, problem: Problem, text: str) -> Inspection:
        body, sign, last = answer_text(text).partition(">")
        parts = body.split(",") if body else []
        steps = []
        for part in parts:
            if len(part) > _MAX_STEP or not _STEP.fullmatch(part):
                break
            steps.append(part)
        asked = step_count(problem)
        right = sum(step == next_step(problem, steps[:i]) for i, step in enumerate(steps[:asked]))
        ended = bool(sign) and re.fullmatch(r"[0-9]{1,40}", last) is not None
        return {
            "correct": bool(sign) and last == str(problem.answer["value"]),
            "format_ok": ended and (not body or len(steps) == len(parts) == asked),
            "steps": len(parts),
            "steps_right": right,
        }


def step_count(problem: Problem) -> int:
    """Steps that the work on paper takes."""
    a, b = problem.answer["a"], problem.answer["b"]
    if problem.answer["sign"] == "*":
        return 2 * len(str(b)) - 1
    return max(len(str(a)), len(str(b)))


def next_step(problem: Problem, written: Sequence[str]) -> str | None:
    """The step that rightly follows the steps written (right or wrong), None after the last.

    written: steps of the form `..=number`, at most step_count(problem).
    """
    done = len(written)
    if done == step_count(problem):
        return None
    a, sign, b = problem.answer["a"], problem.answer["sign"], problem.answer["b"]
    if sign == "*":
        return _next_row(a, str(b), [_result(step) for step in written])
    carry = _result(written[-1]) // 10 if written else 0
    p, q = a // 10**done % 10, b // 10**done % 10
    value = p + q + carry if sign == "+" else p - q - carry
    now = value if value >= 0 else value + 20  # 1 to borrow, then the digit
    return f"{p}{sign}{q}{sign}{carry}={now:02}"


def _next_row(a: int, b: str, results: list[int]) -> str:
    done = len(results)
    if done % 2 == 0 and done > 0:  # after a row: add it
        total, row = results[-2], results[-1]
        return f"{total}+{row}={total + row}"
    place = (done + 1) // 2
    factor = int(b[-1 - place]) * 10**place
    return f"{a}*{factor}={a * factor}"


def conclusion(problem: Problem, written: Sequence[str]) -> int:
    """The answer that all the steps written (right or wrong) amount to."""
    results = [_result(step) for step in written]
    if problem.answer["sign"] == "*":
        return results[-1]
    digits = sum(result % 10 * 10**place for place, result in enumerate(results))
    return digits + results[-1] // 10 * 10 ** len(results) * (problem.answer["sign"] == "+")


def _result(step: str) -> int:
    return int(step.rpartition("=")[2])
