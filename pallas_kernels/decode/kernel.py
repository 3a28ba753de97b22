"""The kernel of `decode/mla.py`: 64 absorbed queries against one split of a row's cache.

A block has three warpgroups and two tiles of 64 slots in shared memory, each used both as keys and
as values. One warpgroup copies. The other two each own a half of the output's channels and every
second tile's logits (the "seesaw" of FlashMLA, deepseek-ai/FlashMLA, docs/20250422):

    even  logits 0, softmax 0 | write p 0 | p 0 v 0 left            | p 1 v 1 left
    odd   logits 1            | softmax 1 | p 0 v 0 right | write p 1 | p 1 v 1 right

While one is in its softmax the other keeps the tensor cores busy, and each half of a tile is copied
anew as soon as its owner has used it. The running maximum goes from tile to tile, so both halves of
the output share it. One buffer carries p both ways: who has read it is the next to write.

Shape letters: B rows of the batch, M queries times heads of a row, L = C + R channels of a slot
(C latent, R rotary), G pages, P page numbers of a row, D splits, T slots of a tile (64).
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import (
    MEMORY_REGISTERS,
    add_products,
    mosaic_kernel,
    not_hoisted,
    rows,
    tile_buffer,
    tiled,
)

ROWS = 64
"""Queries of a block: the rows of one instruction of the tensor cores."""
TILE = 64
"""Slots of a tile."""
PAIR = 2 * TILE
LOWEST = -1e30
"""Maximum of no logits: finite, since the difference of two infinities is NaN."""
COMPUTE_REGISTERS = 232
"""Per thread of the two warpgroups that compute; with MEMORY_REGISTERS at most 512 together."""
LEFT, RIGHT, ROTARY = 0, 1, 2
"""Parts of a tile, each with its own barrier."""


class Sizes(NamedTuple):
    """Static facts of a call."""

    queries: int
    """New tokens; rows of q [B, M, L] beyond queries * heads are padding."""
    heads: int
    latent: int
    rotary: int
    page: int
    """Slots of a page."""
    splits: int
    scale: float
    """Makes base-2 logits of products."""


class Memory(NamedTuple):
    """Shared memory of a block and its barriers."""

    q: Any
    """[half, ROWS, C / 2]; at the end the output."""
    q_rotary: Any
    k: Any
    """Two halves [slot, T, C / 2]."""
    partial: Any
    """Two halves [ROWS, C / 2] fp32, in the place of `k`: outputs of one split of several."""
    k_rotary: Any
    p: Any
    peak: Any
    """[2, ROWS]: running maximum after an even and after an odd tile; at the end log-sum-exp."""
    total: Any
    """[2, ROWS]: sums of p over even and over odd tiles."""
    q_full: Any
    full: Any
    """[slot, part]: copied."""
    used: Any
    """[slot, half]: may be overwritten."""
    ready: Any
    """[slot]: p and peak are written."""
    done: Any


def decode(
    q_BML: Array, cache_GSL: Array, pages_BP: Array, lengths_B: Array, sizes: Sizes, *, emulated
) -> tuple[Array, Array | None]:
    """Outputs of each split, fp32 [D, B, M, C], and base-2 log-sum-exps [D, B, blocks * ROWS].

    With one split the output is final, of the type of q, [B, M, C], and there are no log-sum-exps.
    Splits of the same row get pairs of tiles, as evenly as its length allows; sums of p are fp32.
    Partial outputs are fp32 too: rounded to bf16 they would add as much error again as the result's
    own rounding. The arguments are those of `mla_decode`, checked there.
    """
    (B, M, _), C = q_BML.shape, sizes.latent
    blocks, dtype = pl.cdiv(M, ROWS), q_BML.dtype
    out_type = [jax.ShapeDtypeStruct((B, M, C), dtype)]
    if sizes.splits > 1:
        out_type = [
            jax.ShapeDtypeStruct((sizes.splits, B, M, C), jnp.float32),
            jax.ShapeDtypeStruct((sizes.splits, B, blocks * ROWS), jnp.float32),
        ]

    def mla_decode_split(*refs, union, **buffers):
        memory = Memory(k=union[0], partial=union[1], **buffers)
        q_BML, cache_GSL, pages_BP, lengths_B, *outputs = refs
        split, row, block = (lax.axis_index(name) for name in ("split", "row", "block"))
        work = _share(lengths_B[row], split, sizes.splits)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 2)
        def _():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            _copy_queries(q_BML.at[row, pl.ds(block * ROWS, ROWS)], memory, sizes)
            _copy_tiles(cache_GSL, pages_BP.at[row], memory, work, sizes)

        for side in (LEFT, RIGHT):

            @pl.when(warpgroup == side)
            def _(side=side):
                plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
                running = _attend(memory, work, block, side, sizes, emulated=emulated)
                _write(running, memory, outputs, (split, row, block), side)

    run = mosaic_kernel(
        mla_decode_split,
        out_type=out_type,
        emulated=emulated,
        # Maxima and sums over a row stay within a warp, and 2 KiB for others do not fit.
        reduction_scratch_bytes=0,
        grid=(sizes.splits, B, blocks),  # the last varies fastest: blocks of a row share its cache
        grid_names=("split", "row", "block"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=_scratch(sizes, dtype),
    )
    out = run(q_BML, cache_GSL, pages_BP, lengths_B)
    return (out[0], None) if sizes.splits == 1 else (out[0], out[1])


def _scratch(sizes: Sizes, dtype: Any) -> dict[str, Any]:
    """Buffers and barriers of `Memory`, `k` and `partial` as one."""
    half, R = sizes.latent // 2, sizes.rotary

    def part(*shape: int):
        # Copies ask for tiles that divide the whole row of channels.
        return plgpu.SMEM(shape, dtype, transforms=tiled(math.gcd(half, R), dtype))

    partials = [tile_buffer((ROWS, half), jnp.float32)] * 2
    return {
        "q": part(2, ROWS, half),
        "q_rotary": part(ROWS, R),
        "union": plgpu.RefUnion([part(2, TILE, half)] * 2, partials),
        "k_rotary": part(2, TILE, R),
        "p": part(ROWS, TILE),
        "peak": plgpu.SMEM((2, ROWS), jnp.float32),
        "total": plgpu.SMEM((2, ROWS), jnp.float32),
        "q_full": plgpu.Barrier(num_arrivals=3),
        "full": plgpu.Barrier(num_barriers=6),
        "used": plgpu.Barrier(num_barriers=4),
        "ready": plgpu.Barrier(num_barriers=2),
        "done": plgpu.Barrier(num_arrivals=2),
    }


def shared_memory(latent: int, rotary: int) -> int:
    """Bytes of a block: queries and two tiles, p, the peaks and sums, the barriers."""
    return 2 * (ROWS + PAIR) * (latent + rotary) + 2 * ROWS * TILE + 2 * 1024 + 1024


class Work(NamedTuple):
    """Pairs of tiles [first, first + count) of a row with `length` slots."""

    length: Any
    first: Any
    count: Any


def _share(length, split, splits: int) -> Work:
    """An even share of the row's pairs; none for the last splits of a short row."""
    pairs = lax.div(length + (PAIR - 1), PAIR)
    each = lax.div(pairs + (splits - 1), splits)
    first = jnp.minimum(split * each, pairs)
    return Work(length, first, jnp.minimum(each, pairs - first))


