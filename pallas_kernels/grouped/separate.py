"""Expert FFN over experts that are arrays of their own: how XLA:CPU generates text.

XLA:CPU copies an expert out of [E, K, N] before it multiplies, which triples the traffic where a
token reads few experts and each of them once. An array of its own is multiplied where it lies; a
branch per expert picks it at run time. Weights lie output first, [N, K], which is how a product of
few rows reads them fastest. Forward only.

Shape letters: M rows, E experts, S shards of them, D model width, F expert width, K and N input
and output width of one weight, T rows of a tile.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.grouped.experts import expert_ffn
from pallas_kernels.grouped.ragged import (
    Tiling,
    keep_rows,
    make_tiles,
    put_tiles,
    take,
    take_chunk,
    zeros_varying,
)
from pallas_kernels.mosaic import Backend

MOST_ROWS = 128
"""Rows of a tile, at most. Measured at 2048 x 1408: beyond it nothing is gained."""


def separate_experts(w_EKN: Array, shards: int) -> tuple[Array, ...]:
    """E/S arrays [S, N, K]: the j-th holds expert j of each of `shards` equal parts of the stack.

    Where the stack is sharded over its experts into that many parts, each array is sharded alike,
    so that a device has one expert of each.
    """
    E, K, N = w_EKN.shape
    w_SEKN = w_EKN.reshape(shards, E // shards, K, N)
    return tuple(jnp.swapaxes(w_SEKN[:, j], 1, 2) for j in range(E // shards))


def separate_expert_ffn(
    x_MD: Array,
    w_gate: Sequence[Array],
    w_up: Sequence[Array],
    w_down: Sequence[Array],
    group_sizes_E: Array,
    *,
    backend: Backend = "portable",
) -> Array:
    """`expert_ffn` [M, D] for weights that are E arrays each: gate and up [F, D], down [D, F].

    Rows beyond the last group come out as zeros, whatever they hold. Sums and the activation run
    in fp32. `backend` "reference" is the definition over stacked weights; the others are one.
    Source: DeepSeek-V3 report, eq. 12 (FFN_i of the routed experts).
    """
    if backend == "reference":
        gate, up, down = (jnp.swapaxes(jnp.stack(ws), 1, 2) for ws in (w_gate, w_up, w_down))
        return expert_ffn(x_MD, gate, up, down, group_sizes_E, backend="reference")
    (M, D), dtype, E = x_MD.shape, x_MD.dtype, len(w_gate)
    if M == 0:
        return x_MD
    tiling = Tiling(_tile_rows(M, E), 1)
    tiles = make_tiles(group_sizes_E, M, tiling)
    pairs = list(zip(w_gate, w_up, strict=True))

    def step(i, y):
        chunk = take_chunk(tiles, i, M, tiling)
        expert, x_TD = chunk.expert_B[0], take(x_MD, chunk.rows_BT)[0]
        gate_TF, up_TF = _switch(
            expert,
            [lambda x, pair=pair: tuple(_product(x, w) for w in pair) for pair in pairs],
            x_TD,
        )
        h_TF = (jax.nn.silu(gate_TF) * up_TF).astype(dtype)
        y_TD = _switch(expert, [lambda h, w=w: _product(h, w) for w in w_down], h_TF)
        return put_tiles(y, y_TD[None], chunk.start_B)

    like = (x_MD, group_sizes_E, *w_gate, *w_up, *w_down)
    y = zeros_varying((M + tiling.rows, D), dtype, like)
    return keep_rows(lax.fori_loop(0, tiles.num_chunks, step, y), tiles.num_rows, M)


def _tile_rows(num_rows: int, num_experts: int) -> int:
    """Rows of a tile: one where experts rarely meet two rows, else about an expert's mean."""
    mean = num_rows / num_experts
    if mean <= 0.5:
        return 1
    return min(max(4, 2 ** math.ceil(math.log2(mean))), MOST_ROWS)


def _product(x_TK: Array, w_NK: Array) -> Array:
    """x w^T, summed in fp32 [T, N]; the weight on the left is XLA:CPU's fast way for one row."""
    return jnp.dot(w_NK, x_TK.T, preferred_element_type=jnp.float32).T


def _switch(index: Array, branches: Sequence, operand: Array):
    """`branches[index](operand)`, in two levels: a branch is compiled with all arrays of its level,
    so that one level would cost the square of the number of experts."""
    width = 2 ** round(math.log2(len(branches)) / 2)
    groups = [list(branches[i : i + width]) for i in range(0, len(branches), width)]
    if len(groups) == 1 or width == 1:
        return lax.switch(index, branches, operand)
    inner = [lambda i, x, group=group: lax.switch(i, group, x) for group in groups]
    return lax.switch(index // width, inner, index % width, operand)
