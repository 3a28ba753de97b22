r"""Whether an answer is the expected one: numbers, mathematics, choices, sequences, sets, words.

`expected` comes from the prompt's record, `given` from a model: any text, however long. Texts too
long for a rule are unequal, unless they are the expected text itself. Unicode is brought to its
compatibility form (full-width digits are digits).
"""

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from rl.expressions import MAX_CHARS, ExpressionError, Node, exact_value, parse
from rl.symbolic import symbolically_equal

MAX_TEXT = 20_000
"""Characters of a word answer, sequence or set that are compared."""
_MAX_POWER_OF_TEN = 1000

_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_OPERATOR = re.compile(r"\\operatorname\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|°")
_ASSIGNED = re.compile(r"\\?[A-Za-z]{1,10}\s*(?:=|\\in(?![A-Za-z]))([^=]*)")
_SCIENTIFIC = re.compile(
    r"([-+]?[\d.,]{1,200})(?:[eE]|\s*(?:\\times|\\cdot|[*x×])\s*10\s*(?:\^|\*\*))\s*"
    r"(?:\{\s*([-+]?\d{1,9})\s*\}|([-+]?\d{1,9}))"
)
_MIXED = re.compile(r"([-+]?)(\d{1,100})\s+(\d{1,100})\s*/\s*(\d{1,100})")
_PLAIN = re.compile(r"[-+]?\d{1,200}")
_NUMBER_IN_TEXT = re.compile(
    r"(?<![\w.^])[-+]?\s?[$€£]?(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?"
    r"(?:\s*/\s*\d++(?!\.))?(?!\s?(?:[eE]|\^|\*\*)[-+{]?\d)(?:\s*%)?"
)
_CHOICE = re.compile(r"\(?\s*([A-Za-z])\s*\)?\s*(?:[.:)]\s*(?!.*\bor\b).*)?")
_CHOICE_IN_TEXT = re.compile(
    r"\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)\b(?:\s+is)?[\s:*(]{1,6}([A-Z])(?=[\s.,;:)*]|$)"
    r"(?!\W{0,5}(?:or|and)\b)"
)


class Number(NamedTuple):
    """An exact value. percent: it was written with a percent sign, which `value` ignores."""

    value: Fraction
    percent: bool


def read_number(text: str) -> Number | None:
    r"""A number written out, or None: integer, decimal, fraction, mixed number, power-of-ten form.

    `1,234.5`, `1{,}234`, `-3/4`, `\frac{3}{4}`, `1 1/2`, `1.5e-3`, `1.5 \times 10^{-3}`, `50\%`,
    `\$5`. Sums, products and powers are none: an answer must not be the question.
    """
    text = text.strip().rstrip(".").strip("$ ").removeprefix("\\$").replace("\\%", "%")
    percent = text.endswith("%")
    text = text.removesuffix("%").strip("$€£ ")
    try:
        value = _written_number(text) if text and len(text) <= MAX_CHARS else None
    except ExpressionError:
        value = None
    return None if value is None else Number(value, percent)


def _written_number(text: str) -> Fraction | None:
    if _PLAIN.fullmatch(text):
        return Fraction(int(text))
    if match := _SCIENTIFIC.fullmatch(text):
        power = int(match[2] or match[3])
        mantissa = exact_value(parse(match[1]))
        if mantissa is None or abs(power) > _MAX_POWER_OF_TEN:
            return None
        return mantissa * Fraction(10) ** power
    if match := _MIXED.fullmatch(text):
        sign, whole, above, below = match.groups()
        if int(below) == 0:
            return None
        value = int(whole) + Fraction(int(above), int(below))
        return -value if sign == "-" else value
    if text[0] in "([":  # (1,234) is a pair
        return None
    node = parse(text)
    return exact_value(node) if _is_written_number(node) else None


def _is_written_number(node: Node) -> bool:
    if node.kind == "neg":
        return node.parts[0].kind != "neg" and _is_written_number(node.parts[0])
    kinds = [part.kind for part in node.parts]
    if node.kind == "*" and kinds in (["num", "inv"], ["neg", "inv"]):
        return {part.parts[0].kind for part in node.parts if part.parts} <= {"num"}
    mixed = node.kind == "+" and kinds == ["num", "*"]
    return node.kind == "num" or (mixed and _is_written_number(node.parts[1]))


def same_number(expected: str, given: str, marked: bool = True, tolerance: float = 0.0) -> bool:
    """Whether `given` is the expected number, exactly or within an absolute tolerance.

    A unit or words around the number do not count; of several numbers in a text that nothing marks
    as the answer (marked=False) the last is taken, of several in a marked one none. A percent sign
    on one side only may mean the number or its hundredth. ValueError if `expected` is no number.
    """
    wanted = read_number(expected)
    if wanted is None:
        raise ValueError(f"the expected answer {expected[:80]!r} is no number")
    if len(given) > MAX_CHARS:
        return False
    given = _normal(given)
    found = read_number(given)
    if found is None:
        inside = [match.group() for match in _NUMBER_IN_TEXT.finditer(given)]
        if not inside or (marked and len(inside) > 1):
            return False
        found = read_number(re.sub(r"[$€£]", "", inside[-1]).replace(" ", ""))
    if found is None:
        return False
    return _near(wanted, found, Fraction(tolerance))


