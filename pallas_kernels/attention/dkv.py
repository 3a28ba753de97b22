"""Gradients of the keys and values of latent attention in its expanded form, for Hopper.

dv = P^T do and dk = scale dS^T q, where P = exp(scale q k^T - lse), dS = P * (do v^T - delta); the
logits are made again (FlashAttention-2, arXiv:2307.08691, algorithm 2).

Roofline: four products. V3 (N = 128, P = V = 128, R = 64), one causal sequence of 4096: 1.37 TFLOP,
1.39 ms at 989 TFLOP/s; 0.94 GB of operands and results, 0.20 ms at 4.8 TB/s. At that rate shared
memory would move 141 bytes per cycle and SM, of 128: it bounds the kernel at 91% of the tensor
cores.

Schedule, one program per tile of keys, the longest first within sections of heads that share L2:
1. One warpgroup loads a tile's keys and values once, queries with their gradients through a ring.
2. Two warpgroups own 64 keys each: sums of P + R + V columns, 160 of 232 registers at V3's widths,
   which leave room for one block in fp32. So q k^T becomes P, in bfloat16 in shared memory, before
   do v^T starts, in flight together with dv; dS takes the place of P when dv is done.
3. dk, one product over both parts of a query, stays in flight into the next step, whose logits are
   queued behind it. Then the slot is free.
4. dk's rotary part is written per head, in bfloat16, and summed over heads outside.

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
    launch,
    queries_seeing,
    seen,
    tile_at,
    wait_free,
)
from pallas_kernels.mosaic import not_hoisted, rows


class Arrays(NamedTuple):
    """Operands and results in global memory."""

    q_BTNH: Any
    kv_BTNW: Any
    k_rope_BTR: Any
    start_BT: Any
    do_BTNV: Any
    lse_BNT: Any
    delta_BNT: Any
    until_B2K: Any
    dkv_BTNW: Any
    dk_rope_BTNR: Any


class Scratch(NamedTuple):
    """Shared memory and barriers; keys of a tile, ring of queries with gradients, exchange."""

    k_nope: Any
    k_rope: Any
    v: Any
    q: Any
    do: Any
    lse: Any
    delta: Any
    weights: Any
    """Each warpgroup's P, then dS, of a step: left operands of its products."""
    keys_full: Any
    keys_free: Any
    queries_full: Any
    queries_free: Any


def key_gradients(
    q_BTNH: Array,
    kv_BTNW: Array,
    k_rope_BTR: Array,
    start_BT: Array,
    do_BTNV: Array,
    lse_BNT: Array,
    delta_BNT: Array,
    until_B2K: Array,
    plan: Plan,
) -> tuple[Array, Array]:
    """Gradients of keys and values [B, T, N, P + V], and of rotary keys by head [B, T, N, R].

    Args:
        q_BTNH ... delta_BNT: as `dq.query_gradients` takes them.
        until_B2K: for each block of `BLOCK` keys, how many rows start early enough to see its last
            key, and its first, int32 [B, 2, T / BLOCK].
        plan: its sizes must be those of the arrays.
    """
    (B, T, N, P, R, V), tile = plan.sizes, plan.tile
    assert tile.queries == WARPGROUP_ROWS, "a step is one product of a warpgroup high"
    arrays = Arrays(
        *(q_BTNH, kv_BTNW, k_rope_BTR, start_BT, do_BTNV, lse_BNT, delta_BNT, until_B2K),
        dkv_BTNW=jax.ShapeDtypeStruct((B, T, N, P + V), kv_BTNW.dtype),
        dk_rope_BTNR=jax.ShapeDtypeStruct((B, T, N, R), k_rope_BTR.dtype),
    )
    scratch = Scratch(
        k_nope=plan.buffer(BLOCK, P),
        k_rope=plan.buffer(BLOCK, R),
        v=plan.buffer(BLOCK, V),
        q=plan.buffer(tile.stages, tile.queries, P + R),
        do=plan.buffer(tile.stages, tile.queries, V),
        lse=plgpu.SMEM((tile.stages, tile.queries), jnp.float32),
        delta=plgpu.SMEM((tile.stages, tile.queries), jnp.float32),
        weights=plan.buffer(COMPUTE, tile.queries, WARPGROUP_ROWS),
        keys_full=plgpu.Barrier(num_arrivals=3),
        keys_free=plgpu.Barrier(num_arrivals=COMPUTE),
        queries_full=plgpu.Barrier(num_arrivals=4, num_barriers=tile.stages),
        queries_free=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=tile.stages),
    )
    return launch(
        "attention_key_gradients",
        _load,
        _compute,
        arrays=arrays,
        scratch=scratch,
        plan=plan,
    )


