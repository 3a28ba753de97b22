r"""Numbers as people and models write them: digits, fractions, powers of ten, units, words around.

`read_number` reads a number that stands alone. `core` takes off what may stand around one without
changing it: prose, a unit, a currency. What changes the value (million, half, not, ^, !, a letter
that may be a variable) stays, so that 5 million is not 5 and 3i not 3.
"""

import re
import unicodedata
from fractions import Fraction
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

_MAX_POWER_OF_TEN = 1000

_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "₀₁₂₃₄₅₆₇₈₉"
_VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_SHIFTED = re.compile(f"([{_RAISED}]+)|([{_LOWERED}]+)|([{_VULGAR}])")
_NARROW_SPACE = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")
_SIGNS = str.maketrans({"−": "-", "–": "-", "⁄": "/", "’": "'", "º": "°"})

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
_RADIANS = re.compile(r"(?<![A-Za-z])rad(?:ian)?s?(?![A-Za-z])")
_IN_DEGREES = re.compile(rf"{_DEGREES.pattern}|(?<![A-Za-z])deg(?:rees?)?(?![A-Za-z])")
_ORDINAL = re.compile(
    r"(?<=\d)\s*\^?\s*\{?\s*(?:\\(?:text|mathrm)\s*\{\s*)?(?:st|nd|rd|th)\b\s*\}{0,2}"
)
_CURRENCY = re.compile(
    r"^([-+]?)\s*(?:\\\$|\\(?:pounds|euro)(?![A-Za-z])|[$€£¥])\s*(?=[-+]?[\d.\\])"
)

_SCIENTIFIC = re.compile(
    r"([-+]?[\d.,]{1,200})(?:[eE]|\s*(?:\\times|\\cdot|\\ast|[*x×])\s*10\s*(?:\^|\*\*))\s*"
    r"(?:\{\s*([-+]?\d{1,9})\s*\}|([-+]?\d{1,9}))"
)
_MIXED = re.compile(r"([-+]?)\s*(\d{1,100})\s+(\d{1,100})\s*/\s*(\d{1,100})")
_PLAIN = re.compile(r"[-+]?\d{1,200}")
_REPEATING = re.compile(
    r"([-+]?)(\d{0,100})\.(\d{0,100})\\(?:overline|bar)\s*(?:\{\s*(\d{1,100})\s*\}|(\d))"
)

