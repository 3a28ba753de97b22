"""The rungs that every kernel for Hopper climbs on a machine without a GPU.

Emulated: the kernel's body runs on CPU, block by block, and data races are looked for. Lowered: it
becomes a program for CUDA, which refuses types, layouts and shapes that Hopper does not have. (What
comes after, machine code with its registers and spills, is in tests/test_kernel_compile.py.)
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as emulator


def emulate(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)`, computed by emulated kernels; fails if they race."""
    emulator.reset_gpu_interpret_mode_state()
    try:
        result = jax.block_until_ready(function(*arguments))
        assert not emulator.get_races().races_found, "the kernel has a data race"
    finally:
        emulator.reset_gpu_interpret_mode_state()
    return result


def lower(function: Callable, *arguments: Any) -> str:
    """The program for CUDA, of arrays or shapes; holds a Mosaic kernel per call."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "mosaic_gpu" in text, "no kernel in the lowered program"
    return text


def relative_error(got: Any, exact: Any) -> float:
    """|got - exact| / |exact|, Frobenius, in float64."""
    got, exact = np.asarray(got, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def unlikeness(got: Any, exact: Any) -> float:
    """1 - 2<x, y> / (<x, x> + <y, y>) in float64: 0 for equal arrays."""
    x, y = np.asarray(got, np.float64), np.asarray(exact, np.float64)
    return float(1 - 2 * np.vdot(x, y) / (np.vdot(x, x) + np.vdot(y, y)))
