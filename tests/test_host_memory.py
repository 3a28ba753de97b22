"""Allocator settings of CPU training, each in a process of its own, because they last."""

import ctypes
import pathlib
import subprocess
import sys

import pytest

from runtime.host_memory import keep_freed_memory

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCK = 1 << 25
"""Bytes: far above the size from which malloc maps a block of its own."""

MEASURE = f"""
import ctypes, resource, sys
from runtime.host_memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before = resident()
block = libc.malloc(ctypes.c_size_t({BLOCK}))
ctypes.memset(block, 1, {BLOCK})
held = resident() - before
libc.free(ctypes.c_void_p(block))
print(held, resident() - before)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="settings of glibc's malloc"
)
@pytest.mark.parametrize("setting", ["default", "kept"])
def test_freed_blocks_stay_with_the_process(setting):
    """A large block goes back to the system when it is freed, unless the setting keeps it."""
    command = [sys.executable, "-c", MEASURE, setting]
    held, after = map(int, subprocess.check_output(command, cwd=ROOT, text=True).split())
    assert held > 0.9 * BLOCK
    assert (after > 0.9 * BLOCK) == (setting == "kept"), after


def test_nothing_is_set_where_the_c_library_is_another(monkeypatch):
    class Other:
        """A C library without glibc's version, and without mallopt."""

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Other())
    assert not keep_freed_memory()
