"""Tests of code as a problem has them: of programs, of functions, of values."""

import ast
import math
import sys
import warnings
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

    Raises ValueError that names the first entry which is none of these, or if there is none; also
    for a check that no answer can pass (it is no Python, or imports what the sandbox has not) and
    for one that every answer passes (it defines functions and runs none).
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
        if isinstance(test, FunctionTest) and (why := _useless(test.check)):
            raise ValueError(f"test {number}: the check {test.check[:80]!r} {why}")
        tests.append(test)
    return tests


def _useless(check: str) -> str:
    """Why a check tells no answer from another; '' if it may."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(check)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"is no Python: {error}"
    for node in ast.walk(tree):
        names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module)]
        known = {*sys.stdlib_module_names, "solution"}
        if unknown := [name for name in names if name.partition(".")[0] not in known]:
            return f"imports {unknown[0]}; the sandbox has Python's standard library alone"
    functions = [one for one in tree.body if isinstance(one, ast.FunctionDef)]
    rest = (ast.FunctionDef, ast.Import, ast.ImportFrom, ast.Assign)
    if functions and all(isinstance(one, rest) for one in tree.body):
        return f"defines {functions[0].name} and calls nothing, so that every answer would pass"
    return ""


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
