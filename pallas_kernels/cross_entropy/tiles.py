"""Tiles of the logits of a linear head on Hopper: what cross-entropy needs of each, and no more.

One walk over the tiles of x w, [M, D] times [D, V], with two ways to end a tile: `statistics` keeps
three numbers per row, `gradient` writes the tile's part of the loss' gradient in bf16. Logits
exist in registers only.

Schedule. A cluster is two blocks, one above the other; a block is two warpgroups that multiply and
one that copies. Each of the two owns 64 rows x 256 columns of fp32 sums (128 registers a thread).
    copier      for every tile, for every step of D: wait until the slot is free;
                x[128, 64] -> slot;  half of w[64, 256] -> the slot of both blocks (multicast)
    multiplier  for every step: wait for the slot; start the product; free the slot before it
                then the tile's end, while the copier fills the slots of the next tile
Blocks stay for all tiles (132 / 2 clusters), which are dealt out eight rows of clusters at a time:
x of those, 29 MB at D = 7168, stays in the L2 cache while w streams by.

Roofline: 2 M V D FLOPs. A block's tile reads (128 + 256 / 2) x D x 2 bytes from L2 for
2 x 128 x 256 x D FLOPs, 128 FLOPs a byte: the tensor cores (989 TFLOP/s) ask for 7.7 TB/s, so L2,
taken as 5.5 TB/s, bounds both kernels at 704 TFLOP/s. Memory sees w once per eight rows of
clusters, well below 4.8 TB/s.

Letters: M rows, D hidden width, V vocabulary (this device's part), N columns of a tile.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import (
    MEMORY_REGISTERS,
    NUM_SMS,
    SMEM_BYTES,
    mosaic_kernel,
    rows,
    tiled,
)

PEERS = 2
"""Blocks of a cluster: they share the columns of w."""
MULTIPLIERS = 2
"""Warpgroups of a block that multiply."""
GROUP_ROWS = 64
"""Rows of a warpgroup: one instruction's."""
BLOCK_ROWS = MULTIPLIERS * GROUP_ROWS
CLUSTER_ROWS = PEERS * BLOCK_ROWS
COMPUTE_REGISTERS = 232
PART = GROUP_ROWS, 64
"""Rows and columns of a store: 128 bytes of bf16 are a row of the swizzled layout."""
KEPT_SCALE = 2.0**15
"""Exponentials are kept times this: fp16 then holds 11 bits of all above 2^-29 of the largest."""
LOG2E = math.log2(math.e)


class Blocks(NamedTuple):
    """Blocks of a product."""

    columns: int
    """Columns of a tile: 128 or 256, since its stores take two slots in turn."""
    depth: int
    """Width of a step along D."""
    stages: int
    """Steps in flight."""
    clusters: int
    """Number of clusters, of two blocks each, that walk the tiles."""


def shared_memory(blocks: Blocks) -> int:
    """Bytes of a block: slots of x and w, two stores per warpgroup, reductions, barriers."""
    slots = blocks.stages * blocks.depth * (BLOCK_ROWS + blocks.columns) * 2
    stores = MULTIPLIERS * 2 * math.prod(PART) * 2
    return slots + stores + 2048 + 16 * blocks.stages


def unsupported(D: int, V: int, dtype: Any) -> str | None:
    """Reason why the kernels cannot take x [M, D] and w [D, V], a clause; None if they can."""
    if dtype != jnp.bfloat16:
        return f"the head's operands are {jnp.dtype(dtype)}, and its kernels multiply bfloat16"
    if D % 64:
        return f"the width {D} is not a multiple of 64"
    if V % 16:
        return f"a device's {V} columns of the vocabulary are not a multiple of 16"
    return None


def tile_counts(M: int, V: int, blocks: Blocks) -> tuple[int, int]:
    """Rows of clusters, and columns, of tiles."""
    return pl.cdiv(M, CLUSTER_ROWS), pl.cdiv(V, blocks.columns)


