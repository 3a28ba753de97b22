"""Documents from files (data/readers.py), in a stable order and under stable names.

A source is a folder (searched recursively), one file, a glob, or `stdlib`: the running
interpreter's own standard library, which every machine that can run this project already has. Names
that begin with a dot and `__pycache__` are left out of folders, as shell globs leave them out;
everything else that cannot become a document is counted and named in the report.

A document's name is the file's path relative to the source's folder, plus `:line` in JSONL or
`:row` in Parquet (both from 1). It decides the split, so it must not depend on where the folder
lies.
"""

import dataclasses
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.config import SourceConfig
from data.files import COMPRESSED, kind_of
from data.readers import Document, parquet_module, read_documents
from data.report import Progress, SourceReport, told

READING = 2
"""Version of how files are read; goes up when the same files would give other documents."""
STDLIB = "stdlib"
STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
"""Folders of the standard library that are other people's packages or test data."""


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a source; size and mtime are -1 where the file cannot be examined."""

    name: str
    path: Path
    size: int
    mtime_ns: int


@dataclasses.dataclass(frozen=True)
class Source:
    """A source with its files listed, in the order in which they are read."""

    config: SourceConfig
    files: tuple[SourceFile, ...]

    @property
    def size(self) -> int:
        """Bytes of text, about: those on disk, and four times as many where they are compressed."""
        return sum(max(file.size, 0) * (1 if _is_plain(file.path) else 4) for file in self.files)

    def fingerprint(self) -> str:
        """Hash of the files' names, sizes and mtimes: equal while the text is surely the same."""
        rows = [(file.name, file.size, file.mtime_ns) for file in self.files]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def find_source(config: SourceConfig, progress: Progress = lambda line: None) -> Source:
    """Lists a source's files, sorted by name.

    Raises ValueError if the path does not exist or holds no file, or if it holds Parquet files and
    pyarrow cannot be imported.
    """
    root, paths = _expand(config.path, progress)
    files = sorted((_examine(path, root) for path in paths), key=lambda file: file.name)
    if any(kind_of(file.path) == ".parquet" for file in files):
        parquet_module(config.path)
    return Source(config, tuple(files))


def documents(source: Source, min_bytes: int, report: SourceReport) -> Iterator[Document]:
    """Reads a source's documents one by one; what is left out goes into `report`.

    min_bytes: shorter documents (UTF-8 bytes) are left out as empty; at least 1 is required.
    """
    report.files += len(source.files)
    seen: set[str] = set()
    for file in source.files:
        real = os.path.realpath(file.path)
        if real in seen:  # a link beside its target would leak held-out text into training
            report.skip("duplicate (link to a file already read)", file.name)
            continue
        seen.add(real)
        if file.size < 0 or not file.path.is_file():  # never open a pipe: it would block
            report.skip("unreadable", file.name)
            continue
        found = read_documents(file.path, file.name, source.config.field, report.skip)
        try:
            for document in found:
                if document.text_bytes < max(min_bytes, 1):
                    report.skip("empty", document.name)
                    continue
                report.add(document.text_bytes)
                yield document
        except OSError:
            report.skip("unreadable", file.name)


def check_disjoint(sources: Iterable[Source]) -> None:
    """Raises ValueError if two sources share a file: held-out text of one would train in the
    other."""
    owner: dict[str, str] = {}
    sources = list(sources)
    for source in sources if len(sources) > 1 else ():
        for real in sorted({os.path.realpath(file.path) for file in source.files}):
            other = owner.setdefault(real, source.config.path)
            if other != source.config.path:
                raise ValueError(
                    f"sources {other!r} and {source.config.path!r} both hold {real}; each name "
                    "would be split on its own and held-out text would be trained on. Make them "
                    "disjoint."
                )


# ---- Listing -------------------------------------------------------------------------------------


def _expand(path: str, progress: Progress) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files."""
    if path == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [found for found in _walk(root, STDLIB_LEFT_OUT) if found.suffix == ".py"]
        if not paths:
            raise ValueError(
                f"source 'stdlib': no *.py under {root}; this interpreter carries no source text. "
                "Give a folder of text instead."
            )
        return root, paths
    given = Path(path).expanduser()
    if given.is_dir():
        found = _walk(given, frozenset())
        paths = list(told(found, progress, lambda count: f"{path}: {count} files listed so far"))
        if not paths:
            raise ValueError(f"source {path!r}: no files match '**/*' in folder {given.resolve()}")
        return given, paths
    if given.exists():
        return given.parent, [given]
    if not glob.has_magic(path):
        raise ValueError(f"source {path!r}: {given.absolute()} does not exist")
    matches = glob.glob(str(given), recursive=True)
    paths = [Path(match) for match in matches if not os.path.isdir(match)]
    root = _fixed_part(given)
    if not paths:
        raise ValueError(f"source {path!r}: no files match the pattern in folder {root.absolute()}")
    return root, paths


def _walk(root: Path, left_out: frozenset[str]) -> Iterator[Path]:
    """Files below `root`; links to folders are followed, each real folder once."""
    visited = {os.path.realpath(root)}

    def enter(folder: str, name: str) -> bool:
        if name.startswith(".") or name == "__pycache__" or name in left_out:
            return False
        real = os.path.realpath(os.path.join(folder, name))
        new = real not in visited
        visited.add(real)
        return new

    closed: list[str] = []
    walk = os.walk(root, onerror=lambda error: closed.append(error.filename), followlinks=True)
    for folder, folders, names in walk:
        folders[:] = [name for name in sorted(folders) if enter(folder, name)]
        yield from (Path(folder, name) for name in names if not name.startswith("."))
    yield from map(Path, closed)  # listed like a file, and then reported as unreadable


def _fixed_part(pattern: Path) -> Path:
    """The folder before the first wildcard."""
    fixed = Path(pattern.anchor)
    for part in pattern.parts[1:] if pattern.anchor else pattern.parts:
        if glob.has_magic(part):
            break
        fixed /= part
    return fixed


def _is_plain(path: Path) -> bool:
    return path.suffix.lower() not in (*COMPRESSED, ".parquet")


def _examine(path: Path, root: Path) -> SourceFile:
    # A file name may be any bytes; what UTF-8 cannot say is written as \xNN, so names always print.
    relative = Path(os.path.relpath(path, root)).as_posix()
    name = os.fsencode(relative).decode("utf-8", "backslashreplace")
    try:
        status = path.stat()
    except OSError:
        return SourceFile(name, path, -1, -1)
    return SourceFile(name, path, status.st_size, status.st_mtime_ns)
