"""FP8 products with fine-grained scales: partial sums over 128 of K, promoted to fp32.

DeepSeek-V3 report, section 3.3.2: y[m, n] = sum over k of scale_a[m, k] * scale_b[n, k] * (sum over
the 128 columns of step k of qa[m, :] qb[n, :]). The inner sum is one chain of tensor core
instructions, whose accumulator keeps about 14 bits; the outer one is made in fp32 registers.

Three products of a layer y = x w, with w [K, N]; both operands always have their contraction last:

    y  [M, N]   x  in 1 x 128 tiles of K   w [N, K] in 128 x 128 blocks   `fp8_matmul`
    dx [M, K]   dy in 1 x 128 tiles of N   w [K, N] in 128 x 128 blocks   `fp8_matmul`
    dw [K, N]   x^T in tiles of M          dy^T in tiles of M             `fp8_matmul_tiles`

The two storages of w hold the same bytes and scales, transposed (`quantize_blocks`). Schedule: see
`fp8/product.py`. Roofline: 2 M N K FLOPs at 1979 TFLOP/s; M K + N K bytes in and 2 M N out at
4.8 TB/s take less with M = 4096: 86 % of it for (N, K) = (32768, 512), at most a third for other
layers.

Shape letters: M rows, N columns, K contraction; k = ceil(K / 128), n = ceil(N / 128).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.fp8.product import (
    ROWS,
    Blocks,
    Tile,
    in_bands,
    pad_scales,
    product_kernel,
    smem_bytes,
)
from pallas_kernels.fp8.quantize import E4M3, TILE, Quantized, dequantize
from pallas_kernels.mosaic import NUM_SMS, SMEM_BYTES, Backend


def fp8_matmul(
    a: Quantized,
    b: Quantized,
    *,
    dtype: Any = jnp.bfloat16,
    backend: Backend = "portable",
    blocks: Blocks | None = None,
) -> Array:
    """a b^T [M, N] of rows in 1 x 128 tiles and a weight in 128 x 128 blocks, both along K.

    Args:
        a: E4M3 [M, K] and fp32 scales [M, k], from `quantize_tiles`.
        b: E4M3 [N, K] and fp32 scales [n, k], from `quantize_blocks`.
        dtype: of the result, bf16 or fp32.
        backend: see `mosaic.Backend`; "portable" dequantises to bf16 and multiplies once.
        blocks: how the kernel cuts the product; by default `choose_blocks`.

    Raises:
        ValueError: shapes or types do not fit each other or, for a kernel, the machine.
    """
    return _matmul(a, b, False, dtype, backend, blocks)


def fp8_matmul_tiles(
    a: Quantized,
    b: Quantized,
    *,
    dtype: Any = jnp.float32,
    backend: Backend = "portable",
    blocks: Blocks | None = None,
) -> Array:
    """a b^T [M, N] of two matrices in 1 x 128 tiles along K: the weight gradient.

    For dw = x^T dy take x^T and dy^T from `quantize_tiles_transposed`: K is then the tokens.

    Args:
        a: E4M3 [M, K] and fp32 scales [M, k].
        b: E4M3 [N, K] and fp32 scales [N, k].
        dtype: of the result, bf16 or fp32.
        backend: as in `fp8_matmul`.
        blocks: as there.

    Raises:
        ValueError: as there.
    """
    return _matmul(a, b, True, dtype, backend, blocks)


def unsupported(M: int, N: int, K: int, dtype: Any) -> str | None:
    """Reason why the kernels cannot make a product [M, K] [K, N] of this type, or None."""
    itemsize = jnp.dtype(dtype).itemsize
    if 0 in (M, N, K):
        return f"the product [{M}, {K}] [{K}, {N}] is empty"
    # TMA wants the rows of everything in device memory to start at multiples of 16 bytes.
    if K % 16:
        return f"the contraction {K} is no multiple of 16; pad both operands with zeros"
    if N * itemsize % 16:
        return f"{N} columns of {itemsize} bytes are no multiple of 16 bytes; pad b with zeros"
    return None


def choose_blocks(num_row_tiles: int, N: int, *, b_in_tiles: bool) -> Blocks:
    """The cheaper width of tiles: waves over 132 SMs times the time of a tile.

    A tile of 256 columns takes 2 units and, reading a quarter less per FLOP from L2, one of 128
    takes 1.15. Scales of b by column need 32 registers for each 128 columns, and leave room for
    128. Stages fill shared memory. Bands make what is computed at a time about square.
    """

    def cost(width: int) -> float:
        waves = -(-num_row_tiles * -(-N // width) // NUM_SMS)
        return waves * (2.0 if width == 256 else 1.15)

    width = 128 if b_in_tiles or cost(128) < cost(256) else 256
    return Blocks(width, {128: 6, 256: 4}[width], {128: 12, 256: 16}[width])


def candidates(num_row_tiles: int, N: int, *, b_in_tiles: bool) -> list[Blocks]:
    """Blocks that a tuner should time; all of them fit and spill nothing."""
    widths = (128,) if b_in_tiles or N <= 128 else (128, 256)
    found = [
        Blocks(width, stages, band)
        for width in widths
        for stages in ({128: (4, 6), 256: (3, 4)}[width])
        for band in (8, 16, 32)
        if band == 8 or band < 2 * num_row_tiles
    ]
    return [blocks for blocks in found if smem_bytes(blocks, jnp.float32) <= SMEM_BYTES]


def _matmul(
    a: Quantized,
    b: Quantized,
    b_in_tiles: bool,
    dtype: Any,
    backend: Backend,
    blocks: Blocks | None,
) -> Array:
    (M, K), (N, _) = a.q.shape, b.q.shape
    check_operands(a, b, b_in_tiles, dtype)
    if backend == "portable":
        a_MK, b_NK = dequantize(a, jnp.bfloat16), dequantize(b, jnp.bfloat16, not b_in_tiles)
        return jnp.dot(a_MK, b_NK.T, preferred_element_type=jnp.float32).astype(dtype)
    if backend == "reference":
        a_MK, b_NK = dequantize(a, jnp.float32), dequantize(b, jnp.float32, not b_in_tiles)
        return jnp.dot(a_MK, b_NK.T, precision=lax.Precision.HIGHEST).astype(dtype)
    if reason := unsupported(M, N, K, dtype):
        raise ValueError(f"no FP8 kernel: {reason}, or use backend 'portable'")
    num_m = pl.cdiv(M, ROWS)
    blocks = blocks or choose_blocks(num_m, N, b_in_tiles=b_in_tiles)
    num_n = pl.cdiv(N, blocks.columns)

    def locate(i, a, scale_a, b, scale_b, out):
        m, n = in_bands(i, num_m, num_n, blocks.band)
        return Tile(m * ROWS, n * blocks.columns, 0, pl.cdiv(K, TILE), b, scale_b, out)

    scale_b = pad_scales(b.scale, blocks.columns) if b_in_tiles else b.scale
    return product_kernel(
        "fp8_matmul_tiles" if b_in_tiles else "fp8_matmul",
        locate,
        (a.q, pad_scales(a.scale, ROWS), b.q, scale_b),
        jax.ShapeDtypeStruct((M, N), dtype),
        num_tiles=num_m * num_n,
        blocks=blocks,
        b_in_tiles=b_in_tiles,
        emulated=backend == "emulated",
    )


def check_operands(a: Quantized, b: Quantized, b_in_tiles: bool, dtype: Any) -> None:
    """Raise ValueError unless a [M, K] in tiles and b [..., N, K] make a product of this type."""
    for name, x in (("a", a), ("b", b)):
        if x.q.dtype != E4M3 or x.scale.dtype != jnp.float32:
            raise ValueError(
                f"{name} is {x.q.dtype} with scales of {x.scale.dtype}; give float8_e4m3fn with "
                "scales of float32"
            )
    if a.q.shape[-1] != b.q.shape[-1]:
        raise ValueError(
            f"a is {a.q.shape} and b {b.q.shape}; both need the contraction as the last axis"
        )
    for name, x, in_tiles in (("a", a, True), ("b", b, b_in_tiles)):
        *lead, R, K = x.q.shape
        want = (*lead, R if in_tiles else pl.cdiv(R, TILE), pl.cdiv(K, TILE))
        if x.scale.shape != want:
            raise ValueError(
                f"{name} is {x.q.shape} with scales {x.scale.shape}; its "
                f"{'1 x 128 tiles' if in_tiles else '128 x 128 blocks'} need {want}"
            )
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"the result cannot be {dtype}; ask for bfloat16 or float32")
