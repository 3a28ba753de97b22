"""Expert FFN: SwiGLU of rows sorted by expert.

By kernels on Hopper (`expert_ffn_mosaic.py`); elsewhere the three products are fused in one loop
over tiles. Against three grouped matmuls the rows and their cotangents are then fetched once per
pass, and the gate and up activations of a tile are used while they are in cache.

Shape letters: M rows, E experts, D model width, F expert width, T rows of a tile, B tiles of a
chunk (`ragged.py`).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import library
from pallas_kernels.grouped import expert_ffn_mosaic
from pallas_kernels.grouped.matmul import check_backend, check_operands, grouped_matmul
from pallas_kernels.grouped.products import unsupported
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
from pallas_kernels.mosaic import Backend
from pallas_kernels.swiglu import swiglu, weighted_swiglu_vjp


def expert_ffn(
    x_MD: Array,
    w_gate_EDF: Array,
    w_up_EDF: Array,
    w_down_EFD: Array,
    group_sizes_E: Array,
    *,
    backend: Backend = "portable",
    tiling: Tiling | None = None,
    masters: tuple[Array, ...] | None = None,
) -> Array:
    """y[m] = (silu(x[m] w_gate[e]) * (x[m] w_up[e])) w_down[e] for the rows m of group e.

    Rows beyond the last group may hold anything, NaN included: they come out as zeros and their
    gradient is zero. Sums and the activation run in fp32; gate and up are kept for the backward
    pass, and the inner product is fed, in the type of `x_MD`. Source: DeepSeek-V3 report, eq. 12
    (FFN_i of the routed experts).

    Args:
        x_MD: rows sorted by expert [M, D].
        w_gate_EDF: [E, D, F], of the type of `x_MD`, like the other weights.
        w_up_EDF: [E, D, F].
        w_down_EFD: [E, F, D].
        group_sizes_E: rows of each expert, int [E]; their sum must not exceed M (a run-time value:
            not checked).
        backend: "mosaic" and "emulated" run the kernels (`expert_ffn_mosaic.py`), "library" those
            of a library; "portable" loops over tiles and is differentiated by hand; "reference" is
            dense, in fp32.
        tiling: of "portable": rows of a tile and tiles of a chunk; by default from the shapes.
        masters: gate, up and down in fp32, of which the weights are copies. They are not read; they
            get the gradients, in fp32, and the copies get none.

    Returns:
        [M, D].

    Raises:
        ValueError: shapes, types or the backend do not fit.
    """
    weights = (w_gate_EDF, w_up_EDF, w_down_EFD)
    check_operands(x_MD, group_sizes_E, w_gate=w_gate_EDF, w_up=w_up_EDF, w_down=w_down_EFD)
    E, D, F = w_gate_EDF.shape
    if w_up_EDF.shape != (E, D, F) or w_down_EFD.shape != (E, F, D):
        raise ValueError(
            f"w_gate is {w_gate_EDF.shape}; w_up must be alike and w_down {(E, F, D)}, "
            f"but they are {w_up_EDF.shape} and {w_down_EFD.shape}"
        )
    check_backend(backend, unsupported(D, F, x_MD.dtype))
    if backend == "reference":
        if masters is not None:  # the copies' values, of which the masters have the gradient
            w_gate_EDF, w_up_EDF, w_down_EFD = (
                lax.stop_gradient(w).astype(m.dtype) + (m - lax.stop_gradient(m))
                for w, m in zip(weights, masters, strict=True)
            )
        return _reference(x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E)
    if len(x_MD) == 0:
        return x_MD
    masters = masters or weights
    way = choose_way(backend, len(x_MD), weights, masters)
    way = way._replace(tiling=tiling or way.tiling)
    return _expert_ffn(way, x_MD, weights, group_sizes_E, masters)


def _reference(x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E):
    """The definition over reference grouped matmuls, in fp32. For tests: E times the work."""
    matmul = partial(grouped_matmul, group_sizes_E=group_sizes_E, backend="reference")
    x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, dtype = (
        *(a.astype(jnp.float32) for a in (x_MD, w_gate_EDF, w_up_EDF, w_down_EFD)),
        x_MD.dtype,
    )
    h_MF = swiglu(matmul(x_MD, w_gate_EDF), matmul(x_MD, w_up_EDF))
    return matmul(h_MF, w_down_EFD).astype(dtype)


class Rows(NamedTuple):
    """Rows [M, D] of experts: those of `values` as they lie, or picked by `index_M`."""

    values: Array
    index_M: Array | None = None

    @property
    def number(self) -> int:
        """M."""
        return len(self.values) if self.index_M is None else len(self.index_M)

    def at(self, rows: Array) -> Array:
        """Rows of these numbers."""
        return take(self.values, rows if self.index_M is None else take(self.index_M, rows))

    def whole(self) -> Array:
        """All of them [M, D]."""
        return self.values if self.index_M is None else take(self.values, self.index_M)


Weights = tuple[Array, Array, Array]
"""Gate and up [E, D, F], down [E, F, D]."""


class Way(NamedTuple):
    """Static facts of how experts are computed."""

    backend: Backend
    tiling: Tiling
    """Tiling of "portable"."""
    gradient_type: Any = jnp.float32
    """Type of the weights' gradients."""


