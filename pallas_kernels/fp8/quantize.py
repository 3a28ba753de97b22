"""Quantisation to FP8 (E4M3): 1 x 128 tiles of activations, 128 x 128 blocks of weights.

DeepSeek-V3 report, section 3.3.2: a tile's or block's scale is its largest magnitude / 448 in fp32,
found online, and q = x * (1 / scale) rounded to nearest even, so that x is about q * scale. (A
product with the rounded reciprocal, not a division: a division costs ten instructions, and both
layouts of a matrix would then be bound by arithmetic. The two differ where x / scale lies within an
fp32 rounding of the middle between two E4M3 values.) All backends give the same bits. A tile of
zeros has scale 1. What is not finite dequantises to NaN, alone or with the whole of its tile.

Schedule: one block of 128 threads per 128 x 128 tile, several blocks per SM. A single TMA copy
brings the tile to shared memory; it is read from there once by rows and, where the transpose is
wanted, once by columns, 64 x 128 values in registers at a time; q and scales leave by TMA. Sizes
that 128 does not divide: TMA reads zeros beyond the edge, which raise no scale, and writes nothing
there.

Roofline: memory. bf16 in, one layout out: 3.03 bytes an element; both layouts: 4.06; SwiGLU: 5.03.
At 4.8 TB/s that is 1.6, 1.2 and 0.95 * 10^12 elements/s.

Shape letters: M rows (tokens), K and N widths, E experts, F width of an expert; k = ceil(K / 128)
and so on: tiles along that axis.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import Backend, mosaic_kernel, rows, tile_buffer
from pallas_kernels.scales import E4M3, TILE, reciprocal, tile_scale

HALF = 64
"""Rows of a tile that are in registers at a time."""


class Quantized(NamedTuple):
    """E4M3 values and their fp32 scales."""

    q: Array
    scale: Array


class Prepared(NamedTuple):
    """A weight that was quantised before its products, once for many of them."""

    blocks: Quantized
    """In 128 x 128 blocks [..., K, N]."""
    stand_in: Array
    """fp32 [..., K, N], which nothing reads: its gradient is the weight's."""


def quantize_tiles(
    x_MK: Array, *, power_of_two: bool = False, backend: Backend = "portable"
) -> Quantized:
    """1 x 128 tiles along the last axis: q [M, K] and scale [M, k], for products that contract K.

    Args:
        x_MK: bf16 or fp32 [M, K].
        power_of_two: round scales up to powers of two (section 3.3.3).
        backend: see `mosaic.Backend`. The kernel needs K % 16 == 0.

    Raises:
        ValueError: not a matrix of bf16 or fp32, or a shape that the kernel cannot take.
    """
    return _quantize((x_MK,), True, False, power_of_two, backend)[0]


def quantize_tiles_transposed(
    x_MK: Array, *, power_of_two: bool = False, backend: Backend = "portable"
) -> Quantized:
    """128 x 1 tiles: q [K, M], the transpose, and scale [K, m], for products that contract M.

    FP8 products need the contraction as the last axis of both operands, so the weight gradient,
    which sums over tokens, takes its operands in this form. Arguments and errors as in
    `quantize_tiles`, but the kernel needs M % 16 == 0 and K % 8 == 0 (bf16) or 4 (fp32).
    """
    return _quantize((x_MK,), False, True, power_of_two, backend)[0]


def quantize_both(
    x_MK: Array, *, power_of_two: bool = False, backend: Backend = "portable"
) -> tuple[Quantized, Quantized]:
    """`quantize_tiles` and `quantize_tiles_transposed` in one pass over memory.

    Arguments and errors as there; the kernel needs M % 16 == 0 and K % 16 == 0.
    """
    by_rows, by_columns = _quantize((x_MK,), True, True, power_of_two, backend)
    return by_rows, by_columns


def swiglu_quantize(
    gate_MF: Array, up_MF: Array, *, power_of_two: bool = False, backend: Backend = "portable"
) -> Quantized:
    """`quantize_tiles` of silu(gate) * up, which is kept in fp32 and never stored.

    Args:
        gate_MF: bf16 or fp32 [M, F].
        up_MF: of the same shape and type.
        power_of_two: as in `quantize_tiles`.
        backend: as there. silu differs by a few units of the last fp32 place between backends, so
            a few q differ by one step.

    Raises:
        ValueError: as there, or the two do not match.
    """
    return _quantize((gate_MF, up_MF), True, False, power_of_two, backend)[0]


def swiglu_quantize_both(
    gate_MF: Array, up_MF: Array, *, power_of_two: bool = False, backend: Backend = "portable"
) -> tuple[Quantized, Quantized]:
    """`quantize_both` of silu(gate) * up; arguments and errors as in `swiglu_quantize`."""
    by_rows, by_columns = _quantize((gate_MF, up_MF), True, True, power_of_two, backend)
    return by_rows, by_columns


