"""Forward kernel of latent attention in its expanded form: flash attention for Hopper.

Computes o = softmax(scale q k^T) v over the keys that each row sees, and the log-sum of each row.

Roofline: N T^2 (P + R + V) FLOPs of a causal sequence, half of the square. V3 (N = 128, P = V =
128, R = 64) at T = 4096: 0.69 TFLOP, 0.69 ms at 989 TFLOP/s; 0.60 GB of operands and results, 0.13
ms at 4.8 TB/s: the tensor cores bound it.

Schedule (FlashAttention-3, arXiv:2407.08608, sections 3.1 and 3.2), one program per SM:
1. One warpgroup loads: the queries of a tile once, keys and values through rings, ahead of use and
   across tiles. Slots of keys are free as soon as the logits are made.
2. Two warpgroups own 64 queries each and take turns: while one multiplies, the other computes its
   softmax. A turn is p v of one step and q k^T of the next, in flight together.
3. Weights stay in registers as the left operand; the two parts of q k^T sum into one accumulator.
4. Tiles come longest first within sections of heads that share L2.

Shape letters: as in `attention/tiles.py`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.blocks import BLOCK, COMPUTE, WARPGROUP_ROWS
from pallas_kernels.attention.tiles import (
    Plan,
    Range,
    accumulator,
    drain,
    each_tile,
    keys_seen,
    launch,
    seen,
    tile_at,
    wait_free,
)
from pallas_kernels.mosaic import add_products, not_hoisted, rows

MASKED = -1e30
"""Logit of a pair that is not seen. Finite: rows may start with a block of which they see nothing,
and what such a block adds is wiped out by the first key that they see."""


class Arrays(NamedTuple):
    """Operands and results in global memory."""

    q_BTNH: Any
    kv_BTNW: Any
    k_rope_BTR: Any
    start_BT: Any
    o_BTNV: Any
    lse_BNT: Any


class Scratch(NamedTuple):
    """Shared memory and barriers; queries of a tile, rings of keys and of values."""

    q_nope: Any
    q_rope: Any
    k_nope: Any
    k_rope: Any
    v: Any
    lse: Any
    queries_full: Any
    queries_free: Any
    keys_full: Any
    keys_free: Any
    values_full: Any
    values_free: Any
    turn: Any


def forward(
    q_BTNH: Array, kv_BTNW: Array, k_rope_BTR: Array, start_BT: Array, plan: Plan
) -> tuple[Array, Array]:
    """Outputs, and the base-2 logarithm of each row's sum of exponentials.

    Args:
        q_BTNH: queries [B, T, N, P + R], bfloat16; T is a multiple of `BLOCK`.
        kv_BTNW: keys without position, and values [B, T, N, P + V], bfloat16.
        k_rope_BTR: rotated keys of all heads [B, T, R], bfloat16.
        start_BT: first position that each row sees, int32 [B, T], not decreasing, start[t] <= t.
        plan: its sizes must be those of the arrays.

    Returns:
        [B, T, N, V] bfloat16 and [B, N, T] fp32.
    """
    (B, T, N, P, R, V), tile = plan.sizes, plan.tile
    arrays = Arrays(
        q_BTNH,
        kv_BTNW,
        k_rope_BTR,
        start_BT,
        o_BTNV=jax.ShapeDtypeStruct((B, T, N, V), q_BTNH.dtype),
        lse_BNT=jax.ShapeDtypeStruct((B, N, T), jnp.float32),
    )
    scratch = Scratch(
        q_nope=plan.buffer(BLOCK, P),
        q_rope=plan.buffer(BLOCK, R),
        k_nope=plan.buffer(tile.stages, tile.keys, P),
        k_rope=plan.buffer(tile.stages, tile.keys, R),
        v=plan.buffer(tile.stages, tile.keys, V),
        lse=plgpu.SMEM((COMPUTE, WARPGROUP_ROWS), jnp.float32),
        queries_full=plgpu.Barrier(num_arrivals=2),
        queries_free=plgpu.Barrier(num_arrivals=COMPUTE),
        keys_full=plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
        keys_free=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=tile.stages),
        values_full=plgpu.Barrier(num_barriers=tile.stages),
        values_free=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=tile.stages),
        turn=plgpu.Barrier(num_arrivals=COMPUTE),
    )
    return launch("attention_forward", _load, _compute, arrays=arrays, scratch=scratch, plan=plan)


def _load(g: Arrays, s: Scratch, plan: Plan) -> None:
    """The warpgroup that moves data: for each tile its queries, then keys and values in steps."""
    P, R, V, tile = plan.sizes.P, plan.sizes.R, plan.sizes.V, plan.tile

    def one_tile(i, step):
        b, n, block = tile_at(i, plan, last_first=True)
        blocks = keys_seen(g.start_BT.at[b], block * BLOCK, tile)

        def keys(j):
            slot, at = plan.slot(step + j), pl.ds(blocks.block(j) * tile.keys, tile.keys)
            wait_free(s.keys_free, step + j, plan)
            full = s.keys_full.at[slot]
            plgpu.copy_gmem_to_smem(g.kv_BTNW.at[b, at, n, pl.ds(0, P)], s.k_nope.at[slot], full)
            plgpu.copy_gmem_to_smem(g.k_rope_BTR.at[b, at], s.k_rope.at[slot], full)

        def values(j):
            slot, at = plan.slot(step + j), pl.ds(blocks.block(j) * tile.keys, tile.keys)
            wait_free(s.values_free, step + j, plan)
            full = s.values_full.at[slot]
            plgpu.copy_gmem_to_smem(g.kv_BTNW.at[b, at, n, pl.ds(P, V)], s.v.at[slot], full)

        # The first keys need not wait for the last tile's outputs to leave the queries' place.
        keys(jnp.int32(0))
        pl.when(i > 0)(lambda: plgpu.barrier_wait(s.queries_free))
        q_TH = g.q_BTNH.at[b, pl.ds(block * BLOCK, BLOCK), n]
        plgpu.copy_gmem_to_smem(q_TH.at[:, pl.ds(0, P)], s.q_nope, s.queries_full)
        plgpu.copy_gmem_to_smem(q_TH.at[:, pl.ds(P, R)], s.q_rope, s.queries_full)
        values(jnp.int32(0))

        @pl.loop(1, blocks.steps)
        def _(j):
            keys(j)
            values(j)

        return step + blocks.steps

    steps = each_tile(one_tile, plan)
    drain(steps, plan, s.keys_free, s.values_free)
    plgpu.barrier_wait(s.queries_free)


class Rows(NamedTuple):
    """The 64 queries of a tile that a warpgroup owns, and the steps that they take."""

    warpgroup: Array
    query: Array
    start_Q: Array
    blocks: Range
    step: Array
    """Steps of the program before this tile."""


class Sums(NamedTuple):
    """State after a step: its successor's logits, outputs, and maximum and sum of each row."""

    logits_QS: Array
    o_QV: Array
    max_Q: Array
    sum_Q: Array


