r"""Numbers as people and models write them: digits, fractions, powers of ten, units, words around.

`read_number` reads a number that stands alone. `core` takes off what may stand around one without
changing it: prose, a unit, a currency. What changes the value (million, half, not, ^, !, a letter
that may be a variable) stays, so that 5 million is not 5 and 3i not 3.
"""

import re
import unicodedata
from fractions import Fraction
from itertools import pairwise
from string import ascii_letters
from typing import NamedTuple

from rl.verdict.mathematics.expressions import (
    CONSTANTS,
    FUNCTIONS,
    GREEK,
    MAX_CHARS,
    ExpressionError,
    Node,
    exact_value,
    parse,
)
from rl.verdict.words import LETTER, UNSPACED, changes, entries, pattern, rewritten, scales

_MAX_POWER_OF_TEN = 1000

_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "₀₁₂₃₄₅₆₇₈₉"
_VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_SHIFTED = re.compile(f"([{_RAISED}]+)|([{_LOWERED}]+)|([{_VULGAR}])")
_SEPARATOR = r"(?:,\s*\\!\s*|\{\\?,\}|\\[,!;: ]|[\u00a0\u2009\u202f'’~])"
_GROUPED = re.compile(rf"(?<![\d.,])([1-9]\d{{0,2}})((?:{_SEPARATOR}\d{{3}})++)(?!\d)")
_SPACED = re.compile(
    r"(?<![\d.,])(?<!\d )[1-9]\d{0,2}(?: \d{3})++(?! ?[\d/])"
    r"|(?<![\d.,])[1-9]\d{0,2}(?:\.\d{3}){2,}+(?![\d.])"
)
_BRACED_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)")
_WIDE = str.maketrans({
    "，": ", ", "、": ", ", "。": ". ", "∶": ":", "￥": "¥", "º": "°", "㎡": "m^2", "㎠": "cm^2",
    "㎢": "km^2", "㎥": "m^3", **dict.fromkeys("【】∴“”「」『』", " "),
})  # fmt: skip
_SIGNS = str.maketrans({"−": "-", "–": "-", "⁄": "/", "’": "'", "⩽": "≤", "⩾": "≥"})
_MICRO = re.compile(r"\\mu\s*\\(?:text|mathrm|rm)\s*\{\s*([A-Za-z]{1,2})\s*\}")
_OHM = re.compile(r"(?:\\(?:text|mathrm)\s*\{\s*[kM]\s*\}\s*)?\\Omega(?![A-Za-z])")

TEXT_COMMAND = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|up|normal)?|emph|mathrm|[mh]box)\s*\{([^{}]*)\}"
)
_COLOR = r"(?:textcolor|color(?:box)?)\s*(?:\[\w{1,9}\]\s*)?\{[^{}]{0,40}\}"
_FONT = (
    r"(?:math(?:bf|it|sf|tt)|boldsymbol|bm|pmb|bf(?:series)?|it(?:shape)?|rm|sf|tt|em|underline|"
    r"boxed|fbox|ensuremath|tiny|scriptsize|footnotesize|small|normalsize|[lL]arge|LARGE|[hH]uge|"
    r"displaystyle|textstyle)(?![A-Za-z])"
)
_STYLE = rf"\\(?:{_COLOR}|{_FONT})\s*"
_STYLED = re.compile(
    rf"(?<![\\A-Za-z_^])\{{\s*(?:{_STYLE})+([^{{}}\\]*)\}}(?!\s*[\^_])"
    rf"|{_STYLE}(?:\{{([^{{}}\\]*)\}}(?!\s*[\^_]))?"
)
_SKIPS = re.compile(
    r"(\\\\)\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\]|\\[hv]space\*?\{[^{}]*\}"
    r"|\\[bB]igg?[lrm]?(?![A-Za-z])|[\u200b-\u200d\u2060\ufeff]"
)
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|°|\\degree(?![A-Za-z])")
_SPACING = re.compile(r"(\\\\)|\\[ ,;:]|~|\\q?quad(?![A-Za-z])|\\!")
_ANGLES = {
    "degrees": re.compile(f"{_DEGREES.pattern}|{pattern('degrees').pattern}", re.IGNORECASE),
    "radians": pattern("radians"),
    "minutes": re.compile(r"\d\s*(?:['′″]|\^\s*\{?\s*\\prime)"),
}
_ORDINAL = re.compile(
    r"(?<=\d)\s*\^?\s*\{?\s*(?:\\(?:text|mathrm)\s*\{\s*)?(?:st|nd|rd|th)\b\s*\}{0,2}"
)
_CURRENCY = re.compile(
    r"^([-+]?)\s*(?:(?:[A-Z]{2})?\\?\$|\\(?:pounds|euro|yen)(?![A-Za-z])|[€£¥₽₹₩])"
    r"\s*(?=[-+]?[\d.\\])"
)

