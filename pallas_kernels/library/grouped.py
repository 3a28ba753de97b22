"""Grouped products and the expert FFN by the library's ragged products.

Three products of rows sorted by expert, as in `grouped/`: y = x w, dx = dy w^T and dw = x^T dy. For
dx the library copies the weights, transposed. SwiGLU is XLA's. Rows beyond the last group come out
of the kernels as memory had them, and are set to zero here.

In FP8 (`fp8/grouped.py` has the layout) Triton's kernel multiplies E4M3 and weighs each partial sum
of 128 by both scales; the weight gradient, whose scales run along the rows, is one of bfloat16.

Letters: M rows, P rows with padding, E experts, K contraction and N width of a product, D model
width, F expert width.
"""

import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.library.installed import is_ampere, module, operation, parts, refusal, untracked
from pallas_kernels.swiglu import swiglu, weighted_swiglu_vjp

TILE = 128


def matmul(x_MK: Array, w_EKN: Array, group_sizes_E: Array) -> Array:
    """`grouped.matmul.grouped_matmul` [M, N]; arguments as there, checked."""
    return _matmul(x_MK, w_EKN, group_sizes_E.astype(jnp.int32))


def experts_refusal(D: int, F: int, dtype: Any) -> str | None:
    """The library's reason to refuse experts of these widths; None if it takes them."""
    if dtype != jnp.bfloat16:
        return f"activations are {jnp.dtype(dtype)}, and the library multiplies bfloat16"
    E, array = 2, partial(jax.ShapeDtypeStruct, dtype=dtype)

    def with_gradients(x, *weights_and_sizes):
        *weights, sizes = weights_and_sizes
        y, kept = experts_forward(True, x, tuple(weights), sizes)
        return experts_backward(jnp.float32, x, tuple(weights), sizes, kept, y, None)

    weights = array((E, D, F)), array((E, D, F)), array((E, F, D))
    sizes = jax.ShapeDtypeStruct((E,), jnp.int32)
    return refusal(with_gradients, array((256, D)), *weights, sizes)


def fp8_experts_refusal(D: int, F: int) -> str | None:
    """The library's reason to refuse experts in FP8; None if it takes them."""
    if is_ampere():
        return "the library multiplies no FP8 on GPUs of compute capability 8"
    return experts_refusal(D, F, jnp.bfloat16)


# ---- in bfloat16 ---------------------------------------------------------------------------------


def _rows(x_MK: Array, w: Array, sizes_E: Array, *, transposed: bool = False) -> Array:
    """x w[e] of each group, or x w[e]^T [M, N], in the type of x; other rows are zeros."""
    numbers = (
        module("ragged_dot.base").TRANS_RHS_RAGGED_DOT_DIM_NUMS
        if transposed
        else module("ragged_dot.base").DEFAULT_RAGGED_DOT_DIM_NUMS
    )
    dot = operation("ragged_dot", parts().rows)

    def run(x_MK, w, sizes_E):
        y_MN = dot(x_MK, w, group_sizes=sizes_E, ragged_dot_dimension_numbers=numbers)
        return jnp.where(jnp.arange(x_MK.shape[0])[:, None] < jnp.sum(sizes_E), y_MN, 0)

    return untracked(run, x_MK, w, sizes_E)


def _weights(x_MK: Array, dy_MN: Array, sizes_E: Array, dtype: Any) -> Array:
    """x_e^T dy_e of each group [E, K, N], fp32 sums."""
    part = parts().weights
    if part == "xla":  # its products reach rows of no group, and 0 * NaN is NaN
        own_M1 = jnp.arange(x_MK.shape[0])[:, None] < jnp.sum(sizes_E)
        x_MK, dy_MN = jnp.where(own_M1, x_MK, 0), jnp.where(own_M1, dy_MN, 0)
    dot = partial(
        operation("ragged_dot", part),
        ragged_dot_dimension_numbers=module("ragged_dot.base").RAGGED_CONTRACTING_DOT_DIM_NUMS,
        preferred_element_type=dtype,
    )
    return untracked(lambda x, dy, sizes: dot(x, dy, group_sizes=sizes), x_MK, dy_MN, sizes_E)


@jax.custom_vjp
def _matmul(x_MK: Array, w_EKN: Array, sizes_E: Array) -> Array:
    return _rows(x_MK, w_EKN, sizes_E)


def _matmul_fwd(x_MK, w_EKN, sizes_E):
    return _rows(x_MK, w_EKN, sizes_E), (x_MK, w_EKN, sizes_E)


