"""Bytes of a file as they were before it was compressed: `.gz` and `.zst` are undone, and a mark of
byte order in front is no part of a text."""

import gzip
import io
import zlib
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
        raw = _Gzip(opened) if suffix.lower() == ".gz" else _Zstandard(opened)
        opened = io.BufferedReader(raw, PART)
    return opened


def read_file(path: Path) -> bytes:
    """All bytes of a file, decompressed, without a mark of byte order."""
    with open_file(path) as file:
        return file.read().removeprefix(BOM)


class _Decompressed(io.RawIOBase):
    """A stream of what `_next` gives; b"" is the end."""

    def __init__(self, source: BinaryIO):
        self._source, self._left = source, b""

    def _next(self) -> bytes:
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if not self._left:
            self._left = self._next()
        part = self._left[: len(buffer)]
        buffer[: len(part)] = part
        self._left = self._left[len(part) :]
        return len(part)

    def close(self) -> None:
        self._source.close()
        super().close()


class _Gzip(_Decompressed):
    def __init__(self, source: BinaryIO):
        super().__init__(source)
        self._file = gzip.GzipFile(fileobj=source)

    def _next(self) -> bytes:
        try:
            return self._file.read(PART)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DamagedFileError(f"gzip: {error}") from None


class _Zstandard(_Decompressed):
    """Frame after frame; unlike the library's reader it tells a cut file from a whole one."""

    def __init__(self, source: BinaryIO):
        super().__init__(source)
        self._frame, self._input = None, b""

    def _next(self) -> bytes:
        found = b""
        while not found:
            self._input = self._input or self._source.read(PART)
            if not self._input:
                if self._frame is not None:
                    raise DamagedFileError("zstd: the file is cut")
                return b""
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                found = self._frame.decompress(self._input)
            except zstandard.ZstdError as error:
                raise DamagedFileError(f"zstd: {error}") from None
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        return found
