"""Bytes of a file as they were before it was compressed: `.gz` and `.zst` are undone, and a mark of
byte order in front is no part of a text."""

import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

BOM = b"\xef\xbb\xbf"
COMPRESSED = (".gz", ".zst")
PART = 1 << 17


class DamagedFileError(ValueError):
    """A compressed file that is cut or altered; the message says how."""


def kind_of(path: Path) -> str:
    """The suffix that says what the file holds, in lower case: `.jsonl` of `a.JSONL.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def open_file(path: Path) -> BinaryIO:
    """The file's bytes for reading, decompressed. Reads raise OSError, or DamagedFileError."""
    opened: BinaryIO = path.open("rb")
    for suffix in reversed(path.suffixes):
        if suffix.lower() not in COMPRESSED:
            break
        parts = _gzip(opened) if suffix.lower() == ".gz" else _zstandard(opened)
        opened = io.BufferedReader(_Stream(opened, parts), PART)
    return opened


def read_file(path: Path) -> bytes:
    """All bytes of a file, decompressed, without a mark of byte order."""
    with open_file(path) as file:
        return file.read().removeprefix(BOM)


def digests(paths: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the bytes of those paths that are files."""
    found = {}
    for path in filter(os.path.isfile, paths):
        with open(path, "rb") as file:
            found[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


class _Stream(io.RawIOBase):
    """What `parts` gives, end to end; `source` is closed with it."""

    def __init__(self, source: BinaryIO, parts: Iterator[bytes]):
        self._source, self._parts, self._left = source, parts, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self._left = self._left or next(self._parts, b"")
        part, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._source.close()
        super().close()


def _gzip(source: BinaryIO) -> Iterator[bytes]:
    file = gzip.GzipFile(fileobj=source)
    try:
        while part := file.read1(PART):  # what comes before damage comes out
            yield part
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedFileError(f"gzip: {error}") from None


def _zstandard(source: BinaryIO) -> Iterator[bytes]:
    """Frame after frame; unlike the library's reader it tells a cut file from a whole one."""
    frame = None
    while part := source.read(PART):
        while part:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                if found := frame.decompress(part):
                    yield found
            except zstandard.ZstdError as error:
                raise DamagedFileError(f"zstd: {error}") from None
            part = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise DamagedFileError("zstd: the file is cut")
