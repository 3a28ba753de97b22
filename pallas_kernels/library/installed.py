"""Which of the library's implementations serves which GPU, and whether it is there.

The library (tokamax) has several for every operation, each for some generations of GPUs. Of those
that compile with the locked JAX, the faster one by the library's own timings is named here; what
does not compile is in docs/kernels.md. Operations are called as the locked version has them, so
another version is refused.

A GPU is found as the library finds it: JAX's default device. To compile for one that is absent,
make it the default (`sharding.devices.as_default`), in a process for one generation only: Mosaic
keeps the first that it meets.
"""

import contextlib
import contextvars
import importlib
import logging
import os
from collections.abc import Callable, Generator
from importlib import metadata
from typing import Any, NamedTuple

import jax
from jax import Array
from jax._src import config
from jax.extend import backend
from jax.extend.core import Primitive
from jax.interpreters import mlir

LOCKED = {"tokamax": "0.0.17", "jax-triton": "0.4.1"}
"""Versions whose inner functions are used (requirements-gpu-kernels.lock)."""


class Parts(NamedTuple):
    """Implementation of each operation."""

    attention: str
    rows: str
    """Grouped product of rows with weights, and of their cotangents."""
    weights: str
    """Grouped product that gives weights' gradients."""


PARTS = {
    8: Parts("triton", "triton", "triton"),
    9: Parts("mosaic", "mosaic", "triton"),
    10: Parts("mosaic", "mosaic", "triton"),
}
"""By major compute capability. Mosaic's weight gradient for Hopper takes 4.5 times as long as
Triton's (the library's own figures), and there is none for others."""
XLA = Parts("xla", "xla", "xla")
"""The library's definitions: for tests on CPU."""
CLASSES = {
    ("attention", "triton"): "attention.pallas_triton:PallasTritonFlashAttention",
    ("attention", "mosaic"): "attention.pallas_mosaic_gpu:PallasMosaicGpuFlashAttention",
    ("attention", "xla"): "attention.base:DotProductAttention",
    ("ragged_dot", "triton"): "ragged_dot.triton:TritonRaggedDot",
    ("ragged_dot", "mosaic"): "ragged_dot.pallas_mosaic_gpu:PallasMosaicGpuRaggedDot",
    ("ragged_dot", "xla"): "ragged_dot.base:RaggedDot",
}
_by_xla = contextvars.ContextVar("_by_xla", default=False)


@contextlib.contextmanager
def by_xla() -> Generator[None]:
    """Inside, the library computes by XLA: everything of it but its kernels, on any device."""
    token = _by_xla.set(True)
    try:
        yield
    finally:
        _by_xla.reset(token)


def missing() -> str | None:
    """Reason why the library cannot be called from this environment; None if it can."""
    for name, version in LOCKED.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            return f"the library of kernels is not installed ({name}); make gpu-env installs it"
        if found != version:
            return f"{name} is {found}, and is called as {version} has it; install that version"
    return None


def unusable(device: Any = None) -> str | None:
    """Reason why the library cannot serve a device, by default JAX's own; None if it can."""
    if (why := missing()) or _by_xla.get():
        return why
    device = device or backend.get_default_device()
    if device.platform not in ("cuda", "gpu"):
        return f"the devices are {device.device_kind}, and the library's kernels are for GPUs"
    if _major(device) not in PARTS:
        return f"the library has no kernels for compute capability {device.compute_capability}"
    return None


def is_ampere() -> bool:
    """Whether the GPU is of compute capability 8: no products in FP8, says the library."""
    return not _by_xla.get() and _major(backend.get_default_device()) == 8


def parts() -> Parts:
    """Implementations for JAX's default device.

    Raises:
        ValueError: the library cannot serve it.
    """
    if reason := unusable():
        raise ValueError(f"backend 'library': {reason}, or use 'portable'")
    return XLA if _by_xla.get() else PARTS[_major(backend.get_default_device())]


def operation(kind: str, name: str) -> Any:
    """An operation of the library, by its kind and the name of its implementation."""
    path, _, attribute = CLASSES[kind, name].partition(":")
    # As Triton does by default; said, so that it does not warn.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    log = logging.getLogger("absl")
    if _quiet not in log.filters:
        log.addFilter(_quiet)
    return getattr(module(path), attribute)()


def module(path: str) -> Any:
    """A module of the library's operations."""
    return importlib.import_module(f"tokamax._src.ops.{path}")


def _quiet(record: logging.LogRecord) -> bool:
    """Without the library's note, 1 KB per call, that nobody has timed this shape."""
    return not record.getMessage().startswith("Autotuning cache miss")


def refusal(function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> str | None:
    """The library's reason to refuse a call, found by tracing it; None if it takes it."""
    try:
        jax.eval_shape(function, *shapes)
    except (RuntimeError, ValueError, AttributeError, AssertionError, TypeError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        return f"the library refuses the shape ({said[0]})"
    return None


def untracked(function: Callable[..., Any], *operands: Array) -> Any:
    """`function(*operands)`, also inside of `jax.shard_map`, where the library's kernels do not say
    what varies: nothing is tracked inside, and the results vary wherever an operand does.

    Not to be differentiated.
    """
    axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in operands))
    if not axes:
        return function(*operands)

    def vary(x: Array) -> Array:
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands]
    with config._check_vma(False):
        leaves, tree = jax.tree.flatten(jax.eval_shape(function, *shapes))
    results = _untracked_p.bind(*map(vary, operands), function=function, leaves=tuple(leaves))
    return jax.tree.unflatten(tree, results)


def _compute(*operands: Array, function: Callable[..., Any], leaves: Any) -> list[Array]:
    with config._check_vma(False):
        # Whatever has passed an operation varies over nothing.
        plain = (a.reshape(1, *a.shape).reshape(a.shape) for a in operands)
        return jax.tree.leaves(function(*plain))


_untracked_p = Primitive("untracked")
"""One operation: a function traced here is traced again, and tracked, where gradients are taken."""
_untracked_p.multiple_results = True
_untracked_p.def_impl(_compute)
_untracked_p.def_abstract_eval(
    lambda *avals, function, leaves: [avals[0].update(shape=x.shape, dtype=x.dtype) for x in leaves]
)
mlir.register_lowering(_untracked_p, mlir.lower_fun(_compute, multiple_results=True))


def _major(device: Any) -> int:
    return int(float(device.compute_capability))
