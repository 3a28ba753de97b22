r"""Where in a text the answer is: chain of thought, final answer, boxed value, code.

Every function takes time in proportion to the text, and raises nothing, whatever the text is.
"""

import re
from typing import NamedTuple

from rl.problems import Problem

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


def opened(problem: Problem) -> bool:
    """Whether the prompt ends inside the thought, so that an answer to it begins there.

    Most chat templates open it for a conversation (`rl/prompts.py`); a text may end in <think>.
    """
    if isinstance(problem.prompt, str):
        return problem.prompt.rstrip().endswith(OPEN)
    return problem.opened


def chain_of_thought(text: str) -> str:
    """What stands between the think tags, or up to the closing one if the prompt opened them; the
    whole text if it has no tag; '' if the answer comes at once."""
    before, closed, _ = text.partition(CLOSE)
    begin = before.find(OPEN)
    if begin >= 0:
        return before[begin + len(OPEN) :]
    return before if closed or ANSWER_OPEN not in text else ""


def after_thought(text: str, opened: bool = False) -> str:
    """What follows the last closing think tag; the whole text if there is no think tag; '' if
    thinking began, in the text or (opened) in the prompt, and never ended."""
    _, closed, after = text.rpartition(CLOSE)
    return "" if not closed and (opened or OPEN in text) else after


def boxed(text: str) -> str | None:
    r"""Content of the last complete \boxed{...}, braces inside it balanced; None if there is none.

    Escaped braces (\{ and \}) do not count. An unclosed box is none, and does not hide those
    before it or in it.
    """
    begins = [match.end() for match in _BOXED.finditer(text)]
    if not begins:
        return None
    boxes, unclosed, found = set(begins), [], None
    for match in _BRACES.finditer(text, begins[0] - 1):
        if match.group() == "{":
            unclosed.append(match.end())
        elif match.group() == "}" and unclosed:
            begin = unclosed.pop()
            if begin in boxes:  # of nested boxes the outer one closes last
                found = text[begin : match.start()].strip()
    return found


def final_answer(text: str, opened: bool = False) -> Final:
    r"""The final answer of a text; thinking is never searched. opened: see `after_thought`.

    In this order: the last \boxed{...} of the last <answer>...</answer>, or all of that; the last
    \boxed{...}; what follows the last ####, as in GSM8K; the last line that is not blank.
    """
    text = after_thought(text, opened)
    before, closed, _ = text.rpartition(ANSWER_CLOSE)
    _, begun, inside = before.rpartition(ANSWER_OPEN)
    if closed and begun:
        box = boxed(inside)
        return Final(inside.strip() if box is None else box, True)
    box = boxed(text)
    if box is not None:
        return Final(box, True)
    marks = _GSM8K.findall(text)
    if marks:
        return Final(marks[-1].strip(), True)
    return Final(text.rstrip().rpartition("\n")[2].strip()[-MAX_LINE:], False)


def code_block(text: str, opened: bool = False) -> str:
    """The last fenced block after thinking that is Python or names no language; if there is no
    fence at all, everything after thinking. opened: see `after_thought`."""
    text = after_thought(text, opened)
    found = _FENCE.findall(text if text.endswith("\n") else text + "\n")
    blocks = [
        body for language, body in found if language.lower() in ("", "python", "py", "python3")
    ]
    if blocks:
        return blocks[-1]
    return "" if found else text.strip()