def _load(g: Arrays, s: Scratch, plan: Plan) -> None:
    """For each tile its keys and values once, then queries and their gradients in steps."""
    P, V, tile = plan.sizes.P, plan.sizes.V, plan.tile

    def one_tile(i, step):
        b, n, block = tile_at(i, plan, last_first=False)
        until_2 = g.until_B2K.at[b, :, block]
        blocks = queries_seeing(until_2[0], until_2[1], block * BLOCK, tile)

        def queries(j):
            slot, at = plan.slot(step + j), pl.ds(blocks.block(j) * tile.queries, tile.queries)
            wait_free(s.queries_free, step + j, plan)
            full = s.queries_full.at[slot]
            plgpu.copy_gmem_to_smem(g.q_BTNH.at[b, at, n], s.q.at[slot], full)
            plgpu.copy_gmem_to_smem(g.do_BTNV.at[b, at, n], s.do.at[slot], full)
            plgpu.copy_gmem_to_smem(g.lse_BNT.at[b, n, at], s.lse.at[slot], full)
            plgpu.copy_gmem_to_smem(g.delta_BNT.at[b, n, at], s.delta.at[slot], full)

        queries(jnp.int32(0))
        pl.when(i > 0)(lambda: plgpu.barrier_wait(s.keys_free))
        at = pl.ds(block * BLOCK, BLOCK)
        kv_TW = g.kv_BTNW.at[b, at, n]
        plgpu.copy_gmem_to_smem(kv_TW.at[:, pl.ds(0, P)], s.k_nope, s.keys_full)
        plgpu.copy_gmem_to_smem(g.k_rope_BTR.at[b, at], s.k_rope, s.keys_full)
        plgpu.copy_gmem_to_smem(kv_TW.at[:, pl.ds(P, V)], s.v, s.keys_full)
        pl.loop(1, blocks.steps)(queries)
        return step + blocks.steps

    steps = each_tile(one_tile, plan)
    drain(steps, plan, s.queries_free)
    plgpu.barrier_wait(s.keys_free)


class Columns(NamedTuple):
    """The 64 keys of a tile that a warpgroup owns, and the steps that they take."""

    warpgroup: Array
    batch: Array
    key: Array
    blocks: Range
    step: Array
    """Steps of the program before this tile."""


def _own(s: Scratch, warpgroup: Array) -> tuple[Any, Any, Any]:
    mine = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
    return s.k_nope.at[mine], s.k_rope.at[mine], s.v.at[mine]


