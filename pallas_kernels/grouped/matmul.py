"""Grouped matmul: rows sorted by expert, each group multiplied by its expert's weight.

Shape letters: M rows, E experts, K input width, N output width, T rows of a tile, B tiles of a
chunk (`ragged.py`).
"""

from functools import partial
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import library
from pallas_kernels.grouped.blocks import Blocks
from pallas_kernels.grouped.products import grouped_products, unsupported
from pallas_kernels.grouped.ragged import (
    Tiling,
    add_weights,
    batched_dot,
    choose_tiling,
    keep_rows,
    make_tiles,
    put_tiles,
    take,
    take_chunk,
    transposed,
    zeros_varying,
)
from pallas_kernels.grouped.weight_gradient import grouped_weight_gradient
from pallas_kernels.mosaic import Backend


class MatmulBlocks(NamedTuple):
    """Cuts of the three kernels of a grouped matmul; None: by their own choice."""

    forward: Blocks | None = None
    rows: Blocks | None = None
    """Blocks of the gradient of the rows."""
    weights: Blocks | None = None
    """Blocks of the gradient of the weights."""


def grouped_matmul(
    x_MK: Array,
    w_EKN: Array,
    group_sizes_E: Array,
    *,
    backend: Backend = "portable",
    tiling: Tiling | None = None,
    blocks: MatmulBlocks | None = None,
) -> Array:
    """y[m] = x[m] @ w[e] for the rows m of group e.

    Group e holds rows [sum(group_sizes[:e]), sum(group_sizes[:e+1])) and may be empty. Rows beyond
    the last group may hold anything, NaN included: they come out as zeros and their gradient is
    zero. Sums run in fp32; the result has the type of `x_MK`.

    Args:
        x_MK: rows sorted by expert [M, K].
        w_EKN: one weight per expert [E, K, N], of the type of `x_MK`.
        group_sizes_E: rows of each expert, int [E]; their sum must not exceed M (a run-time value:
            not checked).
        backend: "mosaic" and "emulated" run the kernels (`grouped_matmul_mosaic.py`,
            `grouped_matmul_weights.py`), "library" those of a library; "portable" loops over tiles
            and is differentiated by hand; "reference" is dense, in fp32.
        tiling: of "portable": rows of a tile and tiles of a chunk; by default from the shapes.
        blocks: of the kernels; by default from the shapes.

    Returns:
        [M, N].

    Raises:
        ValueError: shapes, types or the backend do not fit.
    """
    check_operands(x_MK, group_sizes_E, w_EKN=w_EKN)
    M, (E, K, N) = x_MK.shape[0], w_EKN.shape
    check_backend(backend, unsupported(K, N, x_MK.dtype))
    if backend == "reference":
        return _reference(x_MK, w_EKN, group_sizes_E)
    if M == 0:
        return jnp.zeros((0, N), x_MK.dtype)
    if backend == "library":
        return library.matmul(x_MK, w_EKN, group_sizes_E)
    if backend != "portable":
        options = blocks or MatmulBlocks(), backend == "emulated"
        return _mosaic(options, x_MK, w_EKN, group_sizes_E)
    return _portable(tiling or choose_tiling(M, E, K * N), x_MK, w_EKN, group_sizes_E)


def check_backend(backend: str, obstacle: str | None) -> None:
    """Raise ValueError if there is no such backend, or kernels are asked for despite `obstacle`."""
    backends = [name for name in get_args(Backend) if name != "cudnn"]
    if backend not in backends:
        raise ValueError(f"backend is {backend!r}; use one of {', '.join(backends)}")
    if obstacle and backend in ("mosaic", "emulated"):
        raise ValueError(
            f"backend {backend!r} cannot compute this: {obstacle}; use 'portable', which can"
        )


def check_operands(x_MK: Array, group_sizes_E: Array, **weights: Array) -> None:
    """Raise ValueError unless every weight [E, K, N] fits the rows and the groups."""
    if x_MK.ndim != 2:
        raise ValueError(f"rows have shape {x_MK.shape}; give [rows, width]")
    if group_sizes_E.ndim != 1 or not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes has shape {group_sizes_E.shape} and type {group_sizes_E.dtype}; "
            "give one integer per expert"
        )
    for name, w in weights.items():
        if w.ndim != 3 or w.shape[0] != group_sizes_E.shape[0]:
            raise ValueError(
                f"{name} has shape {w.shape}; with {group_sizes_E.shape[0]} groups give "
                f"[{group_sizes_E.shape[0]}, inputs, outputs]"
            )
        if w.dtype != x_MK.dtype:
            raise ValueError(f"{name} is {w.dtype} but the rows are {x_MK.dtype}; cast one of them")
    first_name, first = next(iter(weights.items()))
    if first.shape[1] != x_MK.shape[1]:
        raise ValueError(
            f"{first_name} has shape {first.shape} but the rows have width {x_MK.shape[1]}"
        )