_SCIENTIFIC = re.compile(
    r"([-+]?[\d.,]{1,200})(?:[eE]|\s*(?:\\times|\\cdot|\\ast|[*x×·])\s*10\s*(?:\^|\*\*))\s*"
    r"(?:\{\s*([-+]?\d{1,9})\s*\}|([-+]?\d{1,9}))"
)
_MIXED = re.compile(r"([-+]?)\s*(\d{1,100})\s+(\d{1,100})\s*/\s*(\d{1,100})")
_REPEATING = re.compile(
    r"([-+]?)(\d{0,100})\.(\d{0,100})\\(?:overline|bar)\s*(?:\{\s*(\d{1,100})\s*\}|(\d))"
)

_WORD = re.compile(rf"{LETTER}+(?:'[a-z]+)?")
UNITS = frozenset(entries("units"))
_POWER = r"\s*\^\s*(?:\d|\{\s*-?\s*\d\s*\})"
_UNIT_POWER = re.compile(
    rf"(?<![A-Za-z\\])({'|'.join(entries('units'))}|[a-z]{{4,12}})(?![A-Za-z]){_POWER}"
)
_OTHER = rf"(?![{UNSPACED}\u0370-\u03ff])"
_BEGIN = r"(?<![\\A-Za-z])"
_FOREIGN = re.compile(
    rf"(?:(?<={LETTER})\s*(?:/|·|\\cdot)\s*)?"
    rf"(?:[{UNSPACED}]+|{_BEGIN}(?:μ[A-Za-z]{{1,2}}|[kM]?Ω)(?![A-Za-z])"
    rf"|{_BEGIN}(?=[A-Za-z']*{_OTHER}[^\W\d_A-Za-z])(?:{_OTHER}(?:{LETTER}|'))+)"
    rf"(?:[.!](?!\d))?(?:{_POWER})?"
)
"""A word with other letters than a-z (and Greek), or a unit with a Greek one, and its power."""
_NAMES = frozenset((*FUNCTIONS, *CONSTANTS, *GREEK))


class Number(NamedTuple):
    """An exact value. percent: it was written with a percent sign, which `value` ignores."""

    value: Fraction
    percent: bool


def plain(text: str) -> str:
    """Unicode in its compatibility form, raised digits as powers, ½ as 1/2, any minus as -; without
    colours, fonts, sizes and frames."""

    def replaced(match: re.Match[str]) -> str:
        known = unicodedata.normalize("NFKC", match.group())
        return f"^{{{known}}}" if match[1] else f"_{{{known}}}" if match[2] else f" {known}"

    text = _GROUPED.sub(lambda match: match[1] + re.sub(r"\D", "", match[2]), text)
    text = _SHIFTED.sub(replaced, _BRACED_COMMA.sub(".", text).translate(_WIDE))
    text = _OHM.sub(r"\\text{Ω}", _MICRO.sub(r"\\text{μ\1}", text))
    text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    return _STYLED.sub(_unstyled, _SKIPS.sub(lambda match: match[1] or " ", text))


def ungrouped(text: str) -> str:
    """Groups of three digits without what keeps them apart in Russian, French, Spanish, German:
    `14 916`, `1.234.567`. Not for lists of numbers between spaces."""
    return _SPACED.sub(lambda match: re.sub(r"\D", "", match.group()), text)


def _unstyled(match: re.Match[str]) -> str:
    r"""What a command of style was applied to: words in \text{}, all but a letter in braces."""
    content = match[1] if match[1] is not None else match[2]
    if content is None:
        return " "
    words = _WORD.findall(content)
    if re.fullmatch(r"\s*[A-Za-z]\s*", content):
        return f" {content}"
    if words and re.fullmatch(r"[A-Za-z().,:\s]+", content):  # xy is a product, and (x) a factor
        upright = "\\rm" in match.group() or any(len(word) > 3 for word in words)
        if upright or content.strip() in UNITS or re.fullmatch(r"\s*\([A-E]\)\s*", content):
            return f"\\text{{{content}}}"
    # 2 beside a red 5 is 25, where 2{5} would be a product
    before = match.string[max(0, match.start() - 8) : match.start()]
    beside = re.search(r"[\d}]\s*\Z", before) and re.match(r"\s*[\d.]", content)
    return content if beside else f"{{{content}}}"