def _matmul_bwd(saved, dy_MN: Array):
    x_MK, w_EKN, sizes_E = saved
    dx_MK = _rows(dy_MN, w_EKN, sizes_E, transposed=True)
    return dx_MK, _weights(x_MK, dy_MN, sizes_E, w_EKN.dtype), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def experts_forward(keep: bool, x_MD: Array, weights: tuple, group_sizes_E: Array):
    """y [M, D] of the expert FFN and, with `keep`, gate and up [M, F] for the backward pass."""
    w_gate_EDF, w_up_EDF, w_down_EFD = weights
    sizes_E = group_sizes_E.astype(jnp.int32)
    gate_MF, up_MF = _rows(x_MD, w_gate_EDF, sizes_E), _rows(x_MD, w_up_EDF, sizes_E)
    h_MF = swiglu(*(a.astype(jnp.float32) for a in (gate_MF, up_MF))).astype(x_MD.dtype)
    return _rows(h_MF, w_down_EFD, sizes_E), (gate_MF, up_MF) if keep else ()


def experts_backward(dtype: Any, x_MD, weights: tuple, group_sizes_E, kept: tuple, dy_MD, scale_M):
    """dx [M, D], the gradients of the weights, of a type, and, with `scale_M`, factors of y, theirs
    [M]."""
    (w_gate_EDF, w_up_EDF, w_down_EFD), (gate_MF, up_MF) = weights, kept
    sizes_E = group_sizes_E.astype(jnp.int32)
    dh_MF = _rows(dy_MD, w_down_EFD, sizes_E, transposed=True)
    h_MF, dgate_MF, dup_MF, dscale_M = weighted_swiglu_vjp(gate_MF, up_MF, dh_MF, scale_M)
    dx_MD = _rows(dgate_MF, w_gate_EDF, sizes_E, transposed=True)
    dx_MD += _rows(dup_MF, w_up_EDF, sizes_E, transposed=True)
    pairs = (x_MD, dgate_MF), (x_MD, dup_MF), (h_MF, dy_MD)
    return dx_MD, tuple(_weights(a, b, sizes_E, dtype) for a, b in pairs), dscale_M


# ---- in FP8 --------------------------------------------------------------------------------------


def fp8_rows(x: Any, w: Any, group_sizes_E: Array, dtype: Any) -> Array:
    """x w[e]^T [P, N] as `fp8_grouped_matmul` has it, but rows that no group owns may be anything.

    The library reads weights [K, N]: E4M3 is transposed, at a byte an element.
    """
    sizes_E = _whole_tiles(group_sizes_E)
    K, N = x.q.shape[1], w.q.shape[1]
    pad_K, pad_N = -K % TILE, -N % TILE
    q_PK = jnp.pad(x.q, ((0, 0), (0, pad_K)))
    q_EKN = jnp.pad(w.q, ((0, 0), (0, pad_N), (0, pad_K))).mT
    # Mosaic has no kernel of E4M3 by E4M3 with these scales.
    part = "xla" if parts().rows == "xla" else "triton"
    dot = operation("ragged_dot", part)
    if part == "triton":  # a scaled sum per 128 of K; with its own choice, 4 warps, it spills
        blocks = {"block_m": TILE, "block_n": TILE, "block_k": TILE}
        dot = dot.replace(
            config=module("ragged_dot.triton").Config(**blocks, num_warps=8, num_stages=3)
        )

    def run(q_PK, scale_Pk, q_EKN, scale_Ekn, sizes_E):
        x, w = _quantized(q_PK, scale_Pk), _quantized(q_EKN, scale_Ekn)
        return dot(x, w, group_sizes=sizes_E, preferred_element_type=dtype)

    return untracked(run, q_PK, x.scale, q_EKN, w.scale.mT, sizes_E)[:, :N]


def fp8_weights(a_MP: Array, b_NP: Array, group_sizes_E: Array, dtype: Any) -> Array:
    """a b^T [E, M, N] over the columns of each group, of dequantised operands in bfloat16."""
    return _weights(a_MP.T, b_NP.T, _whole_tiles(group_sizes_E), dtype)


def _quantized(q: Array, scale: Array) -> Any:
    return importlib.import_module("qwix").QArray(
        qvalue=q, scale=scale, zero_point=None, qtype=q.dtype
    )


def _whole_tiles(group_sizes_E: Array) -> Array:
    """Rows of each group with its padding to multiples of 128."""
    return -(-group_sizes_E.astype(jnp.int32) // TILE) * TILE
