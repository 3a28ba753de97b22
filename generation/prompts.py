"""From what people give to token ids: texts, files of prompts, conversations."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.files import DamagedFileError, kind_of, read_file
from generation.chat import chat_pieces

Prompt = str | list[Mapping[str, str]]
"""A text to continue, or the messages of a conversation."""


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of plain text, int32 [n]."""
        ...

    def token_id(self, token: str) -> int:
        """Id of a token by its name; ValueError without it."""
        ...


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
        if isinstance(record.get("prompt"), str):
            return record["prompt"]
        if isinstance(record.get("messages"), list):
            return record["messages"]
    raise ValueError(f'{where}: expected {{"prompt": "text"}} or {{"messages": [..]}}, got {line}')


def as_conversation(prompt: Prompt, system: str) -> list[Mapping[str, str]]:
    """A text as the user's only message; `system`, when not empty, put first."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *messages] if system else list(messages)


def encode_text(tokenizer: Encoder, text: str, first: int) -> np.ndarray:
    """Ids, int32 [n], of a text to continue, after the token that documents begin with."""
    return np.concatenate([np.array([first], np.int32), tokenizer.encode(text)])


def encode_chat(
    tokenizer: Encoder, messages: Sequence[Mapping[str, str]], think: bool
) -> np.ndarray:
    """Ids, int32 [n], of a conversation; ValueError when the vocabulary lacks its tokens."""
    pieces = chat_pieces(messages, think)
    try:
        marks = [[tokenizer.token_id(p.text)] if p.special else [] for p in pieces]
    except ValueError as error:
        raise ValueError(f"{error}; conversations need it, so give the prompt as text") from None
    parts = [
        mark if piece.special else tokenizer.encode(piece.text)
        for mark, piece in zip(marks, pieces, strict=True)
    ]
    return np.concatenate([np.asarray(part, np.int32) for part in parts])
