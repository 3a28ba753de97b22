r"""How a mathematical answer is written: the formula in prose, its parts, its spelling.

Everything here turns text into text; whether parts are equal is for `equivalence.py`.
"""

import re
from itertools import accumulate, pairwise
from typing import NamedTuple

from rl.verdict.mathematics.quantities import TEXT_COMMAND, balanced, plain, read_number, tidy
from rl.verdict.words import LETTER, clause, doubtful, last_joined, pattern

SPAN = re.compile(
    r"\$\$?(?=\S)([^$]+?)(?<=\S)(?<!\\)\$\$?(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_OPERATOR = re.compile(r"\\operatorname\s*\{([^{}]*)\}")
_ASSIGNED = re.compile(
    r"(\\?[A-Za-z]{1,10}(?:_\w|_\{\w+\})?\s*(?:\([A-Za-z,\s]{1,9}\)\s*)?)"
    r"(?:=|∈|\\in(?![A-Za-z]))([^=]*)"
)
_RATIO = re.compile(r"(?:((?:\\?[A-Za-z]{1,10}\s*:\s*)+\\?[A-Za-z]{1,10})\s*=)?([^=]*:[^=]*)")
_VARIABLE = re.compile(r"(?!(?:e|i|\\pi|\\infty)$)(?:[A-Za-z]|\\[a-z]{2,7})(?:_\w|_\{\w+\})?")
_POINT = re.compile(r"(?:\\left\s*)?\(([^()]{1,60}?)(?:\\right\s*)?\)\s*=\s*(?=\(|\\left\s*\()")
_RELATION = re.compile(
    r"<=|>=|[<>≤≥≠]|\s!=|\\not\s*=|\\(?:le|leq|leqslant|lt|ge|geq|geqslant|gt|ne|neq)(?![A-Za-z])"
)
_SIGNS = {
    r"\lt": "<", r"\le": "<=", r"\leq": "<=", r"\leqslant": "<=", "≤": "<=", r"\ne": "!=",
    r"\gt": ">", r"\ge": ">=", r"\geq": ">=", r"\geqslant": ">=", "≥": ">=", r"\neq": "!=",
    "≠": "!=", "!=": "!=", r"\not=": "!=",
}  # fmt: skip
_ANDS, _ORS = pattern("and").pattern, pattern("or").pattern
_OR = rf"(?:\\text\s*\{{\s*{_ORS}\s*\}}|{_ORS}|\\(?:lor|vee)(?![A-Za-z])|∨)"
_CONNECTED = re.compile(rf"({_ANDS}|\\(?:land|wedge)(?![A-Za-z])|∧)|{_OR}", re.IGNORECASE)
_AND = re.compile(
    rf",?\s*(?:\\text\s*\{{\s*,?\s*{_ANDS}\s*\}}|{_ANDS}|\\land(?![A-Za-z])|∧|{_OR})\s*"
)
_ANSWER_IS = re.compile(
    rf"(?:{LETTER}|[\s,])*{pattern('answer').pattern}\s*(?:{pattern('is').pattern}|:)\s*:?",
    re.IGNORECASE,
)
_MATRIX = re.compile(
    r"\\begin\{([pbvBV]?|small)(?:matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1(?:matrix|array)\}",
    re.DOTALL,
)
_BLANKS = re.compile(
    r"(\\\\)|(?<=\d)(\s|\\[ ;:]|~)+(?=\d)|\s+|\\[ ,;:!]|~|\\(?:left|right)(?![A-Za-z])"
)
_SPELLINGS = (
    (re.compile(r"\\[dtc](?=frac)"), "\\\\"), (re.compile(r"_\{(\d+|\w)\}"), r"_\1"),
    (re.compile(r"\^\{(\w)\}"), r"^\1"), (re.compile(r"≤|\\leq(?:slant)?(?![A-Za-z])"), r"\\le"),
    (re.compile(r"≥|\\geq(?:slant)?(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\varnothing|∅|\\\{\\\}|^\{\}$"), r"\\emptyset"), (re.compile("∪"), r"\\cup"),
)  # fmt: skip


class Parts(NamedTuple):
    """What an answer consists of. Parts with other brackets are never equal."""

    brackets: str
    """"{}", "," and "cup": a set, a list without brackets, a union, without order. Brackets of a
    tuple or an interval, "matrix" with the lengths of its rows, "=" or ":" with names: in this
    order."""
    items: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Of x = 1, y = 2: x and y."""
        return self.brackets[1:].split(",") if self.brackets[0] == "=" else []

    @property
    def letters(self) -> set[str]:
        """Names without an index: x alone of x_1 = 1, x_2 = 2, which are roots, in any order."""
        return {name.partition("_")[0] for name in self.names}


def alone(text: str) -> Parts:
    """A set of one."""
    return Parts("{}", (text,))


def parts(text: str) -> Parts | None:
    r"""Rows of a matrix, members of a union, both values of \pm, or items at the commas outside all
    brackets; None for anything else (a number with thousands separators has no such comma)."""
    if read_number(text):
        return None
    assigned = _ASSIGNED.fullmatch(text)
    text = tidy(assigned[2]) if assigned and re.search(r",|\\begin", assigned[2]) else text
    text = text.replace("\\{", "\\lbrace ").replace("\\}", "\\rbrace ")
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", text).strip()
    if "\\begin" in text:
        return _matrix(text)
    union = re.split(r"\\cup(?![A-Za-z])|∪", text)
    if len(union) > 1:
        return Parts("cup", tuple(map(str.strip, union)))
    if len(re.findall(r"\\pm(?![A-Za-z])|±", text)) == 1 and "," not in text:
        return Parts("{}", tuple(re.sub(r"\\pm(?![A-Za-z])|±", sign, text) for sign in "+-"))
    if re.match(r"[\[\]].*[,;].*[\[\]]$", text):  # ]1;2[ is (1;2)
        text = ("(" if text[0] == "]" else "[") + text[1:-1] + (")" if text[-1] == "[" else "]")
    pairs = {"\\lbrace": "{}", "(": "(", "[": "["}
    opening = next((sign for sign in pairs if text.startswith(sign)), "")
    closing = next((sign for sign in ("\\rbrace", ")", "]") if text.endswith(sign)), "")
    if opening and closing and (opening == "\\lbrace") == (closing == "\\rbrace"):
        items = _split(text[len(opening) : -len(closing)])
        if items and (len(items) > 1 or opening == "\\lbrace"):
            return Parts("{}" if opening == "\\lbrace" else opening + closing, items)
    items, ratio = _split(text), _RATIO.fullmatch(text)
    if len(items) > 1:
        return _by_name(items)
    ratio_items = tuple(map(str.strip, ratio[2].split(":"))) if ratio else ()
    return Parts(f":{ratio[1] or ''}", ratio_items) if ratio and all(ratio_items) else None


def _by_name(items: tuple[str, ...]) -> Parts:
    """A list without brackets: x = 1, x = 2 are values of one name; x = 1, y = 2 of several."""
    named = [match for match in map(_ASSIGNED.fullmatch, items) if match]
    names = [re.sub(r"[{}\s]", "", match[1]) for match in named]
    if len(set(names)) < 2 or len(named) < len(items):
        return Parts(",", items)
    return Parts("=" + ",".join(names), tuple(match[2] for match in named))


def _matrix(text: str) -> Parts | None:
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1].strip()
    match = _MATRIX.fullmatch(text)
    if not match:
        return None
    rows = [row.split("&") for row in re.split(r"\\\\", match[2]) if row.strip()]
    kind = "determinant" if match[1] == "v" else "matrix"
    shape = ",".join(str(len(row)) for row in rows)
    return Parts(f"{kind} {shape}", tuple(item.strip() for row in rows for item in row))


def _split(text: str) -> tuple[str, ...]:
    """Items between semicolons, or without one between commas, at depth 0; () if brackets do not
    balance."""
    if not balanced(text):
        return ()
    depths = list(accumulate((c in "([{") - (c in ")]}") for c in text))
    at = {sign: [n for n, c in enumerate(text) if c == sign and not depths[n]] for sign in ";,"}
    ends = [-1, *(at[";"] or at[","]), len(text)]
    return tuple(text[begin + 1 : end].strip() for begin, end in pairwise(ends))


def inequality(text: str) -> Parts | None:
    r"""Sides of a chain such as `0 < x \le 5`, the smallest first, with its signs; None if it is
    none. Sides of `x \ne 5` have no order."""
    sides = [side.strip() for side in _RELATION.split(text)]
    if len(sides) < 2 or not all(sides) or "=" in "".join(sides):
        return None
    signs = [re.sub(r"\s", "", sign) for sign in _RELATION.findall(text)]
    signs = [_SIGNS.get(sign, sign) for sign in signs]
    if signs == ["!="]:
        return Parts("{} !=", tuple(sides))
    if {sign[0] for sign in signs} == {">"}:
        sides, signs = sides[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
    return Parts(" ".join(signs), tuple(sides)) if {sign[0] for sign in signs} == {"<"} else None


def interval(text: str) -> tuple[str, str] | None:
    """The variable and the values of an inequality, or of several joined by `or`, as intervals:
    ("x", "(1,\\infty)") of `x > 1`. None for a text that is none."""
    names, intervals = set(), []
    for piece in re.split(_OR, text):
        chain = inequality(mathematical(piece))
        if not chain or "," in piece or len(chain.items) > 3:
            return None
        sides, signs = list(chain.items), chain.brackets.split()
        left = _VARIABLE.fullmatch(sides[0])
        if signs[-1] == "!=":
            name, other = sides if left else sides[::-1]
            intervals.append(f"(-\\infty,{other})\\cup({other},\\infty)")
        else:
            if len(sides) == 2:
                sides = ["-\\infty", *sides] if left else [*sides, "\\infty"]
                signs = ["<", *signs] if left else [*signs, "<"]
            low, name, high = sides
            intervals.append(f"{'(['['=' in signs[0]]}{low},{high}{')]'['=' in signs[1]]}")
        names.add(name)
    name = names.pop()
    known = not names and _VARIABLE.fullmatch(name)
    return (name, "\\cup".join(intervals)) if known else None


def other_connective(a: str, b: str) -> bool:
    """Whether one of two answers with inequalities joins them by `and`, the other by `or`."""
    joined = [
        {bool(match[1]) for match in _CONNECTED.finditer(text)}
        for text in (a, b)
        if _RELATION.search(text)
    ]
    return len(joined) == 2 and all(joined) and joined[0] != joined[1]


def formula(text: str, marked: bool) -> str:
    """The formula of prose, see `same_maths`; a text without prose, or one that denies the formula
    or names another, is itself."""
    said = _ANSWER_IS.match(text)
    text = text[said.end() if said else 0 :].strip()
    spans = [(*span.span(), next(filter(None, span.groups()))) for span in SPAN.finditer(text)]
    around = SPAN.sub(" ", text)
    if not spans or not re.search(LETTER, around) or (marked and len(spans) > 1):
        return text
    _, answer = last_joined(text, spans)
    alone = answer == spans[-1][2]
    return text if alone and doubtful(*clause(text, *spans[-1][:2])) else answer


def mathematical(text: str) -> str:
    r"""Without dollar signs, spacing, degrees, and words in \text{} beside a value."""
    text = plain(text).lstrip("$ \n").rstrip("$. \n")
    text = _AND.sub(",", _OPERATOR.sub(r"\\\1 ", text))
    bare = tidy(text)
    text = bare if bare else TEXT_COMMAND.sub(r"\1", text)
    text = text.removeprefix("\\(").removesuffix("\\)").strip()
    point = _POINT.match(text)
    if point:  # (x, y) = (1, 2), but not (y, x) = (1, 2)
        names = [name.strip(" \\") for name in point[1].split(",")]
        if names == sorted(set(names)) and all(map(str.isalpha, names)):
            return text[point.end() :]
    return text


def unassigned(text: str) -> str:
    """What follows `x =`, `f(x) =` or `x in`, or stands before `= x`, if that is all there is."""
    assigned, turned = _ASSIGNED.fullmatch(text), text.rpartition("=")
    if not assigned and "=" not in turned[0] and _VARIABLE.fullmatch(turned[2].strip()):
        return turned[0].strip() or text
    return assigned[2].strip() if assigned else text


def squeezed(text: str) -> str:
    """Without white space, but between digits, and in one spelling where LaTeX has several."""

    def replaced(match: re.Match[str]) -> str:
        return match[1] or (" " if match[2] else "")

    text = _BLANKS.sub(replaced, text)
    for found, spelling in _SPELLINGS:
        text = found.sub(spelling, text)
    return text
