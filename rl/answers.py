r"""Where in a text the answer is: chain of thought, final answer, boxed value, code.

Every function takes time in proportion to the text, and raises nothing, whatever the text is.
"""

import re
from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
MAX_LINE = 1000
"""Characters, from its end, of a last line that is looked at when nothing marks the answer."""

_BOXED = re.compile(r"\\f?boxed\s*\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_FENCE = re.compile(
    r"^ {0,3}```[ \t]*([\w+#.-]{0,20})[^\n`]*\n(.*?)^ {0,3}```", re.MULTILINE | re.DOTALL
)
_GSM8K = re.compile(r"####[ \t]*([^\n]+)")


class Final(NamedTuple):
    """A final answer. marked: something says where it is; if not, `text` is the last line."""

    text: str
    marked: bool


def chain_of_thought(text: str) -> str:
    """What stands between the think tags, or up to the closing one if the prompt opened them; the
    whole text if it has no tag; '' if the answer comes at once."""
    before, closed, _ = text.partition(CLOSE)
    opened = before.find(OPEN)
    if opened >= 0:
        return before[opened + len(OPEN) :]
    return before if closed or ANSWER_OPEN not in text else ""


def after_thought(text: str) -> str:
    """What follows the last closing think tag; the whole text if there is no think tag; '' if
    thinking began and never ended."""
    _, closed, after = text.rpartition(CLOSE)
    return "" if not closed and OPEN in text else after


def boxed(text: str) -> str | None:
    r"""Content of the last complete \boxed{...}, braces inside it balanced; None if there is none.

    Escaped braces (\{ and \}) do not count. An unclosed box is none, and does not hide those
    before it or in it.
    """
    begins = [match.end() for match in _BOXED.finditer(text)]
    if not begins:
        return None
    boxes, opened, found = set(begins), [], None
    for match in _BRACES.finditer(text, begins[0] - 1):
        if match.group() == "{":
            opened.append(match.end())
        elif match.group() == "}" and opened:
            begin = opened.pop()
            if begin in boxes:  # of nested boxes the outer one closes last
                found = text[begin : match.start()].strip()
    return found


def final_answer(text: str) -> Final:
    r"""The final answer of a text; thinking is never searched.

    In this order: the last \boxed{...} of the last <answer>...</answer>, or all of that; the last
    \boxed{...}; what follows the last ####, as in GSM8K; the last line that is not blank.
    """
    text = after_thought(text)
    before, closed, _ = text.rpartition(ANSWER_CLOSE)
    _, opened, inside = before.rpartition(ANSWER_OPEN)
    if closed and opened:
        box = boxed(inside)
        return Final(inside.strip() if box is None else box, True)
    box = boxed(text)
    if box is not None:
        return Final(box, True)
    marks = _GSM8K.findall(text)
    if marks:
        return Final(marks[-1].strip(), True)
    return Final(text.rstrip().rpartition("\n")[2].strip()[-MAX_LINE:], False)


def code_block(text: str) -> str:
    """The last fenced block after thinking that is Python or names no language; if there is no
    fence at all, everything after thinking."""
    text = after_thought(text)
    found = _FENCE.findall(text if text.endswith("\n") else text + "\n")
    blocks = [
        body for language, body in found if language.lower() in ("", "python", "py", "python3")
    ]
    if blocks:
        return blocks[-1]
    return "" if found else text.strip()
