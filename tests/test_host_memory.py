"""Allocator settings of CPU training."""

import ctypes

import numpy as np

from runtime.host_memory import keep_freed_memory


def test_is_applied_on_glibc_and_memory_still_works():
    """True exactly where glibc is; large blocks come and go as before."""
    applied = keep_freed_memory()
    assert applied == hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
    for _ in range(3):
        assert np.ones(1 << 22).sum() == 1 << 22
