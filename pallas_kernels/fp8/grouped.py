"""FP8 products of rows sorted by expert, each group with its expert's weight.

Groups start at multiples of 128 rows. Then a tile of 128 rows has one expert, and a 1 x 128 scale
of the weight gradient, which runs along the rows, never spans two of them. `pad_groups` plans the
padded buffer: whoever puts rows in order anyway writes them where it says, at no extra pass;
`pad_rows` moves rows that already lie close together. The padding costs no product that a
tile of 128 rows would not make with groups anywhere, and at most 127 rows of memory per expert.

Schedule: `fp8/product.py`, whose tasks come from tables made outside. Forward and dx: one task per
128 padded rows and tile of columns, in bands; tiles that no group owns are zeros at no product. dw:
one task per expert and tile, over the steps of 128 rows of the expert.

Roofline: 2 M N K FLOPs at 1979 TFLOP/s. With 8 experts and 65,536 rows of 4096 x 7168, 1.9 ms; with
256, weights of 7.5 GB alone take 1.6 ms at 4.8 TB/s, so that both bounds are about equal.

Shape letters: M rows close together, P rows with padding, E experts, N columns, K contraction;
k = ceil(K / 128), n = ceil(N / 128), T = P / 128 tiles of rows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import library
from pallas_kernels.fp8.matmul import check_operands, choose_blocks, unsupported
from pallas_kernels.fp8.product import ROWS, Blocks, Tile, in_bands, pad_scales, product_kernel
from pallas_kernels.fp8.quantize import TILE, Quantized, dequantize
from pallas_kernels.grouped.ragged import zeros_varying
from pallas_kernels.mosaic import Backend


class Padding(NamedTuple):
    """Places of rows in a buffer without padding and in one with it."""

    source_P: Array
    """Row without padding, or M where there is none."""
    target_M: Array
    """Row with padding, or P for rows beyond the last group."""


def padded_size(num_rows: int, num_experts: int) -> int:
    """Rows that are enough with padding, whatever the groups: a multiple of 128."""
    return (num_rows + num_experts * (ROWS - 1)) // ROWS * ROWS


def pad_groups(group_sizes_E: Array, num_rows: int) -> Padding:
    """The plan that lets every group of `num_rows` sorted rows start at a multiple of 128.

    Args:
        group_sizes_E: rows of each expert, int [E]; their sum must not exceed `num_rows`.
        num_rows: M.
    """
    M, P = num_rows, padded_size(num_rows, group_sizes_E.shape[0])
    sizes_E = group_sizes_E.astype(jnp.int32)
    shift_E = _starts(sizes_E) - (jnp.cumsum(sizes_E) - sizes_E)
    row_M = jnp.arange(M, dtype=jnp.int32)
    expert_M = jnp.sum(row_M[:, None] >= jnp.cumsum(sizes_E), axis=1)
    target_M = jnp.where(row_M < jnp.sum(sizes_E), row_M + shift_E.at[expert_M].get(mode="clip"), P)
    source_P = jnp.full(P, M, jnp.int32).at[target_M].set(row_M, mode="drop", unique_indices=False)
    return Padding(source_P, target_M)


def pad_rows(x_MK: Array, padding: Padding) -> Array:
    """Rows with padding [P, K]; the padding is zeros."""
    return x_MK.at[padding.source_P].get(mode="fill", fill_value=0)


def unpad_rows(y_PN: Array, padding: Padding) -> Array:
    """Rows without padding [M, N]; rows beyond the last group are zeros."""
    return y_PN.at[padding.target_M].get(mode="fill", fill_value=0)


def fp8_grouped_matmul(
    x: Quantized,
    w: Quantized,
    group_sizes_E: Array,
    *,
    dtype: Any = jnp.bfloat16,
    backend: Backend = "portable",
    blocks: Blocks | None = None,
) -> Array:
    """y[p] = x[p] w[e]^T for the rows p of group e [P, N]; all other rows are zeros.

    Forward takes w as [E, N, K] for weights [K, N], and dx takes the other orientation of
    `quantize_blocks_both`, as in `fp8_matmul`.

    Args:
        x: E4M3 [P, K] and fp32 scales [P, k], P % 128 == 0. Group e starts at row
            128 * sum(ceil(group_sizes[:e] / 128)). Other rows may hold anything, NaN included.
        w: E4M3 [E, N, K] and fp32 scales [E, n, k].
        group_sizes_E: rows of each expert, int [E], without padding.
        dtype: of the result, bf16 or fp32.
        backend: see `mosaic.Backend`; "portable" dequantises to bf16.
        blocks: how the kernel cuts the product; by default `fp8_matmul.choose_blocks`.

    Raises:
        ValueError: shapes or types do not fit each other or, for a kernel, the machine.
    """
    check_operands(x, w, False, dtype)
    _check_groups(x.q.shape[0], w.q.shape[0] if w.q.ndim == 3 else None, group_sizes_E)
    (P, K), N = x.q.shape, w.q.shape[1]
    if backend == "library":
        owned_P1 = jnp.any(_members(group_sizes_E, P), axis=1, keepdims=True)
        return jnp.where(owned_P1, library.fp8_rows(x, w, group_sizes_E, dtype), 0)
    if backend in ("portable", "reference"):
        kind = jnp.bfloat16 if backend == "portable" else jnp.float32
        return _grouped(dequantize(x, kind), dequantize(w, kind, True), group_sizes_E, dtype)
    if reason := unsupported(P, N, K, dtype):
        raise ValueError(f"no FP8 kernel: {reason}, or use backend 'portable'")
    num_m = P // ROWS
    blocks = blocks or choose_blocks(num_m, N, b_in_tiles=False)
    num_n = pl.cdiv(N, blocks.columns)
    expert_T, rows_T = _row_tiles(group_sizes_E, num_m)

    def locate(i, x, scale_x, w, scale_w, expert, rows, out):
        m, n = in_bands(i, num_m, num_n, blocks.band)
        steps = jnp.where(rows[m] > 0, pl.cdiv(K, TILE), 0)
        e, row, column = expert[m], m * ROWS, n * blocks.columns
        return Tile(row, column, 0, steps, w.at[e], scale_w.at[e], out, lambda: rows[m])

    return product_kernel(
        "fp8_grouped_matmul",
        locate,
        (x.q, pad_scales(x.scale, ROWS), w.q, w.scale, expert_T, rows_T),
        jax.ShapeDtypeStruct((P, N), dtype),
        num_tiles=num_m * num_n,
        blocks=blocks,
        b_in_tiles=False,
        emulated=backend == "emulated",
    )


def fp8_grouped_matmul_tiles(
    a: Quantized,
    b: Quantized,
    group_sizes_E: Array,
    *,
    dtype: Any = jnp.float32,
    backend: Backend = "portable",
    blocks: Blocks | None = None,
) -> Array:
    """a b^T over the columns of each group [E, M, N]; empty groups give zeros.

    The weight gradient: for dw[e] = x_e^T dy_e take x^T and dy^T from `quantize_tiles_transposed`
    of padded rows.

    Args:
        a: E4M3 [M, P] and fp32 scales [M, P / 128].
        b: E4M3 [N, P] and fp32 scales [N, P / 128]. The padding of groups must be zeros in `a` and
            `b`; columns beyond the last group may hold anything.
        group_sizes_E: as in `fp8_grouped_matmul`.
        dtype: of the result, bf16 or fp32.
        backend: as there.
        blocks: as there.

    Raises:
        ValueError: as there.
    """
    check_operands(a, b, True, dtype)
    _check_groups(a.q.shape[1], None, group_sizes_E)
    (M, P), N, E = a.q.shape, b.q.shape[0], group_sizes_E.shape[0]
    if backend == "library":
        a_MP, b_NP = dequantize(a, jnp.bfloat16), dequantize(b, jnp.bfloat16)
        return library.fp8_weights(a_MP, b_NP, group_sizes_E, dtype)
    if backend in ("portable", "reference"):
        kind = jnp.bfloat16 if backend == "portable" else jnp.float32
        return _grouped_tiles(dequantize(a, kind), dequantize(b, kind), group_sizes_E, dtype)
    if reason := unsupported(M, N, P, dtype):
        raise ValueError(f"no FP8 kernel: {reason}, or use backend 'portable'")
    num_m = pl.cdiv(M, ROWS)
    blocks = blocks or choose_blocks(num_m * E, N, b_in_tiles=True)
    num_n = pl.cdiv(N, blocks.columns)
    scale_a, scale_b = pad_scales(a.scale, ROWS), pad_scales(b.scale, blocks.columns)
    sizes_E = group_sizes_E.astype(jnp.int32)
    first_E, steps_E = _starts(sizes_E) // TILE, -(-sizes_E // TILE)

    def locate(i, a, scale_a, b, scale_b, first, steps, out):
        e = lax.div(i, jnp.int32(num_m * num_n))
        m, n = in_bands(i - e * (num_m * num_n), num_m, num_n, blocks.band)
        row, column = m * ROWS, n * blocks.columns
        return Tile(row, column, first[e], steps[e], b, scale_b, out.at[e])

    return product_kernel(
        "fp8_grouped_matmul_tiles",
        locate,
        (a.q, scale_a, b.q, scale_b, first_E, steps_E),
        jax.ShapeDtypeStruct((E, M, N), dtype),
        num_tiles=E * num_m * num_n,
        blocks=blocks,
        b_in_tiles=True,
        emulated=backend == "emulated",
    )


def _starts(sizes_E: Array) -> Array:
    """First padded row of each group."""
    padded_E = -(-sizes_E // ROWS) * ROWS
    return jnp.cumsum(padded_E) - padded_E


def _row_tiles(group_sizes_E: Array, num_tiles: int) -> tuple[Array, Array]:
    """Expert and number of rows of each tile of 128 padded rows; no rows beyond the groups."""
    sizes_E = group_sizes_E.astype(jnp.int32)
    starts_E = _starts(sizes_E)
    row_T = jnp.arange(num_tiles, dtype=jnp.int32) * ROWS
    # The last expert that starts here or before; empty ones start where the next one does.
    expert_T = jnp.sum(row_T[:, None] >= starts_E, axis=1, dtype=jnp.int32) - 1
    return expert_T, jnp.clip((starts_E + sizes_E)[expert_T] - row_T, 0, ROWS)


def _check_groups(num_rows: int, num_weights: int | None, group_sizes_E: Array) -> None:
    if group_sizes_E.ndim != 1 or not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes has shape {group_sizes_E.shape} and type {group_sizes_E.dtype}; "
            "give one integer per expert"
        )
    num_groups = group_sizes_E.shape[0]
    if num_weights is not None and num_weights != num_groups:
        raise ValueError(f"{num_weights} weights for {num_groups} groups; give one per group")
    if num_rows % ROWS:
        raise ValueError(
            f"{num_rows} rows are no multiple of {ROWS}; give a padded buffer, see pad_groups"
        )


def _members(group_sizes_E: Array, num_rows: int) -> Array:
    """True at [p, e] where padded row p belongs to group e."""
    sizes_E = group_sizes_E.astype(jnp.int32)
    in_group_PE = jnp.arange(num_rows)[:, None] - _starts(sizes_E)
    return (in_group_PE >= 0) & (in_group_PE < sizes_E)


def _grouped(x_PK: Array, w_ENK: Array, group_sizes_E: Array, dtype: Any) -> Array:
    """One expert after the other, on all rows."""
    member_PE = _members(group_sizes_E, x_PK.shape[0])

    def add(y_PN, expert):
        w_NK, member_P = expert
        x_own_PK = jnp.where(member_P[:, None], x_PK, 0)
        return y_PN + _dot(x_own_PK, w_NK.T), None

    shape, like = (x_PK.shape[0], w_ENK.shape[1]), (x_PK, w_ENK, group_sizes_E)
    zeros = zeros_varying(shape, jnp.float32, like)
    return lax.scan(add, zeros, (w_ENK, member_PE.T))[0].astype(dtype)


def _grouped_tiles(a_MP: Array, b_NP: Array, group_sizes_E: Array, dtype: Any) -> Array:
    def one(member_P):
        return _dot(jnp.where(member_P, a_MP, 0), jnp.where(member_P, b_NP, 0).T).astype(dtype)

    return lax.map(one, _members(group_sizes_E, a_MP.shape[1]).T)


def _dot(a: Array, b: Array) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
