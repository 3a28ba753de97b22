"""Sources of examples for supervised fine-tuning: a JSONL file, or a task's demonstrations.

A line of a file is one of
    {"messages": [{"role": "user", "content": ".."}, {"role": "assistant", "content": ".."}, ..]}
    {"prompt": "text", "completion": "text"}
and may have other fields, such as the provenance that `rl/examples/traces.py` writes, but none that
would change what is read or learned (tools, system, weight, ..): those of messages are in
`rl/examples/conversations.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.tokenizer import Tokenizer
from generation.chat import END_THINK, REASONING, THINK, UNREAD, check_fields
from rl.examples.conversations import (
    WEIGHTS,
    Example,
    ListedExamples,
    encode_conversation,
    encode_pair,
)
from rl.jsonl import read_jsonl
from rl.tasks.task import Task

MAX_DRAWS = 100
"""Demonstrations drawn per one that is asked for, before it is an error that none is right."""
_STREAM = 3
"""Stream of random numbers, apart from those of `rl/tasks/task.py`."""


def read_examples(
    path: Path, tokenizer: Tokenizer, say: Callable[[str], None] = print
) -> ListedExamples:
    """Examples of a JSONL file in its order; says which fields are not read, and which names of
    marks are letters. Raises ValueError as `read_jsonl`."""
    examples: list[Example] = []
    names: list[str] = []
    letters: set[str] = set()
    unread: set[str] = set()

    def use(number: int, fields: dict[str, Any]) -> None:
        found = examples_of(fields, tokenizer)
        examples.extend(found)
        names.extend([f"{path}:{number}"] * len(found))
        unread.update(fields.keys() - {"messages", "prompt", "completion"})
        texts = [fields.get("prompt"), *(x["content"] for x in fields.get("messages", ()))]
        letters.update(tokenizer.marks_in(f"{texts}{fields.get('completion')}"))

    read_jsonl(path, "example", use)
    if unread:
        say(f"{path}: fields that are not read: {', '.join(sorted(unread))}")
    if letters := letters - {THINK, END_THINK}:
        say(f"warning: {', '.join(sorted(letters))} in texts of {path} are read as letters")
    return ListedExamples(examples, names)


class Demonstrations(NamedTuple):
    """Demonstrations of a task."""

    examples: ListedExamples
    wrong: int
    """Number of demonstrations left out because their answer is wrong."""


def task_examples(task: Task, tokenizer: Tokenizer, seed: int, count: int) -> Demonstrations:
    """`count` correct demonstrations of training prompts, functions of their number and the seed.

    What the task writes with mistakes on purpose is left out where the answer is wrong; steps on
    the way to a right one may still be, unless the task's own options say otherwise.

    Raises ValueError if hardly any demonstration is right.
    """
    examples: list[Example] = []
    names: list[str] = []
    wrong = index = 0
    while len(examples) < count:
        if index == MAX_DRAWS * count:
            raise ValueError(
                f"task {task.name}: {len(examples)} of {index} demonstrations are right, and "
                f"{count} are needed; lower the noise of the task, or ask for fewer"
            )
        problem = task.prompt(seed, index, "train")
        answer = task.demonstrate(problem, np.random.default_rng((seed, _STREAM, index)))
        if task.verify(problem, answer):
            assert isinstance(problem.prompt, str)
            examples.append(encode_pair(tokenizer, problem.prompt, answer))
            names.append(f"{task.name} {index}")
        else:
            wrong += 1
        index += 1
    return Demonstrations(ListedExamples(examples, names), wrong)


def examples_of(fields: dict[str, Any], tokenizer: Tokenizer) -> list[Example]:
    """Examples of a line's object; ValueError for what it must not have, or lacks."""
    check_fields(fields, (*UNREAD, *REASONING, *WEIGHTS))
    pair = [name for name in ("prompt", "completion") if name in fields]
    if ("messages" in fields) == bool(pair) or len(pair) == 1:
        raise ValueError(
            f'has the fields {sorted(fields)}; give either "messages", or "prompt" and "completion"'
        )
    if pair and not all(isinstance(fields[name], str) for name in pair):
        raise ValueError('"prompt" and "completion" must be texts')
    if not pair and not isinstance(fields["messages"], list):
        raise ValueError('"messages" must be a list of messages')
    if pair:
        return [encode_pair(tokenizer, fields["prompt"], fields["completion"])]
    return encode_conversation(tokenizer, fields["messages"])