def quantize_blocks(
    w_EKN: Array, *, power_of_two: bool = False, backend: Backend = "portable"
) -> Quantized:
    """128 x 128 blocks: q [..., K, N] and scale [..., k, n], the format of released checkpoints.

    Args:
        w_EKN: bf16 or fp32 [K, N] or [E, K, N].
        power_of_two: as in `quantize_tiles`.
        backend: as there. The kernel needs N % 16 == 0.

    Raises:
        ValueError: no such array, or a shape that the kernel cannot take.
    """
    return _quantize_blocks(w_EKN, False, power_of_two, backend)[0]


def quantize_blocks_both(
    w_EKN: Array, *, power_of_two: bool = False, backend: Backend = "portable"
) -> tuple[Quantized, Quantized]:
    """`quantize_blocks` and its transpose, q [..., N, K] and scale [..., n, k], in one pass.

    The transpose serves y = x w, which contracts K, and the matrix as it is dx = dy w^T, which
    contracts N. Arguments and errors as there; the kernel needs K % 16 == 0 and N % 16 == 0.
    """
    as_is, transposed = _quantize_blocks(w_EKN, True, power_of_two, backend)
    return as_is, transposed


def block_scale(largest: Array) -> Array:
    """fp32 scales of blocks whose largest magnitudes are given, as `quantize_blocks` makes them."""
    return tile_scale(largest, False)


def with_block_scale(x: Array, scale: Array, spread: Callable[[Array], Array]) -> Array:
    """E4M3 values as `quantize_blocks` makes them; spread(s) has a block's s at each entry of x."""
    return (x.astype(jnp.float32) * spread(reciprocal(scale))).astype(E4M3)


def both_layouts(w: Array | Prepared, backend: Backend) -> tuple[Quantized, Quantized]:
    """`quantize_blocks_both` of a weight, which may have been quantised: blocks are square, so that
    the transpose has their scales too."""
    if not isinstance(w, Prepared):
        return quantize_blocks_both(w, backend=backend)
    q, scale = w.blocks
    return w.blocks, Quantized(q.mT, scale.mT)


def unsupported(
    shape: Sequence[int], dtype: Any, *, by_rows: bool = True, by_columns: bool = False
) -> str | None:
    """Reason why the kernel cannot quantise a matrix [M, K] in these layouts, or None."""
    M, K = shape
    itemsize = jnp.dtype(dtype).itemsize
    # TMA wants the rows of everything in device memory to start at multiples of 16 bytes.
    if K * itemsize % 16:
        return f"rows of {K} * {itemsize} bytes are no multiple of 16 bytes; pad the width"
    if by_rows and K % 16:
        return f"the width {K} is no multiple of 16; pad it"
    if by_columns and M % 16:
        return f"there are {M} rows, no multiple of 16; pad them with zeros"
    return None


def dequantize(x: Quantized, dtype: Any, blocks: bool = False) -> Array:
    """q * scale [..., R, C]; scales of 1 x 128 tiles [..., R, c], or of 128 x 128 blocks [r, c]."""
    scale = jnp.repeat(x.scale, TILE, axis=-1)[..., : x.q.shape[-1]]
    if blocks:
        scale = jnp.repeat(scale, TILE, axis=-2)[..., : x.q.shape[-2], :]
    return (x.q.astype(jnp.float32) * scale).astype(dtype)


def _quantize(
    inputs: tuple[Array, ...], by_rows: bool, by_columns: bool, power_of_two: bool, backend: Backend
) -> list[Quantized]:
    x_MK = inputs[0]
    _check(inputs)
    if backend in ("mosaic", "emulated"):
        reason = unsupported(x_MK.shape, x_MK.dtype, by_rows=by_rows, by_columns=by_columns)
        if reason:
            raise ValueError(f"no FP8 kernel for {x_MK.shape}: {reason}, or use 'portable'")
        return _by_kernel(inputs, by_rows, by_columns, power_of_two, backend == "emulated")
    # The definition is already the plain XLA implementation; there is nothing to sum.
    x_MK = _combine([x.astype(jnp.float32) for x in inputs])
    layouts = [x_MK] * by_rows + [x_MK.T] * by_columns
    return [_quantize_rows(x, power_of_two) for x in layouts]


def _check(inputs: tuple[Array, ...]) -> None:
    x = inputs[0]
    if x.ndim != 2 or x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"cannot quantise {x.dtype} of shape {x.shape}; give a matrix of bf16 or fp32"
        )
    for other in inputs[1:]:
        if (other.shape, other.dtype) != (x.shape, x.dtype):
            raise ValueError(
                f"gate is {x.dtype} {x.shape} but up is {other.dtype} {other.shape}; "
                "give two of one shape and type"
            )