def _reference(x_MK: Array, w_EKN: Array, group_sizes_E: Array) -> Array:
    """Every row times every weight, then the row's own is kept. For tests: E times the work."""
    member_ME = group_members(x_MK.shape[0], group_sizes_E)
    x32_MK = jnp.where(member_ME.any(axis=1)[:, None], x_MK.astype(jnp.float32), 0)
    y_EMN = jnp.einsum(
        "MK,EKN->EMN", x32_MK, w_EKN.astype(jnp.float32), precision=lax.Precision.HIGHEST
    )
    y_MN = jnp.sum(jnp.where(member_ME.T[:, :, None], y_EMN, 0), axis=0)
    return y_MN.astype(x_MK.dtype)


def group_members(num_rows: int, group_sizes_E: Array) -> Array:
    """True at [m, e] where row m belongs to group e [M, E]."""
    ends_E = jnp.cumsum(group_sizes_E)
    index_M1 = jnp.arange(num_rows)[:, None]
    return (index_M1 >= ends_E - group_sizes_E) & (index_M1 < ends_E)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _portable(tiling: Tiling, x_MK: Array, w_EKN: Array, group_sizes_E: Array) -> Array:
    M, N = x_MK.shape[0], w_EKN.shape[2]
    tiles = make_tiles(group_sizes_E, M, tiling)

    def step(i, y):
        chunk = take_chunk(tiles, i, M, tiling)
        x_BTK = take(x_MK, chunk.rows_BT)
        y_BTN = batched_dot(x_BTK, take(w_EKN, chunk.expert_B), 2, 1)
        return put_tiles(y, y_BTN, chunk.start_B)

    y = zeros_varying((M + tiling.rows, N), x_MK.dtype, (x_MK, w_EKN, group_sizes_E))
    y = lax.fori_loop(0, tiles.num_chunks, step, y)
    return keep_rows(y, tiles.num_rows, M)


def _portable_fwd(tiling: Tiling, x_MK: Array, w_EKN: Array, group_sizes_E: Array):
    return _portable(tiling, x_MK, w_EKN, group_sizes_E), (x_MK, w_EKN, group_sizes_E)


def _portable_bwd(tiling: Tiling, saved, dy_MN: Array):
    """dx = dy @ w^T row by row; dw[e] = x^T @ dy over the rows of group e."""
    x_MK, w_EKN, group_sizes_E = saved
    M, K = x_MK.shape
    tiles = make_tiles(group_sizes_E, M, tiling)

    def step(i, carry):
        dx, dw_EKN = carry
        chunk = take_chunk(tiles, i, M, tiling)
        # The weight gradient sums over rows, so rows of other groups must be zero, on both sides
        # since 0 * NaN is NaN.
        x_BTK = jnp.where(chunk.valid_BT1, take(x_MK, chunk.rows_BT), 0)
        dy_BTN = jnp.where(chunk.valid_BT1, take(dy_MN, chunk.rows_BT), 0)
        dx_BTK = batched_dot(dy_BTN, take(w_EKN, chunk.expert_B), 2, 2)
        dw_BKN = batched_dot(transposed(x_BTK), dy_BTN, 2, 1)
        return (
            put_tiles(dx, dx_BTK, chunk.start_B),
            add_weights(dw_EKN, dw_BKN, chunk.expert_B),
        )

    like = (x_MK, w_EKN, group_sizes_E, dy_MN)
    dx = zeros_varying((M + tiling.rows, K), x_MK.dtype, like)
    dw_EKN = zeros_varying(w_EKN.shape, jnp.float32, like)
    dx, dw_EKN = lax.fori_loop(0, tiles.num_chunks, step, (dx, dw_EKN))
    return keep_rows(dx, tiles.num_rows, M), dw_EKN.astype(w_EKN.dtype), None


_portable.defvjp(_portable_fwd, _portable_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mosaic(options: tuple[MatmulBlocks, bool], x_MK, w_EKN, group_sizes_E) -> Array:
    """The product by the kernels; `options` are their blocks and whether to emulate them."""
    blocks, emulated = options
    return grouped_products(
        [(x_MK, (w_EKN,))],
        group_sizes_E,
        name="grouped_matmul_forward",
        blocks=blocks.forward,
        emulated=emulated,
    )[0]


def _mosaic_fwd(options, x_MK: Array, w_EKN: Array, group_sizes_E: Array):
    return _mosaic(options, x_MK, w_EKN, group_sizes_E), (x_MK, w_EKN, group_sizes_E)


def _mosaic_bwd(options, saved, dy_MN: Array):
    (blocks, emulated), (x_MK, w_EKN, group_sizes_E) = options, saved
    (dx_MK,) = grouped_products(
        [(dy_MN, (w_EKN,))],
        group_sizes_E,
        name="grouped_matmul_rows",
        transposed=True,
        blocks=blocks.rows,
        emulated=emulated,
    )
    dw_EKN = grouped_weight_gradient(
        x_MK, dy_MN, group_sizes_E, dtype=w_EKN.dtype, blocks=blocks.weights, emulated=emulated
    )
    return dx_MK, dw_EKN, None


_mosaic.defvjp(_mosaic_fwd, _mosaic_bwd)
