"""Expert FFN: SwiGLU of rows sorted by expert.

By kernels on Hopper (`expert_ffn_mosaic.py`); elsewhere the three products are fused in one loop
over tiles. Against three grouped matmuls the rows and their cotangents are then fetched once per
pass, and the gate and up activations of a tile are used while they are in cache.

Shape letters: M rows, E experts, D model width, F expert width, T rows of a tile, B tiles of a
chunk (`ragged.py`).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.grouped.expert_ffn_mosaic import expert_ffn_mosaic
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
from pallas_kernels.swiglu import swiglu, swiglu_vjp


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
        backend: "mosaic" and "emulated" run the kernels (`expert_ffn_mosaic.py`); "portable" loops
            over tiles and is differentiated by hand; "reference" is dense, in fp32.
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
            weights = [
                lax.stop_gradient(w).astype(m.dtype) + (m - lax.stop_gradient(m))
                for w, m in zip(weights, masters, strict=True)
            ]
        return _reference(x_MD, *weights, group_sizes_E)
    M = x_MD.shape[0]
    if M == 0:
        return x_MD
    operands = x_MD, *weights, group_sizes_E, masters or weights
    if backend != "portable":
        return expert_ffn_mosaic(backend == "emulated", *operands)
    return _portable(tiling or choose_tiling(M, E, D * F), *operands)


def _reference(x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E):
    """The definition over reference grouped matmuls, in fp32. For tests: E times the work."""
    matmul = partial(grouped_matmul, group_sizes_E=group_sizes_E, backend="reference")
    x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, dtype = (
        *(a.astype(jnp.float32) for a in (x_MD, w_gate_EDF, w_up_EDF, w_down_EFD)),
        x_MD.dtype,
    )
    h_MF = swiglu(matmul(x_MD, w_gate_EDF), matmul(x_MD, w_up_EDF))
    return matmul(h_MF, w_down_EFD).astype(dtype)


def _forward(tiling: Tiling, keep: bool, x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E):
    """Output, and with `keep` the gate and up activations [M + T, F] for the backward pass."""
    (M, D), F, dtype = x_MD.shape, w_gate_EDF.shape[2], x_MD.dtype
    tiles = make_tiles(group_sizes_E, M, tiling)

    def step(i, carry):
        y, kept = carry
        chunk = take_chunk(tiles, i, M, tiling)
        x_BTD = take(x_MD, chunk.rows_BT)
        gate_BTF = batched_dot(x_BTD, take(w_gate_EDF, chunk.expert_B), 2, 1)
        up_BTF = batched_dot(x_BTD, take(w_up_EDF, chunk.expert_B), 2, 1)
        h_BTF = swiglu(gate_BTF, up_BTF).astype(dtype)
        y_BTD = batched_dot(h_BTF, take(w_down_EFD, chunk.expert_B), 2, 1)
        if keep:
            gate, up = kept
            kept = put_tiles(gate, gate_BTF, chunk.start_B), put_tiles(up, up_BTF, chunk.start_B)
        return put_tiles(y, y_BTD, chunk.start_B), kept

    zeros = partial(
        zeros_varying,
        dtype=dtype,
        like=(x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E),
    )
    rows = M + tiling.rows
    kept = (zeros((rows, F)), zeros((rows, F))) if keep else ()
    y, kept = lax.fori_loop(0, tiles.num_chunks, step, (zeros((rows, D)), kept))
    return keep_rows(y, tiles.num_rows, M), kept


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _portable(tiling: Tiling, x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, masters):
    return _forward(tiling, False, x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E)[0]


def _portable_fwd(tiling: Tiling, *operands_and_masters):
    *operands, masters = operands_and_masters
    y_MD, kept = _forward(tiling, True, *operands)
    return y_MD, (operands, kept, jnp.zeros(0, masters[0].dtype))


def _portable_bwd(tiling: Tiling, saved, dy_MD: Array):
    (x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E), (gate, up), empty = saved
    (M, D), dtype = x_MD.shape, x_MD.dtype
    weights = w_gate_EDF, w_up_EDF, w_down_EFD
    tiles = make_tiles(group_sizes_E, M, tiling)

    def step(i, carry):
        dx, dw_gate_EDF, dw_up_EDF, dw_down_EFD = carry
        chunk = take_chunk(tiles, i, M, tiling)
        # Weight gradients sum over rows, so rows of other groups must be zero, on both sides of
        # each product since 0 * NaN is NaN.
        x_BTD, dy_BTD, gate_BTF, up_BTF = (
            jnp.where(chunk.valid_BT1, take(a, chunk.rows_BT), 0) for a in (x_MD, dy_MD, gate, up)
        )
        w_gate_BDF, w_up_BDF, w_down_BFD = (take(w, chunk.expert_B) for w in weights)
        dh_BTF = batched_dot(dy_BTD, w_down_BFD, 2, 2)
        h_BTF, dgate_BTF, dup_BTF = swiglu_vjp(gate_BTF, up_BTF, dh_BTF)
        x_BDT = transposed(x_BTD)
        dx_BTD = batched_dot(dgate_BTF, w_gate_BDF, 2, 2) + batched_dot(dup_BTF, w_up_BDF, 2, 2)
        return (
            put_tiles(dx, dx_BTD, chunk.start_B),
            add_weights(dw_gate_EDF, batched_dot(x_BDT, dgate_BTF, 2, 1), chunk.expert_B),
            add_weights(dw_up_EDF, batched_dot(x_BDT, dup_BTF, 2, 1), chunk.expert_B),
            add_weights(dw_down_EFD, batched_dot(transposed(h_BTF), dy_BTD, 2, 1), chunk.expert_B),
        )

    zeros = partial(zeros_varying, like=(x_MD, *weights, group_sizes_E, dy_MD))
    carry = zeros((M + tiling.rows, D), dtype), *(zeros(w.shape, jnp.float32) for w in weights)
    dx, *dw = lax.fori_loop(0, tiles.num_chunks, step, carry)
    d_masters = tuple(g.astype(empty.dtype) for g in dw)
    return keep_rows(dx, tiles.num_rows, M), None, None, None, None, d_masters


_portable.defvjp(_portable_fwd, _portable_bwd)