def other_angle(expected: str, given: str) -> bool:
    """Whether one of two texts (see `plain`) is in degrees and the other in radians, or one alone
    in minutes. Without a word for them, a multiple of pi is expected in radians."""
    a, b = (
        {unit for unit, known in _ANGLES.items() if known.search(text)}
        for text in (expected, given)
    )
    if re.search(r"\\pi(?![A-Za-z])|π", expected) and "degrees" not in a:
        a.add("radians")
    if "degrees" in a | b and "minutes" in a ^ b:
        return True
    return any("degrees" in x and "radians" in y for x, y in ((a, b), (b, a)))


def read_number(text: str) -> Number | None:
    r"""A number written out, or None: integer, decimal, fraction, mixed number, power-of-ten form.

    `1,234.5`, `1{,}234`, `-3/4`, `\frac{3}{4}`, `1 1/2`, `1.5e-3`, `1.5 \times 10^{-3}`, `50\%`,
    `\$5`, `-\$5`, `0.1\overline{6}`. Sums, products and powers are none: an answer must not be the
    question.
    """
    text = text.strip().rstrip(".").strip("$ ").replace("\\%", "%")
    percent = text.endswith("%")
    text = _CURRENCY.sub(r"\1", text.removesuffix("%").strip("$€£¥₽₹₩ "))
    try:
        value = _written_number(text) if text and len(text) <= MAX_CHARS else None
    except ExpressionError:
        value = None
    return None if value is None else Number(value, percent)


def _written_number(text: str) -> Fraction | None:
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
    if match := _REPEATING.fullmatch(text):
        return _repeating(match[1], match[2], match[3], match[4] or match[5])
    if text[0] in "([":  # (1,234) is a pair
        return None
    node = parse(text)
    return exact_value(node) if is_written_number(node) else None


def _repeating(sign: str, whole: str, first: str, period: str) -> Fraction:
    nines = Fraction(int(period), 10 ** len(period) - 1) / 10 ** len(first)
    value = Fraction(int((whole + first) or "0"), 10 ** len(first)) + nines
    return -value if sign == "-" else value


def is_written_number(node: Node) -> bool:
    """Whether a tree is a number as written: digits, a quotient of two, or a mixed number, each
    with one sign."""
    if node.kind == "neg":
        return node.parts[0].kind != "neg" and is_written_number(node.parts[0])
    if node.kind not in "+*":
        return node.kind == "num"
    first, last = node.parts[0], node.parts[-1]
    if len(node.parts) != 2 or last.kind != ("*" if node.kind == "+" else "inv"):
        return False
    if node.kind == "+":
        return first.kind == "num" and is_written_number(last)
    parts = (first, last.parts[0])
    return all((part.parts[0] if part.kind == "neg" else part).kind == "num" for part in parts)


def decimal_point(text: str) -> str:
    """3,14 as 3.14 and 1.234,5 as 1234.5 in a text that is no list; 1,234 stays."""
    if text.count(",") != 1 or re.search(r"[(\[;]|\\\{|(?<![\d.])[1-9]\d{0,2},\d{3}(?!\d)", text):
        return text
    whole = r"(\d{1,3}(?:\.\d{3})+|(?<!\.)\d+)"
    return re.sub(
        rf"(?<!\d){whole},(?=\d)(?!\d+\.)", lambda match: match[1].replace(".", "") + ".", text
    )


def core(text: str) -> tuple[str, int]:
    r"""What stands in a text (see `plain`) without the words, unit and currency around it, and the
    factor that a word such as million gives it.

    ("5", 1) of `so 5\text{ cm}^2`, `5 cm`, `\$5 an hour`; ("5", 10**6) of `5 million people`. A
    text with anything else around is itself, with factor 1: `3i`, `x-3`, `5k`, `5 or 6`, `not 5`.
    """
    text = _UNIT_POWER.sub(r"\1", tidy(text))
    text = re.sub(r"(?<=[A-Za-z])\s*(?:\\cdot|[·*])\s*(?=[A-Za-z])|(?<=[A-Za-z])\.\s", " ", text)
    if changes(text):
        return text, 1
    inner = text.lstrip(ascii_letters + " \n\t,:;'\"*")
    before = text[: len(text) - len(inner)]
    middle = inner.rstrip(ascii_letters + " \n\t,:;.'\"*!()/-[]")
    after = inner[len(middle) :]
    while after.lstrip()[:1] in ("!", ")", "]"):  # of the number: a factorial, closing brackets
        after = after.lstrip()
        middle, after = middle + after[0], after[1:]
    if not middle or middle.endswith("\\") or not balanced(after) or not _is_lead(before):
        return text, 1
    words = _without_articles(_WORD.findall(after))
    factor = scales().get(words[0].lower(), 1) if words else 1
    attached = after[:1].isalpha()
    if not all(
        _is_prose(word, spaced=number > 0 or not attached)
        for number, word in enumerate(words[1:] if factor > 1 else words)
    ):
        return text, 1
    return _CURRENCY.sub(r"\1", middle.strip()), factor


