"""Expert FFN on Hopper: grouped products with SwiGLU where the gate and up sums are.

Forward: one kernel multiplies rows by the gate and the up weight side by side and stores
h = silu(gate) * up, with gate and up too when a backward pass will follow; a second multiplies h by
the down weight. Backward: dh = dy w_down^T; dgate, dup and h again by XLA, elementwise; three
weight gradients; and dx = dgate w_gate^T + dup w_up^T in one kernel that sums both products in
registers.

Roofline on an H200: 6 M D F FLOPs forward and 12 M D F backward, at 989 TFLOP/s.

Shape letters: M rows, E experts, D model width, F expert width.
"""

from functools import partial
from typing import Any

from jax import Array

from pallas_kernels.grouped.products import grouped_products
from pallas_kernels.grouped.weight_gradient import grouped_weight_gradient
from pallas_kernels.swiglu import swiglu, weighted_swiglu_vjp


def forward(emulated: bool, keep: bool, x_MD: Array, weights: tuple, group_sizes_E: Array):
    """y[m] = (silu(x[m] w_gate[e]) * (x[m] w_up[e])) w_down[e] for the rows m of group e [M, D].

    With `keep` also gate and up [M, F] for the backward pass. All but the sizes are bf16, D and F
    multiples of 64. Gate, up and h are rounded to bf16, sums are fp32. Rows beyond the last group
    give zeros. Source: DeepSeek-V3 report, eq. 12.
    """
    w_gate_EDF, w_up_EDF, w_down_EFD = weights

    def finish(gate: Array, up: Array):
        h = swiglu(gate, up)
        return (h, gate, up) if keep else (h,)

    h_MF, *kept = grouped_products(
        [(x_MD, (w_gate_EDF, w_up_EDF))],
        group_sizes_E,
        name="grouped_swiglu_kept" if keep else "grouped_swiglu",
        finish=finish,
        num_outputs=3 if keep else 1,
        emulated=emulated,
    )
    (y_MD,) = grouped_products(
        [(h_MF, (w_down_EFD,))], group_sizes_E, name="grouped_matmul_forward", emulated=emulated
    )
    return y_MD, tuple(kept)


def backward(
    emulated: bool,
    w_dtype: Any,
    x_MD: Array,
    weights: tuple,
    group_sizes_E: Array,
    kept: tuple,
    dy_MD: Array,
    scale_M: Array | None,
):
    """dx [M, D] and the gradients of the weights, of type `w_dtype`; and, with `scale_M`, that of
    the scale [M].

    `scale_M` are factors of y; dy is then that of the scaled rows, and y is not needed: as y =
    h w_down, the scale's gradient is dh h.
    """
    w_gate_EDF, w_up_EDF, w_down_EFD = weights
    gate_MF, up_MF = kept
    rows = partial(
        grouped_products, group_sizes_E=group_sizes_E, transposed=True, emulated=emulated
    )
    products = partial(
        grouped_weight_gradient, group_sizes_E=group_sizes_E, dtype=w_dtype, emulated=emulated
    )
    (dh_MF,) = rows([(dy_MD, (w_down_EFD,))], name="grouped_matmul_rows")
    h_MF, dgate_MF, dup_MF, dscale_M = weighted_swiglu_vjp(gate_MF, up_MF, dh_MF, scale_M)
    dw = products(x_MD, dgate_MF), products(x_MD, dup_MF), products(h_MF, dy_MD)
    (dx_MD,) = rows(
        [(dgate_MF, (w_gate_EDF,)), (dup_MF, (w_up_EDF,))], name="grouped_matmul_rows_of_two"
    )
    return dx_MD, dw, dscale_M
