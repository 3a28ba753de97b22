"""Expert FFN for a few rows per expert, as in decoding: weights come from memory once.

XLA:CPU copies an expert out of [E, D, F] before it multiplies, and a copy of megabytes goes to
memory and back. Here a product takes some rows of the weight at a time: the copy stays in cache.
Forward only; the caller's backward pass is that of `expert_ffn.py`.

Shape letters: M rows, E experts, D model width, F expert width, T rows of a tile, C of a piece.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.tiles import (
    Tiling,
    keep_rows,
    make_tiles,
    put_tiles,
    take,
    take_chunk,
    zeros_varying,
)

TILING = Tiling(rows=4, batch=1)
PIECE = 32
"""Rows of a weight in one product, measured at widths 1408 and 2048 in fp32: 128 KiB and more."""


def has_few_rows(num_rows: int, num_experts: int) -> bool:
    """Whether this way pays: on CPU, up to a tile's rows per expert on average."""
    return jax.default_backend() == "cpu" and num_rows <= TILING.rows * num_experts


def expert_ffn_few_rows(
    x_MD: Array, w_gate_EDF: Array, w_up_EDF: Array, w_down_EFD: Array, group_sizes_E: Array
) -> Array:
    """`expert_ffn` with its arguments and result [M, D]; no gradient is defined."""
    operands = (x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E)
    (M, D), dtype = x_MD.shape, x_MD.dtype
    tiles = make_tiles(group_sizes_E, M, TILING)

    def step(i, y):
        chunk = take_chunk(tiles, i, M, TILING)
        expert, x_TD = chunk.expert_B[0], take(x_MD, chunk.rows_BT)[0]
        gate_TF = _product(x_TD, w_gate_EDF, expert, operands)
        up_TF = _product(x_TD, w_up_EDF, expert, operands)
        h_TF = (jax.nn.silu(gate_TF) * up_TF).astype(dtype)
        y_TD = _product(h_TF, w_down_EFD, expert, operands)
        return put_tiles(y, y_TD[None], chunk.start_B)

    y = zeros_varying((M + TILING.rows, D), dtype, operands)
    return keep_rows(lax.fori_loop(0, tiles.num_chunks, step, y), tiles.num_rows, M)


def _product(x_TK: Array, w_EKN: Array, expert: Array, like: tuple[Array, ...]) -> Array:
    """x @ w[expert], summed in fp32 over pieces of PIECE rows of the weight [T, N]."""
    (T, K), N = x_TK.shape, w_EKN.shape[2]
    piece = next(size for size in (PIECE, PIECE // 2, PIECE // 4, K) if K % size == 0)

    def add(i, sum_TN):
        x_TC = lax.dynamic_slice(x_TK, (0, i * piece), (T, piece))
        w_CN = lax.dynamic_slice(w_EKN, (expert, i * piece, 0), (1, piece, N))[0]
        return sum_TN + jnp.dot(x_TC, w_CN, preferred_element_type=jnp.float32)

    return lax.fori_loop(0, K // piece, add, zeros_varying((T, N), jnp.float32, like))
