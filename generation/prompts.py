"""From what people give to token ids: texts, files of prompts, conversations."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.files import DamagedFileError, kind_of, read_file
from generation.chat import check_fields

Prompt = str | list[Mapping[str, str]]
"""A text to continue, or the messages of a conversation."""


def parse_ids(text: str) -> np.ndarray:
    """Ids, int32 [n], of numbers with commas between; ValueError for anything else."""
    try:
        return np.array([int(part) for part in text.split(",")], np.int32)
    except (ValueError, OverflowError):
        raise ValueError(f"token ids {text!r}: give whole numbers with commas, 1,2,3") from None


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a file: a text per line, or in a .jsonl {"prompt": ..} or {"messages": [..]}.

    .ndjson and .json are read as .jsonl, and all as .gz and .zst too. Lines without text are passed
    over. Raises ValueError naming the line that is neither, and for tables and what is not UTF-8.
    """
    kind = kind_of(path)
    if kind in (".csv", ".tsv", ".parquet"):
        raise ValueError(f"{path}: a table is no list of prompts; give a text or a .jsonl file")
    try:
        lines = read_file(path).decode("utf-8").split("\n")
    except (UnicodeDecodeError, DamagedFileError) as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from None
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path} holds no prompt")
    if kind not in (".jsonl", ".ndjson", ".json"):
        return [line.removesuffix("\r") for _, line in rows]
    return [_record(f"{path}:{number}", line) for number, line in rows]


def _record(where: str, line: str) -> Prompt:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if isinstance(record, dict) and len(record.keys() & {"prompt", "messages"}) == 1:
        try:
            check_fields(record)
        except ValueError as error:
            raise ValueError(f"{where} {error}") from None
        if isinstance(record.get("prompt"), str):
            return record["prompt"]
        if isinstance(record.get("messages"), list):
            return record["messages"]
    raise ValueError(f'{where}: expected {{"prompt": "text"}} or {{"messages": [..]}}, got {line}')


def as_conversation(prompt: Prompt, system: str) -> list[Mapping[str, str]]:
    """A text as the user's only message; `system`, when not empty, put first."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *messages] if system else list(messages)
