"""The words around an answer, of all languages at once: `words.toml` as regular expressions.

A language is taught there. Patterns are words without nesting, so that time stays bounded.
"""

import functools
import operator
import pathlib
import re
import tomllib
from typing import Any

UNSPACED = (
    "\u1100-\u11ff\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff\u3400-\u9fff\uac00-\ud7af"
    "\U00020000-\U0003ffff"
)
"""Letters of scripts in which words do not stand apart, or (Korean) grow endings."""
LETTER = r"[^\W\d_]"
_KEYS = (
    "answer", "choice", "is", "and", "or", "to", "not", "wrong", "unsure", "changes", "harmless",
    "units", "yes", "no", "true", "false", "degrees", "radians", "measures", "scales", "rewrite",
)  # fmt: skip
_BREAK = re.compile(r"[;!?\n]|(?<!\d),|,(?!\d)|\.(?!\d)")
_MARKUP = r"\\(?:q?quad|text\b|[\[\]();, ])|[\s$.,;:&{}*/~—-]"
_PART_BEFORE = re.compile(
    r"(?:[\d+\-/^_]|\\(?:pm|cdot|times|div)\s*|\\(?:sqrt|[dt]?frac)\s*\{)\Z|\\neq?\s*\Z|(?:≠|!=)\s*\Z"
)
_PART_AFTER = re.compile(r"\s*[\^_]|!\w|\.?\d|/\s*[\d\\]|\s*\\(?:cdot|times|div)|[a-z](?![A-Za-z])")


def check(table: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The table, unless something in it cannot be used: a ValueError that names it."""
    for language, section in table.items():
        for key, value in section.items():
            try:
                if key not in _KEYS:
                    raise ValueError(f"no such key; there are {', '.join(_KEYS)}")
                if key == "scales":
                    [operator.index(factor) for factor in dict(value).values()]
                elif key == "measures":
                    "".join(name for names in dict(value).values() for name in names)
                elif not isinstance(value, list):
                    raise ValueError(f"{value!r} is no list")
                elif key == "rewrite":
                    [re.compile(f"{found}|").sub(meant, "") for found, meant in value]
                elif grouped := [entry for entry in value if re.compile(entry).groups]:
                    raise ValueError(f"{grouped[0]!r} has a group; begin it with (?: for (")
            except (re.error, TypeError, ValueError, IndexError) as error:
                in_ = f" in {error.pattern!r}" if isinstance(error, re.error) else ""
                raise ValueError(f"words.toml, [{language}] {key}: {error}{in_}") from None
    return table


TABLE = check(tomllib.loads(pathlib.Path(__file__).with_name("words.toml").read_text("utf-8")))


def entries(key: str) -> list[str]:
    """What all languages have under a key, the longest first."""
    found = {entry for language in TABLE.values() for entry in language.get(key, ())}
    return sorted(found, key=lambda entry: (-len(entry), entry))


@functools.cache
def pattern(*keys: str) -> re.Pattern[str]:
    """Any entry of any of the keys; in scripts with spaces a whole word."""
    unspaced = re.compile(rf"[{UNSPACED}]|^\(\?<=")
    known = [entry for key in keys for entry in entries(key)]
    inside = "|".join(entry for entry in known if unspaced.search(entry))
    words = "|".join(entry for entry in known if not unspaced.search(entry))
    alone = rf"(?<!\\)(?<!{LETTER})(?:{words or '(?!)'})(?!{LETTER})"
    return re.compile(rf"(?:{inside or '(?!)'}|{alone})", re.IGNORECASE)


def says(text: str, *keys: str) -> bool:
    """Whether a text has an entry of any of the keys."""
    return pattern(*keys).search(pattern("harmless").sub(" ", text)) is not None


def changes(text: str) -> bool:
    """Whether a word says another value than what stands beside it, or none, or several."""
    return says(text, "changes", "not", "wrong", "unsure", "or")


@functools.cache
def one_word(text: str) -> str:
    """`yes`, `no`, `true` or `false` for such a word of any language, in any case; else ''."""
    text = text.strip(" .!").casefold()
    return next((key for key in ("yes", "no", "true", "false") if text in entries(key)), "")


@functools.cache
def scales() -> dict[str, int]:
    """Factors of words after a number, such as million; the words in lower case."""
    tables = (language.get("scales", {}) for language in TABLE.values())
    return {word.lower(): factor for table in tables for word, factor in table.items()}


@functools.cache
def measures() -> dict[str, str]:
    """The unit that each name of one means: `cm` for centimeters."""
    tables = (language.get("measures", {}) for language in TABLE.values())
    return {name: unit for table in tables for unit, names in table.items() for name in names}


def rewritten(text: str) -> str:
    """A text with signs for words: minus, percent, fractions, powers of ten."""
    for language in TABLE.values():
        for found, meant in language.get("rewrite", ()):
            text = re.sub(found, meant, text)
    return text


def clause(text: str, begin: int, end: int) -> tuple[str, str]:
    """What stands before and after a place of a text in the same clause."""
    before = _BREAK.split(text[max(0, begin - 300) : begin])[-1]
    return before, _BREAK.split(text[end : end + 300], maxsplit=1)[0]


def doubtful(before: str, after: str) -> bool:
    """Whether a clause denies the answer in it, names another, or says half of it or the like."""
    near = re.split(rf"[\d=]|{pattern('is').pattern}", before, flags=re.IGNORECASE)[-1]
    beside = f"{' '.join(near.split()[-4:])} 1 {' '.join(after.split()[:4])}"
    return says(f"{before} ; {after}", "not", "or", "unsure", "wrong") or changes(beside)


def denied(text: str, begin: int, end: int) -> bool:
    """Whether `not`, minus or the like stands right before a marked place of a text, or `is wrong`
    right after it; or a sign, digit or power beside it makes it part of something else."""
    before, after = text[max(0, begin - 60) : begin], text[end : end + 60]
    before = pattern("harmless").sub(" ", before)
    is_, or_ = pattern("is").pattern, pattern("or").pattern
    left = rf"{pattern('not').pattern}\s*(?:equal to|{is_}|the answer)?(?:{_MARKUP}|\\boxed)*$"
    right = rf"(?:[\s$)\]*}}]|\\[)\]])*(?:{is_}|{or_})?\s*{pattern('not', 'wrong').pattern}"
    return bool(
        _PART_BEFORE.search(before)
        or _PART_AFTER.match(after)
        or rewritten(f"{before.rstrip(' $')} 1").endswith("-1")
        or re.search(left, before, re.IGNORECASE)
        or re.match(right, after, re.IGNORECASE)
    )


def last_joined(text: str, found: list[tuple[int, int, str]]) -> tuple[int, str]:
    """Where the answer begins, and it: the last of the answers (begin, end, content) in a text,
    with those before it that nothing but `and`, `or`, a comma or `x =` joins to it, or that `or`
    joins in one sentence."""
    joints = f"{_MARKUP}|{pattern('and', 'or', 'to').pattern}"
    begin, _, answer = found[-1]
    for first, end, content in reversed(found[-50:-1]):
        between = text[end:begin]
        either = pattern("or").search(between)
        left = re.sub(r"\\?[A-Za-z]\w{0,9}\s*=[\s$]*$", "", between)
        near = either and len(between) < 80 and not re.search(r"[.\n。]", between)
        if not near and re.sub(joints, "", left, flags=re.IGNORECASE):
            break
        if content != answer:
            answer = f"{content}{' or ' if either else ', '}{answer}"
        begin = first
    return begin, answer
