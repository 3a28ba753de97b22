r"""Where in a text the answer is: chain of thought, final answer, boxed value, code.

Every function takes time in proportion to the text, and raises nothing, whatever the text is.
"""

import re
from typing import NamedTuple

from rl.problems import Problem
from rl.verdict.words import denied, last_joined

OPEN, CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
MAX_LINE = 1000
"""Characters, from its end, of a last line that is looked at when nothing marks the answer."""

_BOXED = re.compile(r"\\f?boxed\s*\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_FENCE = re.compile(
    r"^ {0,3}```[ \t]*([\w+#.-]{0,20})[^\n`]*\n(.*?)^ {0,3}```", re.MULTILINE | re.DOTALL
)
_END = re.compile(
    r"<[|｜][^<>\n]{0,40}(?:end|eo[stm]|return)[^<>\n]{0,40}[|｜]>|</s>|<eos>|<end_of_turn>"
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


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Complete \boxed{...}, braces inside them balanced, none inside another: where each begins
    and ends, and its content.

    Escaped braces (\{ and \}) do not count. An unclosed box is none, and does not hide those
    before it or in it.
    """
    begins = {match.end(): match.start() for match in _BOXED.finditer(text)}
    unclosed, found = [], []
    for match in _BRACES.finditer(text, min(begins, default=len(text) + 1) - 1):
        if match.group() == "{":
            unclosed.append(match.end())
        elif match.group() == "}" and unclosed:
            inside = unclosed.pop()
            if inside in begins:
                while found and found[-1][0] >= inside:
                    found.pop()
                found.append((begins[inside], match.end(), text[inside : match.start()].strip()))
    return found


def boxed(text: str) -> str | None:
    """Content of the last box, and of those that only `and`, `or` or a comma joins to it; '' if
    words around it deny it, None if there is no box."""
    found = boxes(text)
    if not found:
        return None
    begin, answer = last_joined(text, found)
    last, end, _ = found[-1]
    return "" if denied(text, begin, end) or denied(text, last, end) else answer


def final_answer(text: str, opened: bool = False) -> Final:
    r"""The final answer of a text; thinking is never searched. opened: see `after_thought`.

    In this order: the last \boxed{...} of the last <answer>...</answer>, or all of that; the last
    \boxed{...} (see `boxed`); what follows the last ####, as in GSM8K; the last line that is not
    blank. Nothing after a token that ends a turn counts.
    """
    text, tagged = _answer_part(text, opened)
    box = boxed(text)
    if box is not None or tagged:
        return Final(text.strip() if box is None else box, True)
    marks = _GSM8K.findall(text)
    if marks:
        return Final(marks[-1].strip(), True)
    return Final(text.rstrip().rpartition("\n")[2].strip()[-MAX_LINE:], False)


def all_boxed(text: str, opened: bool = False) -> list[str]:
    """Contents of all boxes where `final_answer` looks for the last one, each once."""
    return list(dict.fromkeys(content for *_, content in boxes(_answer_part(text, opened)[0])))


def _answer_part(text: str, opened: bool) -> tuple[str, bool]:
    """What follows the thought up to the end of the turn, or of that what is in answer tags; and
    whether it is."""
    text = after_thought(_END.split(text, maxsplit=1)[0], opened)
    before, closed, _ = text.rpartition(ANSWER_CLOSE)
    _, begun, inside = before.rpartition(ANSWER_OPEN)
    return (inside, True) if closed and begun else (text, False)


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