def _compute(g: Arrays, s: Scratch, plan: Plan, warpgroup: Array) -> None:
    """A warpgroup that computes its 64 queries of each tile."""
    V, acc = plan.sizes.V, accumulator(plan.tile.keys)

    def one_tile(i, step):
        b, n, block = tile_at(i, plan, last_first=True)
        query = block * BLOCK + warpgroup * WARPGROUP_ROWS
        at = pl.ds(query, WARPGROUP_ROWS)
        start_Q = plgpu.load(g.start_BT.at[b, at], optimized=False)
        blocks = keys_seen(g.start_BT.at[b], block * BLOCK, plan.tile)
        here = Rows(warpgroup, query, start_Q, blocks, step)
        attend = partial(_attend, s=s, plan=plan, here=here)

        plgpu.barrier_wait(s.queries_full)
        pl.when(warpgroup == 1)(lambda: _take_turns(s))
        sums = Sums(
            pl.run_scoped(partial(_first_logits, s=s, plan=plan, here=here), acc),
            jnp.zeros((WARPGROUP_ROWS, V), jnp.float32),
            jnp.full((WARPGROUP_ROWS,), MASKED, jnp.float32),
            jnp.zeros((WARPGROUP_ROWS,), jnp.float32),
        )
        last = blocks.steps - 1
        masked = jnp.minimum(blocks.masked, last)
        sums = lax.fori_loop(0, masked, partial(attend, masked=True), sums)
        sums = lax.fori_loop(masked, last, partial(attend, masked=False), sums)
        _, o_QV, max_Q, sum_Q = attend(last, sums, masked=True, last=True)
        pl.when(warpgroup == 0)(lambda: _take_turns(s))

        s.lse[warpgroup] = max_Q + jnp.log2(sum_Q)
        # The queries have been read, and outputs are as wide as their first part.
        place = s.q_nope.at[pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)]
        place[...] = (o_QV * rows(1 / sum_Q, (WARPGROUP_ROWS, V))).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(s.lse.at[warpgroup], g.lse_BNT.at[b, n, at])
        plgpu.copy_smem_to_gmem(place, g.o_BTNV.at[b, at, n])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(s.queries_free)
        return step + blocks.steps

    each_tile(one_tile, plan)
    plgpu.wait_smem_to_gmem(0)


