"""A linear layer whose three products are FP8: y = x w, dx = dy w^T and dw = x^T dy.

DeepSeek-V3 report, section 3.3: everything that is multiplied is E4M3, activations and gradients in
1 x 128 tiles along the contraction, weights in 128 x 128 blocks, partial sums over 128 promoted to
fp32. y and dx have the type of x, dw that of w: a master weight in fp32 gets its gradient in fp32.

    forward    x  --both layouts in one pass--> x in tiles of K, x^T in tiles of M (kept)
               w  --both layouts in one pass--> w^T in blocks,   w in blocks       (kept)
               y  = tiles of x  times w^T           `fp8_matmul`
    backward   dy --both layouts in one pass--> dy in tiles of N, dy^T in tiles of M
               dx = tiles of dy times w             `fp8_matmul`
               dw = tiles of x^T times tiles of dy^T  `fp8_matmul_tiles`, over tokens

Of x only the form that dw reads is kept: 1.03 bytes an element, as much as V3's 1 x 128 tiles,
which are dequantised, transposed and quantised again in the backward pass. Both layouts in forward
move 4.06 bytes an element; V3's way moves 3.03 + 2.06 and rounds x twice. The weight is kept in FP8
too, 1.03 bytes an element, where bf16 products keep a copy of 2.

Roofline: 6 M N K FLOPs at 1979 TFLOP/s, 1.46 ms for M = 4096 and 16384 x 7168. Quantising moves
4.06 M (K + N) + 6.06 K N bytes, 0.23 ms at 4.8 TB/s.

Shape letters: M rows (tokens), K input and N output width.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.fp8.matmul import fp8_matmul, fp8_matmul_tiles
from pallas_kernels.fp8.quantize import (
    TILE,
    Quantized,
    quantize_blocks_both,
    quantize_both,
    quantize_tiles,
)
from pallas_kernels.mosaic import Backend

Static = tuple[Backend, Any]
"""Backend, and the type of the weight's gradient."""


def fp8_linear(x_MK: Array, w_KN: Array, *, backend: Backend = "portable") -> Array:
    """y = x w [M, N] in the type of x, by FP8 products; so are its gradients.

    Source: DeepSeek-V3 report, section 3.3.

    Args:
        x_MK: bf16 or fp32 [M, K]. Kernels get zeros up to `fitting` sizes.
        w_KN: bf16 or fp32 [K, N]; quantised from what it is, so give the master weight.
        backend: see `mosaic.Backend`. All quantise alike; "portable" multiplies in bf16,
            "reference" in fp32.

    Raises:
        ValueError: shapes or types do not fit each other or, for the kernels, the machine.
    """
    if x_MK.ndim != 2 or w_KN.ndim != 2 or x_MK.shape[1] != w_KN.shape[0]:
        raise ValueError(f"no product of {x_MK.shape} and {w_KN.shape}; give [M, K] and [K, N]")
    static: Static = backend, w_KN.dtype
    if backend not in ("mosaic", "emulated"):
        return _linear(static, x_MK, w_KN)
    for dtype in (x_MK.dtype, w_KN.dtype):
        if reason := unsupported(dtype):
            raise ValueError(f"no FP8 kernel: {reason}")
    (M, K), N = x_MK.shape, w_KN.shape[1]
    x_MK, w_KN = _pad(x_MK, M, K), _pad(w_KN, K, N)
    y_MN: Array = _linear(static, x_MK, w_KN)
    return y_MN[:M, :N]


def unsupported(dtype: Any) -> str | None:
    """Reason why the kernels cannot take activations or weights of this type, or None."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"operands are {dtype}; give bfloat16 or float32"
    return None


def fitting(size: int) -> int:
    """The next size that a kernel's matrices can have: every axis is that of rows in some product.

    TMA wants rows of multiples of 16 bytes, and tiles of 128 E4M3 values want whole tiles, unless
    there is but one. Of V3's widths only the latent with the rotary key is none, 576.
    """
    multiple = 16 if size <= TILE else TILE
    return -(-size // multiple) * multiple


def _pad(x_RC: Array, R: int, C: int) -> Array:
    return jnp.pad(x_RC, ((0, fitting(R) - R), (0, fitting(C) - C)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(static: Static, x_MK: Array, w_KN: Array) -> Array:
    backend, _ = static
    x = quantize_tiles(x_MK, backend=backend)
    _, w_transposed = quantize_blocks_both(w_KN, backend=backend)
    return fp8_matmul(x, w_transposed, dtype=x_MK.dtype, backend=backend)


def _forward(static: Static, x_MK: Array, w_KN: Array):
    backend, _ = static
    x, x_transposed = quantize_both(x_MK, backend=backend)
    w, w_transposed = quantize_blocks_both(w_KN, backend=backend)
    y_MN = fp8_matmul(x, w_transposed, dtype=x_MK.dtype, backend=backend)
    return y_MN, (x_transposed, w)


def _backward(static: Static, saved: tuple[Quantized, Quantized], dy_MN: Array):
    (backend, w_dtype), (x_transposed, w) = static, saved
    dy, dy_transposed = quantize_both(dy_MN, backend=backend)
    dx_MK = fp8_matmul(dy, w, dtype=dy_MN.dtype, backend=backend)
    dw_KN = fp8_matmul_tiles(x_transposed, dy_transposed, dtype=w_dtype, backend=backend)
    return dx_MK, dw_KN


_linear.defvjp(_forward, _backward)
