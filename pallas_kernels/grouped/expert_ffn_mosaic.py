"""Expert FFN on Hopper: grouped products with SwiGLU where the gate and up sums are.

Forward: one kernel multiplies rows by the gate and the up weight side by side and stores
h = silu(gate) * up, with gate and up too when a backward pass will follow; a second multiplies h by
the down weight. Backward: dh = dy w_down^T; dgate, dup and h again by XLA, elementwise; dx =
dgate w_gate^T + dup w_up^T in one kernel that sums both products in registers; and three weight
gradients.

Roofline on an H200: 6 M D F FLOPs forward and 12 M D F backward, at 989 TFLOP/s.

Shape letters: M rows, E experts, D model width, F expert width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.grouped.products import grouped_products
from pallas_kernels.grouped.weight_gradient import grouped_weight_gradient
from pallas_kernels.swiglu import swiglu, swiglu_vjp


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_ffn_mosaic(
    emulated: bool,
    x_MD: Array,
    w_gate_EDF: Array,
    w_up_EDF: Array,
    w_down_EFD: Array,
    group_sizes_E: Array,
    masters: tuple[Array, ...],
) -> Array:
    """y[m] = (silu(x[m] w_gate[e]) * (x[m] w_up[e])) w_down[e] for the rows m of group e [M, D].

    All but the sizes are bf16, D and F multiples of 64. Gate, up, h and their cotangents are
    rounded to bf16, sums are fp32. Rows beyond the last group give zeros and get a zero gradient.
    `masters` get the weights' gradients, in their type (`experts.py:expert_ffn`).
    Source: DeepSeek-V3 report, eq. 12.
    """
    h_MF, *_ = _hidden(emulated, x_MD, w_gate_EDF, w_up_EDF, group_sizes_E, keep=False)
    return _down(emulated, h_MF, w_down_EFD, group_sizes_E)


def _hidden(emulated: bool, x_MD, w_gate_EDF, w_up_EDF, group_sizes_E, *, keep: bool):
    """h [M, F] and, with `keep`, gate and up."""

    def finish(gate: Array, up: Array):
        h = swiglu(gate, up)
        return (h, gate, up) if keep else (h,)

    return grouped_products(
        [(x_MD, (w_gate_EDF, w_up_EDF))],
        group_sizes_E,
        name="grouped_swiglu_kept" if keep else "grouped_swiglu",
        finish=finish,
        num_outputs=3 if keep else 1,
        emulated=emulated,
    )


def _down(emulated: bool, h_MF, w_down_EFD, group_sizes_E) -> Array:
    name = "grouped_matmul_forward"
    return grouped_products([(h_MF, (w_down_EFD,))], group_sizes_E, name=name, emulated=emulated)[0]


def _forward(emulated: bool, x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, masters):
    h_MF, gate_MF, up_MF = _hidden(emulated, x_MD, w_gate_EDF, w_up_EDF, group_sizes_E, keep=True)
    operands = x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E
    saved = operands, gate_MF, up_MF, jnp.zeros(0, masters[0].dtype)
    return _down(emulated, h_MF, w_down_EFD, group_sizes_E), saved


def _backward(emulated: bool, saved, dy_MD: Array):
    (x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E), gate_MF, up_MF, empty = saved
    rows = partial(
        grouped_products, group_sizes_E=group_sizes_E, transposed=True, emulated=emulated
    )
    weights = partial(
        grouped_weight_gradient, group_sizes_E=group_sizes_E, dtype=empty.dtype, emulated=emulated
    )
    (dh_MF,) = rows([(dy_MD, (w_down_EFD,))], name="grouped_matmul_rows")
    h_MF, dgate_MF, dup_MF = swiglu_vjp(gate_MF, up_MF, dh_MF)
    (dx_MD,) = rows(
        [(dgate_MF, (w_gate_EDF,)), (dup_MF, (w_up_EDF,))], name="grouped_matmul_rows_of_two"
    )
    dw = weights(x_MD, dgate_MF), weights(x_MD, dup_MF), weights(h_MF, dy_MD)
    return dx_MD, None, None, None, None, dw


expert_ffn_mosaic.defvjp(_forward, _backward)
