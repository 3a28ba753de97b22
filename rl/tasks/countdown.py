"""Countdown: reach a target from three or four numbers, as TinyZero trains it.

The answer is an expression between `<answer>` and `</answer>`; a chain of tries may stand before it
between `<think>` and `</think>`, `3*8=24;`. The prompt is `3,8,5=19:`, or a sentence for models
that read English. Every prompt has a solution, since a random expression made it.
"""

import collections
import dataclasses
import re
from fractions import Fraction
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from rl.problems import Problem
from rl.tasks.task import END, Inspection, Task, answer_text, check_choice, check_number
from rl.verdict.mathematics.expressions import exact_value, parse

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
MAX_STEPS = 64
"""Tries of a chain that are looked at; later ones count as wrong."""

SENTENCE = (
    "Combine the numbers {numbers} into an expression whose value is {target}. Use {use} and "
    "nothing but +, -, *, / and parentheses. Think between <think> and </think>, then give the "
    "expression between <answer> and </answer>, for example <answer>(1 + 2) / 3</answer>."
)

FAILURES = ("no_answer", "bad_expression", "wrong_numbers", "wrong_value")
_FORMAT = re.compile(r"(?:<think>[^<>]*</think>)?\s*<answer>[^<>]*</answer>\s*")
_EXPRESSION = re.compile(r"[0-9+*/()\- ]+")
_UNWRITTEN = re.compile(r"\* *\*|[0-9)] *\(")  # a power; a product without its sign
_STEP = re.compile(r"[0-9+*/()\- ]+=[0-9+*/()\- ]+")


class _Term(NamedTuple):
    text: str
    value: Fraction
    rank: int  # 1 a sum, 2 a product, 3 a number


@dataclasses.dataclass(frozen=True)
class Countdown(Task):
    """Options; TinyZero's own problems have largest=99 and largest_target=100."""

    name: ClassVar[str] = "countdown"

    fewest: int = 3
    """Fewest numbers of a prompt."""
    most: int = 4
    """Most numbers of a prompt."""
    largest: int = 20
    """Numbers are drawn from 1..largest; they may repeat."""
    largest_target: int = 50
    """Targets are drawn from 1..largest_target."""
    use_all: bool = True
    """Each number must be used exactly once; otherwise at most once."""
    wording: Literal["short", "sentence"] = "short"
    """Prompt in few characters, or in English."""
    share_of_chains: float = 0.3
    """Share of the demonstrations that write their tries."""
    tries: int = 4
    """Most tries of a demonstration."""
    noise: float = 0.06
    """Chance that the value written after a try is wrong."""

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "fewest", 2, 6)
        check_number(self, "most", self.fewest, 6)
        check_number(self, "largest", 2, 999)
        check_number(self, "largest_target", 10, 9999)
        check_choice(self, "wording", ("short", "sentence"))
        check_number(self, "share_of_chains", 0, 1)
        check_number(self, "tries", 1, MAX_STEPS)
        check_number(self, "noise", 0, 1)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        marks = "0123456789,=:;+-*/()"
        words = sorted(set(SENTENCE + self._use() + "[]")) if self.wording == "sentence" else ()
        return tuple(dict.fromkeys([*TAGS, *marks, *words, END]))

    def _use(self) -> str:
        return "each number exactly once" if self.use_all else "each number at most once"

    def sample_prompt(self, rng: np.random.Generator) -> Problem:
        count = int(rng.integers(self.fewest, self.most + 1))
        for _ in range(10_000):
            numbers = (1 + rng.integers(self.largest, size=count)).tolist()
            made = random_expression(numbers, rng)
            if made is not None and 1 <= made.value <= self.largest_target:
                break
        else:
            raise ValueError(
                f"task {self.name}: {count} numbers up to {self.largest} hardly ever reach a "
                f"target in 1..{self.largest_target}; raise largest_target or lower largest"
            )
        target = int(made.value)
        if self.wording == "short":
            prompt = f"{','.join(map(str, numbers))}={target}:"
        else:
            prompt = SENTENCE.format(numbers=numbers, target=target, use=self._use())
        answer = {"numbers": numbers, "target": target, "solution": made.text}
        key = f"{sorted(numbers)}={target}"
        return Problem(prompt, answer, self.name, key)

    def demonstrate(self, problem: Problem, rng: np.random.Generator) -> str:
        solution = f"<answer>{problem.answer['solution']}</answer>"
        if rng.random() >= self.share_of_chains:
            return solution
        text = ""
        for _ in range(int(rng.integers(self.tries))):
            made = random_expression(problem.answer["numbers"], rng)
            if made is not None and made.value != problem.answer["target"]:
                text += self._try(made.text, int(made.value), rng)
        text += f"{problem.answer['solution']}={problem.answer['target']};"
        return f"<think>{text}</think>{solution}"

    def _try(self, expression: str, value: int, rng: np.random.Generator) -> str:
        if rng.random() < self.noise:
            value += int(rng.integers(1, 10))
        return f"{expression}={value};"

    def inspect(self, problem: Problem, text: str) -> Inspection:
        """Adds failure ('' or one of FAILURES). The last answer of a text counts; a step is a
        line or part `expression=value` of the chain, and right if that is its value."""
        text = answer_text(text)
        failure = self._judge(problem, text)
        steps = _chain(text)
        return {
            "correct": not failure,
            "format_ok": _FORMAT.fullmatch(text) is not None,
            "steps": len(steps),
            "steps_right": sum(map(_is_true, steps[:MAX_STEPS])),
            "failure": failure,
        }

    def _judge(self, problem: Problem, text: str) -> str:
        start = text.rfind("<answer>")
        stop = text.find("</answer>", start)
        if start < 0 or stop < 0:
            return "no_answer"
        try:
            value, used = evaluate(text[start + len("<answer>") : stop].strip())
        except ValueError:
            return "bad_expression"
        given, counts = collections.Counter(problem.answer["numbers"]), collections.Counter(used)
        if not counts <= given or (self.use_all and counts != given):
            return "wrong_numbers"
        return "" if value == problem.answer["target"] else "wrong_value"


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """Exact value of an expression, and the numbers in it in their order.

    Whole numbers, + - * / and parentheses. ValueError for anything else, for a division by zero,
    and beyond the limits of `rl.expressions`: no text is slow.
    """
    if not _EXPRESSION.fullmatch(text) or _UNWRITTEN.search(text):
        raise ValueError("give an expression of whole numbers, + - * / and parentheses")
    value = exact_value(parse(text))
    assert value is not None, "only names and fractional powers have no exact value"
    return value, [int(number) for number in re.findall("[0-9]+", text)]


