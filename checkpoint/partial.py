"""Folders that appear whole or not at all: built under another name, renamed at the end."""

import contextlib
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

SPARE = 16 << 20
"""Bytes asked for beyond the arrays: headers, indexes, small files."""


@contextlib.contextmanager
def new_folder(dst: Path, needed: int, say: Callable[[str], None]) -> Generator[Path]:
    """A folder to fill; it becomes `dst` when the block ends without an error, else it is removed.

    What a killed process left is removed first, and said. Raises ValueError when `dst` exists or
    the disk has less than `needed` bytes (and SPARE) free.
    """
    if dst.exists() or dst.is_symlink():
        raise ValueError(f"{dst} exists already; give another name, or move it away")
    if not dst.parent.is_dir():
        raise ValueError(f"{dst.parent} is no folder; make it first")
    work = dst.with_name(f"{dst.name}.partial")
    if work.exists():
        say(f"{work} was left by an interrupted conversion; removed, starting again")
        shutil.rmtree(work)
    free = shutil.disk_usage(dst.parent).free
    if free < needed + SPARE:
        raise ValueError(
            f"{dst} needs {needed + SPARE:,} bytes, the disk has {free:,} free; give a folder on a "
            "larger disk, or a smaller --dtype"
        )
    work.mkdir()
    try:
        yield work
        sync(work)
        work.rename(dst)
        sync(dst.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