def choose_way(backend: Backend, num_rows: int, weights: Weights, masters: Any) -> Way:
    """The way of a backend, once it is checked for these weights; `masters` get the gradients."""
    E, D, F = weights[0].shape
    return Way(backend, choose_tiling(num_rows, E, D * F), masters[0].dtype)


def forward(way: Way, keep: bool, x: Rows, weights: Weights, group_sizes_E: Array):
    """`expert_ffn` [M, D], and with `keep` what `backward` wants."""
    if way.backend == "portable":
        return _portable_forward(way.tiling, keep, x, weights, group_sizes_E)
    if way.backend == "library":
        return library.experts_forward(keep, x.whole(), weights, group_sizes_E)
    emulated = way.backend == "emulated"
    return expert_ffn_mosaic.forward(emulated, keep, x.whole(), weights, group_sizes_E)


def backward(way: Way, x: Rows, weights: Weights, group_sizes_E: Array, kept, dy: Rows, scale_M):
    """dx [M, D], the gradients of the weights, and that of `scale_M`, factors of y, unless None."""
    if way.backend == "portable":
        return _portable_backward(way, x, weights, group_sizes_E, kept, dy, scale_M)
    operands = x.whole(), weights, group_sizes_E, kept, dy.whole(), scale_M
    if way.backend == "library":
        return library.experts_backward(way.gradient_type, *operands)
    return expert_ffn_mosaic.backward(way.backend == "emulated", way.gradient_type, *operands)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_ffn(way: Way, x_MD: Array, weights: Weights, group_sizes_E: Array, masters) -> Array:
    return forward(way, False, Rows(x_MD), weights, group_sizes_E)[0]


def _expert_ffn_fwd(way: Way, x_MD: Array, weights: Weights, group_sizes_E: Array, masters):
    y_MD, kept = forward(way, True, Rows(x_MD), weights, group_sizes_E)
    return y_MD, (x_MD, weights, group_sizes_E, kept)


def _expert_ffn_bwd(way: Way, saved, dy_MD: Array):
    x_MD, weights, group_sizes_E, kept = saved
    dx_MD, dw, _ = backward(way, Rows(x_MD), weights, group_sizes_E, kept, Rows(dy_MD), None)
    return dx_MD, None, None, dw


_expert_ffn.defvjp(_expert_ffn_fwd, _expert_ffn_bwd)


# ---- by XLA, a chunk of tiles at a time ----------------------------------------------------------