def random_expression(numbers: list[int], rng: np.random.Generator) -> _Term | None:
    """An expression that uses every number once, joined two by two in random order; all its parts
    are whole and at least 0. None if a draw comes to a part that is not."""
    pool = [_Term(str(number), Fraction(number), 3) for number in numbers]
    while len(pool) > 1:
        left = pool.pop(rng.integers(len(pool)))
        right = pool.pop(rng.integers(len(pool)))
        joined = _join(left, "+-*/"[rng.integers(4)], right)
        if joined is None:
            return None
        pool.append(joined)
    return pool[0]


def _join(left: _Term, sign: str, right: _Term) -> _Term | None:
    if sign == "/" and right.value == 0:
        return None
    value = {
        "+": left.value + right.value,
        "-": left.value - right.value,
        "*": left.value * right.value,
        "/": left.value / (right.value or 1),
    }[sign]
    if value < 0 or value.denominator != 1:
        return None
    rank = 1 if sign in "+-" else 2
    first = f"({left.text})" if left.rank < rank else left.text
    closed = right.rank < rank or (right.rank == rank and sign in "-/")
    second = f"({right.text})" if closed else right.text
    return _Term(f"{first}{sign}{second}", value, rank)


def _chain(text: str) -> list[str]:
    """Tries between <think> and </think> (or the end of a text that is cut off)."""
    start = text.find("<think>")
    if start < 0:
        return []
    stop = text.find("</think>", start)
    inside = text[start + len("<think>") : stop if stop >= 0 else len(text)]
    return [part for part in re.split("[;\n]", inside) if _STEP.fullmatch(part)]


def _is_true(step: str) -> bool:
    expression, _, value = step.partition("=")
    try:
        return evaluate(expression)[0] == evaluate(value)[0]
    except ValueError:
        return False
