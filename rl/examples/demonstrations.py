"""Where examples for supervised fine-tuning come from: a JSONL file, or a task's demonstrations.

A line of a file is one of
    {"messages": [{"role": "user", "content": ".."}, {"role": "assistant", "content": ".."}, ..]}
    {"prompt": "text", "completion": "text"}
and may have other fields, which are not read: `rl/examples/traces.py` leaves there where a trace
comes from.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.tokenizer import Tokenizer
from rl.examples.conversations import Example, ListedExamples, encode_conversation, encode_pair
from rl.tasks.task import Task

MAX_SHOWN = 20
"""Broken lines that an error lists; it counts the others."""
MAX_DRAWS = 100
"""Demonstrations drawn per one that is asked for, before a task is said to show nothing right."""
_STREAM = 3
"""Of random numbers, beside those of `rl/tasks/task.py`."""


def read_examples(path: Path, tokenizer: Tokenizer) -> ListedExamples:
    """Examples of a JSONL file, UTF-8, in its order; blank lines are passed over.

    Raises ValueError for a file without examples, and one that lists every line that cannot be
    used.
    """
    if not path.is_file():
        raise ValueError(f"examples {path} is no file; give a JSONL file, an example in each line")
    examples: list[Example] = []
    names: list[str] = []
    errors: list[str] = []
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    used = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for number, line in used:
        try:
            found = _examples(_fields(line), tokenizer)
        except ValueError as error:
            errors.append(f"  line {number}: {error}")
            continue
        examples += found
        names += [f"{path}:{number}"] * len(found)
    if errors:
        more = [f"  and {len(errors) - MAX_SHOWN} more"] if len(errors) > MAX_SHOWN else []
        raise ValueError(
            f"examples {path}: {len(errors)} of {len(used)} lines cannot be used; correct or "
            "remove them\n" + "\n".join(errors[:MAX_SHOWN] + more)
        )
    if not examples:
        raise ValueError(f"examples {path} holds no example; every line is empty")
    return ListedExamples(examples, names)


class Demonstrations(NamedTuple):
    """What a task shows."""

    examples: ListedExamples
    wrong: int
    """Demonstrations drawn whose answer is wrong, and left out."""


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


def _fields(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode("utf-8"))
        json.dumps(fields, ensure_ascii=False).encode("utf-8")  # half a surrogate pair fails here
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError("not an object {..}")
    return fields


def _examples(fields: dict[str, Any], tokenizer: Tokenizer) -> list[Example]:
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