# ---- the warpgroup that copies ------------------------------------------------------------------


def _copy_queries(q_ML: Any, memory: Memory, sizes: Sizes) -> None:
    """Rows beyond the last query come as zeros."""
    half = sizes.latent // 2
    for side in (LEFT, RIGHT):
        source = q_ML.at[:, pl.ds(side * half, half)]
        plgpu.copy_gmem_to_smem(source, memory.q.at[side], memory.q_full)
    source = q_ML.at[:, pl.ds(sizes.latent, sizes.rotary)]
    plgpu.copy_gmem_to_smem(source, memory.q_rotary, memory.q_full)


def _copy_tiles(cache_GSL: Any, pages_P: Any, memory: Memory, work: Work, sizes: Sizes) -> None:
    """Tile t goes to slot t % 2, its left half as soon as the left half of tile t - 2 is used."""
    half = sizes.latent // 2
    last = lax.div(work.length - 1, TILE)

    @pl.loop(0, work.count)
    def _(pair):
        for slot in (0, 1):
            # A pair's second tile may lie beyond the row, and so may its page: the last tile is
            # copied in its place, and masked.
            start = jnp.minimum(2 * (work.first + pair) + slot, last) * TILE
            page = pages_P[lax.div(start, sizes.page)]
            tile_TL = cache_GSL.at[page, pl.ds(lax.rem(start, sizes.page), TILE)]
            for side in (LEFT, RIGHT):

                @pl.when(pair > 0)
                def _(slot=slot, side=side):
                    plgpu.barrier_wait(memory.used.at[2 * slot + side])

                if side == LEFT:
                    plgpu.copy_gmem_to_smem(
                        tile_TL.at[:, pl.ds(sizes.latent, sizes.rotary)],
                        memory.k_rotary.at[slot],
                        memory.full.at[3 * slot + ROTARY],
                    )
                plgpu.copy_gmem_to_smem(
                    tile_TL.at[:, pl.ds(side * half, half)],
                    memory.k[side].at[slot],
                    memory.full.at[3 * slot + side],
                )

    @pl.when(work.count > 0)
    def _():  # every phase of a barrier is waited for
        for barrier in range(4):
            plgpu.barrier_wait(memory.used.at[barrier])


