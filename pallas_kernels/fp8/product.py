"""The kernel under every FP8 product: partial sums over 128 of K, promoted to fp32.

Schedule: a resident block per SM walks over tiles of 128 x 128 or 128 x 256, in bands of rows so
that operands are read from L2. A warpgroup of 40 registers keeps `stages` steps of 128 of K in
flight by TMA. Two warpgroups own 64 rows each: per step and 128 columns a fresh accumulator is
multiplied (64 x 128 x 128), the slot is released after the last of them, and only then is the
accumulator scaled and added, while the other warpgroup has the tensor cores. The finished tile
leaves through shared memory by TMA as the next one starts.

Roofline: 1979 TFLOP/s. A tile of 128 x 256 reads 384 bytes from L2 for 65,536 FLOPs, so that 1000
TFLOP/s take 5.9 TB/s of L2. Per warpgroup and step, 64 x 128 x 128 take 256 cycles of the tensor
cores at their peak and 96 bytes a cycle (of 128) of shared memory; promotion takes 128 instructions
per warp, of the 512 that its scheduler can issue while both warpgroups multiply.

Shape letters: M rows, N columns, K contraction; k = ceil(K / 128), n = ceil(N / 128).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fp8.quantize import E4M3, TILE
from pallas_kernels.mosaic import (
    MEMORY_REGISTERS,
    NUM_SMS,
    columns,
    mosaic_kernel,
    product,
    rows,
    tile_buffer,
)

ROWS = 128
"""Rows of a tile, half of them per warpgroup."""
HALF = ROWS // 2
COMPUTE_REGISTERS = 208
"""Registers that are used of 232: given more, the assembler moves so much ahead that it spills."""


class Blocks(NamedTuple):
    """Blocks of a product."""

    columns: int
    """Columns of a tile: 128 or 256."""
    stages: int
    """Steps of 128 of K in shared memory."""
    band: int
    """Tiles from top to bottom that are computed before the next column of tiles."""
    programs: int = NUM_SMS
    """Blocks that are resident at once."""


class Tile(NamedTuple):
    """One tile of the result: where its operands lie and where it goes."""

    row: Array
    column: Array
    first: Array | int
    """First step."""
    steps: Array | int
    b: Any
    """In device memory [N, K]."""
    scale_b: Any
    """In device memory: [n, k] of blocks, [k, >= N] of tiles."""
    out: Any
    """In device memory [M, N]."""
    count_rows: Callable[[], Array] | None = None
    """Number of rows that count, the others being zeros; None: all. Called when the sums are made,
    since they leave no register for it."""


def product_kernel(
    name: str,
    locate: Callable[..., Tile],
    operands: Sequence[Array],
    out_type: jax.ShapeDtypeStruct,
    *,
    num_tiles: int,
    blocks: Blocks,
    b_in_tiles: bool,
    emulated: bool,
) -> Array:
    """The kernel under every FP8 product.

    Args:
        name: of the kernel, in reports.
        locate: from the number of a tile and the operands and result in device memory to `Tile`.
        operands: a [M, K], its scales [k, M], b, its scales, and whatever `locate` reads. Scales
            of tiles are as long as the tiles of the result that they belong to (`pad_scales`).
        out_type: of the result.
        num_tiles: tiles of the result, cut as `blocks` says.
        b_in_tiles: b has 1 x 128 tiles and not 128 x 128 blocks.
        emulated: on CPU.
    """
    programs, num_arrays = min(blocks.programs, num_tiles), len(operands) + 1

    def body(*refs):
        gmem, smem = refs[:num_arrays], refs[num_arrays:]
        warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
        count = lax.div(num_tiles - program + programs - 1, jnp.int32(programs))

        def walk(visit):
            def at(i, step):
                return visit(locate(program + i * programs, *gmem), step)

            return lax.fori_loop(0, count, at, jnp.int32(0))

        @pl.when(warpgroup == 2)
        def _():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            steps = walk(lambda tile, step: _load_tile(tile, step, gmem, smem, blocks))
            _drain(steps, smem, blocks)

        @pl.when(warpgroup < 2)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            compute = partial(_compute_tile, scale_a=gmem[1], b_in_tiles=b_in_tiles)
            walk(lambda tile, step: compute(tile, step, warpgroup, smem, blocks))
            plgpu.wait_smem_to_gmem(0)

    body.__name__ = name
    return mosaic_kernel(
        body,
        out_type=out_type,
        emulated=emulated,
        grid=(programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=_scratch(blocks, out_type.dtype),
    )(*operands)


def in_bands(i: Array, num_m: int, num_n: int, band: int) -> tuple[Array, Array]:
    """Tile number `i`, going down bands of `band` tiles and along each from left to right."""
    first = lax.div(i, jnp.int32(band * num_n)) * band
    i = i - first * num_n
    height = jnp.minimum(band, num_m - first)
    return first + lax.rem(i, height), lax.div(i, height)


def pad_scales(scale_Rk: Array, multiple: int) -> Array:
    """Scales step by step [k, R], R a multiple of the rows that a block reads at a time."""
    return jnp.pad(scale_Rk.T, ((0, 0), (0, -scale_Rk.shape[0] % multiple)))


def smem_bytes(blocks: Blocks, out_dtype: Any) -> int:
    """Shared memory of the kernel, barriers included."""
    operands = (ROWS + blocks.columns) * TILE
    out = 2 * HALF * _out_columns(out_dtype) * jnp.dtype(out_dtype).itemsize
    return blocks.stages * (operands + 16) + out


class _Smem(NamedTuple):
    """Shared memory of a block; the first axis of operands is the slot of a step."""

    a: Any
    b: Any
    out: Any
    """A part of the tile per warpgroup."""
    loaded: Any
    released: Any


def _out_columns(dtype: Any) -> int:
    """Columns of the result that leave at a time: 16 KiB per warpgroup."""
    return 256 // jnp.dtype(dtype).itemsize


def _scratch(blocks: Blocks, out_dtype: Any) -> _Smem:
    stages = blocks.stages
    return _Smem(
        a=tile_buffer((stages, ROWS, TILE), E4M3),
        b=tile_buffer((stages, blocks.columns, TILE), E4M3),
        out=tile_buffer((2, HALF, _out_columns(out_dtype)), out_dtype),
        loaded=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        released=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    )


def _load_tile(tile: Tile, step: Array, gmem: Any, smem: Any, blocks: Blocks) -> Array:
    """Copies the tile's steps into slots as they free up; returns the number of steps so far."""
    s = _Smem(*smem)

    def load(k, step):
        slot = lax.rem(step, jnp.int32(blocks.stages))
        # Every slot is free at first; waiting for a release that nobody makes would hang.
        pl.when(step >= blocks.stages)(lambda: plgpu.barrier_wait(s.released.at[slot]))
        loaded = s.loaded.at[slot]
        at_row, at_column = pl.ds(tile.row, ROWS), pl.ds(tile.column, blocks.columns)
        at_k = pl.ds((tile.first + k) * TILE, TILE)
        plgpu.copy_gmem_to_smem(gmem[0].at[at_row, at_k], s.a.at[slot], loaded)
        plgpu.copy_gmem_to_smem(tile.b.at[at_column, at_k], s.b.at[slot], loaded)
        return step + 1

    return lax.fori_loop(0, tile.steps, load, step)


