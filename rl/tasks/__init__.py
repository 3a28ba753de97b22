"""Tasks with verifiers that need no download, by name."""

import dataclasses
import difflib
from typing import Any

from rl.tasks.permutations import Permutations
from rl.tasks.search import Search
from rl.tasks.task import Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Permutations, Search)}


def make_task(name: str, **options: Any) -> Task:
    """The task of that name with its options; ValueError, with near matches, for a name or option
    that does not exist."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}{_near(name, list(TASKS))}")
    known = [field.name for field in dataclasses.fields(TASKS[name])]
    for option in options:
        if option not in known:
            raise ValueError(f"task {name} has no option {option!r}{_near(option, known)}")
    return TASKS[name](**options)


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known)
    return f"; did you mean {' or '.join(near)}?" if near else f"; choose from {', '.join(known)}"
