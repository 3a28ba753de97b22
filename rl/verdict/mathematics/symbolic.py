"""Whether two expressions are equal, by sympy, in a process that is stopped when it takes too long.

sympy's own parsers evaluate text as Python; the trees here come from `expressions.py`. Simplifying
has no bound on time or memory, hence the process, the limits and three outcomes: equal, not equal,
UndecidedError.
"""

import atexit
import functools
import threading
from fractions import Fraction
from typing import Any

from rl.verdict.child import Child, ChildError, serve
from rl.verdict.mathematics.expressions import ExpressionError, Node, parse

SECONDS = 3.0
"""Time for one comparison."""
START_SECONDS = 30.0
"""Time for the process to start and to import sympy."""
MEMORY_BYTES = 1 << 30
_DIGITS = 30
_POINTS = ((0.37, 1.13, 2.71), (1.91, 0.53, 1.37), (2.23, 1.71, 0.29), (-0.83, 1.37, 2.19))
"""Values of the first three variables; further ones have these plus 1, 2, ..."""


class UndecidedError(Exception):
    """Neither equal nor unequal within the limits on time and memory."""


def symbolically_equal(a: str, b: str, seconds: float = SECONDS, scaled: bool = False) -> bool:
    """Whether two expressions in the notation of `expressions.py` are equal for all real values of
    their variables; or (scaled) whether one is the other times a number other than 0.

    Raises ExpressionError if one is none, UndecidedError when the limits end the comparison, and
    RuntimeError if sympy is not installed.
    """
    for text in (a, b):
        parse(text)  # here, so that the helper sees expressions only
    outcome = _compared(*sorted((a, b)), seconds, scaled)
    if isinstance(outcome, str):
        raise UndecidedError(f"{a[:80]!r} and {b[:80]!r}: {outcome}")
    return outcome


@functools.lru_cache(maxsize=4096)
def _compared(a: str, b: str, seconds: float, scaled: bool) -> bool | str:
    # Answers to one prompt repeat each other, the undecided ones too.
    global _helper
    with _lock:
        try:
            if _helper is None:
                _helper = _started()
            return _helper.ask([a, b, scaled], seconds)
        except (TimeoutError, ChildError) as error:
            stop()
            return str(error) if isinstance(error, TimeoutError) else f"its process {error}"
        except BaseException:
            stop()
            raise


_lock = threading.RLock()
_helper: Child | None = None


def _started() -> Child:
    helper = Child("rl.verdict.mathematics.symbolic")
    try:
        missing = helper.wait(START_SECONDS)
    except BaseException:
        helper.end()
        raise
    if missing:
        helper.end()
        raise RuntimeError(f"comparing expressions needs sympy: {missing}; pip install '.[rl]'")
    return helper


@atexit.register
def stop() -> None:
    """Ends the helper process; the next comparison starts another."""
    global _helper
    with _lock:
        if _helper is not None:
            _helper.end()
        _helper = None


def to_sympy(node: Node) -> Any:
    """The tree as a sympy expression; variables stand for real numbers."""
    import sympy

    if node.kind == "num":
        assert isinstance(node.value, Fraction)
        return sympy.Rational(node.value.numerator, node.value.denominator)
    if node.kind == "name":
        constants = {"pi": sympy.pi, "infty": sympy.oo, "e": sympy.E, "i": sympy.I}
        return constants.get(str(node.value)) or sympy.Symbol(str(node.value), real=True)
    parts = [to_sympy(part) for part in node.parts]
    if node.kind == "call":
        names = {"abs": "Abs", "ln": "log"}
        return getattr(sympy, names.get(str(node.value), str(node.value)))(*parts)
    if node.kind in "+*":
        return (sympy.Add if node.kind == "+" else sympy.Mul)(*parts)
    if node.kind == "neg":
        return -parts[0]
    return sympy.Pow(parts[0], parts[1] if node.kind == "^" else -1)


def equal_trees(a: Node, b: Node) -> bool:
    """Whether two trees are equal; unbounded in time, so for the helper process alone.

    Numbers at a few points tell most unequal ones apart; simplification proves the equal ones.
    Raises UndecidedError where neither does.
    """
    import sympy

    left, right = to_sympy(a), to_sympy(b)
    if left == right:
        return True
    if any(side.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan) for side in (left, right)):
        return False
    difference = left - right
    symbols = sorted(difference.free_symbols, key=str)
    for point in _POINTS:
        at = {s: point[n % 3] + n // 3 for n, s in enumerate(symbols)}
        values = [side.evalf(_DIGITS, subs=at) for side in (left, right)]
        sizes = [abs(value) for value in values]
        # Where roots of negative numbers appear, what is meant for positive ones may differ.
        numbers = values if point[0] < 0 else sizes
        known = all(number.is_Float or number.is_Integer for number in numbers)
        if known and abs(values[0] - values[1]) > 1e-12 * max(1, *sizes):
            return False
    if sympy.simplify(difference) == 0:
        return True
    verdict = difference.equals(0)
    if verdict is None:
        raise UndecidedError("simplification neither proves nor refutes it")
    return bool(verdict)


def proportional_trees(a: Node, b: Node) -> bool:
    """Whether the quotient of two trees is a number; see `equal_trees`."""
    import sympy

    quotient = sympy.simplify(to_sympy(a) / to_sympy(b))
    return bool(quotient.is_number and quotient.is_finite and quotient.is_nonzero)


def _answer(work: tuple[str, str, bool]) -> bool | str:
    try:
        a, b, scaled = work
        return (proportional_trees if scaled else equal_trees)(parse(a), parse(b))
    except (ExpressionError, UndecidedError) as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


def _main() -> None:
    import json

    try:
        import sympy
    except ImportError as error:
        print(json.dumps(str(error)), flush=True)
        return
    # The first simplification imports much of sympy; it must not count as a comparison's time.
    sympy.simplify(sympy.sin(1) ** 2 + sympy.cos(1) ** 2)
    print(json.dumps(""), flush=True)
    serve(_answer, MEMORY_BYTES, 10 * SECONDS)


if __name__ == "__main__":
    _main()
