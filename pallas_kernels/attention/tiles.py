"""Shared parts of latent attention's kernels: launch, order of tiles, ranges, masks and buffers.

Row t sees the keys s with start[t] <= s <= t. Both ends grow with t, so the keys that a block of
queries sees are one range, as are the queries that see a block of keys. Only blocks at the two ends
of a range hold pairs that are not seen: they are computed first, with a mask, the others without.

Shape letters: as in `attention/blocks.py`; Q queries and S keys of one step.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.blocks import (
    BLOCK,
    COMPUTE,
    WARPGROUP_ROWS,
    Sizes,
    Tile,
)
from pallas_kernels.mosaic import MEMORY_REGISTERS, mosaic_kernel, rows, tiled

COMPUTE_REGISTERS = 232
"""Per thread: two such warpgroups and one with `MEMORY_REGISTERS` fill the 65,536 of an SM."""
L2_BYTES = 32 * 2**20
"""Share of the 50 MB of L2 that the keys and values of a section of heads may fill."""


class Plan(NamedTuple):
    """Static facts of a kernel."""

    scale: float
    sizes: Sizes
    tile: Tile
    programs: int
    """At most one per tile."""
    emulated: bool

    @property
    def log2_scale(self) -> float:
        """Factor of logits whose exponential is a power of two, as the hardware has it."""
        return self.scale * math.log2(math.e)

    def slot(self, step: Array) -> Array:
        """Slot of the ring that holds what a step reads."""
        return lax.rem(step, jnp.int32(self.tile.stages))

    def buffer(self, *shape: int) -> Any:
        """Shared memory [..., rows, columns] in bfloat16, laid out for every width of a head.

        Both operands of a product must be swizzled alike, and the parts of a head meet each other.
        """
        s = self.sizes
        transforms = tiled(math.gcd(s.P, s.R, s.V), jnp.bfloat16)
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


# ---- programs and tiles -------------------------------------------------------------------------


def launch(
    name: str, load: Callable, compute: Callable, *, arrays: Any, scratch: Any, plan: Plan
) -> Any:
    """Run a kernel whose programs have one warpgroup that loads and two that compute.

    Args:
        name: of the kernel, for profiles and the assembler's report.
        load: called as `load(arrays, scratch, plan)` with references in place of arrays.
        compute: likewise, with the index of its warpgroup as fourth argument.
        arrays: NamedTuple of the operands, then `jax.ShapeDtypeStruct` of the results.
        scratch: NamedTuple of buffers and barriers.
        plan: its shapes.
    """
    operands = [x for x in arrays if not isinstance(x, jax.ShapeDtypeStruct)]
    memory, buffers, count = type(arrays), type(scratch), len(arrays)

    def body(*refs: Any) -> None:
        global_memory, shared = memory(*refs[:count]), buffers(*refs[count:])
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == COMPUTE)
        def _():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            load(global_memory, shared, plan)

        @pl.when(warpgroup < COMPUTE)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            compute(global_memory, shared, plan, warpgroup)

    body.__name__ = name
    return mosaic_kernel(
        body,
        out_type=tuple(arrays[len(operands) :]),
        grid=(plan.programs,),
        grid_names=("program",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        scratch_types=tuple(scratch),
        emulated=plan.emulated,
    )(*operands)


def each_tile(one_tile: Callable[[Array, Array], Array], plan: Plan) -> Array:
    """Run `one_tile(i, steps so far) -> steps so far` for the tiles of this program."""
    tiles, program = plan.sizes.tiles, lax.axis_index("program")
    none = 0 * program  # not a constant: those do not lower where a product closes over them
    if plan.programs == tiles:
        # Without a loop: addresses of what comes after the steps would fill registers throughout.
        return one_tile(none, none)
    mine = lax.div(tiles - 1 - program, jnp.int32(plan.programs)) + 1
    return lax.fori_loop(0, mine, one_tile, none)


def tile_at(i: Array, plan: Plan, *, last_first: bool) -> tuple[Array, Array, Array]:
    """Batch, head and block (of `BLOCK` positions) of this program's i-th tile.

    Heads are taken in sections whose keys and values (or queries and gradients) fit into L2; within
    a section the longest tiles come first, so that programs finish together.
    """
    sizes, heads = plan.sizes, jnp.int32(section_heads(plan.sizes))
    num_blocks = sizes.T // BLOCK
    index = lax.axis_index("program") + i * plan.programs
    within = lax.rem(index, heads * num_blocks)
    row = lax.div(index, heads * num_blocks) * heads + lax.rem(within, heads)
    block = lax.div(within, heads)
    block = num_blocks - 1 - block if last_first else block
    return lax.div(row, jnp.int32(sizes.N)), lax.rem(row, jnp.int32(sizes.N)), block


def section_heads(sizes: Sizes) -> int:
    """Heads of a section: the largest divisor of B N whose keys and values fit into `L2_BYTES`."""
    heads = sizes.B * sizes.N
    most = max(1, L2_BYTES // (2 * sizes.T * (sizes.P + sizes.V)))
    return max(n for n in range(1, min(heads, most) + 1) if heads % n == 0)


def wait_free(free: Any, step: Array, plan: Plan) -> None:
    """Wait until the slot of a step has been read, if it was ever filled."""

    @pl.when(step >= plan.tile.stages)
    def _():
        plgpu.barrier_wait(free.at[plan.slot(step)])


def drain(steps: Array, plan: Plan, *frees: Any) -> None:
    """Wait until every slot has been read, after `steps` of them were filled."""

    @pl.loop(jnp.maximum(steps - plan.tile.stages, 0), steps)
    def _(step):
        for free in frees:
            plgpu.barrier_wait(free.at[plan.slot(step)])


# ---- what a tile sees ---------------------------------------------------------------------------


class Range(NamedTuple):
    """Blocks [first, last) of which [full_first, full_last) need no mask."""

    first: Array
    full_first: Array
    full_last: Array
    last: Array

    @property
    def steps(self) -> Array:
        return self.last - self.first

    @property
    def masked(self) -> Array:
        """Steps with a mask; they come first."""
        return self.steps - (self.full_last - self.full_first)

    def block(self, step: Array) -> Array:
        """Block of a step: those with a mask from the last on, then the others."""
        tail = self.last - self.full_last
        masked = jnp.where(step < tail, self.last - 1 - step, self.first + step - tail)
        return jnp.where(step < self.masked, masked, self.full_first + step - self.masked)


def range_of(first: Array, full_first: Array, full_last: Array, last: Array) -> Range:
    """A `Range` whose inner part may be given reversed, which is empty."""
    full_last = jnp.maximum(full_last, first)
    return Range(first, jnp.clip(full_first, first, full_last), full_last, last)


def keys_seen(start_T: Any, query: Array, tile: Tile) -> Range:
    """Blocks of keys that the queries [query, query + tile.queries) see."""
    keys = jnp.int32(tile.keys)
    return range_of(
        first=lax.div(start_T[query], keys),
        full_first=ceil_div(start_T[query + tile.queries - 1], keys),
        full_last=lax.div(query + 1, keys),
        last=ceil_div(query + tile.queries, keys),
    )


def queries_seeing(any_until: Array, all_until: Array, key: Array, tile: Tile) -> Range:
    """Blocks of queries that see the keys [key, key + tile.keys).

    Queries before `any_until` start early enough to see one of them, those before `all_until` to
    see all.
    """
    queries = jnp.int32(tile.queries)
    return range_of(
        first=lax.div(key, queries),
        full_first=ceil_div(key + tile.keys - 1, queries),
        full_last=lax.div(all_until, queries),
        last=ceil_div(any_until, queries),
    )


def ceil_div(x: Array, y: Array) -> Array:
    """x / y rounded up, of positive integers."""
    return lax.div(x + y - 1, y)


def seen(start_Q: Array, query: Array, key: Array, shape: tuple[int, int]) -> Array:
    """Mask of a step's pairs [Q, S] that count, given the positions of its first query and key."""
    # Both bounds are made per row: positions of all pairs would fill registers.
    column_QS = lax.broadcasted_iota(jnp.int32, shape, 1)
    last_Q = lax.iota(jnp.int32, shape[0]) + (query - key)
    return (column_QS <= rows(last_Q, shape)) & (column_QS >= rows(start_Q - key, shape))


# ---- products -----------------------------------------------------------------------------------


def accumulator(columns: int) -> Any:
    """Sums of products of one warpgroup's rows, fp32, zero at first."""
    return plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, columns), jnp.float32)