def _portable_forward(tiling: Tiling, keep: bool, x: Rows, weights: Weights, group_sizes_E: Array):
    """Output, and with `keep` the gate and up activations [M + T, F] for the backward pass."""
    M, D, F, dtype = x.number, x.values.shape[1], weights[0].shape[2], x.values.dtype
    w_gate_EDF, w_up_EDF, w_down_EFD = weights
    tiles = make_tiles(group_sizes_E, M, tiling)

    def step(i, carry):
        y, kept = carry
        chunk = take_chunk(tiles, i, M, tiling)
        x_BTD = x.at(chunk.rows_BT)
        gate_BTF = batched_dot(x_BTD, take(w_gate_EDF, chunk.expert_B), 2, 1)
        up_BTF = batched_dot(x_BTD, take(w_up_EDF, chunk.expert_B), 2, 1)
        h_BTF = swiglu(gate_BTF, up_BTF).astype(dtype)
        y_BTD = batched_dot(h_BTF, take(w_down_EFD, chunk.expert_B), 2, 1)
        if keep:
            gate, up = kept
            kept = put_tiles(gate, gate_BTF, chunk.start_B), put_tiles(up, up_BTF, chunk.start_B)
        return put_tiles(y, y_BTD, chunk.start_B), kept

    zeros = partial(
        zeros_varying, dtype=dtype, like=tuple(jax.tree.leaves((x, weights, group_sizes_E)))
    )
    rows = M + tiling.rows
    kept = (zeros((rows, F)), zeros((rows, F))) if keep else ()
    y, kept = lax.fori_loop(0, tiles.num_chunks, step, (zeros((rows, D)), kept))
    return keep_rows(y, tiles.num_rows, M), kept


def _portable_backward(
    way: Way, x: Rows, weights: Weights, group_sizes_E: Array, kept, dy: Rows, scale_M
):
    M, D, dtype, tiling = x.number, x.values.shape[1], x.values.dtype, way.tiling
    tiles = make_tiles(group_sizes_E, M, tiling)

    def step(i, carry):
        dx, dscale, dw_gate_EDF, dw_up_EDF, dw_down_EFD = carry
        chunk = take_chunk(tiles, i, M, tiling)
        # Weight gradients sum over rows, so rows of other groups must be zero, on both sides of
        # each product since 0 * NaN is NaN.
        picked = (
            x.at(chunk.rows_BT),
            dy.at(chunk.rows_BT),
            *(take(a, chunk.rows_BT) for a in kept),
        )
        x_BTD, dy_BTD, gate_BTF, up_BTF = (jnp.where(chunk.valid_BT1, a, 0) for a in picked)
        w_gate_BDF, w_up_BDF, w_down_BFD = (take(w, chunk.expert_B) for w in weights)
        dh_BTF = batched_dot(dy_BTD, w_down_BFD, 2, 2)
        scale_BT = None if scale_M is None else take(scale_M, chunk.rows_BT)
        h_BTF, dgate_BTF, dup_BTF, dscale_BT = weighted_swiglu_vjp(
            gate_BTF, up_BTF, dh_BTF, scale_BT
        )
        x_BDT = transposed(x_BTD)
        dx_BTD = batched_dot(dgate_BTF, w_gate_BDF, 2, 2) + batched_dot(dup_BTF, w_up_BDF, 2, 2)
        if dscale_BT is not None:
            dscale = put_tiles(dscale, dscale_BT[..., None], chunk.start_B)
        return (
            put_tiles(dx, dx_BTD, chunk.start_B),
            dscale,
            add_weights(dw_gate_EDF, batched_dot(x_BDT, dgate_BTF, 2, 1), chunk.expert_B),
            add_weights(dw_up_EDF, batched_dot(x_BDT, dup_BTF, 2, 1), chunk.expert_B),
            add_weights(dw_down_EFD, batched_dot(transposed(h_BTF), dy_BTD, 2, 1), chunk.expert_B),
        )

    like = tuple(jax.tree.leaves((x, weights, group_sizes_E, kept, dy, scale_M)))
    zeros = partial(zeros_varying, like=like)
    rows = M + tiling.rows
    dscale = None if scale_M is None else zeros((rows, 1), jnp.float32)
    carry = zeros((rows, D), dtype), dscale, *(zeros(w.shape, jnp.float32) for w in weights)
    dx, dscale, *dw = lax.fori_loop(0, tiles.num_chunks, step, carry)
    if dscale is not None:
        dscale = keep_rows(dscale, tiles.num_rows, M)[:, 0]
    return keep_rows(dx, tiles.num_rows, M), tuple(g.astype(way.gradient_type) for g in dw), dscale