def tidy(text: str) -> str:
    r"""A text (see `plain`) without degrees, spacing commands, dollar signs around it, and \text{}
    that changes nothing, `\text{ cm}^2` say; what changes something is left without \text."""

    def spoken(match: re.Match[str]) -> str:
        before, content, power = match.groups(default="")
        words = _WORD.findall(content)
        loud = re.search(r"[\d^=]", content) or _FOREIGN.search(content) or changes(content)
        variable = re.fullmatch(r"\s*[A-Za-z]\s*", content) and content.strip() not in UNITS
        if words and not (loud or variable or any(word.lower() in scales() for word in words)):
            begin, end = match.span()  # 3 hours 5 minutes are no 3 minutes 5 hours
            apart = re.search(r"\d\s*\Z", text[:begin]) and re.match(r"\s*\d", text[end:])
            return f" {words[0][0]} " if apart else " "
        return f"{before} {content} {power}"

    text = _ORDINAL.sub("", text)
    text = _DEGREES.sub("", _SPACING.sub(lambda match: match[1] or " ", text))
    powers = rf"(\\cdot\s*|/\s*)?{TEXT_COMMAND.pattern}({_POWER})?"
    text = _unspoken(re.sub(powers, spoken, text).strip())
    text = re.sub(r"\\[dt]?frac\s*\{\s*\}\s*\{\s*\}", " ", text).strip()  # of units alone
    while _is_group(text):
        text = text[1:-1].strip()
    for begin, end in (("\\(", "\\)"), ("\\[", "\\]"), ("**", "**")):
        text = text.removeprefix(begin).removesuffix(end) if text.endswith(end) else text
    return re.sub(r"\s*(?:\\cent(?![A-Za-z])|[¢′″])", " ", text).strip().strip("$").strip()


def _unspoken(text: str) -> str:
    """A text with signs for words where it can be (see `words.rewritten`), and without words of
    other letters than a-z if they change nothing and are not all that keeps numbers apart."""
    text = rewritten(text)
    found = list(_FOREIGN.finditer(text))
    pieces = [piece.strip() for piece in _FOREIGN.split(text) if piece.strip()]
    apart = any(a[-1].isdigit() and b[0].isdigit() for a, b in pairwise(pieces))
    if not found or apart or changes(text) or any(_may_be_variable(match) for match in found):
        return text
    joined = _FOREIGN.sub(lambda match: ", " if pattern("and").search(match[0]) else " ", text)
    return joined.strip(" ,:=")


def _may_be_variable(match: re.Match[str]) -> bool:
    """Whether a letter alone after a value is no unit: a Cyrillic x, say."""
    word, before = match[0].strip(" ./·"), match.string[: match.start()].rstrip()
    alone = re.fullmatch(f"[^{UNSPACED}]", word) and word not in UNITS
    return bool(alone and re.search(r"[\d)}]\Z", before))


def _is_group(text: str) -> bool:
    """Whether the brace at the beginning is closed by the one at the end."""
    inside = re.fullmatch(r"\{(.*)(?<!\\)\}", text, re.DOTALL)
    return inside is not None and balanced(re.sub(r"\\[{}]", "", inside[1]))


def balanced(text: str) -> bool:
    """Whether every bracket, of any kind, has its partner."""
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _is_lead(text: str) -> bool:
    """Whether words before a number change nothing; the last one must stand apart from it."""
    words = _WORD.findall(text)
    if not words:
        return True
    if text[-1:].isalpha():
        return False
    return all(_is_prose(word, spaced=True) for word in _without_articles(words))


def _without_articles(words: list[str]) -> list[str]:
    # the last word stays: 3a is a product
    return [word for word in words[:-1] if word not in ("a", "A", "I")] + words[-1:]


def _is_prose(word: str, spaced: bool) -> bool:
    """Whether a word beside a number is a unit or prose: one that is known as a unit, one of four
    letters or more, or (spaced) of two or three with a vowel, as men and boxes are."""
    lower = word.lower()
    if lower in scales():
        return False
    if word in UNITS:
        return True
    if word in _NAMES or (lower[:-1] in FUNCTIONS and lower[-1] in "xyzt"):  # sinx
        return False
    if len(word) > 3:
        return True
    return spaced and len(word) > 1 and re.search("[aeiouyAEIOUY]", word) is not None
