"""Documents of one file, by its kind: text, JSON, JSON Lines, CSV and Parquet, compressed or not.

What cannot become a document is given to `skip` with the reason and its name, and does not stop the
rest. A name is the file's, plus `:line` in JSON Lines, or `:row` or `:item` elsewhere, from 1.
"""

import csv
import importlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.files import BOM, DamagedFileError, kind_of, open_file, read_file

Skip = Callable[[str, str], None]
"""Takes a reason and a name."""


class Document(NamedTuple):
    """One text under its stable name."""

    name: str
    text: str
    text_bytes: int


def read_documents(path: Path, name: str, field: str, skip: Skip) -> Iterator[Document]:
    """The documents of a file. Raises OSError where it cannot be read."""
    try:
        yield from _READERS.get(kind_of(path), _read_text)(path, name, field, skip)
    except DamagedFileError as error:
        skip(f"cut or damaged ({error}); documents before that were read", name)


def parquet_module(asked_by: str) -> Any:
    """(pyarrow.parquet, pyarrow); ValueError with the remedy where they cannot be imported."""
    try:
        return importlib.import_module("pyarrow.parquet"), importlib.import_module("pyarrow")
    except ImportError as error:
        raise ValueError(
            f"source {asked_by!r} holds Parquet files, and pyarrow cannot be imported: install it "
            "(pip install pyarrow), or convert the files to JSONL"
        ) from error


def _read_text(path: Path, name: str, field: str, skip: Skip) -> Iterator[Document]:
    """A whole file as one document, byte for byte: line ends and NUL bytes stay as they are."""
    del field
    content = read_file(path)
    try:
        yield Document(name, content.decode("utf-8"), len(content))
    except UnicodeDecodeError:
        skip("not UTF-8", name)


def _read_archive(path: Path, name: str, field: str, skip: Skip) -> Iterator[Document]:
    """Nothing: as one text it would be headers and all."""
    del path, field
    skip("an archive; unpack it", name)
    yield from ()


def _read_jsonl(path: Path, name: str, field: str, skip: Skip) -> Iterator[Document]:
    """One document per line; blank lines hold none."""
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                yield from _record(f"{name}:{number}", line, field, skip)


def _read_json(path: Path, name: str, field: str, skip: Skip) -> Iterator[Document]:
    """An array of objects, one object over several lines, or JSON Lines under another name."""
    if _has_lines(path, 1):
        yield from _read_jsonl(path, name, field, skip)
        return
    try:
        value = json.loads(read_file(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if _has_lines(path, 100):  # a broken line costs no more than itself
            yield from _read_jsonl(path, name, field, skip)
        else:
            skip("not UTF-8" if isinstance(error, UnicodeDecodeError) else "malformed JSON", name)
    else:
        for number, item in enumerate(value if isinstance(value, list) else [value], 1):
            yield from _field_of(f"{name}:{number}", item, field, skip)


def _has_lines(path: Path, count: int) -> bool:
    """Whether one of the first `count` lines that are not blank is an object by itself, or all are
    blank."""
    seen = 0
    with open_file(path) as file:
        for line in file:
            if not line.removeprefix(BOM).strip():
                continue
            try:
                if isinstance(json.loads(line.removeprefix(BOM)), dict):
                    return True
            except (ValueError, RecursionError):
                pass
            if (seen := seen + 1) == count:
                break
    return not seen


def _record(name: str, line: bytes, field: str, skip: Skip) -> Iterator[Document]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        skip("not UTF-8", name)
    except (ValueError, RecursionError):
        skip("malformed line", name)
    else:
        yield from _field_of(name, value, field, skip)


def _field_of(name: str, value: Any, field: str, skip: Skip) -> Iterator[Document]:
    text = value.get(field) if isinstance(value, dict) else None
    yield from _document(name, text, field, skip)


def _read_csv(path: Path, name: str, field: str, skip: Skip) -> Iterator[Document]:
    """One document per row; the first line names the columns."""
    csv.field_size_limit(sys.maxsize)  # a cell may be a book
    with open_file(path) as file:
        # A bad byte costs its row: it becomes half a surrogate pair, which is no text.
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        delimiter = "\t" if kind_of(path) == ".tsv" else ","
        rows = csv.DictReader(text, delimiter=delimiter, strict=True)
        try:
            if field not in (rows.fieldnames or ()):
                skip(f"no text in field {field!r}", name)
                return
            for number, row in enumerate(rows, 1):
                # More cells than columns: the text was cut at a comma that should be quoted.
                whole = None if None in row else row[field]
                yield from _document(f"{name}:{number}", whole, field, skip)
        except csv.Error as error:
            skip(f"malformed CSV ({error}); rows before that were read", name)


def _read_parquet(path: Path, name: str, field: str, skip: Skip) -> Iterator[Document]:
    """One document per row, read in batches of rows."""
    parquet, arrow = parquet_module(name)
    plain = path.suffix.lower() == ".parquet"
    try:
        table = parquet.ParquetFile(path if plain else io.BytesIO(read_file(path)))
        if field not in table.schema_arrow.names:
            skip(f"no text in field {field!r}", name)
            return
        for number, text in enumerate(_cells(table, arrow, field), 1):
            yield from _document(f"{name}:{number}", text, field, skip)
    except arrow.ArrowException as error:
        reason = "not a Parquet file" if isinstance(error, arrow.ArrowInvalid) else str(error)
        skip(reason.partition("\n")[0], name)


def _cells(table: Any, arrow: Any, field: str) -> Iterable[Any]:
    """Cells of a column; texts as bytes, which need not be UTF-8."""
    binary = {arrow.string(): arrow.binary(), arrow.large_string(): arrow.large_binary()}
    for batch in table.iter_batches(batch_size=256, columns=[field]):
        column = batch.column(0)
        if arrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if column.type in binary:
            column = column.view(binary[column.type])
        yield from column.to_pylist()


def _document(name: str, text: object, field: str, skip: Skip) -> Iterator[Document]:
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if not isinstance(text, str):
            skip(f"no text in field {field!r}", name)
            return
        text_bytes = len(text.encode("utf-8"))
    except UnicodeError:  # JSON can spell lone surrogates, which are no text
        skip("not UTF-8", name)
        return
    yield Document(name, text, text_bytes)


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    **dict.fromkeys((".tar", ".tgz", ".zip", ".7z", ".rar", ".bz2", ".xz"), _read_archive),
}
