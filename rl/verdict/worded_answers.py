"""Whether an answer in words is the expected one: a choice, a sequence, a set, a text.

`expected` comes from the prompt's record, `given` from a model: any text, however long. Texts too
long for a rule are unequal, unless they are the expected text itself. Unicode is brought to its
compatibility form (full-width digits are digits).
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from rl.verdict.mathematics.expressions import MAX_CHARS
from rl.verdict.mathematics.quantities import TEXT_COMMAND, plain, read_number
from rl.verdict.words import clause, pattern, says

MAX_TEXT = 20_000
"""Characters of a word answer, sequence or set that are compared."""

_CHOICE = re.compile(r"\(?\s*([A-Za-z])\s*\)?\s*(?:[.:)]\s*(?!.*\bor\b).*)?")
_CHOICE_IN_TEXT = re.compile(
    rf"(?<!not )(?<![不别勿非]){pattern('answer', 'choice').pattern}(?:\s*{pattern('is').pattern})?"
    rf"[\s:*(]{{0,6}}(?<![A-Za-z])(?-i:([A-Z]))(?=[\s.,;:)*]|$)"
    rf"(?!\W{{0,5}}{pattern('or', 'and').pattern}|\s*[,&/]\s*\(?[A-Z](?![A-Za-z]))",
    re.IGNORECASE,
)

_CHOICE_FIRST = re.compile(
    rf"(?<![A-Za-z])([A-Z])(?:\s|\W){{1,4}}(?:{pattern('is').pattern})\s+(?:the\s+)?"
    rf"(?:correct|right|{pattern('answer').pattern})"
)
"""B is correct."""


def same_choice(expected: str, given: str, choices: Sequence[str] = ()) -> bool:
    """Multiple choice by letter, either case: `B`, `(b)`, `B. Paris`, `The answer is B`.

    choices: the texts of A, B, ...; the text itself is then an answer too. An answer that names two
    letters is none. ValueError if `expected` is no letter or beyond the choices.
    """
    wanted = expected.strip().strip("()").upper()
    if not re.fullmatch(r"[A-Z]", wanted) or (choices and ord(wanted) - 65 >= len(choices)):
        among = f" among {len(choices)} choices" if choices else ""
        raise ValueError(f"the expected answer {expected[:80]!r} is no letter{among}")
    if choices and same_text(choices[ord(wanted) - 65], given):
        return True
    if len(given) > MAX_CHARS:
        return False
    given = _normal(given).replace("**", "").strip("${} \n")
    match = _CHOICE.fullmatch(given.rstrip("."))
    if match:
        return match[1].upper() == wanted
    found = [*_CHOICE_IN_TEXT.finditer(given), *_CHOICE_FIRST.finditer(given)]
    denied = any(says(" ; ".join(clause(given, *match.span())), "not", "wrong") for match in found)
    denied |= any(says(match[0], "not", "wrong") for match in found)
    return not denied and {match[1] for match in found} == {wanted}


def same_sequence(expected: Sequence[object] | str, given: str) -> bool:
    """Whether the items are the expected ones in the expected order (see `read_items`)."""
    return read_items(given) == _expected_items(expected)


def same_set(expected: Sequence[object] | str, given: str) -> bool:
    """Whether the items are the expected ones; order and repetition do not count."""
    return set(read_items(given)) == set(_expected_items(expected))


def _expected_items(expected: Sequence[object] | str) -> list[Fraction | str]:
    if isinstance(expected, str):
        return read_items(expected)
    return [_item(str(item)) for item in expected]


def read_items(text: str) -> list[Fraction | str]:
    """Items of a list: numbers as exact values, words in lower case without quotes.

    Separated by commas or semicolons, or by white space if there are none; brackets or braces
    around the whole do not count. A list of more than MAX_TEXT characters has no items.
    """
    text = _normal(text).replace("\\{", "{").replace("\\}", "}").replace("$", "")
    text = text.strip().rstrip(".").strip()
    if len(text) > MAX_TEXT:
        return []
    if text[:1] + text[-1:] in ("()", "[]", "{}"):
        text = text[1:-1]
    if not text.strip():
        return []
    items = re.split(r"[,;]", text) if re.search("[,;]", text) else text.split()
    return [_item(item) for item in items]


def _item(text: str) -> Fraction | str:
    number = read_number(text)
    if number and not number.percent:
        return number.value
    return _words(text.strip().strip("\"'`"))


def same_text(expected: str, given: str) -> bool:
    """Whether the words are equal; case, white space and a last full stop do not count."""
    if len(given) > max(MAX_TEXT, 2 * len(expected)):
        return False
    return _words(expected) == _words(given) != ""


def _words(text: str) -> str:
    return " ".join(_normal(text).casefold().split()).removesuffix(".")


def _normal(text: str) -> str:
    return TEXT_COMMAND.sub(r"\1", plain(text[: 4 * MAX_TEXT]))
