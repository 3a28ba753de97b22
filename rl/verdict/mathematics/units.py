r"""Units beside a number: whether two texts name different ones, as 5 m and 5 cm do.

Names of units stand under `measures` in `words.toml`, by language. A word that is not there is no
unit, so that it never makes an answer wrong.
"""

import functools
import re

from rl.verdict.words import UNSPACED, measures

_MARKUP = re.compile(r"\\(?:text|mathrm|rm|mbox|,|;|:|!|quad|\s)(?![A-Za-z])|[{}~$]")
_RAISED = str.maketrans("²³", "23")


class _Written:
    """How a quantity is written: a number, a unit with its power, and another below a stroke."""

    def __init__(self) -> None:
        self.names = measures()
        known = sorted(self.names, key=lambda name: (-len(name), name))
        spaced = "|".join(name for name in known if not re.search(f"[{UNSPACED}]", name))
        unspaced = "|".join(name for name in known if re.search(f"[{UNSPACED}]", name))
        unit = rf"(?:(?:{spaced})(?![^\W\d_])|(?:{unspaced or '(?!)'}))"
        raised = r"(?:\s*\^\s*([23])|\s+(squared|cubed)(?![a-z]))?"
        self.pattern = re.compile(
            rf"(?<=\d)\s*(?:\.\s*)?(?:(square|sq\.?|平方)|(cubic|cu\.?|立方))?\s*({unit}){raised}"
            rf"(?:\s*(?:/|每|per(?![a-z])|an?(?=\s))\s*({unit}))?"
        )


_written = functools.cache(_Written)


def units(text: str) -> set[tuple[str, int, str]]:
    r"""Units right after numbers of a text: (unit, its power, the unit below the stroke or '').

    `5\text{ cm}^2` and `5 square centimeters` are ("cm", 2, ""), `60 km/h` is ("km", 1, "h").
    """
    text = " ".join(_MARKUP.sub(" ", text.translate(_RAISED)).split())
    written, found = _written(), set()
    for match in written.pattern.finditer(text):
        square, cubic, unit, digit, word, below = match.groups()
        power = int(digit) if digit else 2 if square or word == "squared" else 1
        power = 3 if cubic or word == "cubed" else power
        found.add((written.names[unit], power, written.names.get(below, "")))
    return found


def other_unit(expected: str, given: str) -> bool:
    """Whether two texts have one unit each, and not the same: an amount of something else, even
    where the numbers agree."""
    a, b = units(expected), units(given)
    return len(a) == len(b) == 1 and a != b


def quantity(text: str) -> bool:
    """Whether a text is a number and, apart from it or of several letters, one unit: 5 cm, not 5m,
    which may be a product."""
    apart = re.search(r"\d\s+\S|\d\s*(?:[A-Za-z]{2}|[^\x00-\x7f])|\\text", text)
    return len(units(text)) == 1 and apart is not None
