"""A folder or a bucket, behind one interface: tensorstore's key-value stores.

A place is a local folder (`cache`, `/data/cache`) or any URL tensorstore knows
(`gs://bucket/cache`, `s3://bucket/cache`, `memory://cache`). Small files are whole values, so a
reader sees one completely or not at all.
"""

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path

import tensorstore as ts

CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 256 << 20}})
"""Shared by all stores of the process, and with it a cache of the chunks read last."""


def is_url(place: str) -> bool:
    """Whether a place is a URL rather than a local folder."""
    return "://" in place


def join(place: str, *names: str) -> str:
    """A place inside another."""
    return "/".join([place.rstrip("/"), *names])


def open_place(place: str) -> ts.KvStore:
    """The key-value store of a folder or URL; nothing has to exist there yet."""
    if is_url(place):
        return ts.KvStore.open(place.rstrip("/") + "/", context=CONTEXT).result()
    folder = Path(place).expanduser().absolute()
    return ts.KvStore.open({"driver": "file", "path": f"{folder}/"}, context=CONTEXT).result()


def read_bytes(place: str, name: str) -> bytes | None:
    """The value under a name, or None if there is none."""
    result = open_place(place).read(name).result()
    return bytes(result.value) if result.state == "value" else None


def names(place: str) -> set[str]:
    """Names of all values in a place."""
    return {name.decode("utf-8", "replace") for name in open_place(place).list().result()}


def write_bytes(place: str, name: str, value: bytes) -> None:
    """Writes a value; readers see the old one or the new one, never a part."""
    open_place(place).write(name, value).result()


def delete(place: str) -> None:
    """Removes everything in a place."""
    open_place(place).delete_range(ts.KvStore.KeyRange()).result()


@contextlib.contextmanager
def one_builder(place: str, progress: Callable[[str], None]) -> Generator[None]:
    """Holds the place's lock: of several processes on one machine only one builds, the others say
    that they wait.

    The lock dies with its process. Buckets have no lock: there, let one process prepare the data
    before the others start.
    """
    if is_url(place):
        yield
        return
    import fcntl

    folder = Path(place).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"another process prepares data in {place}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
