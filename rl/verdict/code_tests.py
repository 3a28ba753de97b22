"""Tests of code as a problem has them: of programs, of functions, of values."""

import math
from typing import Any, NamedTuple

from rl.verdict.sandbox_values import is_expression, is_json


class ProgramTest(NamedTuple):
    """The code is a program: given this standard input, it prints this. White space at the ends of
    lines and of the text does not count."""

    stdin: str
    stdout: str


class FunctionTest(NamedTuple):
    """The code defines functions: this Python statement, run after it, raises nothing."""

    check: str


class ValueTest(NamedTuple):
    """The code defines functions: this Python expression, evaluated after it, has this value."""

    call: str
    value: Any
    """As JSON has it; `rl/verdict/sandbox_values.py:same_value` says what equals it."""
    tolerance: float = 0.0
    """By which every number in it may differ."""


Test = ProgramTest | FunctionTest | ValueTest


def read_tests(entries: object) -> list[Test]:
    """Tests from JSON: a list of {"stdin": .., "stdout": ..}, {"call": "f(1)", "value": 2} (and
    "tolerance": a number, 0 or more) and {"check": "assert f(1) == 2"}.

    Raises ValueError that names the first entry which is none of these, or if there is none.
    """
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"tests is {str(entries)[:80]!r}; give a list with at least one test")
    tests: list[Test] = []
    for number, entry in enumerate(entries):
        test = _read_test(entry) if isinstance(entry, dict) else None
        if test is None:
            raise ValueError(
                f"test {number} is {str(entry)[:80]!r}; give {{'stdin': text, 'stdout': text}}, "
                "{'call': expression, 'value': JSON} (and 'tolerance': a number, 0 or more) or "
                "{'check': statement}"
            )
        tests.append(test)
    return tests


def _read_test(entry: dict) -> Test | None:
    texts = all(isinstance(entry[key], str) for key in entry.keys() - {"value", "tolerance"})
    tolerance = entry.get("tolerance", 0.0)
    right = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if not texts or not right or not 0 <= tolerance < math.inf:
        return None
    match sorted(entry):
        case ["stdin", "stdout"]:
            return ProgramTest(entry["stdin"], entry["stdout"])
        case ["check"]:
            return FunctionTest(entry["check"])
        case ["call", "value"] | ["call", "tolerance", "value"]:
            if is_expression(entry["call"]) and is_json(entry["value"]):
                return ValueTest(entry["call"], entry["value"], tolerance)
    return None
