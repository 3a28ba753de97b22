"""Results of functions, compared out of reach of the code that computed them.

The sandbox is told which expression to evaluate and sends its value as data; what the value should
be never enters it. A class whose `__eq__` always agrees, or a changed `assert`, gains nothing.
"""

import ast
import json
import math
import sys
import warnings
from decimal import Decimal
from typing import Any, NamedTuple

from rl.verdict.printed import near

sys.set_int_max_str_digits(100_000)  # results of 5,000 digits are no attack, and read in 1 ms
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)


class Unit(NamedTuple):
    """Part of a test of functions: what the sandbox runs, and what has to come of it."""

    kind: str
    """exec: a statement that raises nothing. eval: an expression with the value `expected`. json:
    an expression whose value is read as JSON would have it, so that an iterator is a list."""
    text: str
    expected: Any = None
    identical: bool = False
    """The value is True, False or None itself (`is`)."""
    message: str = ""
    """What an assert says when it fails."""

    def why_wrong(self, text: str) -> str:
        """'' if `text`, JSON from the sandbox, is the value; else what it was instead."""
        try:
            found = read_value(text)
            right = found is self.expected if self.identical else found == self.expected
            said = self.message or _differs(found, self.expected)
        except _UNREADABLE:
            return "the result cannot be read"
        return "" if right else f"AssertionError: {said}"


def _differs(found: Any, expected: Any) -> str:
    return f"the value is {str(found)[:80]}, not {str(expected)[:80]}"


def read_value(text: str) -> Any:
    """Plain data from what `rl/verdict/sandbox_program.py:wire` writes; ValueError or TypeError if
    it is something else."""
    return _read(json.loads(text))


def _read(data: Any) -> Any:
    if isinstance(data, list):
        return [_read(item) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    match kind:
        case "tuple":
            return tuple(_read(item) for item in content)
        case "frozenset":
            return frozenset(_read(item) for item in content)
        case "dict":
            return {_read(key): _read(item) for key, item in content}
        case "bytes":
            return bytes.fromhex(content)
        case "int":
            return int(content, 16)
        case "complex":
            return complex(*content)
    raise ValueError(f"{kind!r} is no kind of value")


def same_value(found: Any, expected: Any, tolerance: float = 0.0) -> bool:
    """Whether plain data is the JSON value `expected`.

    Types are JSON's: true is not 1, a tuple is a list, every key of a dict is a text. Numbers
    compare by value, 1 and 1.0 being one; with a tolerance they may differ by as much. A float
    may be one that is `near`: 0.1 + 0.2 is 0.3.
    """
    if isinstance(expected, bool) or expected is None:
        return found is expected
    if isinstance(expected, list):
        return (
            isinstance(found, list | tuple)
            and len(found) == len(expected)
            and all(same_value(*pair, tolerance) for pair in zip(found, expected, strict=True))
        )
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == expected.keys()
            and all(same_value(found[key], expected[key], tolerance) for key in expected)
        )
    if isinstance(expected, str):
        return isinstance(found, str) and found == expected
    if isinstance(found, bool) or not isinstance(found, int | float):
        return False
    if found == expected or (tolerance > 0 and abs(found - expected) <= tolerance):
        return True
    if math.isnan(expected):
        return math.isnan(found)
    floats = isinstance(expected, float) and math.isfinite(expected) and math.isfinite(found)
    return floats and near(Decimal(repr(found)), Decimal(repr(expected)))


def why_not(text: str, expected: Any, tolerance: float) -> str:
    """'' if `text`, JSON from the sandbox, is the JSON value `expected`; else what it is."""
    try:
        found = read_value(text)
        return "" if same_value(found, expected, tolerance) else _differs(found, expected)
    except _UNREADABLE:
        return "the result cannot be read"


def is_json(value: Any) -> bool:
    """Whether JSON has it: None, bool, number, text, lists and dicts of these, keys being texts."""
    if isinstance(value, list):
        return all(map(is_json, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_json(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def is_expression(text: str) -> bool:
    """Whether it is one Python expression."""
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def units(check: str, same: str) -> list[Unit]:
    """The statements of a check.

    `assert EXPRESSION == LITERAL`, either way round, and `assert EXPRESSION is True` (False, None)
    become expressions whose value is compared here. In the others `==` and `!=` become calls of
    the function `same`, which `rl/verdict/sandbox_program.py` defines; they are judged in the
    sandbox.
    """
    as_it_is = [Unit("exec", check)]
    try:
        with warnings.catch_warnings(action="ignore"):
            statements = ast.parse(check).body
        return [_compared(one) or _statement(one, same) for one in statements] or as_it_is
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return as_it_is  # fails there, with the reason


def _compared(statement: ast.stmt) -> Unit | None:
    match statement:
        case ast.Assert(ast.Compare(left, [ast.Eq() | ast.Is() as operator], [right]), message):
            pass
        case _:
            return None
    identical = isinstance(operator, ast.Is)
    for side, other in ((right, left), (left, right)):
        try:
            expected = ast.literal_eval(side)
        except (ValueError, TypeError, SyntaxError):
            continue
        if identical and not (expected is None or isinstance(expected, bool)):
            continue
        said = str(message.value) if isinstance(message, ast.Constant) else ""
        return Unit("eval", ast.unparse(other), expected, identical, said)
    return None


def _statement(statement: ast.stmt, same: str) -> Unit:
    changed = ast.fix_missing_locations(_Equality(same).visit(statement))
    return Unit("exec", ast.unparse(changed))


class _Equality(ast.NodeTransformer):
    """left == right becomes same(left, right)."""

    def __init__(self, same: str):
        self._same = same

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.Compare(left, [ast.Eq() | ast.NotEq() as operator], [right]):
                call = ast.Call(ast.Name(self._same, ast.Load()), [left, right], [])
                is_same = isinstance(operator, ast.Eq)
                return call if is_same else ast.UnaryOp(ast.Not(), call)
        return node
