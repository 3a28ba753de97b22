"""Shapes at which the kernels for Hopper are compiled, timed and tuned: those of the models."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np


class Tunable(NamedTuple):
    """A case's block sizes to try, for the tuner."""

    kernel: str
    """Name of the kernel's file of timed blocks."""
    shapes: str
    """The call as the kernel spells it."""
    candidates: Sequence[Any]
    """Blocks to try."""
    run: Callable[[Any], Callable[..., Any]]
    """The case's function with given blocks."""


class Case(NamedTuple):
    """One call of a kernel: what is traced, and the least that any implementation must do."""

    run: Callable[..., Any]
    """Takes `arguments`; calls the kernel once and nothing else that costs."""
    arguments: tuple[Any, ...]
    """`jax.ShapeDtypeStruct` of each array."""
    flops: float
    """Multiply-adds times two that the result needs."""
    bytes: float
    """Traffic with the device's memory if everything is read and written once."""
    peak: Literal["bf16", "fp8"] = "bf16"
    """Type that the tensor cores multiply."""
    forward: bool = True
    """Part of a forward pass: no register may be spilled."""
    integers: Callable[[], Sequence[np.ndarray]] = tuple
    """Values of the integer arguments, in their order."""
    baselines: Mapping[str, Callable[..., Any]] = {}
    """Other ways to the same result, by name; they take the same arguments."""
    tunable: Tunable | None = None
    """Block sizes that the tuner may try; None: they are fixed."""
