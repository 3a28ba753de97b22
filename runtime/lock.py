"""A file that one program at a time holds, on this machine or on another that shares the disk.

The kernel's lock (flock) ends with its process, however that ends, and NFS carries it to the
server. Some shared disks have no locks, or each machine's own, so the holder also writes who it is
and renews the file's time every BEAT_S; a holder on another machine whose file stands still for
SILENT_S is dead. Should two hold it all the same, the one that was written over ends.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

BEAT_S, SILENT_S = 5.0, 30.0
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def hold(file: Path, what: str, say: Callable[[str], None]) -> Generator[str]:
    """Hold `file`, which is made and removed here, during the block; gives a token found in it.

    Args:
      what: what the file stands for, to begin messages with.
      say: told when there is something to wait for.
    Raises ValueError that names the process that holds it, OSError if it cannot be written.
    """
    handle = _take(file, what, say)
    token, ended = secrets.token_hex(8), threading.Event()
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = {"host": socket.gethostname(), "process": os.getpid(), "since": now}
    content = json.dumps({**holder, "boot": _boot(), "token": token}) + "\n"
    beat = threading.Thread(target=_beat, args=(file, what, handle, token, ended), daemon=True)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, content.encode(), 0)
        os.fsync(handle)
        beat.start()
        yield token
    finally:
        ended.set()
        if beat.ident is not None:
            beat.join()
        with contextlib.suppress(OSError):
            if _is_at(handle, file) and holds(file, token):
                file.unlink()
        os.close(handle)


def holds(file: Path, token: str) -> bool:
    """Whether the holder of `file`, as seen from here, is the one that has this token."""
    return _read(file).get("token") == token


def _take(file: Path, what: str, say: Callable[[str], None]) -> int:
    """A handle with the kernel's lock, where there are such, on a file that nobody else holds."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _lock(handle)
            if _is_at(handle, file):  # else its last holder has just removed it
                holder = _read(file)
                here = bool(locked) and holder.get("boot") == _boot()
                if locked is False or (holder and not here and _beats(file, what, holder, say)):
                    raise ValueError(
                        f"{what} is in use by {_who(holder)}; wait for its end, or give another"
                    )
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Whether the kernel gave the lock; None on a disk without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _beats(file: Path, what: str, holder: dict[str, Any], say: Callable[[str], None]) -> bool:
    """Whether the file's time changes, which takes SILENT_S to find out that it does not."""
    say(
        f"{what} was left by {_who(holder)}, or is in use there: looking for signs of life "
        f"for {SILENT_S:.0f} s"
    )
    first, end = _seen(file), time.monotonic() + SILENT_S
    while time.monotonic() < end:
        time.sleep(min(0.5, SILENT_S / 10))
        if _seen(file) != first:
            return True
    return False


def _beat(file: Path, what: str, handle: int, token: str, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with contextlib.suppress(OSError):  # somebody removed the folder, or the disk is away
            holder = _read(file)
            if holder and holder.get("token") != token:
                print(
                    f"\n{what} was taken over by {_who(holder)}; this one ends at once and "
                    "writes nothing more",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(2)
            os.utime(handle)


def _who(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('process')} on {holder.get('host')} (since {holder.get('since')})"


def _read(file: Path) -> dict[str, Any]:
    """Text of the holder as a dict; {} when there is none, or when it is about to write."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _seen(file: Path) -> tuple[int, bytes]:
    """Time and content; the file is opened because NFS then asks its server."""
    with contextlib.suppress(OSError), file.open("rb") as content:
        return os.fstat(content.fileno()).st_mtime_ns, content.read()
    return 0, b""


def _is_at(handle: int, file: Path) -> bool:
    try:
        there = file.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(handle)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _boot() -> str:
    """Name of this machine since it started, also inside its containers."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return socket.gethostname()