_UNIT_WORDS = (
    "mm cm dm m km in ft yd mi mg g kg lb lbs oz ml mL dl cl l L s sec min h hr hrs yr yrs mph kph "
    "kmh ms ns V W kW J kJ N Pa Hz C F mol rad deg sq cu pt qt gal ha cc rpm USD Rs ct pts "
    "mon tue wed thu fri sat sun am pm"
)
"""Words of less than four letters, or without vowels, that are a unit beside a number."""
_SCALES = {
    "dozen": 12, "dozens": 12, "hundred": 100, "hundreds": 100, "thousand": 10**3,
    "thousands": 10**3, "million": 10**6, "millions": 10**6, "billion": 10**9, "billions": 10**9,
    "trillion": 10**12, "trillions": 10**12,
}  # fmt: skip
_CHANGING_WORDS = (
    "or half halves third thirds fourths fifth fifths sixths sevenths eighths ninths tenth tenths "
    "hundredth hundredths thousandth thousandths root reciprocal twice thrice squared cubed "
    "factorial not no isn't aren't plus minus negative divided multiplied modulo mod power "
    "quadrillion lakh crore score bn mln"
)
"""Words that say another value than the number beside them."""
_CHANGING_PHRASE = re.compile(
    r"\b(?:square|cube|double|triple|quadruple|log|logarithm|inverse|opposite)\s+(?:of\b|[\d\\])"
    r"|\b(?:times|point)\s+(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|a|an)\b"
    r"|\b(?:less|more|greater|larger|smaller|fewer|other|up)\s+(?:than|to)\s*\W{0,3}\d"
)
_NEGATIVE = re.compile(r"\b(?:negative|minus)\s+(?=[\d.\\])", re.IGNORECASE)
_PERCENT = re.compile(r"\s*\b(?:percent|per cent|percentage points?)\b", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_UNIT_POWER = re.compile(
    rf"(?<![A-Za-z\\])({'|'.join(_UNIT_WORDS.split())}|[a-z]{{4,12}})(?![A-Za-z])"
    r"\s*\^\s*(?:[1-4]|\{\s*-?\s*[1-4]\s*\})"
)
_UNITS, _CHANGING = frozenset(_UNIT_WORDS.split()), frozenset(_CHANGING_WORDS.split())
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

    text = _SHIFTED.sub(replaced, _NARROW_SPACE.sub("", text).replace("º", "°"))
    text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    return _STYLED.sub(_unstyled, _SKIPS.sub(lambda match: match[1] or " ", text))


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
        if upright or content.strip() in _UNITS or re.fullmatch(r"\s*\([A-E]\)\s*", content):
            return f"\\text{{{content}}}"
    # 2 beside a red 5 is 25, where 2{5} would be a product
    before = match.string[max(0, match.start() - 8) : match.start()]
    beside = re.search(r"[\d}]\s*\Z", before) and re.match(r"\s*[\d.]", content)
    return content if beside else f"{{{content}}}"


def other_angle(expected: str, given: str) -> bool:
    """Whether one of two texts (see `plain`) is in degrees and the other in radians. Without a word
    for them, a multiple of pi is expected in radians."""
    degrees = [bool(_IN_DEGREES.search(text)) for text in (expected, given)]
    radians = [bool(_RADIANS.search(text)) for text in (expected, given)]
    if re.search(r"\\pi(?![A-Za-z])|π", expected) and not degrees[0]:
        radians[0] = True
    return (degrees[0] and radians[1]) or (degrees[1] and radians[0])


def read_number(text: str) -> Number | None:
    r"""A number written out, or None: integer, decimal, fraction, mixed number, power-of-ten form.

    `1,234.5`, `1{,}234`, `-3/4`, `\frac{3}{4}`, `1 1/2`, `1.5e-3`, `1.5 \times 10^{-3}`, `50\%`,
    `\$5`, `-\$5`, `0.1\overline{6}`. Sums, products and powers are none: an answer must not be the
    question.
    """
    text = text.strip().rstrip(".").strip("$ ").replace("\\%", "%")
    percent = text.endswith("%")
    text = _CURRENCY.sub(r"\1", text.removesuffix("%").strip("$€£¥ "))
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
    if match := _REPEATING.fullmatch(text):
        return _repeating(match[1], match[2], match[3], match[4] or match[5])
    if text[0] in "([":  # (1,234) is a pair
        return None
    node = parse(text)
    return exact_value(node) if _is_written_number(node) else None


def _repeating(sign: str, whole: str, first: str, period: str) -> Fraction:
    nines = Fraction(int(period), 10 ** len(period) - 1) / 10 ** len(first)
    value = Fraction(int((whole + first) or "0"), 10 ** len(first)) + nines
    return -value if sign == "-" else value


def _is_written_number(node: Node) -> bool:
    if node.kind == "neg":
        return node.parts[0].kind != "neg" and _is_written_number(node.parts[0])
    kinds = [part.kind for part in node.parts]
    if node.kind == "*" and kinds in (["num", "inv"], ["neg", "inv"]):
        return {part.parts[0].kind for part in node.parts if part.parts} <= {"num"}
    mixed = node.kind == "+" and kinds == ["num", "*"]
    return node.kind == "num" or (mixed and _is_written_number(node.parts[1]))


def core(text: str) -> tuple[str, int]:
    r"""What stands in a text (see `plain`) without the words, unit and currency around it, and the
    factor that a word such as million gives it.

    ("5", 1) of `so 5\text{ cm}^2`, `5 cm`, `\$5 an hour`; ("5", 10**6) of `5 million people`. A
    text with anything else around is itself, with factor 1: `3i`, `x-3`, `5k`, `5 or 6`, `not 5`.
    """
    text = _UNIT_POWER.sub(r"\1", _NEGATIVE.sub("-", _PERCENT.sub("%", tidy(text))))
    text = re.sub(r"(?<=[A-Za-z])\s*(?:\\cdot|[·*])\s*(?=[A-Za-z])|(?<=[A-Za-z])\.\s", " ", text)
    if _CHANGING_PHRASE.search(text):
        return text, 1
    inner = text.lstrip(_LETTERS + " \n\t,:;'\"*")
    before = text[: len(text) - len(inner)]
    middle = inner.rstrip(_LETTERS + " \n\t,:;.'\"*!()/-[]")
    after = inner[len(middle) :]
    while after.lstrip()[:1] in ("!", ")", "]"):  # of the number: a factorial, closing brackets
        after = after.lstrip()
        middle, after = middle + after[0], after[1:]
    if not middle or middle.endswith("\\") or not _balanced(after) or not _is_lead(before):
        return text, 1
    words = _without_articles(_WORD.findall(after))
    factor = _SCALES.get(words[0].lower(), 1) if words else 1
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
        known = {word.lower() for word in words}
        loud = re.search(r"[\d^=]", content) or _CHANGING_PHRASE.search(content)
        variable = re.fullmatch(r"\s*[a-z]\s*", content) and content.strip() not in _UNITS
        silent = words and not loud and not variable
        if silent and not known & (_CHANGING | _SCALES.keys()):
            return " "
        return f"{before} {content} {power}"

    text = re.sub(r"(?<=\d)\\[,!](?=\d{3}(?!\d))|(?<=\d),\\!(?=\d{3}(?!\d))", ",", text)
    text = _ORDINAL.sub("", text)
    text = _DEGREES.sub("", _SPACING.sub(lambda match: match[1] or " ", text))
    powers = rf"(\\cdot\s*|/\s*)?{TEXT_COMMAND.pattern}(\s*\^\s*(?:\d|\{{\s*-?\d\s*\}}))?"
    text = re.sub(powers, spoken, text).strip()
    text = re.sub(r"\\[dt]?frac\s*\{\s*\}\s*\{\s*\}", " ", text).strip()  # of units alone
    while _is_group(text):
        text = text[1:-1].strip()
    for begin, end in (("\\(", "\\)"), ("\\[", "\\]"), ("**", "**")):
        text = text.removeprefix(begin).removesuffix(end) if text.endswith(end) else text
    return re.sub(r"\s*(?:\\cent(?![A-Za-z])|[¢′″])", " ", text).strip().strip("$").strip()


def _is_group(text: str) -> bool:
    """Whether the brace at the beginning is closed by the one at the end."""
    if not re.fullmatch(r"\{.*(?<!\\)\}", text, re.DOTALL):
        return False
    depth = 0
    for brace in re.finditer(r"(?<!\\)[{}]", text):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return brace.end() == len(text)
    return False


def _balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character in "([") - (character in ")]")
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
    if lower in _CHANGING or lower in _SCALES or word in _NAMES:
        return False
    if word in _UNITS or len(word) > 3:
        return True
    return spaced and len(word) > 1 and re.search("[aeiouyAEIOUY]", word) is not None