def _combine(values: Sequence[Array]) -> Array:
    """Values to be quantised, from fp32 inputs: x itself, or silu(gate) * up."""
    if len(values) == 1:
        return values[0]
    gate, up = values
    return gate / (1.0 + jnp.exp(-gate)) * up


def _quantize_rows(x_RC: Array, power_of_two: bool) -> Quantized:
    R, C = x_RC.shape
    x_RcT = jnp.pad(x_RC, ((0, 0), (0, -C % TILE))).reshape(R, -1, TILE)
    scale_Rc = tile_scale(jnp.max(jnp.abs(x_RcT), axis=-1), power_of_two)
    q_RcT = (x_RcT * reciprocal(scale_Rc)[..., None]).astype(E4M3)
    return Quantized(q_RcT.reshape(R, -1)[:, :C], scale_Rc)


def _by_kernel(
    inputs: tuple[Array, ...], by_rows: bool, by_columns: bool, power_of_two: bool, emulated: bool
) -> list[Quantized]:
    M, K = inputs[0].shape
    num_inputs, layouts = len(inputs), [False] * by_rows + [True] * by_columns

    def body(*refs):
        x_gmem, out_gmem = refs[:num_inputs], refs[num_inputs : num_inputs + 2 * len(layouts)]
        x_smem, q_smem, scale_smem, loaded = refs[num_inputs + 2 * len(layouts) :]
        m, k = lax.axis_index("m"), lax.axis_index("k")
        at_m, at_k = pl.ds(m * TILE, TILE), pl.ds(k * TILE, TILE)
        for i, source in enumerate(x_gmem):
            plgpu.copy_gmem_to_smem(source.at[at_m, at_k], x_smem.at[i], loaded)
        plgpu.barrier_wait(loaded)
        for i, transposed in enumerate(layouts):
            for half in range(0, TILE, HALF):
                part = pl.ds(half, HALF)
                x = _load(x_smem, num_inputs, part, transposed)
                scale = tile_scale(_largest(x), power_of_two)
                q_smem[i, part] = (x * rows(reciprocal(scale), (HALF, TILE))).astype(E4M3)
                scale_smem[i, part] = scale
        plgpu.commit_smem()
        for i, transposed in enumerate(layouts):
            q_gmem, scale_gmem = out_gmem[2 * i : 2 * i + 2]
            row, column, tile = (at_k, at_m, m) if transposed else (at_m, at_k, k)
            plgpu.copy_smem_to_gmem(q_smem.at[i], q_gmem.at[row, column])
            plgpu.copy_smem_to_gmem(scale_smem.at[i], scale_gmem.at[tile, row])
        plgpu.wait_smem_to_gmem(0)

    body.__name__ = _name(num_inputs, layouts)
    shapes = [shape for t in layouts for shape in _outputs(*((K, M) if t else (M, K)))]
    out = mosaic_kernel(
        body,
        out_type=shapes,
        emulated=emulated,
        grid=(pl.cdiv(M, TILE), pl.cdiv(K, TILE)),
        grid_names=("m", "k"),
        scratch_types=[
            tile_buffer((num_inputs, TILE, TILE), inputs[0].dtype),
            tile_buffer((len(layouts), TILE, TILE), E4M3),
            plgpu.SMEM((len(layouts), TILE), jnp.float32),
            plgpu.Barrier(num_arrivals=num_inputs),
        ],
    )(*inputs)
    # Scales lie tile by tile in memory, as the products want them; `.T` costs nothing between two
    # kernels of one program, since the product's own `.T` cancels it.
    return [
        Quantized(out[2 * i], out[2 * i + 1][:, : K if transposed else M].T)
        for i, transposed in enumerate(layouts)
    ]


def _load(x_smem: Any, num_inputs: int, part: Any, transposed: bool) -> Array:
    """Half of the tile, by rows or by columns, in fp32 [64, 128]."""

    def load(i: int) -> Array:
        source = x_smem.at[i].transpose((1, 0)) if transposed else x_smem.at[i]
        x = plgpu.load(source.at[part], optimized=not transposed).astype(jnp.float32)
        return plgpu.layout_cast(x, plgpu.Layout.WGMMA)

    return _combine([load(i) for i in range(num_inputs)])


def _largest(x: Array) -> Array:
    """Largest magnitude of each row."""
    return jnp.max(jnp.abs(x), axis=1)


