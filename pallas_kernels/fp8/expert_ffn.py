"""Expert FFN in FP8: SwiGLU of rows sorted by expert, all nine products of it in E4M3.

DeepSeek-V3 report, section 3.3, as in `fp8/linear.py`; groups start at multiples of 128 rows, so
that no scale along the rows spans two experts (`fp8/grouped.py`).

    forward    rows padded, quantised both ways; gate, up = x w_gate, x w_up
               h = silu(gate) * up in fp32, quantised at once, never stored; y = h w_down
    kept       x^T, gate and up in FP8, and the weights in FP8: 1.03 bytes an element each
    backward   dy quantised both ways; dh = dy w_down^T
               h, dgate and dup from gate and up, elementwise by XLA, and quantised
               dx = dgate w_gate^T + dup w_up^T; three weight gradients over rows, fp32 sums

Gate and up are cached in FP8 and h is computed again, as in section 3.3.3; y does not see that
rounding. A padded row and choice keeps 1.03 (D + 2 F) bytes; bf16 keeps 2 (D + 2 F).

Roofline: 6 M D F FLOPs forward and 12 M D F backward at 1979 TFLOP/s. With 8 experts of 7168 x 2048
and 65,536 rows, 2.9 and 5.8 ms; quantising and SwiGLU move 10 GB, padding rows and back 7.5 GB,
3.7 ms in all at 4.8 TB/s.

Shape letters: M rows, P rows with padding, E experts, D model width, F expert width, T tiles of 128
padded rows.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.fp8.grouped import (
    fp8_grouped_matmul,
    fp8_grouped_matmul_tiles,
    pad_groups,
    pad_rows,
    unpad_rows,
)
from pallas_kernels.fp8.linear import as_gradients, fitting
from pallas_kernels.fp8.quantize import (
    TILE,
    Prepared,
    Quantized,
    both_layouts,
    dequantize,
    quantize_both,
    quantize_tiles,
    quantize_tiles_transposed,
    swiglu_quantize,
)
from pallas_kernels.grouped.matmul import check_operands
from pallas_kernels.grouped.ragged import zeros_varying
from pallas_kernels.mosaic import Backend
from pallas_kernels.swiglu import swiglu_vjp


def fp8_expert_ffn(
    x_MD: Array,
    w_gate_EDF: Array | Prepared,
    w_up_EDF: Array | Prepared,
    w_down_EFD: Array | Prepared,
    group_sizes_E: Array,
    *,
    backend: Backend = "portable",
) -> Array:
    """y[m] = (silu(x[m] w_gate[e]) * (x[m] w_up[e])) w_down[e] for the rows m of group e [M, D].

    `expert_ffn` by FP8 products, and so are its gradients: dx in the type of x, those of the
    weights in their own. Rows beyond the last group may hold anything, NaN included: they come out
    as zeros and their gradient is zero. Source: DeepSeek-V3 report, eq. 12 and section 3.3.

    Args:
        x_MD: rows sorted by expert, bf16 or fp32 [M, D].
        w_gate_EDF: bf16 or fp32 [E, D, F], like the other weights; give the master weights. Or all
            three quantised before.
        w_up_EDF: [E, D, F].
        w_down_EFD: [E, F, D].
        group_sizes_E: rows of each expert, int [E]; their sum must not exceed M (a run-time value:
            not checked).
        backend: see `mosaic.Backend`. All quantise alike; "portable" multiplies in bf16, tile by
            tile, "reference" in fp32.

    Raises:
        ValueError: shapes or types do not fit each other or, for the kernels, the machine.
    """
    weights = w_gate_EDF, w_up_EDF, w_down_EFD
    gate, up, down = (w.stand_in if isinstance(w, Prepared) else w for w in weights)
    E, D, F = gate.shape
    if up.shape != (E, D, F) or down.shape != (E, F, D):
        raise ValueError(
            f"w_gate is {gate.shape}; w_up must be alike and w_down {(E, F, D)}, "
            f"but they are {up.shape} and {down.shape}"
        )
    # Types may differ; XLA drops the cast, whose result is not used.
    check_operands(x_MD, group_sizes_E, w_gate=gate.astype(x_MD.dtype))
    if backend in ("mosaic", "emulated") and (reason := unsupported(D, F)):
        raise ValueError(f"no FP8 kernel: {reason}, or use backend 'portable'")
    if x_MD.shape[0] == 0:
        return x_MD
    static = backend, gate.dtype, isinstance(w_gate_EDF, Prepared)
    return _expert_ffn(static, x_MD, *weights, group_sizes_E)


def unsupported(D: int, F: int) -> str | None:
    """Reason why the kernels cannot compute experts of widths D and F, or None if they can."""
    for name, size in (("model", D), ("expert", F)):
        if size != fitting(size):
            return f"the {name} width is {size}; pad the weights to {fitting(size)}"
    return None


class _Saved(NamedTuple):
    """Values that the backward pass reads."""

    x_transposed: Quantized
    gate: Quantized
    up: Quantized
    weights: tuple[Quantized, ...]
    group_sizes_E: Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_ffn(static, x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E) -> Array:
    """`static` is as in `fp8/linear.py`."""
    weights = w_gate_EDF, w_up_EDF, w_down_EFD
    padding = pad_groups(group_sizes_E, x_MD.shape[0])
    x = quantize_tiles(pad_rows(x_MD, padding), backend=static[0])
    return _forward(static[0], x, weights, group_sizes_E, padding, x_MD.dtype)[0]


def _forward(backend: Backend, x: Quantized, weights, group_sizes_E, padding, dtype):
    """y [M, D], gate and up [P, F], and the weights as they are, in FP8."""
    gate_w, up_w, down_w = (both_layouts(w, backend) for w in weights)
    rows = partial(_rows, group_sizes_E=group_sizes_E, dtype=dtype, backend=backend)
    gate_PF, up_PF = rows(x, gate_w[1]), rows(x, up_w[1])
    y_PD = rows(swiglu_quantize(gate_PF, up_PF, backend=backend), down_w[1])
    return unpad_rows(y_PD, padding), gate_PF, up_PF, (gate_w[0], up_w[0], down_w[0])


def _expert_ffn_fwd(static, x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E):
    backend = static[0]
    weights = w_gate_EDF, w_up_EDF, w_down_EFD
    padding = pad_groups(group_sizes_E, x_MD.shape[0])
    x, x_transposed = quantize_both(pad_rows(x_MD, padding), backend=backend)
    y_MD, gate_PF, up_PF, quantized = _forward(
        backend, x, weights, group_sizes_E, padding, x_MD.dtype
    )
    gate, up = (quantize_tiles(a, backend=backend) for a in (gate_PF, up_PF))
    return y_MD, _Saved(x_transposed, gate, up, quantized, group_sizes_E)


def _expert_ffn_bwd(static, saved: _Saved, dy_MD: Array):
    (backend, w_dtype, prepared), sizes_E, dtype = static, saved.group_sizes_E, dy_MD.dtype
    rows = partial(_rows, group_sizes_E=sizes_E, dtype=dtype, backend=backend)
    weights = partial(_weights, group_sizes_E=sizes_E, dtype=w_dtype, backend=backend)
    w_gate, w_up, w_down = saved.weights
    padding = pad_groups(sizes_E, dy_MD.shape[0])
    dy, dy_transposed = quantize_both(pad_rows(dy_MD, padding), backend=backend)
    gate_PF, up_PF = dequantize(saved.gate, dtype), dequantize(saved.up, dtype)
    # In the padding gate, up and dh are zeros, and so is all that follows: what dw must not see.
    h_PF, dgate_PF, dup_PF = swiglu_vjp(gate_PF, up_PF, rows(dy, w_down))
    h_transposed = quantize_tiles_transposed(h_PF, backend=backend)
    dgate, dgate_transposed = quantize_both(dgate_PF, backend=backend)
    dup, dup_transposed = quantize_both(dup_PF, backend=backend)
    dx_PD = rows(dgate, w_gate) + rows(dup, w_up)
    dw = (
        weights(saved.x_transposed, dgate_transposed),
        weights(saved.x_transposed, dup_transposed),
        weights(h_transposed, dy_transposed),
    )
    return unpad_rows(dx_PD, padding), *as_gradients(dw, prepared), None


_expert_ffn.defvjp(_expert_ffn_fwd, _expert_ffn_bwd)


# ---- products ------------------------------------------------------------------------------------


def _rows(x: Quantized, w: Quantized, group_sizes_E, dtype: Any, backend: Backend) -> Array:
    """x w^T [P, N] of padded rows, with w [E, N, K]."""
    if backend != "portable":
        return fp8_grouped_matmul(x, w, group_sizes_E, dtype=dtype, backend=backend)
    x_PK, w_ENK = dequantize(x, jnp.bfloat16), dequantize(w, jnp.bfloat16, blocks=True)

    def multiply(tile):
        x_TK, expert = tile
        y = jnp.dot(x_TK, w_ENK[expert].T, preferred_element_type=jnp.float32)
        return y.astype(dtype)

    tiles = x_PK.reshape(-1, TILE, x_PK.shape[1])
    y_TN = lax.map(multiply, (tiles, _expert_of_tiles(group_sizes_E, len(tiles))))
    return y_TN.reshape(x_PK.shape[0], -1)


def _weights(a: Quantized, b: Quantized, group_sizes_E, dtype: Any, backend: Backend) -> Array:
    """a b^T [E, M, N] over the padded rows of each group, which are the columns of both."""
    if backend != "portable":
        return fp8_grouped_matmul_tiles(a, b, group_sizes_E, dtype=dtype, backend=backend)
    a_MP, b_NP = dequantize(a, jnp.bfloat16), dequantize(b, jnp.bfloat16)
    (M, P), N, E = a_MP.shape, b_NP.shape[0], group_sizes_E.shape[0]

    def add(dw_EMN, tile):
        a_MT, b_NT, expert = tile
        part_MN = jnp.dot(a_MT, b_NT.T, preferred_element_type=jnp.float32)
        return dw_EMN.at[expert].add(part_MN), None

    tiles = (x.reshape(-1, P // TILE, TILE).swapaxes(0, 1) for x in (a_MP, b_NP))
    dw_EMN = zeros_varying((E, M, N), jnp.float32, (a_MP, b_NP, group_sizes_E))
    expert_T = _expert_of_tiles(group_sizes_E, P // TILE)
    return lax.scan(add, dw_EMN, (*tiles, expert_T))[0].astype(dtype)


def _expert_of_tiles(group_sizes_E: Array, num_tiles: int) -> Array:
    """Expert of each tile of 128 padded rows; beyond the groups, where rows are zeros, the last."""
    ends_E = jnp.cumsum(-(-group_sizes_E.astype(jnp.int32) // TILE))
    expert_T = jnp.sum(jnp.arange(num_tiles)[:, None] >= ends_E, axis=1, dtype=jnp.int32)
    return jnp.minimum(expert_T, len(ends_E) - 1)