def _compute(g: Arrays, s: Scratch, plan: Plan, warpgroup: Array) -> None:
    """A warpgroup that computes its 64 keys of each tile."""
    P, R, V = plan.sizes.P, plan.sizes.R, plan.sizes.V

    def one_tile(i, step):
        b, n, block = tile_at(i, plan, last_first=False)
        key = block * BLOCK + warpgroup * WARPGROUP_ROWS
        at = pl.ds(key, WARPGROUP_ROWS)
        until_2 = g.until_B2K.at[b, :, block]
        blocks = queries_seeing(until_2[0], until_2[1], block * BLOCK, plan.tile)
        here = Columns(warpgroup, b, key, blocks, step)

        def over_queries(*sums):
            attend = partial(_attend, g=g, s=s, plan=plan, here=here, sums=sums)
            lax.fori_loop(0, blocks.masked, partial(attend, masked=True), None)
            lax.fori_loop(blocks.masked, blocks.steps, partial(attend, masked=False), None)
            return tuple(acc[...] for acc in sums)

        plgpu.barrier_wait(s.keys_full)
        dk, dv = pl.run_scoped(over_queries, accumulator(P + R), accumulator(V))
        plgpu.barrier_arrive(s.queries_free.at[plan.slot(step + blocks.steps - 1)])
        k_nope, k_rope, v = _own(s, warpgroup)
        k_nope[...] = (dk[:, :P] * plan.scale).astype(jnp.bfloat16)
        k_rope[...] = (dk[:, P:] * plan.scale).astype(jnp.bfloat16)
        v[...] = dv.astype(jnp.bfloat16)
        plgpu.commit_smem()
        dkv_SW = g.dkv_BTNW.at[b, at, n]
        plgpu.copy_smem_to_gmem(k_nope, dkv_SW.at[:, pl.ds(0, P)])
        plgpu.copy_smem_to_gmem(k_rope, g.dk_rope_BTNR.at[b, at, n])
        plgpu.copy_smem_to_gmem(v, dkv_SW.at[:, pl.ds(P, V)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(s.keys_free)
        return step + blocks.steps

    each_tile(one_tile, plan)
    plgpu.wait_smem_to_gmem(0)


def _attend(
    j: Array,
    _: None,
    *,
    g: Arrays,
    s: Scratch,
    plan: Plan,
    here: Columns,
    sums: tuple[Any, ...],
    masked: bool,
) -> None:
    """dv += P^T do and dk += dS^T q over the queries of step j; dk is still in flight after it."""
    dk, dv = sums
    shape, slot = (WARPGROUP_ROWS, WARPGROUP_ROWS), plan.slot(here.step + j)
    P, R, q, do = plan.sizes.P, plan.sizes.R, s.q.at[slot], s.do.at[slot]
    warpgroup, acc = not_hoisted(here.warpgroup), accumulator(WARPGROUP_ROWS)
    (k_nope, k_rope, v), weights = _own(s, warpgroup), s.weights.at[warpgroup]
    plgpu.barrier_wait(s.queries_full.at[slot])

    def logits(acc):
        plgpu.wgmma(acc, q.at[:, pl.ds(0, P)], k_nope.transpose((1, 0)))
        plgpu.wgmma(acc, q.at[:, pl.ds(P, R)], k_rope.transpose((1, 0)))
        return acc[...]

    logits_QS = pl.run_scoped(logits, acc)

    @pl.when(j > 0)
    def _():  # the products of the step before are done too
        plgpu.barrier_arrive(s.queries_free.at[plan.slot(here.step + j - 1)])

    p_QS = jnp.exp2(logits_QS * plan.log2_scale - rows(s.lse[slot], shape))
    if masked:
        query = here.blocks.block(j) * plan.tile.queries
        start_g = g.start_BT.at[here.batch, pl.ds(query, plan.tile.queries)]
        start_Q = plgpu.load(start_g, optimized=False)
        p_QS = jnp.where(seen(start_Q, query, here.key, shape), p_QS, 0)
    weights[...] = p_QS.astype(jnp.bfloat16)
    plgpu.commit_smem()

    def products(acc):
        plgpu.wgmma(acc, do, v.transpose((1, 0)))
        plgpu.wgmma(dv, weights.transpose((1, 0)), do)
        return plgpu.wgmma_accumulator_load(acc, wait_n=1)

    dp_QS = pl.run_scoped(products, acc)
    # P is read back: kept in registers over the products it would be spilled.
    ds_QS = weights[...].astype(jnp.float32) * (dp_QS - rows(s.delta[slot], shape))
    ds16_QS = ds_QS.astype(jnp.bfloat16)
    plgpu.wgmma_wait(0)
    weights[...] = ds16_QS
    plgpu.commit_smem()
    plgpu.wgmma(dk, weights.transpose((1, 0)), q)
