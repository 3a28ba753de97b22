"""Texts that programs print and numbers that they compute, compared with what is expected."""

import re
from decimal import Decimal

_NUMBER = re.compile(r"(?<![\w.])([-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?)(?![\w.])")


def same_text(printed: str, expected: str) -> bool:
    """Whether a program's output is the expected one, line by line.

    White space at the ends of lines and of the text does not count. Where a number with a point is
    expected, one that is `near` it will do: programs print floats in full. Whole numbers and
    everything between numbers are compared as texts.
    """
    found, wanted = _lines(printed), _lines(expected)
    if found == wanted:
        return True
    return len(found) == len(wanted) and all(map(_same_line, found, wanted))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _same_line(found: str, wanted: str) -> bool:
    if found == wanted or "." not in wanted:
        return found == wanted
    parts, others = _NUMBER.split(found), _NUMBER.split(wanted)  # numbers at the odd places
    return len(parts) == len(others) and all(
        a == b or (place % 2 == 1 and "." in b and near(Decimal(a), Decimal(b)))
        for place, (a, b) in enumerate(zip(parts, others, strict=True))
    )


def near(found: Decimal, expected: Decimal) -> bool:
    """Whether the expected number is this one rounded to its digits, at least six after the point,
    or differs by what sums of floats lose: a billionth of it, at most half a millionth."""
    size, unit = abs(expected), Decimal(1).scaleb(int(expected.as_tuple().exponent))
    slack = min(Decimal("5e-7"), max(unit / 2, size * Decimal("1e-9")))
    return abs(found - expected) <= slack + size * Decimal("1e-15")
