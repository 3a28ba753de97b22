"""Prompts from a user's JSONL file, GSM8K's included, as problems for verifiers.

A line is one of
    {"prompt": "text", "answer": ..}
    {"messages": [{"role": "user", "content": "text"}, ..], "answer": ..}
    {"question": "text", "answer": "solution #### 1,234"}      as GSM8K has it
with "reward" (or "kind") to name the rule that scores it, if lines differ in that. An answer is a
text, a number, or a list of these; "tests" may stand in its place, for code. Every other field is
kept in the problem, for the rule that scores it. Records of public sets of programming problems are
read as they are (`rl/verdict/public_tests.py`).
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from generation.chat import check_fields, check_messages
from rl.jsonl import read_jsonl, type_name
from rl.problems import Problem, Prompt
from rl.verdict.public_tests import as_own_line

_FORMS = ("prompt", "question", "messages")
_RULES = ("reward", "kind")
_THOUSANDS = re.compile(r"[-+]?\$?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")


def read_prompts(
    path: Path, need_answers: bool = True, check: Callable[[Problem], None] | None = None
) -> list[Problem]:
    """Problems of a JSONL file in its order; a line that repeats an earlier one is left out.

    A problem's `answer` holds "answer" (str or list of str, if the line gives one), "solution"
    (GSM8K's text before ####) and the line's other fields; its `task` is the line's reward.

    Args:
      need_answers: a line with neither "answer" nor "tests" (for code) is an error.
      check: raises ValueError for a problem that its reward cannot score.

    Raises ValueError as `read_jsonl`, also for wrong types and for one prompt with two answers.
    """
    problems: dict[str, tuple[int, Problem]] = {}

    def use(number: int, fields: dict[str, Any]) -> None:
        problem = _problem(fields, need_answers)
        if check is not None:
            check(problem)
        first, known = problems.setdefault(problem.key, (number, problem))
        if known != problem:
            raise ValueError(
                f"has the prompt of line {first}, but another answer or other fields; "
                "keep one of them"
            )

    read_jsonl(path, "prompt", use)
    return [problem for _, problem in problems.values()]


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


def _problem(fields: dict[str, Any], need_answers: bool) -> Problem:
    fields = as_own_line(fields)
    check_fields(fields)
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
    return Problem(_prompt(form, fields[form]), answer, _reward(fields))


def _split_solution(answer: dict[str, Any]) -> None:
    if not isinstance(answer["answer"], str):
        raise ValueError('"answer" of a "question" is a list; give a text with "####"')
    if "solution" in answer:
        raise ValueError('"solution" would be replaced by the text before "####"; rename it')
    answer["answer"], answer["solution"] = final_answer(answer["answer"])


def _prompt(form: str, value: Any) -> Prompt:
    if form != "messages":
        if not isinstance(value, str):
            raise ValueError(f'"{form}" is {type_name(value)}, not a text')
        if not value.strip():
            raise ValueError(f'"{form}" is an empty text')
        return value
    if not isinstance(value, list):
        raise ValueError(f'"messages" is {type_name(value)}, not a list')
    check_messages(value)
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
        raise ValueError(f"{what} is {type_name(value)}, not a text, a number or a list of these")
    text = str(value).strip()
    if not text:
        raise ValueError(f"{what} is an empty text")
    return text


def _reward(fields: dict[str, Any]) -> str:
    given = [fields[name] for name in _RULES if name in fields]
    if not given:
        return ""
    if any(name != given[0] for name in given):
        raise ValueError(f'"reward" is {given[0]!r} and "kind" is {given[1]!r}; give one of them')
    name = given[0]
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f'"reward" is {type_name(name) if name != "" else "empty"}, not a name')
    return name
