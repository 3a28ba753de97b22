"""Common ground of the kernels for Hopper: the machine they are cut for, and matrix products.

Kernels are written in Pallas Mosaic GPU with warpgroup semantics. One Pallas thread is a warpgroup
of 128 CUDA threads. The same body runs on a GPU and, block by block, in JAX's emulator on a CPU,
which also looks for data races; the emulator lacks one thing, a product whose left operand lies in
registers, so `add_products` is the only place where the two differ.

Shape letters: M rows, N columns and K contraction of one product.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Backend = Literal["mosaic", "emulated", "library", "cudnn", "portable", "reference"]
"""Way to compute a hot path: "mosaic" by the kernel, on Hopper; "emulated" by the same kernel on
CPU, block by block (for tests: thousands of times slower); "library" by kernels of a library, for
other GPUs (`pallas_kernels/library`); "cudnn", of grouped attention alone, by cuDNN; "portable" by
XLA, anywhere; "reference" by its definition in fp32, with no care for cost."""

NUM_SMS = 132
"""Streaming multiprocessors of an H100 or H200 SXM."""
SMEM_BYTES = 232_448
"""Shared memory that a block can have: 227 KiB."""
MEMORY_REGISTERS = 40
"""Registers per CUDA thread of a warpgroup that only starts copies."""


def mosaic_kernel(
    body: Callable,
    *,
    out_type: Any,
    emulated: bool,
    reduction_scratch_bytes: int = 2048,
    **options: Any,
) -> Callable:
    """`plgpu.kernel` with warpgroup semantics; `emulated` runs it on CPU and records data races.

    `reduction_scratch_bytes` of shared memory serve reductions that cross warps; those over the
    columns of a product need none. `options` are those of `plgpu.kernel`: grid, grid_names,
    num_threads, thread_name, scratch_types, cluster and others.
    """

    def make() -> Callable:
        return plgpu.kernel(
            body,
            out_type=out_type,
            interpret=plgpu.InterpretGPUParams(detect_races=True) if emulated else False,
            compiler_params=plgpu.CompilerParams(
                lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
                approx_math=True,
                reduction_scratch_bytes=reduction_scratch_bytes,
            ),
            **options,
        )

    parts = body, out_type, reduction_scratch_bytes, options
    kernel = make() if emulated else once(parts, make)

    def call(*operands: Array) -> Any:
        # Inside `jax.shard_map` a result varies over every axis that an operand varies over, which
        # Pallas does not say.
        axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in operands))
        result = kernel(*operands)
        return jax.lax.pcast(result, tuple(sorted(axes)), to="varying") if axes else result

    return call


_made: dict[Any, Callable] = {}


def once(parts: Any, make: Callable[[], Callable]) -> Callable:
    """`make()`, a kernel, traced and lowered once for all calls whose `parts` are alike.

    A step holds a kernel many times, in layers, in their derivatives and in rounds of experts.
    """
    key = _alike(parts)
    if key not in _made:
        _made[key] = jax.jit(make())
    return _made[key]


def _alike(x: Any) -> Any:
    """What is equal for values that make the same kernel: of functions their code and what they
    close over. An array makes TypeError: a kernel takes arrays as operands."""
    if isinstance(x, jax.Array):
        raise TypeError(f"a kernel closes over {x}; make it an operand")
    if isinstance(x, partial):
        return partial, _alike(x.func), _alike(x.args), _alike(x.keywords)
    if isinstance(x, FunctionType):
        cells = tuple(_alike(cell.cell_contents) for cell in x.__closure__ or ())
        return x.__module__, x.__code__, cells, _alike(x.__defaults__), _alike(x.__kwdefaults__)
    if isinstance(x, dict):
        return dict, _alike(tuple(x.items()))
    if isinstance(x, (list, tuple)):
        return type(x), *map(_alike, x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return type(x), *(_alike(getattr(x, field.name)) for field in dataclasses.fields(x))
    return type(x), x


def tiled(columns: int, dtype: Any) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Layout in shared memory of a buffer [..., rows, columns] that products read or TMA fills."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * itemsize * 8)
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


def tile_buffer(shape: Sequence[int], dtype: Any):
    """Shared memory [..., rows, columns] in the layout of `tiled`."""
    return plgpu.SMEM(tuple(shape), dtype, transforms=tiled(shape[-1], dtype))


def product(a_MK: Any, b_KN: Any) -> Array:
    """a b in fp32 [M, N], both operands in shared memory; returns when it is done."""
    (M, _), (_, N) = a_MK.shape, b_KN.shape

    def multiply(acc_MN):
        plgpu.wgmma(acc_MN, a_MK, b_KN)
        return acc_MN[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((M, N), jnp.float32))


def add_products(
    sums: tuple[Array, ...],
    a_MK: Any,
    bs: tuple[Any, ...],
    start_more: Callable[[], None] = lambda: None,
    *,
    emulated: bool,
) -> tuple[Array, ...]:
    """sum + a b in fp32 for each sum [M, N] and b [K, N].

    `a` is in registers or in shared memory, every b in shared memory.

    `start_more` starts further products, in flight together with these; all are done when it
    returns.
    """
    if emulated:
        pairs, a = zip(sums, bs, strict=True), a_MK if isinstance(a_MK, jax.Array) else a_MK[...]
        sums = tuple(x + jnp.dot(a, b[...], preferred_element_type=jnp.float32) for x, b in pairs)
        # These read `bs` as ordinary loads do; products read as copies write.
        plgpu.commit_smem()
        start_more()
        return sums

    def multiply(accs: tuple[Any, ...]):
        for acc, b in zip(accs, bs, strict=True):
            plgpu.wgmma(acc, a_MK, b)
        start_more()

    start: Any = tuple(plgpu.WGMMAAccumulatorRef.init(x) for x in sums)
    return pl.run_state(multiply)(start)


def not_hoisted(index: Any) -> Array:
    """The same index, of which the compiler does not know that a loop leaves it alone.

    It would otherwise compute every address and descriptor made of it before the loop, and keep
    them in registers that the accumulators need.
    """
    return jax.lax.optimization_barrier(jnp.asarray(index, jnp.int32))


def rows(x_M: Array, shape: tuple[int, int]) -> Array:
    """One value per row, spread over the columns [M, N]."""
    return jax.lax.broadcast_in_dim(x_M, shape, [0])


def columns(x_N: Array, shape: tuple[int, int]) -> Array:
    """One value per column, spread over the rows [M, N]."""
    return jax.lax.broadcast_in_dim(x_N, shape, [1])
