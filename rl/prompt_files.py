"""Prompts from a user's JSONL file, GSM8K's included, as problems for verifiers.

A line is one of
    {"prompt": "text", "answer": ..}
    {"messages": [{"role": "user", "content": "text"}, ..], "answer": ..}
    {"question": "text", "answer": "solution #### 1,234"}      as GSM8K has it
with "reward" (or "kind") to name the rule that scores it, if lines differ in that. An answer is a
text, a number, or a list of these; "tests" may stand in its place, for code. Every other field is
kept in the problem, for the rule that scores it.
"""

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from generation.chat import chat_pieces
from rl.problems import Problem, Prompt

MAX_SHOWN = 20
"""Broken lines that an error lists; it counts the others."""
_FORMS = ("prompt", "question", "messages")
_RULES = ("reward", "kind")
_THOUSANDS = re.compile(r"[-+]?\$?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")


class PromptFile(NamedTuple):
    """What a file of prompts holds."""

    problems: list[Problem]
    """In the file's order. `answer` holds "answer" (str or list of str, if the line gives one),
    "solution" (GSM8K's text before ####) and the line's other fields; `task` is its reward."""
    repeated: list[int]
    """Numbers of the lines left out because they repeat an earlier line's prompt and answer."""


def read_prompts(
    path: Path,
    need_answers: bool = True,
    rewards: Collection[str] | None = None,
    check: Callable[[Problem], None] | None = None,
) -> PromptFile:
    """Reads a JSONL file of prompts, UTF-8; blank lines are passed over.

    need_answers: a line with neither "answer" nor "tests" (for code) is an error. rewards: names
    that "reward" may have, None for any. check: raises ValueError for a problem that its reward
    cannot score. Raises ValueError for a file without prompts, and one that lists every broken
    line: not JSON, wrong types, unknown rewards, one prompt with two answers.
    """
    if not path.is_file():
        raise ValueError(f"prompts {path} is no file; give a JSONL file with a prompt in each line")
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    errors: list[str] = []
    problems: dict[str, tuple[int, Problem]] = {}
    repeated: list[int] = []
    used = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        used += 1
        try:
            problem = _problem(_fields(line), need_answers, rewards)
            if check is not None:
                check(problem)
            first, known = problems.setdefault(problem.key, (number, problem))
            if known != problem:
                raise ValueError(
                    f"has the prompt of line {first}, but another answer or other fields; "
                    "keep one of them"
                )
            if first != number:
                repeated.append(number)
        except ValueError as error:
            errors.append(f"  line {number}: {error}")
    if not used:
        raise ValueError(f"prompts {path} holds no prompt; every line is empty")
    if errors:
        more = [f"  and {len(errors) - MAX_SHOWN} more"] if len(errors) > MAX_SHOWN else []
        raise ValueError(
            f"prompts {path}: {len(errors)} of {used} lines cannot be used; correct or remove "
            "them\n" + "\n".join(errors[:MAX_SHOWN] + more)
        )
    return PromptFile([problem for _, problem in problems.values()], repeated)


def final_answer(answer: str) -> tuple[str, str]:
    """GSM8K's answer as (final answer, solution): what follows the last `####`, without thousands
    separators, and what stands before. ValueError if there is no `####` or nothing after it."""
    solution, mark, last = answer.rpartition("####")
    if not mark:
        raise ValueError(
            '"answer" has no "####" before the final answer; where the answer is all there is, '
            'name the other field "prompt" instead of "question"'
        )
    last = last.strip()
    if not last:
        raise ValueError('"answer" has nothing after "####"')
    return last.replace(",", "") if _THOUSANDS.fullmatch(last) else last, solution.rstrip()


def _fields(line: bytes) -> dict[str, Any]:
    """The object that a line holds; ValueError says what is wrong."""
    try:
        text = line.decode("utf-8")
        fields = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1})") from None
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair (\\ud800 to \\udfff)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not usable: brackets are nested too deep") from None
    if not isinstance(fields, dict):
        raise ValueError(f"holds {_type(fields)}, not an object {{..}}")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"has the field {twice!r} twice")
    return fields


def _no_constant(name: str) -> float:
    raise ValueError(f"not JSON: {name} is no number of JSON")


def _problem(
    fields: dict[str, Any], need_answers: bool, rewards: Collection[str] | None
) -> Problem:
    forms = [form for form in _FORMS if form in fields]
    if len(forms) != 1:
        found = f"both {forms[0]!r} and {forms[1]!r}" if forms else f"the fields {sorted(fields)}"
        raise ValueError(f'has {found}; give one of "prompt", "question", "messages"')
    form = forms[0]
    answer = {name: value for name, value in fields.items() if name not in (form, *_RULES)}
    if "answer" in fields:
        answer["answer"] = _answer(fields["answer"])
        if form == "question":
            _split_solution(answer)
    elif need_answers and "tests" not in fields:
        raise ValueError(f'has neither "answer" nor "tests"; its fields are {sorted(fields)}')
    return Problem(_prompt(form, fields[form]), answer, _reward(fields, rewards))


def _split_solution(answer: dict[str, Any]) -> None:
    if not isinstance(answer["answer"], str):
        raise ValueError('"answer" of a "question" is a list; give a text with "####"')
    if "solution" in answer:
        raise ValueError('"solution" would be replaced by the text before "####"; rename it')
    answer["answer"], answer["solution"] = final_answer(answer["answer"])


def _prompt(form: str, value: Any) -> Prompt:
    if form != "messages":
        if not isinstance(value, str):
            raise ValueError(f'"{form}" is {_type(value)}, not a text')
        if not value.strip():
            raise ValueError(f'"{form}" is an empty text')
        return value
    if not isinstance(value, list):
        raise ValueError(f'"messages" is {_type(value)}, not a list')
    chat_pieces(value)  # raises for roles, contents and order
    for message in value:
        if message.keys() != {"role", "content"}:
            raise ValueError(f"a message has the fields {sorted(message)}, not role and content")
    if not value[-1]["content"].strip():
        raise ValueError("the last message is an empty text")
    return value


def _answer(value: Any) -> str | list[str]:
    if isinstance(value, list):
        if not value:
            raise ValueError('"answer" is an empty list')
        return [_text(item, 'an item of "answer"') for item in value]
    return _text(value, '"answer"')


def _text(value: Any, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{what} is {_type(value)}, not a text, a number or a list of these")
    text = str(value).strip()
    if not text:
        raise ValueError(f"{what} is an empty text")
    return text


def _reward(fields: dict[str, Any], rewards: Collection[str] | None) -> str:
    given = [fields[name] for name in _RULES if name in fields]
    if not given:
        return ""
    if any(name != given[0] for name in given):
        raise ValueError(f'"reward" is {given[0]!r} and "kind" is {given[1]!r}; give one of them')
    name = given[0]
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f'"reward" is {_type(name) if name != "" else "empty"}, not a name')
    if rewards is not None and name not in rewards:
        raise ValueError(f'"reward" is {name!r}; choose one of {", ".join(sorted(rewards))}')
    return name


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false",
             type(None): "null"}  # fmt: skip
    return names.get(type(value), "a number")
