"""Host memory of a training process on CPU devices: keep what was freed for the next step.

XLA:CPU asks for its temporaries at the start of every step and frees them at the end. For blocks of
this size the C library maps fresh pages and unmaps them again, and the kernel clears every page
anew: a quarter of a step's processor time at a width of 256.
"""

import ctypes

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


def keep_freed_memory() -> bool:
    """Make malloc serve large blocks from one heap that never shrinks.

    Call it before the first use of a device: threads keep the heap they started with. The process
    stays at its peak size until it ends. Returns False, and changes nothing, where the C library
    is not glibc.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    for name, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
        assert libc.mallopt(name, value) == 1
    return True
