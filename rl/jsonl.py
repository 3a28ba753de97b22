"""JSON Lines files that people write: an error names every line that cannot be used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.files import DamagedFileError, read_file

MAX_SHOWN = 20
"""Broken lines that an error lists; it counts the others."""


def read_jsonl(path: Path, noun: str, use: Callable[[int, dict[str, Any]], None]) -> None:
    """Calls `use` with the number and the object of every line, UTF-8; blank lines are passed over.

    noun: what a line holds, in messages. `use` raises ValueError for an object of no use. Raises
    ValueError for a path that is no file, for a file without lines, and one that lists all lines
    that are not JSON or were of no use.
    """
    if not path.is_file():
        raise ValueError(f"{noun}s {path} is no file; give a JSONL file, a line for each {noun}")
    try:
        lines = read_file(path).split(b"\n")
    except DamagedFileError as error:
        raise ValueError(f"{noun}s {path} is cut or damaged ({error})") from None
    used = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not used:
        raise ValueError(f"{noun}s {path} holds no {noun}; every line is empty")
    errors: list[str] = []
    for number, line in used:
        try:
            use(number, _fields(line))
        except ValueError as error:
            errors.append(f"  line {number}: {error}")
    if errors:
        more = [f"  and {len(errors) - MAX_SHOWN} more"] if len(errors) > MAX_SHOWN else []
        raise ValueError(
            f"{noun}s {path}: {len(errors)} of {len(used)} lines cannot be used; correct or remove "
            "them\n" + "\n".join(errors[:MAX_SHOWN] + more)
        )


def type_name(value: Any) -> str:
    """Type of a JSON value, in words."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), "a number")


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
        raise ValueError(f"holds {type_name(fields)}, not an object {{..}}")
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
