"""Gradients of the queries of latent attention in its expanded form, for Hopper.

dq = scale dS k, where P = exp(scale q k^T - lse) and dS = P * (do v^T - delta); the logits are made
again (FlashAttention-2, arXiv:2307.08691, algorithm 2, without its atomic sums).

Roofline: three products. V3 (N = 128, P = V = 128, R = 64), one causal sequence of 4096: 1.10
TFLOP, 1.11 ms at 989 TFLOP/s; 0.81 GB of operands and results, 0.17 ms at 4.8 TB/s: the tensor
cores bound it, with shared memory close behind (121 of its 128 bytes per cycle at full rate).

Schedule, one program per SM, the longest tiles first within sections of heads that share L2:
1. One warpgroup loads a tile's queries and their gradients once, keys with values through a ring.
2. Two warpgroups own 64 queries each. q k^T and do v^T are in flight together, and exponentials are
   computed under the second; while one warpgroup does so, the other one's products run.
3. dS goes from registers into both parts of dq, in flight together; dq stays in registers, and
   the sums of P * dP, which the kernel for dk takes as its delta.

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


class Arrays(NamedTuple):
    """Operands and results in global memory."""

    q_BTNH: Any
    kv_BTNW: Any
    k_rope_BTR: Any
    start_BT: Any
    do_BTNV: Any
    lse_BNT: Any
    delta_BNT: Any
    dq_BTNH: Any
    new_delta_BNT: Any


class Scratch(NamedTuple):
    """Shared memory and barriers; queries of a tile, ring of keys with values."""

    q_nope: Any
    q_rope: Any
    do: Any
    k_nope: Any
    k_rope: Any
    v: Any
    delta: Any
    queries_full: Any
    queries_free: Any
    keys_full: Any
    keys_free: Any


def query_gradients(
    q_BTNH: Array,
    kv_BTNW: Array,
    k_rope_BTR: Array,
    start_BT: Array,
    do_BTNV: Array,
    lse_BNT: Array,
    delta_BNT: Array,
    plan: Plan,
) -> tuple[Array, Array]:
    """Gradient of the queries [B, T, N, P + R], bfloat16, and delta again [B, N, T], fp32.

    The new delta is the sum over keys of P * dP: equal to the given one, but not burdened by the
    rounding of outputs to bfloat16, which would add a tenth to the errors of dk.

    Args:
        q_BTNH, kv_BTNW, k_rope_BTR, start_BT: as `forward.forward` takes them.
        do_BTNV: gradient of the outputs, bfloat16.
        lse_BNT: as `forward` returns it, fp32.
        delta_BNT: sum over channels of outputs times their gradient, fp32.
        plan: its sizes must be those of the arrays.
    """
    (B, T, N, P, R, V), tile = plan.sizes, plan.tile
    arrays = Arrays(
        *(q_BTNH, kv_BTNW, k_rope_BTR, start_BT, do_BTNV, lse_BNT, delta_BNT),
        dq_BTNH=jax.ShapeDtypeStruct((B, T, N, P + R), q_BTNH.dtype),
        new_delta_BNT=jax.ShapeDtypeStruct((B, N, T), jnp.float32),
    )
    scratch = Scratch(
        q_nope=plan.buffer(BLOCK, P),
        q_rope=plan.buffer(BLOCK, R),
        do=plan.buffer(BLOCK, V),
        k_nope=plan.buffer(tile.stages, tile.keys, P),
        k_rope=plan.buffer(tile.stages, tile.keys, R),
        v=plan.buffer(tile.stages, tile.keys, V),
        delta=plgpu.SMEM((COMPUTE, WARPGROUP_ROWS), jnp.float32),
        queries_full=plgpu.Barrier(num_arrivals=3),
        queries_free=plgpu.Barrier(num_arrivals=COMPUTE),
        keys_full=plgpu.Barrier(num_arrivals=3, num_barriers=tile.stages),
        keys_free=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=tile.stages),
    )
    return launch(
        "attention_query_gradients",
        _load,
        _compute,
        arrays=arrays,
        scratch=scratch,
        plan=plan,
    )


def _load(g: Arrays, s: Scratch, plan: Plan) -> None:
    """For each tile its queries and their gradients once, then keys and values in steps."""
    P, R, V, tile = plan.sizes.P, plan.sizes.R, plan.sizes.V, plan.tile

    def one_tile(i, step):
        b, n, block = tile_at(i, plan, last_first=True)
        blocks = keys_seen(g.start_BT.at[b], block * BLOCK, tile)

        def keys(j):
            slot, at = plan.slot(step + j), pl.ds(blocks.block(j) * tile.keys, tile.keys)
            wait_free(s.keys_free, step + j, plan)
            full, kv_SW = s.keys_full.at[slot], g.kv_BTNW.at[b, at, n]
            plgpu.copy_gmem_to_smem(kv_SW.at[:, pl.ds(0, P)], s.k_nope.at[slot], full)
            plgpu.copy_gmem_to_smem(g.k_rope_BTR.at[b, at], s.k_rope.at[slot], full)
            plgpu.copy_gmem_to_smem(kv_SW.at[:, pl.ds(P, V)], s.v.at[slot], full)

        # The first keys need not wait for the last tile's results to leave the queries' place.
        keys(jnp.int32(0))
        pl.when(i > 0)(lambda: plgpu.barrier_wait(s.queries_free))
        at = pl.ds(block * BLOCK, BLOCK)
        q_TH = g.q_BTNH.at[b, at, n]
        plgpu.copy_gmem_to_smem(q_TH.at[:, pl.ds(0, P)], s.q_nope, s.queries_full)
        plgpu.copy_gmem_to_smem(q_TH.at[:, pl.ds(P, R)], s.q_rope, s.queries_full)
        plgpu.copy_gmem_to_smem(g.do_BTNV.at[b, at, n], s.do, s.queries_full)
        pl.loop(1, blocks.steps)(keys)
        return step + blocks.steps

    steps = each_tile(one_tile, plan)
    drain(steps, plan, s.keys_free)
    plgpu.barrier_wait(s.queries_free)


class Rows(NamedTuple):
    """The 64 queries of a tile that a warpgroup owns, and the steps that they take."""

    warpgroup: Array
    query: Array
    start_Q: Array
    lse_Q: Array
    delta_Q: Array
    blocks: Range
    step: Array
    """Steps of the program before this tile."""


class Sums(NamedTuple):
    """Over the keys so far: dS k, and P * dP."""

    nope_QP: Array
    rope_QR: Array
    delta_Q: Array


def _own(s: Scratch, warpgroup: Array) -> tuple[Any, Any, Any]:
    mine = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
    return s.q_nope.at[mine], s.q_rope.at[mine], s.do.at[mine]


def _compute(g: Arrays, s: Scratch, plan: Plan, warpgroup: Array) -> None:
    """A warpgroup that computes its 64 queries of each tile."""
    P, R = plan.sizes.P, plan.sizes.R

    def one_tile(i, step):
        b, n, block = tile_at(i, plan, last_first=True)
        query = block * BLOCK + warpgroup * WARPGROUP_ROWS
        at = pl.ds(query, WARPGROUP_ROWS)
        load = partial(plgpu.load, optimized=False)
        start_Q, lse_Q = load(g.start_BT.at[b, at]), load(g.lse_BNT.at[b, n, at])
        blocks = keys_seen(g.start_BT.at[b], block * BLOCK, plan.tile)
        delta_Q = load(g.delta_BNT.at[b, n, at])
        here = Rows(warpgroup, query, start_Q, lse_Q, delta_Q, blocks, step)
        attend = partial(_attend, s=s, plan=plan, here=here)

        zeros = partial(jnp.zeros, dtype=jnp.float32)
        sums = Sums(*(zeros((WARPGROUP_ROWS, *width)) for width in ((P,), (R,), ())))
        plgpu.barrier_wait(s.queries_full)
        sums = lax.fori_loop(0, blocks.masked, partial(attend, masked=True), sums)
        sums = lax.fori_loop(blocks.masked, blocks.steps, partial(attend, masked=False), sums)
        q_nope, q_rope, _ = _own(s, warpgroup)
        q_nope[...] = (sums.nope_QP * plan.scale).astype(jnp.bfloat16)
        q_rope[...] = (sums.rope_QR * plan.scale).astype(jnp.bfloat16)
        s.delta[warpgroup] = sums.delta_Q
        plgpu.commit_smem()
        dq_QH = g.dq_BTNH.at[b, at, n]
        plgpu.copy_smem_to_gmem(s.delta.at[warpgroup], g.new_delta_BNT.at[b, n, at])
        plgpu.copy_smem_to_gmem(q_nope, dq_QH.at[:, pl.ds(0, P)])
        plgpu.copy_smem_to_gmem(q_rope, dq_QH.at[:, pl.ds(P, R)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(s.queries_free)
        return step + blocks.steps

    each_tile(one_tile, plan)
    plgpu.wait_smem_to_gmem(0)


def _attend(j: Array, sums: Sums, *, s: Scratch, plan: Plan, here: Rows, masked: bool) -> Sums:
    """dq += dS k over the keys of step j."""
    slot, shape = plan.slot(here.step + j), (WARPGROUP_ROWS, plan.tile.keys)
    q_nope, q_rope, do = _own(s, not_hoisted(here.warpgroup))
    plgpu.barrier_wait(s.keys_full.at[slot])

    def score_gradients(logits, dp):
        plgpu.wgmma(logits, q_nope, s.k_nope.at[slot].transpose((1, 0)))
        plgpu.wgmma(logits, q_rope, s.k_rope.at[slot].transpose((1, 0)))
        plgpu.wgmma(dp, do, s.v.at[slot].transpose((1, 0)))
        logits_QS = plgpu.wgmma_accumulator_load(logits, wait_n=1)
        p_QS = jnp.exp2(logits_QS * plan.log2_scale - rows(here.lse_Q, shape))
        if masked:
            key = here.blocks.block(j) * plan.tile.keys
            p_QS = jnp.where(seen(here.start_Q, here.query, key, shape), p_QS, 0)
        p_dp_QS = p_QS * dp[...]
        ds_QS = p_dp_QS - p_QS * rows(here.delta_Q, shape)
        return ds_QS.astype(jnp.bfloat16), p_dp_QS.sum(axis=1)

    accs = accumulator(plan.tile.keys), accumulator(plan.tile.keys)
    ds_QS, delta_Q = pl.run_scoped(score_gradients, *accs)
    keys = s.k_nope.at[slot], s.k_rope.at[slot]
    dq = sums.nope_QP, sums.rope_QR
    nope_QP, rope_QR = add_products(dq, ds_QS, keys, emulated=plan.emulated)
    plgpu.barrier_arrive(s.keys_free.at[slot])
    return Sums(nope_QP, rope_QR, sums.delta_Q + delta_Q)
