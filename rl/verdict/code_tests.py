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
    defined = [one.name for one in tree.body if isinstance(one, _DEFINITIONS)]
    if all(isinstance(one, _IDLE) or _is_idle(one) for one in tree.body) and defined:
        return f"defines {defined[0]} and calls nothing, so that every answer would pass"
    return "" if tree.body else "is empty, so that every answer would pass"


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_IDLE = (*_DEFINITIONS, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Pass)


def _is_idle(statement: ast.stmt) -> bool:
    """A text that stands alone, and what only a main program runs."""
    if isinstance(statement, ast.If):
        return "__name__" in ast.unparse(statement.test)
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


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