def _drain(steps: Array, smem: Any, blocks: Blocks) -> None:
    """Waits until every slot is released: a barrier must not end with a phase that nobody saw."""
    released = _Smem(*smem).released
    for slot in range(blocks.stages):
        pl.when(slot < steps)(lambda slot=slot: plgpu.barrier_wait(released.at[slot]))


def _compute_tile(
    tile: Tile,
    step: Array,
    warpgroup: Array,
    smem: Any,
    blocks: Blocks,
    *,
    scale_a: Any,
    b_in_tiles: bool,
) -> Array:
    """Sums the tile's steps and sends off the result; returns the number of steps so far."""
    s = _Smem(*smem)
    parts = range(0, blocks.columns, TILE)
    first_row = warpgroup * HALF
    zeros = plgpu.layout_cast(jnp.zeros((HALF, TILE), jnp.float32), plgpu.Layout.WGMMA)

    def add(index, state):
        k, (step, *sums) = tile.first + index, state
        slot = lax.rem(step, jnp.int32(blocks.stages))
        # Scales come straight from L2, and nothing touches them before the products are done.
        scale_a_M = _load_scales(scale_a, k, tile.row + first_row, HALF, axis=1)
        scales_b = [_load_scale_b(tile, part, k, b_in_tiles) for part in parts]
        plgpu.barrier_wait(s.loaded.at[slot])
        for i, part in enumerate(parts):
            a_smem = s.a.at[slot, pl.ds(first_row, HALF)]
            acc = product(a_smem, s.b.at[slot, pl.ds(part, TILE)].transpose((1, 0)))
            if i == len(parts) - 1:
                plgpu.barrier_arrive(s.released.at[slot])
            sums[i] += acc * _scale(scale_a_M, scales_b[i])
        return step + 1, *sums

    state = (step, *[zeros for _ in parts])
    step, *sums = lax.fori_loop(0, tile.steps, add, state)
    for part, y in zip(parts, sums, strict=True):
        _store(tile, y, part, first_row, s.out.at[warpgroup])
    return step