def _near(wanted: Number, found: Number, tolerance: Fraction) -> bool:
    values = [(wanted.value, found.value)]
    if wanted.percent and not found.percent:
        values.append((wanted.value / 100, found.value))
    if found.percent and not wanted.percent:
        values.append((wanted.value, found.value / 100))
    return any(abs(a - b) <= tolerance for a, b in values)


def same_maths(expected: str, given: str) -> bool:
    """Whether two mathematical texts mean the same: equal text, equal number, or equal by sympy.

    `x = 5` is 5. Tuples, intervals and lists are compared part by part, with their brackets; sets
    in braces without order. Raises rl.symbolic.UndecidedError if sympy reaches no verdict in time.
    """
    a, b = _mathematical(expected), _mathematical(given)
    if _squeezed(a) == _squeezed(b):
        return bool(_squeezed(a))
    if max(len(a), len(b)) > MAX_CHARS:
        return False
    parts_a, parts_b = _parts(a), _parts(b)
    if parts_a or parts_b:
        return _same_parts(parts_a, parts_b)
    numbers = read_number(a), read_number(b)
    if numbers[0] and numbers[1]:
        return _near(numbers[0], numbers[1], Fraction(0))
    try:
        node_a, node_b = parse(a), parse(b)
        value_a, value_b = exact_value(node_a), exact_value(node_b)
    except ExpressionError:
        return False
    if value_a is not None and value_b is not None:
        return value_a == value_b
    if _only_names(a) and _only_names(b):
        return False
    return symbolically_equal(a, b)


def _only_names(text: str) -> bool:
    # Words of up to three letters: as products of variables, 'no' would equal 'on'.
    return re.fullmatch(r"[A-Za-z\s]+", text) is not None


def _same_parts(a: "_Parts | None", b: "_Parts | None") -> bool:
    if not a or not b or a.brackets != b.brackets or len(a.items) != len(b.items):
        return False
    if a.brackets != "{}":
        return all(same_maths(x, y) for x, y in zip(a.items, b.items, strict=True))
    left = list(b.items)
    for item in a.items:
        match = next((n for n, other in enumerate(left) if same_maths(item, other)), None)
        if match is None:
            return False
        del left[match]
    return True


class _Parts(NamedTuple):
    brackets: str
    items: tuple[str, ...]


def _parts(text: str) -> _Parts | None:
    """Items at the commas outside all brackets; None if there is no such comma (a number with
    thousands separators has none)."""
    if read_number(text):
        return None
    text = text.replace("\\{", "\\lbrace ").replace("\\}", "\\rbrace ")
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text).strip()
    pairs = {"\\lbrace": "{}", "(": "(", "[": "["}
    opening = next((sign for sign in pairs if text.startswith(sign)), "")
    closing = next((sign for sign in ("\\rbrace", ")", "]") if text.endswith(sign)), "")
    brackets = ""
    if opening and closing and (opening == "\\lbrace") == (closing == "\\rbrace"):
        inside = text[len(opening) : -len(closing)]
        items = _split(inside)
        if items and (len(items) > 1 or opening == "\\lbrace"):
            brackets = "{}" if opening == "\\lbrace" else opening + closing
            return _Parts(brackets, items)
    items = _split(text)
    return _Parts("", items) if items and len(items) > 1 else None


def _split(text: str) -> tuple[str, ...]:
    """Items between commas at depth 0; () if brackets do not balance."""
    items, depth, begin = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return ()
        if character == "," and depth == 0:
            items.append(text[begin:position].strip())
            begin = position + 1
    items.append(text[begin:].strip())
    return tuple(items) if depth == 0 else ()


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
    given = _normal(given).replace("**", "").strip("$ \n")
    match = _CHOICE.fullmatch(given.rstrip("."))
    if match:
        return match[1].upper() == wanted
    return set(_CHOICE_IN_TEXT.findall(given)) == {wanted}


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
    text = unicodedata.normalize("NFKC", text[: 4 * MAX_TEXT]).replace("−", "-")
    return _TEXT_COMMAND.sub(r"\1", text)


def _mathematical(text: str) -> str:
    """Without dollar signs, spacing, degrees, units in \\text{} beside a value, and `x =`."""
    text = text[: 4 * MAX_TEXT].strip().strip("$").strip().rstrip(".")
    text = _DEGREES.sub("", _OPERATOR.sub(r"\\\1 ", text))
    bare = _TEXT_COMMAND.sub("", text).strip()
    text = _normal(bare if bare else text)
    text = text.removeprefix("\\(").removesuffix("\\)").removeprefix("\\[").removesuffix("\\]")
    assigned = _ASSIGNED.fullmatch(text.strip())
    return (assigned[1] if assigned else text).strip()


def _squeezed(text: str) -> str:
    return re.sub(r"\s+|\\[ ,;:!]|\\left(?![A-Za-z])|\\right(?![A-Za-z])", "", text)
