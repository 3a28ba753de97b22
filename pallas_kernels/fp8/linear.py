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
too, 1.03 bytes an element, where bf16 products keep a copy of 2. It may be quantised before, once a
step: then its transpose alone is made here.

Roofline: 6 M N K FLOPs at 1979 TFLOP/s, 1.46 ms for M = 4096 and 16384 x 7168. Quantising moves
4.06 M (K + N) + 6.06 K N bytes, 0.23 ms at 4.8 TB/s.

Shape letters: M rows (tokens), K input and N output width.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.fp8.matmul import fp8_matmul, fp8_matmul_tiles
from pallas_kernels.fp8.quantize import (
    TILE,
    Prepared,
    Quantized,
    both_layouts,
    quantize_both,
    quantize_tiles,
)
from pallas_kernels.mosaic import Backend

Static = tuple[Backend, Any, bool]
"""Backend, the type of the weights' gradients, and whether they were quantised before."""


def fp8_linear(x_MK: Array, w_KN: Array, *, backend: Backend = "portable") -> Array:
    """y = x w [M, N]: `fp8_linears` of one weight."""
    return fp8_linears(x_MK, (w_KN,), backend=backend)[0]


def fp8_linears(
    x_MK: Array, weights: Sequence[Array | Prepared], *, backend: Backend = "portable"
) -> tuple[Array, ...]:
    """y = x w [M, N] for every weight, in the type of x, by FP8 products; so are its gradients.

    x is quantised once for all, and kept once; what the products add to dx is summed in fp32.
    Source: DeepSeek-V3 report, section 3.3.

    Args:
        x_MK: bf16 or fp32 [M, K]. Kernels get zeros up to `fitting` sizes.
        weights: [K, N] each, all bf16 or fp32, quantised from what they are, so give master
            weights; or all quantised before.
        backend: see `mosaic.Backend`. All quantise alike; "portable" multiplies in bf16,
            "reference" in fp32.

    Raises:
        ValueError: shapes or types do not fit each other or, for the kernels, the machine.
    """
    masters = [w.stand_in if isinstance(w, Prepared) else w for w in weights]
    for w_KN in masters:
        if x_MK.ndim != 2 or w_KN.ndim != 2 or x_MK.shape[1] != w_KN.shape[0]:
            raise ValueError(f"no product of {x_MK.shape} and {w_KN.shape}; give [M, K] and [K, N]")
    static: Static = backend, masters[0].dtype, isinstance(weights[0], Prepared)
    if backend not in ("mosaic", "emulated"):
        return _linears(static, x_MK, tuple(weights))
    for dtype in (x_MK.dtype, *(w.dtype for w in masters)):
        if reason := unsupported(dtype):
            raise ValueError(f"no FP8 kernel: {reason}")
    M, K = x_MK.shape
    padded = tuple(_padded(w) for w in weights)
    found: Any = _linears(static, _pad(x_MK, M, K), padded)
    return tuple(y[:M, : w.shape[1]] for y, w in zip(found, masters, strict=True))


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


def _padded(w: Array | Prepared) -> Array | Prepared:
    """Sizes that kernels take; it has as many blocks as before."""
    if not isinstance(w, Prepared):
        return _pad(w, *w.shape)
    blocks = Quantized(_pad(w.blocks.q, *w.blocks.q.shape), w.blocks.scale)
    return Prepared(blocks, _pad(w.stand_in, *w.stand_in.shape))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linears(static: Static, x_MK: Array, weights: tuple[Any, ...]) -> tuple[Array, ...]:
    backend = static[0]
    x = quantize_tiles(x_MK, backend=backend)
    return tuple(
        fp8_matmul(x, both_layouts(w, backend)[1], dtype=x_MK.dtype, backend=backend)
        for w in weights
    )


def _forward(static: Static, x_MK: Array, weights: tuple[Any, ...]):
    backend = static[0]
    x, x_transposed = quantize_both(x_MK, backend=backend)
    both = [both_layouts(w, backend) for w in weights]
    ys = tuple(fp8_matmul(x, w[1], dtype=x_MK.dtype, backend=backend) for w in both)
    return ys, (x_transposed, [w[0] for w in both])


def _backward(static: Static, saved: tuple[Quantized, list[Quantized]], dys: tuple[Array, ...]):
    (backend, w_dtype, prepared), (x_transposed, weights) = static, saved
    dtype = dys[0].dtype
    part = dtype if len(dys) == 1 else jnp.float32
    dx_MK, dw = [], []
    for dy_MN, w in zip(dys, weights, strict=True):
        dy, dy_transposed = quantize_both(dy_MN, backend=backend)
        dx_MK.append(fp8_matmul(dy, w, dtype=part, backend=backend))
        dw.append(fp8_matmul_tiles(x_transposed, dy_transposed, dtype=w_dtype, backend=backend))
    return sum(dx_MK[1:], dx_MK[0]).astype(dtype), as_gradients(dw, prepared)


def as_gradients(dw: Sequence[Array], prepared: bool) -> tuple[Any, ...]:
    """Gradients of weights, of the structure that they have."""
    return tuple(Prepared(Quantized(None, None), g) if prepared else g for g in dw)  # pyright: ignore[reportArgumentType]


_linears.defvjp(_forward, _backward)