def candidates(M: int, D: int, V: int) -> list[Blocks]:
    """Cuts that fit shared memory and registers, for the tuner; the stages fill the memory."""
    found = []
    for width in (128, 256):
        for depth in (64, 128):
            fits = [
                s for s in range(2, 9) if shared_memory(Blocks(width, depth, s, 1)) <= SMEM_BYTES
            ]
            if D % depth == 0 and fits:
                tiles = math.prod(tile_counts(M, V, Blocks(width, depth, 0, 0)))
                found.append(Blocks(width, depth, fits[-1], min(NUM_SMS // PEERS, tiles)))
    return found


def seconds(M: int, D: int, V: int, blocks: Blocks) -> float:
    """Predicted time of a walk: waves x (the slower of products and L2, plus a tile's end).

    A block's tile takes 2 x 128 x N x D FLOPs at 989e12 / 132 a second, and (128 + N / 2) x D x 2
    bytes at 5.5e12 / 132; its end takes about 2 us.
    """
    waves = pl.cdiv(math.prod(tile_counts(M, V, blocks)), blocks.clusters)
    products = 2 * BLOCK_ROWS * blocks.columns * D / 989e12
    traffic = (BLOCK_ROWS + blocks.columns / PEERS) * D * 2 / 5.5e12
    return waves * (NUM_SMS * max(products, traffic) + 2e-6)


def choose_blocks(M: int, D: int, V: int) -> Blocks:
    """The cut that `seconds` finds fastest; of equals the shallower step, with more in flight."""
    return min(candidates(M, D, V), key=lambda blocks: (seconds(M, D, V, blocks), blocks.depth))


class Pipe(NamedTuple):
    """Slots in shared memory between the copier and the multipliers."""

    x: Any
    w: Any
    full: Any
    """Barrier of each slot: x and w are there."""
    free: Any
    """Barrier of each slot: the multipliers of both blocks have read it."""


class Place(NamedTuple):
    """Place of a warpgroup in the logits."""

    row: Array
    """First of its rows."""
    column: Array
    """First of its columns."""
    tile: Array
    """Number of the tile along the vocabulary."""
    part: int = 0
    """Number of the part of the tile."""


def _walk(shape: tuple[int, int, int], blocks: Blocks, visit: Callable) -> None:
    """`visit(first step, place)` for every tile of this cluster; `place` is the block's."""
    M, D, V = shape
    counts = tile_counts(M, V, blocks)

    @plgpu.nd_loop((math.prod(counts),), collective_axes="cluster")
    def _(loop):
        down, along = plgpu.planar_snake(loop.index[0], counts, 0, min(8, counts[0]))
        row = (down * PEERS + lax.axis_index("peer")) * BLOCK_ROWS
        visit(loop.local_index * (D // blocks.depth), Place(row, along * blocks.columns, along))


def _copy(x_g: Any, w_g: Any, pipe: Pipe, blocks: Blocks, first: Array, place: Place) -> None:
    """Fill the slots with the steps of a tile, each as soon as it is free."""

    @pl.loop(0, x_g.shape[1] // blocks.depth)
    def _(k):
        slot = lax.rem(first + k, blocks.stages)
        d = pl.ds(k * blocks.depth, blocks.depth)
        plgpu.barrier_wait(pipe.free.at[slot])
        x_here = x_g.at[pl.ds(place.row, BLOCK_ROWS), d]
        w_here = w_g.at[d, pl.ds(place.column, blocks.columns)]
        plgpu.copy_gmem_to_smem(x_here, pipe.x.at[slot], pipe.full.at[slot])
        plgpu.copy_gmem_to_smem(w_here, pipe.w.at[slot], pipe.full.at[slot], collective_axes="peer")


def _multiply(pipe: Pipe, blocks: Blocks, first: Array, steps: int, group: Array) -> Array:
    """This warpgroup's part of the tile, fp32 [64, N]."""
    own = pl.ds(group * GROUP_ROWS, GROUP_ROWS)

    def with_sums(sums):
        @pl.loop(0, steps)
        def _(k):
            slot = lax.rem(first + k, blocks.stages)
            plgpu.barrier_wait(pipe.full.at[slot])
            plgpu.wgmma(sums, pipe.x.at[slot, own], pipe.w.at[slot])
            plgpu.wgmma_wait(1)

            @pl.when(k > 0)
            def _():
                plgpu.barrier_arrive(pipe.free.at[lax.rem(first + k - 1, blocks.stages)])

        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(pipe.free.at[lax.rem(first + steps - 1, blocks.stages)])
        return sums[...]

    shape = GROUP_ROWS, blocks.columns
    sums = plgpu.ACC(shape, jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
    return pl.run_scoped(with_sums, sums)


def _run(
    x_g: Any, w_g: Any, pipe: Pipe, blocks: Blocks, prepare: Callable, finish: Callable
) -> None:
    """Work of each warpgroup: `finish(place, group, prepare(place), logits)` ends a tile."""
    (M, D), V = x_g.shape, w_g.shape[1]
    assert D % blocks.depth == 0, (D, blocks)
    assert blocks.columns in (128, 256), blocks
    group, steps = lax.axis_index("group"), D // blocks.depth

    @pl.when(group < MULTIPLIERS)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        for slot in range(blocks.stages):
            plgpu.barrier_arrive(pipe.free.at[slot])

        def visit(first, place):
            place = place._replace(row=place.row + group * GROUP_ROWS)
            prepared = prepare(place, group)
            logits = _multiply(pipe, blocks, first, steps, group)
            finish(place, group, prepared, logits)

        _walk((M, D, V), blocks, visit)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == MULTIPLIERS)
    def _():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        _walk((M, D, V), blocks, lambda *at: _copy(x_g, w_g, pipe, blocks, *at))
        # Until its slots are free, the other block of the cluster may still write to this one.
        for slot in range(blocks.stages):
            plgpu.barrier_wait(pipe.free.at[slot])


def _buffer(shape: tuple[int, ...], V: int, dtype: Any) -> Any:
    """Shared memory in tiles of 64 columns, or of 32 or 16 where these do not divide V.

    A copy's tiles must divide the array, and both operands of a product have the same tiles.
    """
    return plgpu.SMEM(shape, dtype, transforms=tiled(math.gcd(V, 64), dtype))


def _pipe_types(blocks: Blocks, V: int) -> Pipe:
    slots = blocks.stages
    return Pipe(
        _buffer((slots, BLOCK_ROWS, blocks.depth), V, jnp.bfloat16),
        _buffer((slots, blocks.depth, blocks.columns), V, jnp.bfloat16),
        plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        plgpu.ClusterBarrier(
            collective_axes=("peer",), num_arrivals=MULTIPLIERS, num_barriers=slots
        ),
    )


def _kernel(body: Callable, V: int, blocks: Blocks, out_type: Any, scratch: Any, emulated: bool):
    """`body(*operands, outputs, scratch, pipe)` on the clusters."""
    return mosaic_kernel(
        body,
        out_type=out_type,
        emulated=emulated,
        scratch_types=[scratch, _pipe_types(blocks, V)],
        grid=(blocks.clusters,),
        grid_names=("cluster",),
        cluster=(PEERS,),
        cluster_names=("peer",),
        num_threads=MULTIPLIERS + 1,
        thread_name="group",
    )


def _parts(place: Place, logits_MN: Array) -> Iterator[tuple[Place, Array]]:
    """The tile, a store's columns at a time."""
    for i in range(logits_MN.shape[1] // PART[1]):
        start = i * PART[1]
        part = place._replace(column=place.column + start, part=i)
        yield part, logits_MN[:, start : start + PART[1]]


def _store(part_MN: Array, slots_s: Any, out_g: Any, place: Place) -> None:
    """Write a part of a tile to `out_g`, through one of two slots; what lies outside is dropped."""
    slot_s = slots_s.at[place.part % 2]
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    slot_s[...] = part_MN.astype(out_g.dtype)
    plgpu.commit_smem()
    here = pl.ds(place.row, PART[0]), pl.ds(place.column, PART[1])
    plgpu.copy_smem_to_gmem(slot_s, out_g.at[here])


def _columns(place: Place, shape: tuple[int, int]) -> Array:
    """Column in w of each element of a tile or part."""
    return lax.broadcasted_iota(jnp.int32, shape, 1) + place.column


def _hits(part: Place, target_M: Array) -> Array:
    """Mask of a part's elements that are the targets of their rows."""
    return _columns(part, PART) == rows(target_M, PART)


def _row_values(a_g: Any, place: Place) -> Array:
    """Value in `a_g` [M] of each row of a warpgroup."""
    return plgpu.load(a_g.at[pl.ds(place.row, GROUP_ROWS)], optimized=False)


def _padded(a: Array, multiple: int = CLUSTER_ROWS) -> Array:
    """Zeros added: values of whole tiles' rows are read, and copies take eight rows at a time."""
    return jnp.pad(a, ((0, -a.shape[0] % multiple), *[(0, 0)] * (a.ndim - 1)))


def statistics(
    x_MD: Array, w_DV: Array, targets_M: Array, *, keep: bool, blocks: Blocks, emulated: bool
) -> tuple[Array, Array | None]:
    """Largest logit, sum of exp(logit - largest) and target's logit, per row and tile.

    Returns:
        fp32 [tiles along V, 3, M]; the last of the three is 0 where the target is in another tile.
        With `keep`, 2^15 exp(logit - largest of its row and tile) in fp16 [M, V], else None.
    """
    M, V = x_MD.shape[0], w_DV.shape[1]
    targets_M = jnp.where(targets_M < V, targets_M, -1)  # columns of the last tile are not theirs
    x_MD, targets_M = _padded(x_MD, 8), _padded(targets_M)

    def cross_entropy_statistics(x_g, w_g, targets_g, out_g, exp_g, exp_s, pipe):
        def prepare(place, group):
            return _row_values(targets_g, place)

        def finish(place, group, target_M, logits_MN):
            if V % blocks.columns:
                column_MN = _columns(place, (GROUP_ROWS, blocks.columns))
                logits_MN = jnp.where(column_MN < V, logits_MN, -jnp.inf)
            largest_M = jnp.max(logits_MN, axis=1)
            sum_M = target_logit_M = jnp.zeros((GROUP_ROWS,), jnp.float32)
            for part, logits in _parts(place, logits_MN):
                hit = _hits(part, target_M)
                target_logit_M += jnp.sum(jnp.where(hit, logits, 0.0), axis=1)
                exp = jnp.exp2((logits - rows(largest_M, PART)) * LOG2E)
                sum_M += jnp.sum(exp, axis=1)
                if keep:
                    _store(exp * KEPT_SCALE, exp_s.at[group], exp_g, part)
            results = largest_M, sum_M, target_logit_M
            for i, result_M in enumerate(results):
                out_g[place.tile, i, pl.ds(place.row, GROUP_ROWS)] = result_M

        _run(x_g, w_g, pipe, blocks, prepare, finish)

    tiles = pl.cdiv(V, blocks.columns)
    out = jax.ShapeDtypeStruct((tiles, 3, targets_M.shape[0]), jnp.float32)
    exp = jax.ShapeDtypeStruct((x_MD.shape[0], V), jnp.float16) if keep else None
    stores = _buffer((MULTIPLIERS, 2, *PART), V, jnp.float16) if keep else None
    kernel = _kernel(cross_entropy_statistics, V, blocks, (out, exp), stores, emulated)
    out, exp = kernel(x_MD, w_DV, targets_M)
    return out[:, :, :M], None if exp is None else exp[:M]


def gradient(
    x_MD: Array,
    w_DV: Array,
    targets_M: Array,
    lse_M: Array,
    weights_M: Array,
    *,
    blocks: Blocks,
    emulated: bool,
) -> Array:
    """weights x (exp(logits - lse) - [column is the target]), bf16 [M, V]."""
    M, V = x_MD.shape[0], w_DV.shape[1]
    x_MD, row_values = _padded(x_MD, 8), [_padded(a) for a in (targets_M, lse_M, weights_M)]

    def cross_entropy_gradient(x_g, w_g, targets_g, lse_g, weights_g, out_g, out_s, pipe):
        def prepare(place, group):
            return [_row_values(a_g, place) for a_g in (targets_g, lse_g, weights_g)]

        def finish(place, group, prepared, logits_MN):
            target_M, lse_M, weight_M = prepared
            for part, logits in _parts(place, logits_MN):
                p = jnp.exp2((logits - rows(lse_M, PART)) * LOG2E)
                d = rows(weight_M, PART) * (p - jnp.where(_hits(part, target_M), 1.0, 0.0))
                _store(d, out_s.at[group], out_g, part)

        _run(x_g, w_g, pipe, blocks, prepare, finish)

    out = jax.ShapeDtypeStruct((x_MD.shape[0], V), jnp.bfloat16)
    scratch = _buffer((MULTIPLIERS, 2, *PART), V, jnp.bfloat16)
    kernel = _kernel(cross_entropy_gradient, V, blocks, out, scratch, emulated)
    return kernel(x_MD, w_DV, *row_values)[:M]
