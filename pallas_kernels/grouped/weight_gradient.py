"""Gradient of grouped weights on Hopper: dw[e] = x_e^T dy_e over the rows of each group, bf16.

Schedule: a persistent grid takes tiles of 128 x 256 of dw, expert by expert, down bands of columns,
in pairs of blocks that share the tile of dy. Of a block, one warpgroup copies [64, 128] of x and
[64, 256] of dy per step by TMA into a ring of 4 slots (`ring.py`); two multiply 64 rows of
dw each, reading x through a transposed view. The first step starts at a multiple of 8 rows at or
before the group's first row, the last runs over its end: only there the rows of others are set to
zero in shared memory, in both operands, since 0 * NaN is NaN. An empty group has no steps: its
sums, zero, are stored like any others.

Roofline on an H200: 2 M K N FLOPs at 989 TFLOP/s and 2 M (K + N) + s E K N bytes at 4.8 TB/s, for s
bytes per element of dw. In fp32 the result bounds it below about 410 rows per expert.

Shape letters: M rows, E experts, K rows of dw, N columns of dw, D rows of one step, R rows of dw
of a warpgroup, C columns of a tile.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped.blocks import (
    DEPTH,
    PRODUCT_WARPGROUPS,
    TILE_ROWS,
    WARPGROUP_ROWS,
    Blocks,
    choose,
    cuts,
)
from pallas_kernels.grouped.products import BARRIER_BYTES, pad_rows
from pallas_kernels.grouped.ring import Copy, Ring, banded, for_each_tile
from pallas_kernels.grouped.row_tiles import ALIGNMENT, group_spans
from pallas_kernels.mosaic import mosaic_kernel, tile_buffer
from pallas_kernels.tuned import tuned_blocks

CHUNK_BYTES = 128
"""Bytes of a row that a warpgroup stores at a time: the widest swizzle."""
STAGES = 2
"""Chunks of a warpgroup that are on their way at a time."""


def shared_memory(blocks: Blocks) -> int:
    """Bytes of shared memory that a program takes."""
    staging = STAGES * PRODUCT_WARPGROUPS * WARPGROUP_ROWS * CHUNK_BYTES
    return blocks.slots * 2 * DEPTH * (TILE_ROWS + blocks.columns) + staging + BARRIER_BYTES


def candidates(inputs: int, outputs: int) -> list[Blocks]:
    """Blocks worth timing for dw [E, inputs, outputs]."""
    found = cuts(outputs, 1, shared_memory)
    return [blocks for blocks in found if -(-inputs // TILE_ROWS) % blocks.pair_rows == 0]


def choose_blocks(num_experts: int, inputs: int, outputs: int) -> Blocks:
    """Blocks for dw [E, K, N]: `choose`."""

    def tiles(blocks: Blocks) -> float:
        row_tiles = -(-inputs // TILE_ROWS)
        return num_experts * row_tiles * (outputs // blocks.columns) / blocks.peers

    return choose(candidates(inputs, outputs), tiles)


class _Group(NamedTuple):
    """Rows of a group, run-time values."""

    start: Array
    """First row that is read, a multiple of 8."""
    first: Array
    """First own row, counted from `start`."""
    end: Array
    """One past the last own row, counted from `start`."""
    steps: Array


def grouped_weight_gradient(
    x_MK: Array,
    dy_MN: Array,
    group_sizes_E: Array,
    *,
    dtype: Any = jnp.float32,
    blocks: Blocks | None = None,
    emulated: bool,
) -> Array:
    """dw[e] = x_e^T dy_e over the rows of group e, summed in fp32.

    Rows of no group may hold anything, NaN included, and reach nothing. Source: the derivative of
    y[m] = x[m] @ w[e].

    Args:
        x_MK: rows sorted by expert [M, K], bf16; K and N multiples of 64.
        dy_MN: their cotangents [M, N], bf16.
        group_sizes_E: rows of each expert, int [E].
        dtype: of the result, float32 or bfloat16.
        blocks: by default those measured best, else `choose_blocks`.
        emulated: run on CPU.

    Returns:
        [E, K, N], zeros for an empty group.
    """
    (M, K), N, E = x_MK.shape, dy_MN.shape[1], group_sizes_E.shape[0]
    shapes = f"M{M} E{E} K{K} N{N} {jnp.dtype(dtype)}"
    blocks = blocks or tuned_blocks("grouped_weights", shapes, Blocks) or choose_blocks(E, K, N)
    columns, tile_rows = blocks.columns * blocks.pair_columns, TILE_ROWS * blocks.pair_rows
    column_tiles, row_tiles = N // columns, -(-K // tile_rows)
    assert N % (columns * blocks.band) == 0, (N, blocks)
    # TMA cuts rows into swizzle patterns of 8, and a copy must not be larger than its source.
    rows = max(DEPTH, -(-M // ALIGNMENT) * ALIGNMENT)
    starts_G, ends_G = group_spans(group_sizes_E, rows)

    def weight_gradient(*refs):
        _body(blocks, row_tiles, column_tiles, *refs)

    chunk = CHUNK_BYTES // jnp.dtype(dtype).itemsize
    kernel = mosaic_kernel(
        weight_gradient,
        out_type=jax.ShapeDtypeStruct((E, K, N), dtype),
        emulated=emulated,
        scratch_types=[
            tile_buffer((blocks.slots, DEPTH, TILE_ROWS), x_MK.dtype),
            tile_buffer((blocks.slots, DEPTH, blocks.columns), x_MK.dtype),
            tile_buffer((PRODUCT_WARPGROUPS, STAGES, WARPGROUP_ROWS, chunk), dtype),
            *blocks.barriers(copies=2),
            plgpu.Barrier(num_arrivals=PRODUCT_WARPGROUPS),
        ],
        **blocks.grid(E * row_tiles * column_tiles),
    )
    return kernel(starts_G, ends_G, pad_rows(x_MK, rows), pad_rows(dy_MN, rows))


def _body(blocks: Blocks, row_tiles: int, column_tiles: int, *refs):
    starts_G, ends_G, x_MK, dy_MN, dw_EKN, x_smem, dy_smem, staging, loaded, free, masked = refs
    E, K, _ = dw_EKN.shape
    ring = Ring(blocks.slots, loaded, free)
    per_expert = row_tiles * column_tiles

    def tile_at(index):
        expert = lax.div(index, per_expert)
        row, column = banded(lax.rem(index, per_expert), row_tiles, blocks.band)
        row = row * blocks.pair_rows + (blocks.peer() if blocks.pair == "rows" else 0)
        column = column * blocks.pair_columns + (blocks.peer() if blocks.pair == "columns" else 0)
        row = pl.multiple_of(row * TILE_ROWS, TILE_ROWS)
        column = pl.multiple_of(column * blocks.columns, blocks.columns)
        return expert, row, column, _group_at(starts_G, ends_G, expert)

    def load_tile(index, step):
        _, row, column, group = tile_at(index)

        def fill(k, step):
            depth = pl.ds(pl.multiple_of(group.start + k * DEPTH, ALIGNMENT), DEPTH)
            x_tile = x_MK.at[depth, pl.ds(row, TILE_ROWS)]
            dy_tile = dy_MN.at[depth, pl.ds(column, blocks.columns)]
            ring.fill(
                step,
                [
                    Copy(x_tile, x_smem, blocks.pair == "columns"),
                    Copy(dy_tile, dy_smem, blocks.pair == "rows"),
                ],
            )
            return step + 1

        return lax.fori_loop(0, group.steps, fill, step)

    def multiply_tile(warpgroup, index, step):
        expert, row, column, group = tile_at(index)
        row = pl.multiple_of(row + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        operands = x_smem, dy_smem, masked
        dw_RC = _multiply(ring, step, group, operands, warpgroup, blocks.columns)

        @pl.when(row < K)
        def _():
            _store(
                dw_RC, dw_EKN.at[expert, pl.ds(row, WARPGROUP_ROWS)], column, staging.at[warpgroup]
            )

        return step + group.steps

    for_each = partial(for_each_tile, blocks.clusters(E * per_expert), E * per_expert)
    ring.run(
        lambda: for_each(load_tile),
        lambda warpgroup: for_each(partial(multiply_tile, warpgroup)),
    )


def _group_at(starts_G, ends_G, expert: Array) -> _Group:
    start, end = starts_G[expert], ends_G[expert]
    first = lax.rem(start, ALIGNMENT)
    count = end - start
    steps = jnp.where(count > 0, lax.div(first + count + DEPTH - 1, DEPTH), 0)
    return _Group(pl.multiple_of(start - first, ALIGNMENT), first, first + count, steps)


def _multiply(ring: Ring, step: Array, group: _Group, operands, warpgroup, columns: int) -> Array:
    """A warpgroup's rows of a tile of dw, in fp32 [64, columns]."""
    x_smem, dy_smem, masked = operands
    mine = pl.ds(pl.multiple_of(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS), WARPGROUP_ROWS)
    # Columns of dy are shared out in whole swizzle patterns.
    cleaners = PRODUCT_WARPGROUPS if columns % (PRODUCT_WARPGROUPS * DEPTH) == 0 else 1
    part = columns // cleaners
    my_part = pl.ds(pl.multiple_of(warpgroup * part, part), part)

    def scope(acc_RC):
        def multiply(slot, k):
            x_DR = x_smem.at[slot, :, mine]
            first, end = group.first - k * DEPTH, group.end - k * DEPTH

            @pl.when((first > 0) | (end < DEPTH))
            def _():
                # Each warpgroup clears what it alone reads of x, and a part of dy, which both read.
                _keep_rows(x_DR, first, end)

                @pl.when(warpgroup < cleaners)
                def _():
                    _keep_rows(dy_smem.at[slot, :, my_part], first, end)

                plgpu.commit_smem()
                plgpu.barrier_arrive(masked)
                plgpu.barrier_wait(masked)

            plgpu.wgmma(acc_RC, x_DR.transpose((1, 0)), dy_smem.at[slot])

        ring.consume(step, group.steps, multiply)
        sums = acc_RC[...]
        ring.release_last(step, group.steps)
        return sums

    shape = WARPGROUP_ROWS, columns
    acc = plgpu.ACC(shape, jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
    return pl.run_scoped(scope, acc)


def _keep_rows(ref, first: Array, end: Array) -> None:
    """Set the rows outside [first, end) to zero."""
    row = lax.broadcasted_iota(jnp.int32, ref.shape, 0)
    ref[...] = jnp.where((row >= first) & (row < end), ref[...], jnp.zeros((), ref.dtype))


def _store(dw_RC: Array, out_RN, column, staging) -> None:
    """Write a warpgroup's rows of a tile, a chunk of columns at a time."""
    chunk = staging.shape[2]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for i, c in enumerate(range(0, dw_RC.shape[1], chunk)):
        buffer = staging.at[i % STAGES]
        plgpu.wait_smem_to_gmem(STAGES - 1, wait_read_only=True)
        buffer[...] = dw_RC[:, c : c + chunk].astype(buffer.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, out_RN.at[:, pl.ds(column + c, chunk)])