# ---- the warpgroups that compute ----------------------------------------------------------------


class Running(NamedTuple):
    """Softmax so far: `acc` and `total` in units of 2^peak."""

    acc_MC: Array
    peak_M: Array
    total_M: Array

    def rescale(self, peak_M: Array, more_M: Array | float = 0.0) -> "Running":
        """In units of 2^peak_M, with `more_M` in the sum."""
        alpha_M = jnp.exp2(self.peak_M - peak_M)
        acc_MC = self.acc_MC * rows(alpha_M, (ROWS, self.acc_MC.shape[1]))
        return Running(acc_MC, peak_M, self.total_M * alpha_M + more_M)


def _attend(memory: Memory, work: Work, block, side: int, sizes: Sizes, *, emulated) -> Running:
    """Half of the output, not yet divided by the sum; `total_M` is over this side's tiles."""
    half, dtype = sizes.latent // 2, memory.p.dtype
    # Every query sees the whole of these pairs; in later ones a slot may be masked.
    whole = lax.div(work.length - (sizes.queries - 1), PAIR) - work.first
    whole = jnp.clip(whole, 0, work.count)

    def pair(index, running, *, ragged: bool):
        start = (work.first + index) * PAIR
        s_MT = _logits(memory, side)
        if ragged:
            s_MT = _mask(s_MT, start + side * TILE, work.length, block, sizes)

        def attend(running, p_MT, slot: int):
            v_TC = memory.k[side].at[not_hoisted(slot)]
            if slot != side:
                plgpu.barrier_wait(memory.full.at[3 * slot + side])
            if ragged:
                _clear_beyond(v_TC, work.length - start - slot * TILE)
            (acc_MC,) = add_products((running.acc_MC,), p_MT, (v_TC,), emulated=emulated)
            plgpu.barrier_arrive(memory.used.at[2 * slot + side])
            return running._replace(acc_MC=acc_MC)

        if side == LEFT:
            peak_M, p_MT = _softmax(running.peak_M, s_MT, sizes.scale)
            _publish(memory, p_MT.astype(dtype), peak_M, 0)
            running = running.rescale(peak_M, p_MT.sum(axis=1))
            running = attend(running, p_MT.astype(dtype), 0)
            plgpu.barrier_wait(memory.ready.at[1])
            return attend(running.rescale(memory.peak[1]), memory.p, 1)
        plgpu.barrier_wait(memory.ready.at[0])
        before_M = memory.peak[0]
        peak_M, p_MT = _softmax(before_M, s_MT, sizes.scale)
        sum_M = p_MT.sum(axis=1)  # here, so that p in bf16 alone lives through the next product
        running = attend(running.rescale(before_M), memory.p, 0)
        _publish(memory, p_MT.astype(dtype), peak_M, 1)
        return attend(running.rescale(peak_M, sum_M), p_MT.astype(dtype), 1)

    running = Running(
        jnp.zeros((ROWS, half), jnp.float32),
        jnp.full((ROWS,), LOWEST, jnp.float32),
        jnp.zeros((ROWS,), jnp.float32),
    )
    plgpu.barrier_wait(memory.q_full)
    running = lax.fori_loop(0, whole, partial(pair, ragged=False), running)
    return lax.fori_loop(whole, work.count, partial(pair, ragged=True), running)