def _take_turns(s: Scratch) -> None:
    """Give the tensor cores to the other warpgroup, and wait until it gives them back.

    The second warpgroup does so once more before a tile, the first after it: half a step apart.
    """
    plgpu.barrier_arrive(s.turn)
    plgpu.barrier_wait(s.turn)


def _start_logits(acc: Any, j: Array, s: Scratch, plan: Plan, here: Rows) -> None:
    """Start q k^T of step j, then let the other warpgroup multiply."""
    slot = plan.slot(here.step + j)
    mine = pl.ds(not_hoisted(here.warpgroup) * WARPGROUP_ROWS, WARPGROUP_ROWS)
    plgpu.barrier_wait(s.keys_full.at[slot])
    plgpu.wgmma(acc, s.q_nope.at[mine], s.k_nope.at[slot].transpose((1, 0)))
    plgpu.wgmma(acc, s.q_rope.at[mine], s.k_rope.at[slot].transpose((1, 0)))
    _take_turns(s)


def _first_logits(acc: Any, s: Scratch, plan: Plan, here: Rows) -> Array:
    _start_logits(acc, jnp.int32(0), s, plan, here)
    return acc[...]


def _attend(
    j: Array, sums: Sums, *, s: Scratch, plan: Plan, here: Rows, masked: bool, last: bool = False
) -> Sums:
    """Softmax of step j; then its values are added while the next logits are made."""
    logits_QS, o_QV, max_Q, sum_Q = sums
    slot = plan.slot(here.step + j)
    shape, o_shape = (WARPGROUP_ROWS, plan.tile.keys), (WARPGROUP_ROWS, plan.sizes.V)
    plgpu.barrier_arrive(s.keys_free.at[slot])
    factor = plan.log2_scale
    if masked:
        pairs_QS = seen(here.start_Q, here.query, here.blocks.block(j) * plan.tile.keys, shape)
        # Scaled first: the product of a scale and MASKED is rounded by more than exponents take.
        logits_QS, factor = jnp.where(pairs_QS, logits_QS * factor, MASKED), 1.0
    new_max_Q = jnp.maximum(max_Q, logits_QS.max(axis=1) * factor)
    p_QS = jnp.exp2(logits_QS * factor - rows(new_max_Q, shape))
    decay_Q = jnp.exp2(max_Q - new_max_Q)
    o_QV *= rows(decay_Q, o_shape)
    sum_Q = sum_Q * decay_Q + p_QS.sum(axis=1)
    p16_QS = p_QS.astype(jnp.bfloat16)

    plgpu.barrier_arrive(s.turn)
    plgpu.barrier_wait(s.values_full.at[slot])
    plgpu.barrier_wait(s.turn)
    add_values = partial(add_products, (o_QV,), p16_QS, (s.v.at[slot],), emulated=plan.emulated)

    def products(acc):
        (o_QV,) = add_values(partial(_start_logits, acc, j + 1, s, plan, here))
        return acc[...], o_QV

    if last:
        (o_QV,) = add_values()
    else:
        logits_QS, o_QV = pl.run_scoped(products, accumulator(plan.tile.keys))
    plgpu.barrier_arrive(s.values_free.at[slot])
    return Sums(logits_QS, o_QV, new_max_Q, sum_Q)