def _scale(scale_a_M: Array, scale_b: Array) -> Array:
    """Factor of an accumulator [64, 128]; scale_b is one number, or one per column."""
    shape = (HALF, TILE)
    if scale_b.ndim == 0:
        return rows(scale_a_M * scale_b, shape)
    return rows(scale_a_M, shape) * columns(scale_b, shape)


def _load_scale_b(tile: Tile, part: int, k: Array, b_in_tiles: bool) -> Array:
    """Scale of step k of the 128 columns from column `part` of the tile on, or of each of them."""
    column = tile.column + part
    if b_in_tiles:
        return _load_scales(tile.scale_b, k, column, TILE, axis=0)
    # The last tile may reach beyond the last block.
    block = jnp.minimum(lax.div(column, jnp.int32(TILE)), tile.scale_b.shape[0] - 1)
    return tile.scale_b[block, k]


def _load_scales(scales: Any, k: Array, first: Array, count: int, *, axis: int) -> Array:
    """One scale per row (axis 1 is reduced) or per column of an accumulator, from [k, rows]."""
    layout = plgpu.Layout.WGMMA.reduce(axis)
    # Without `optimized`, a few bytes per thread are no error.
    return plgpu.load(scales.at[k, pl.ds(first, count)], layout=layout, optimized=False)


def _store(tile: Tile, y: Array, part: int, first_row: Array, out_smem: Any) -> None:
    """Sends 64 x 128 sums off, in pieces that fit the buffer."""
    if tile.count_rows is not None:
        # One index per row: a whole tile of them would stay in registers throughout.
        layout = plgpu.Layout.WGMMA.reduce(1)
        index_M = plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=layout)
        own = rows(index_M, (HALF, TILE)) < tile.count_rows() - first_row
        y = jnp.where(own, y, 0.0)
    width = out_smem.shape[1]
    for at in range(0, TILE, width):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_smem[...] = y[:, at : at + width].astype(out_smem.dtype)
        plgpu.commit_smem()
        at_row = pl.ds(tile.row + first_row, HALF)
        plgpu.copy_smem_to_gmem(
            out_smem, tile.out.at[at_row, pl.ds(tile.column + part + at, width)]
        )
