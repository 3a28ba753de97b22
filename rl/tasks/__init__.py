"""Tasks with verifiers that need no download, by name."""

import dataclasses
from typing import Any

from rl.config import check_choice
from rl.tasks.permutations import Permutations
from rl.tasks.search import Search
from rl.tasks.task import Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Permutations, Search)}


def make_task(name: str, **options: Any) -> Task:
    """The task of that name with its options; ValueError, with near matches, for a name or option
    that does not exist."""
    check_choice("the task", name, TASKS)
    known = [field.name for field in dataclasses.fields(TASKS[name])]
    for option in options:
        check_choice(f"an option of task {name}", option, known)
    return TASKS[name](**options)
