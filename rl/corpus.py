"""Tasks by configuration, and their base corpora as documents for pre-training."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data import storage
from data.config import DataConfig, SourceConfig
from rl.config import TaskConfig
from rl.tasks import TASKS, make_task
from rl.tasks.characters import character_tokenizer
from rl.tasks.task import Task

FORMAT = 1
"""Version of the documents; goes up when the same settings would give others."""


def configured_task(config: TaskConfig) -> Task:
    """The task that `config` names, its options read by the types of their defaults.

    Raises ValueError for an unknown task or option (with near matches) and for a wrong value.
    """
    options: dict[str, Any] = {}
    fields = {field.name: field for field in dataclasses.fields(TASKS.get(config.name, Task))}
    for text in config.options:
        name, sign, value = text.partition("=")
        if not sign or name in options:
            why = "is given twice" if sign else "has no '='"
            raise ValueError(f"task.options: {text!r} {why}; give NAME=VALUE, each name once")
        kind = type(fields[name].default) if name in fields else str
        options[name] = _read(text, value, kind)
    return make_task(config.name, **options)


def _read(text: str, value: str, kind: type) -> Any:
    if kind is bool:
        if value not in ("true", "false"):
            raise ValueError(f"task.options: {text!r}; give true or false")
        return value == "true"
    try:
        return kind(value)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"task.options: {text!r}; give {wanted}") from None


def corpus_data(
    config: TaskConfig, data: DataConfig, seed: int, say: Callable[[str], None] = print
) -> DataConfig:
    """`data` with the task's documents as its only source, and a tokenizer of its characters.

    The documents are written under data.cache_dir once per configuration and seed. A document ends
    with the tokenizer's end token, which the token store puts there. Other fields of `data` stay.

    Raises ValueError for a number of documents below 1, and as `configured_task`.
    """
    task = configured_task(config)
    if config.documents < 1:
        raise ValueError(f"task.documents is {config.documents}; give 1 or more")
    content = [FORMAT, task.name, dataclasses.asdict(task), config.documents, seed]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    folder = Path(data.cache_dir) / "corpora" / f"{task.name}-{key}"
    corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer.json"
    with storage.one_builder(str(folder), say):
        if not corpus.exists():
            tokenizer.write_text(character_tokenizer(task.vocabulary).json, encoding="utf-8")
            lines = itertools.islice(task.corpus(seed, end=""), config.documents)
            new = corpus.with_suffix(".new")
            new.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines), "utf-8")
            new.replace(corpus)
            say(f"task {task.name}: {config.documents} documents in {corpus}")
    source = SourceConfig(str(corpus))
    return dataclasses.replace(data, sources=(source,), tokenizer=str(tokenizer))


def sample_prompt(config: TaskConfig, seed: int) -> str:
    """Beginning of a sample text: a prompt of the task, or "def " without one."""
    if not config.name:
        return "def "
    prompt = configured_task(config).prompt(seed, 0).prompt
    assert isinstance(prompt, str), prompt
    return prompt
