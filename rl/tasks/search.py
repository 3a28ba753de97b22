"""Trial and error: find three of five digits with a given sum, in at most eight tries.

Prompt `30791,13:` (digits, target). A text proposes digits, writes their sum, checks it (y or n),
and tries again or answers: `071=08n391=13y>391`; `>-` gives up. The base corpus gives up early, so
RL can find patience: more tries. It also finds a checker that errs, and makes it worse: read the
census of failures together with the accuracy.

With `pick=0` any two or more of the digits may be summed: subset sum.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from rl.problems import Problem
from rl.tasks.task import END, Inspection, Task, answer_text, check_number

FAILURES = ("gave_up", "wrong_check", "wrong_sum", "wrong_answer", "budget", "format")
"""Ways to fail: gave up with tries left; checked a wrong sum as right; wrote a wrong sum that hits
the target; answered what no check had accepted; used up the tries or was cut off; not readable."""

_TRY = re.compile(r"([0-9]{1,10})=([0-9]{2})([yn])")


class _Try(NamedTuple):
    digits: str
    written: int  # the sum as written
    accepted: bool  # y


@dataclasses.dataclass(frozen=True)
class Search(Task):
    """Options; the defaults are the base whose verifier is strong."""

    name: ClassVar[str] = "search"

    digits: int = 5
    """Digits in a prompt, all different."""
    pick: int = 3
    """Digits to be summed; 0 lets any two or more be summed."""
    tries: int = 8
    """Tries that an answer may take; one that takes more counts as failed."""
    sum_right: float = 0.992
    """Share of the sums in the corpus that are right; others are off by one or two."""
    check_right: float = 0.966
    """Share of the checks in the corpus that agree with the sum as written."""
    hit_early: float = 0.3
    """Share of the demonstrations whose first try is a solution; others try at random."""
    give_up: float = 0.35
    """Chance that a demonstration gives up after a miss."""

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "digits", 3, 10)
        check_number(self, "tries", 1, 99)
        if self.pick:
            check_number(self, "pick", 2, self.digits - 1)
        for field in ("sum_right", "check_right", "hit_early", "give_up"):
            check_number(self, field, 0, 1)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return (*"0123456789", ",", ":", "=", "y", "n", ">", "-", END)

    @property
    def _sizes(self) -> range:
        return range(self.pick, self.pick + 1) if self.pick else range(2, self.digits + 1)

    def _choices(self, digits: str) -> list[str]:
        return ["".join(c) for n in self._sizes for c in itertools.combinations(digits, n)]

    def sample_prompt(self, rng: np.random.Generator) -> Problem:
        digits = "".join(map(str, rng.permutation(10)[: self.digits]))
        choices = self._choices(digits)
        target = digit_sum(choices[rng.integers(len(choices))])
        answer = {
            "digits": digits,
            "target": target,
            "solutions": [choice for choice in choices if digit_sum(choice) == target],
        }
        key = f"{''.join(sorted(digits))},{target}"
        return Problem(f"{digits},{target:02}:", answer, self.name, key)

    def demonstrate(self, problem: Problem, rng: np.random.Generator) -> str:
        choices, solutions = self._choices(problem.answer["digits"]), problem.answer["solutions"]
        order = [choices[i] for i in rng.permutation(len(choices))]
        if rng.random() < self.hit_early:
            first = solutions[rng.integers(len(solutions))]
            order = [first, *(choice for choice in order if choice != first)]
        text = ""
        for digits in order[: self.tries]:
            written = digit_sum(digits)
            if rng.random() >= self.sum_right:
                others = [written + off for off in (-2, -1, 1, 2) if written + off >= 0]
                written = others[rng.integers(len(others))]
            agrees = rng.random() < self.check_right
            accepted = (written == problem.answer["target"]) == agrees
            text += f"{digits}={written:02}{'y' if accepted else 'n'}"
            if accepted:
                return f"{text}>{digits}"
            if rng.random() < self.give_up:
                break
        return f"{text}>-"

    def inspect(self, problem: Problem, text: str) -> Inspection:
        """Adds tries, sums_right, checks_right (of the sum as written), duplicates (tries of digits
        already tried) and failure ('' or one of FAILURES)."""
        target, digits = problem.answer["target"], problem.answer["digits"]
        tries, rest = _read_tries(answer_text(text))
        ours = [self._legal(attempt.digits, digits) for attempt in tries]
        sums = [digit_sum(attempt.digits) == attempt.written for attempt in tries]
        checks = [(attempt.written == target) == attempt.accepted for attempt in tries]
        both = [a and b and c for a, b, c in zip(ours, sums, checks, strict=True)]
        answered = rest[1:] if rest[:1] == ">" else ""
        complete = all(ours) and (answered == "-" or self._legal(answered, digits))
        if not complete:
            cut = all(ours) and self._is_cut_off(text, rest)
            failure = "budget" if cut else "format"
        else:
            failure = self._judge(problem, tries, answered)
        return {
            "correct": not failure,
            "format_ok": complete,
            "steps": len(tries),
            "steps_right": sum(both),
            "tries": len(tries),
            "sums_right": sum(sums),
            "checks_right": sum(checks),
            "duplicates": len(tries) - len({frozenset(attempt.digits) for attempt in tries}),
            "failure": failure,
        }

    def _legal(self, choice: str, digits: str) -> bool:
        distinct = set(choice)
        return len(choice) in self._sizes and len(distinct) == len(choice) and distinct <= {*digits}

    def _judge(self, problem: Problem, tries: list[_Try], answered: str) -> str:
        target = problem.answer["target"]
        if len(tries) > self.tries:
            return "budget"
        if answered == "-":
            return "budget" if len(tries) == self.tries else "gave_up"
        if digit_sum(answered) == target:
            return ""
        if not tries or not tries[-1].accepted or {*tries[-1].digits} != {*answered}:
            return "wrong_answer"
        return "wrong_sum" if tries[-1].written == target else "wrong_check"

    def _is_cut_off(self, text: str, rest: str) -> bool:
        """Whether more text could have made it readable: it does not end, and stops midway."""
        least, most = self._sizes[0], self._sizes[-1]
        midway = rf"[0-9]{{0,{most}}}|[0-9]{{{least},{most}}}=[0-9]{{0,2}}|>[0-9]{{0,{least - 1}}}"
        return text != "" and not text.endswith(END) and re.fullmatch(midway, rest) is not None


def digit_sum(digits: str) -> int:
    """Sum of the digits in a text of digits 0-9."""
    return sum(map(int, digits))


def _read_tries(text: str) -> tuple[list[_Try], str]:
    """The tries that the text begins with, and what follows them."""
    tries, at = [], 0
    while found := _TRY.match(text, at):
        tries.append(_Try(found[1], int(found[2]), found[3] == "y"))
        at = found.end()
    return tries, text[at:]


def census(inspections: Sequence[Inspection]) -> dict[str, float]:
    """Share of the answers that are correct, or fail in each way (they sum to 1); and
    duplicate_tries, sum_accuracy, check_accuracy: shares of the tries (nan where there is none)."""
    if not inspections:
        raise ValueError("a census needs at least one inspected answer, got none")
    kinds = collections.Counter(item["failure"] for item in inspections)
    shares = {kind: kinds[kind] / len(inspections) for kind in FAILURES}
    tries = sum(item["tries"] for item in inspections)

    def of_tries(field: str) -> float:
        return sum(item[field] for item in inspections) / tries if tries else float("nan")

    return {
        "correct": kinds[""] / len(inspections),
        **shares,
        "duplicate_tries": of_tries("duplicates"),
        "sum_accuracy": of_tries("sums_right"),
        "check_accuracy": of_tries("checks_right"),
    }


def accuracy_by_tries(inspections: Sequence[Inspection], tries: int) -> list[float]:
    """Share of the answers that are correct after at most 1, 2, ... `tries` tries, [tries]."""
    if not inspections:
        raise ValueError("a curve needs at least one inspected answer, got none")
    used = [item["tries"] for item in inspections if item["correct"]]
    return [sum(n <= most for n in used) / len(inspections) for most in range(1, tries + 1)]