def _logits(memory: Memory, side: int) -> Array:
    """q k^T of the tile in slot `side`, fp32 [ROWS, T]; starts on what is copied."""
    slot = not_hoisted(side)

    def multiply(acc_MT):
        operands = {
            ROTARY: (memory.q_rotary, memory.k_rotary.at[slot]),
            LEFT: (memory.q.at[not_hoisted(LEFT)], memory.k[LEFT].at[slot]),
            RIGHT: (memory.q.at[not_hoisted(RIGHT)], memory.k[RIGHT].at[slot]),
        }
        for part, (q_MX, k_TX) in operands.items():
            plgpu.barrier_wait(memory.full.at[3 * side + part])
            plgpu.wgmma(acc_MT, q_MX, k_TX.transpose((1, 0)))
        return acc_MT[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, TILE), jnp.float32))


def _mask(s_MT: Array, start, length, block, sizes: Sizes) -> Array:
    """-inf where a query does not see the slot: query i of Q sees those below length - (Q-1-i)."""
    slot_MT = plgpu.broadcasted_iota(jnp.int32, s_MT.shape, 1) + start
    limit_MT = length
    if sizes.queries > 1:
        row_MT = plgpu.broadcasted_iota(jnp.int32, s_MT.shape, 0) + block * ROWS
        limit_MT = lax.div(row_MT, sizes.heads) + (length - (sizes.queries - 1))
        limit_MT = jnp.minimum(limit_MT, length)  # of padding too
    return jnp.where(slot_MT < limit_MT, s_MT, -jnp.inf)


def _clear_beyond(v_TC: Any, count) -> None:
    """Zeros in slots from `count` on: their p is 0, but 0 times NaN is NaN."""
    width = math.gcd(64, v_TC.shape[1])

    @pl.when(count < TILE)
    def _():
        slot_TC = plgpu.broadcasted_iota(jnp.int32, (TILE, width), 0)
        for start in range(0, v_TC.shape[1], width):
            part = v_TC.at[:, pl.ds(start, width)]
            value_TC = part[...]
            part[...] = jnp.where(slot_TC < count, value_TC, jnp.zeros_like(value_TC))
        plgpu.commit_smem()


def _softmax(peak_M: Array, s_MT: Array, scale: float) -> tuple[Array, Array]:
    """The running maximum of base-2 logits with the tile's, and p in its units."""
    peak_M = jnp.maximum(peak_M, s_MT.max(axis=1) * scale)
    return peak_M, jnp.exp2(s_MT * scale - rows(peak_M, (ROWS, TILE)))


def _publish(memory: Memory, p_MT: Array, peak_M: Array, slot: int) -> None:
    memory.p[...] = p_MT
    memory.peak[slot] = peak_M
    plgpu.commit_smem()
    plgpu.barrier_arrive(memory.ready.at[slot])


def _write(running: Running, memory: Memory, outputs, at, side: int) -> None:
    """Divide by the sum over both sides' tiles and copy the half of the output."""
    split, row, block = at
    memory.total[side] = running.total_M
    plgpu.commit_smem()
    plgpu.barrier_arrive(memory.done)
    plgpu.barrier_wait(memory.done)
    total_M = running.total_M + memory.total[1 - side]
    # A row without visible slots has a sum of 0 and comes out as zeros.
    scale_M = 1 / jnp.maximum(total_M, 1e-30)
    half = running.acc_MC.shape[1]
    o_MC = running.acc_MC * rows(scale_M, (ROWS, half))
    at_rows = pl.ds(block * ROWS, ROWS)
    at_columns = pl.ds(side * half, half)
    if len(outputs) == 1:
        memory.q[side] = o_MC.astype(memory.q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory.q.at[side], outputs[0].at[row, at_rows, at_columns])
    else:
        memory.partial[side][...] = o_MC
        if side == LEFT:
            memory.peak[0] = running.peak_M + jnp.log2(jnp.maximum(total_M, 1e-30))
        plgpu.commit_smem()
        target = outputs[0].at[split, row, at_rows, at_columns]
        plgpu.copy_smem_to_gmem(memory.partial[side], target)
        if side == LEFT:
            plgpu.copy_smem_to_gmem(memory.peak.at[0], outputs[1].at[split, row, at_rows])
    plgpu.wait_smem_to_gmem(0)
