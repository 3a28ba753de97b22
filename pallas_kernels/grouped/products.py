"""Grouped products on Hopper: y[m] = sum over i of x_i[m] @ w_i[e], rows sorted by expert, bf16.

One kernel serves the forward pass, the gradient of the rows (weights read transposed, where they
lie) and SwiGLU (two weights side by side, joined before they are stored).

Schedule: a persistent grid takes tiles of 128 rows x 256 columns, down bands of columns, in pairs
of blocks that share the weight's tile or the rows'. Of a block, one warpgroup copies [128, 64] of
the rows and [64, 256] of the weight per step by TMA into a ring of 4 slots (`ring.py`); two
multiply 64 rows each and store. Tiles come from a table (`row_tiles.py`) and start at multiples
of 8 rows, so a tile may hold rows of its neighbours: products of rows are independent, and only its
own are stored. 64 own rows are one TMA store per 64 columns; fewer go through an unswizzled buffer
in pieces of 32, 16, 8, 4, 2 and 1 rows, by the bits of their number. No row is written twice.

Roofline on an H200: 2 M K N FLOPs at 989 TFLOP/s and 2 (M K + E K N + M N) bytes at 4.8 TB/s; with
fewer than about 200 rows per expert the weights' bytes bound it, with more the FLOPs. From L2 a
block reads 32 KiB per step where a pair shares the weight: 4.3 TB/s at 550 TFLOP/s, 6.4 if not.

Shape letters: M rows, E experts, K contraction, N columns, R rows of a warpgroup, C columns of a
tile.
"""

from collections.abc import Callable, Sequence
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
from pallas_kernels.grouped.ring import Copy, Ring, banded, for_each_tile
from pallas_kernels.grouped.row_tiles import ALIGNMENT, RowTiles, make_row_tiles, most_tiles
from pallas_kernels.mosaic import mosaic_kernel, tile_buffer
from pallas_kernels.tuned import tuned_blocks

CHUNK = 64
"""Columns that a warpgroup stores at a time."""
STAGING_BYTES = 2 * PRODUCT_WARPGROUPS * WARPGROUP_ROWS * CHUNK * 2
"""Shared memory of the stores: a swizzled and a plain buffer per warpgroup."""
BARRIER_BYTES = 1024
"""Shared memory kept for barriers and alignment."""

Summand = tuple[Array, tuple[Array, ...]]
"""Rows [M, K] and the weights [E, K, N] (transposed: [E, N, K]) that multiply them."""


def unsupported(inputs: int, outputs: int, dtype: Any) -> str | None:
    """Reason why the kernels cannot multiply rows by weights [E, inputs, outputs], or None."""
    if dtype != jnp.bfloat16:
        return f"the kernels multiply bfloat16, not {jnp.dtype(dtype)}"
    for width in (inputs, outputs):
        if width <= 0 or width % DEPTH:
            return f"a width of {width} is no multiple of {DEPTH}"
    return None


def shared_memory(blocks: Blocks, side_by_side: int = 1) -> int:
    """Bytes of shared memory that a program takes."""
    slot = 2 * DEPTH * (TILE_ROWS + side_by_side * blocks.columns)
    return blocks.slots * slot + STAGING_BYTES + BARRIER_BYTES


def candidates(outputs: int, side_by_side: int = 1) -> list[Blocks]:
    """Blocks worth timing for `outputs` columns of so many weights side by side."""
    return cuts(outputs, side_by_side, partial(shared_memory, side_by_side=side_by_side))


def choose_blocks(num_rows: int, num_experts: int, outputs: int, side_by_side: int = 1) -> Blocks:
    """Blocks for M rows over E experts and N output columns: `choose`.

    A group wastes half a tile, or pair of tiles, of rows.
    """

    def tiles(blocks: Blocks) -> float:
        rows = num_rows / (TILE_ROWS * blocks.pair_rows) + min(num_experts, num_rows) / 2
        return rows * outputs / (blocks.columns * blocks.pair_columns)

    return choose(candidates(outputs, side_by_side), tiles, side_by_side)


class _Shape(NamedTuple):
    """Static facts of a call that the kernel's body needs besides its blocks."""

    programs: int
    num_experts: int
    depth_steps: int
    """Steps of the ring per summand."""
    column_tiles: int
    """Tiles, or pairs of them, along the columns."""
    num_summands: int
    side_by_side: int
    transposed: bool
    num_outputs: int