def _outputs(R: int, C: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """q [R, C] and scales [c, R], R rounded up to the 16 bytes that TMA counts in."""
    scales = jax.ShapeDtypeStruct((pl.cdiv(C, TILE), pl.cdiv(R, 4) * 4), jnp.float32)
    return jax.ShapeDtypeStruct((R, C), E4M3), scales


def _name(num_inputs: int, layouts: list[bool]) -> str:
    layout = "both" if len(layouts) == 2 else "columns" if layouts[0] else "rows"
    return f"{'quantize' if num_inputs == 1 else 'swiglu_quantize'}_{layout}"


def _quantize_blocks(
    w_EKN: Array, both: bool, power_of_two: bool, backend: Backend
) -> list[Quantized]:
    if w_EKN.ndim not in (2, 3):
        raise ValueError(f"cannot quantise shape {w_EKN.shape}; give [K, N] or [E, K, N]")
    if w_EKN.ndim == 2:
        found = _quantize_blocks(w_EKN[None], both, power_of_two, backend)
        return [Quantized(x.q[0], x.scale[0]) for x in found]
    _check((w_EKN[0],))
    if backend in ("mosaic", "emulated"):
        if reason := unsupported(w_EKN.shape[1:], w_EKN.dtype, by_columns=both):
            raise ValueError(f"no FP8 kernel for {w_EKN.shape}: {reason}, or use 'portable'")
        return _blocks_by_kernel(w_EKN, both, power_of_two, backend == "emulated")
    E, K, N = w_EKN.shape
    padded = jnp.pad(w_EKN.astype(jnp.float32), ((0, 0), (0, -K % TILE), (0, -N % TILE)))
    w_EkTnT = padded.reshape(E, pl.cdiv(K, TILE), TILE, pl.cdiv(N, TILE), TILE)
    scale_Ekn = tile_scale(jnp.max(jnp.abs(w_EkTnT), axis=(2, 4)), power_of_two)
    q_EkTnT = (w_EkTnT * reciprocal(scale_Ekn)[:, :, None, :, None]).astype(E4M3)
    q_EKN = q_EkTnT.reshape(padded.shape)[:, :K, :N]
    return [Quantized(q_EKN, scale_Ekn), Quantized(q_EKN.mT, scale_Ekn.mT)][: 1 + both]


def _blocks_by_kernel(
    w_EKN: Array, both: bool, power_of_two: bool, emulated: bool
) -> list[Quantized]:
    E, K, N = w_EKN.shape
    layouts = [False, True][: 1 + both]

    def body(w_gmem, *refs):
        *q_gmem, scale_gmem, w_smem, q_smem, loaded = refs
        e, k, n = (lax.axis_index(name) for name in ("e", "k", "n"))
        at_k, at_n = pl.ds(k * TILE, TILE), pl.ds(n * TILE, TILE)
        plgpu.copy_gmem_to_smem(w_gmem.at[e, at_k, at_n], w_smem.at[0], loaded)
        plgpu.barrier_wait(loaded)
        parts = [pl.ds(half, HALF) for half in range(0, TILE, HALF)]
        largest = jnp.maximum(*[jnp.max(_largest(_load(w_smem, 1, part, False))) for part in parts])
        # As a vector, since the lowering has no bit casts of scalars.
        largest = plgpu.layout_cast(jnp.full((HALF,), largest), plgpu.Layout.WGMMA.reduce(1))
        scale = tile_scale(largest, power_of_two)
        scale_gmem[e, k, n], inverse = jnp.max(scale), rows(reciprocal(scale), (HALF, TILE))
        for i, transposed in enumerate(layouts):
            for part in parts:
                q_smem[i, part] = (_load(w_smem, 1, part, transposed) * inverse).astype(E4M3)
        plgpu.commit_smem()
        for i, transposed in enumerate(layouts):
            at = (e, at_n, at_k) if transposed else (e, at_k, at_n)
            plgpu.copy_smem_to_gmem(q_smem.at[i], q_gmem[i].at[at])
        plgpu.wait_smem_to_gmem(0)

    body.__name__ = "quantize_blocks_both" if both else "quantize_blocks"
    grid = (E, pl.cdiv(K, TILE), pl.cdiv(N, TILE))
    q_types = [jax.ShapeDtypeStruct((E, N, K) if t else (E, K, N), E4M3) for t in layouts]
    *q, scale_Ekn = mosaic_kernel(
        body,
        out_type=[*q_types, jax.ShapeDtypeStruct(grid, jnp.float32)],
        emulated=emulated,
        grid=grid,
        grid_names=("e", "k", "n"),
        scratch_types=[
            tile_buffer((1, TILE, TILE), w_EKN.dtype),
            tile_buffer((len(layouts), TILE, TILE), E4M3),
            plgpu.Barrier(),
        ],
    )(w_EKN)
    return [
        Quantized(q[i], scale_Ekn.mT if transposed else scale_Ekn)
        for i, transposed in enumerate(layouts)
    ]