def grouped_products(
    summands: Sequence[Summand],
    group_sizes_E: Array,
    *,
    name: str,
    transposed: bool = False,
    finish: Callable[..., Sequence[Array]] = lambda *sums: sums,
    num_outputs: int = 1,
    blocks: Blocks | None = None,
    emulated: bool,
) -> list[Array]:
    """finish(y_1, y_2, ..) with y_j[m] = sum over i of x_i[m] @ w_ij[e], for the rows m of group e.

    Rows beyond the last group may hold anything; their outputs are finish(0, ..).

    Args:
        summands: rows x_i [M, K] and weights w_ij [E, K, N], bf16; all x_i and all w_ij alike.
        group_sizes_E: rows of each expert, int [E].
        name: of the kernel, as profilers and the assembler report it.
        transposed: weights are [E, N, K], and are read so.
        finish: from fp32 sums [64, columns], one per j, the outputs, elementwise.
        num_outputs: how many arrays `finish` returns.
        blocks: by default those measured best, else `choose_blocks`.
        emulated: run on CPU.

    Returns:
        `num_outputs` arrays [M, N], bf16.
    """
    x_MK, weights = summands[0]
    (M, K), E, N = x_MK.shape, weights[0].shape[0], weights[0].shape[1 if transposed else 2]
    blocks = blocks or _best_blocks(M, E, K, N, summands, transposed)
    columns, tile_rows = blocks.columns * blocks.pair_columns, TILE_ROWS * blocks.pair_rows
    assert N % (columns * blocks.band) == 0, (N, blocks)
    # TMA cuts rows into swizzle patterns of 8, and a copy must not be larger than its source.
    rows = max(TILE_ROWS, -(-M // ALIGNMENT) * ALIGNMENT)
    operands = [a for x, ws in summands for a in (pad_rows(x, rows), *ws)]
    most = most_tiles(rows, E, tile_rows) * (N // columns)
    shape = _Shape(
        blocks.clusters(most), E, K // DEPTH, N // columns, len(summands), len(weights), transposed,
        num_outputs,
    )  # fmt: skip

    def body(*refs):
        _body(blocks, shape, finish, *refs)

    body.__name__ = name
    kernel = mosaic_kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((rows, N), x_MK.dtype)] * num_outputs,
        emulated=emulated,
        scratch_types=_scratch(blocks, shape, x_MK.dtype),
        **blocks.grid(most),
    )
    outputs = kernel(*make_row_tiles(group_sizes_E, rows, tile_rows), *operands)
    return [y[:M] for y in outputs] if rows > M else list(outputs)


def _best_blocks(M, E, K, N, summands: Sequence[Summand], transposed: bool) -> Blocks:
    side_by_side = len(summands[0][1])
    shapes = spelled(M, E, K, N, side_by_side, len(summands), transposed)
    measured = tuned_blocks("grouped_products", shapes, Blocks)
    return measured or choose_blocks(M, E, N, side_by_side)


def spelled(
    M: int, E: int, K: int, N: int, weights: int = 1, summands: int = 1, transposed: bool = False
) -> str:
    """A call as files of timed blocks name it."""
    shapes = f"M{M} E{E} K{K} N{N} weights{weights} summands{summands}"
    return shapes + " transposed" * transposed


def _scratch(blocks: Blocks, shape: _Shape, dtype: Any) -> list[Any]:
    """The ring's operands, what is stored through, and the ring's barriers."""
    tile = (blocks.columns, DEPTH) if shape.transposed else (DEPTH, blocks.columns)
    staging = (PRODUCT_WARPGROUPS, WARPGROUP_ROWS, CHUNK)
    return [
        tile_buffer((blocks.slots, TILE_ROWS, DEPTH), dtype),
        [tile_buffer((blocks.slots, *tile), dtype)] * shape.side_by_side,
        tile_buffer(staging, dtype),
        plgpu.SMEM(staging, dtype),
        *blocks.barriers(copies=1 + shape.side_by_side),
    ]


def pad_rows(x_MK: Array, rows: int) -> Array:
    """The array with zero rows appended up to `rows` of them."""
    return jnp.pad(x_MK, ((0, rows - x_MK.shape[0]), (0, 0))) if rows > x_MK.shape[0] else x_MK


class _Tile(NamedTuple):
    """One tile's work, run-time values."""

    group: Array
    start: Array
    """First row in device memory; own rows are [start + first, start + end)."""
    first: Array
    end: Array
    column: Array
    steps: Array
    """Per summand; 0 for rows of no group."""


def _tile_at(blocks: Blocks, shape: _Shape, tables: RowTiles, index: Array) -> _Tile:
    """This block's tile of its cluster's `index`-th."""
    t, column = banded(index, tables.count_1[0], blocks.band)
    above = blocks.peer() * TILE_ROWS if blocks.pair == "rows" else 0
    if blocks.pair == "columns":
        column = column * 2 + blocks.peer()
    group = tables.group_C[t]
    return _Tile(
        group,
        pl.multiple_of(tables.start_C[t] + above, ALIGNMENT),
        jnp.maximum(tables.first_C[t] - above, 0),
        tables.end_C[t] - above,
        pl.multiple_of(column * blocks.columns, blocks.columns),
        jnp.where(group < shape.num_experts, shape.depth_steps, 0),
    )


def _body(blocks: Blocks, shape: _Shape, finish: Callable[..., Sequence[Array]], *refs):
    num_tables, each = len(RowTiles._fields), 1 + shape.side_by_side
    num_operands = shape.num_summands * each
    tables = RowTiles(*refs[:num_tables])
    operands = refs[num_tables : num_tables + num_operands]
    outputs = refs[num_tables + num_operands :][: shape.num_outputs]
    x_smem, w_smem, whole_smem, part_smem, *barriers = refs[-6:]
    ring = Ring(blocks.slots, *barriers)
    for_each = partial(for_each_tile, shape.programs, tables.count_1[0] * shape.column_tiles)

    def load_tile(index, step):
        tile = _tile_at(blocks, shape, tables, index)
        for i in range(0, num_operands, each):
            summand = operands[i : i + each]
            step = _load(blocks, shape.transposed, ring, tile, step, summand, [x_smem, *w_smem])
        return step

    def multiply_tile(warpgroup, index, step):
        tile = _tile_at(blocks, shape, tables, index)
        steps, offset = tile.steps * shape.num_summands, warpgroup * WARPGROUP_ROWS
        first = jnp.maximum(tile.first - offset, 0)
        count = jnp.minimum(tile.end - offset, WARPGROUP_ROWS) - first
        buffers = whole_smem.at[warpgroup], part_smem.at[warpgroup]

        def store(*sums):
            for y, out in zip(finish(*sums), outputs, strict=True):
                _store(y, out, tile.start + offset, first, count, tile.column, buffers)

        @pl.when(count > 0)
        def _():
            _multiply(shape.transposed, ring, step, steps, (x_smem, offset), w_smem, store)

        @pl.when(count <= 0)
        def _():
            ring.skip(step, steps)

        return step + steps

    ring.run(
        lambda: for_each(load_tile),
        lambda warpgroup: for_each(partial(multiply_tile, warpgroup)),
    )


def _load(blocks: Blocks, transposed: bool, ring: Ring, tile: _Tile, step, summand, buffers):
    """Fill the ring with a summand of a tile; returns the step after the last."""
    x, *weights = summand
    x_smem, *w_smem = buffers
    rows, columns = pl.ds(tile.start, TILE_ROWS), pl.ds(tile.column, blocks.columns)

    def fill(k, step):
        depth = pl.ds(k * DEPTH, DEPTH)
        at = (columns, depth) if transposed else (depth, columns)
        copies = [Copy(x.at[rows, depth], x_smem, blocks.pair == "columns")]
        for w, target in zip(weights, w_smem, strict=True):
            copies.append(Copy(w.at[tile.group, *at], target, blocks.pair == "rows"))
        ring.fill(step, copies)
        return step + 1

    return lax.fori_loop(0, tile.steps, fill, step)


def _multiply(transposed: bool, ring: Ring, step, steps, rows, w_smem, store) -> None:
    """Sum a warpgroup's products over a tile's steps and give them to `store`."""
    x_smem, offset = rows

    def scope(*accumulators):
        def multiply(slot, _):
            x_RK = x_smem.at[slot, pl.ds(offset, WARPGROUP_ROWS)]
            for acc_RC, w in zip(accumulators, w_smem, strict=True):
                w_KC = w.at[slot].transpose((1, 0)) if transposed else w.at[slot]
                plgpu.wgmma(acc_RC, x_RK, w_KC)

        ring.consume(step, steps, multiply)
        sums = [acc_RC[...] for acc_RC in accumulators]
        ring.release_last(step, steps)
        store(*sums)

    columns = w_smem[0].shape[1 if transposed else 2]
    acc = plgpu.ACC((WARPGROUP_ROWS, columns), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
    pl.run_scoped(scope, *[acc] * len(w_smem))


def _store(y_RC: Array, out_MN, start, first, count, column, buffers) -> None:
    """Write rows [first, first + count) of a warpgroup's tile, whose row 0 belongs at `start`."""
    whole, part = buffers
    y_RC = y_RC.astype(out_MN.dtype)

    def through(buffer, copy):
        for c in range(0, y_RC.shape[1], CHUNK):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            buffer[...] = y_RC[:, c : c + CHUNK]
            plgpu.commit_smem()
            copy(pl.ds(column + c, CHUNK))

    @pl.when(count == WARPGROUP_ROWS)
    def _():
        rows = pl.ds(pl.multiple_of(start, ALIGNMENT), WARPGROUP_ROWS)
        through(whole, lambda columns: plgpu.copy_smem_to_gmem(whole, out_MN.at[rows, columns]))

    @pl.when(count < WARPGROUP_ROWS)
    def _():
        def copy(columns):
            row, size = first, WARPGROUP_ROWS // 2
            while size:

                @pl.when(count & size != 0)
                def _(row=row, size=size):
                    plgpu.copy_smem_to_gmem(
                        part.at[pl.ds(row, size)], out_MN.at[pl.ds(start + row, size), columns]
                    )

                row, size = row + (count & size), size // 2

        through(part, copy)
