"""FP8 at DeepSeek-V3's shapes: quantisation, products of layers, products of experts."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import Case
from pallas_kernels.fp8 import quantize as fp8_quantize
from pallas_kernels.fp8.grouped import (
    fp8_grouped_matmul,
    fp8_grouped_matmul_tiles,
    padded_size,
)
from pallas_kernels.fp8.matmul import fp8_matmul, fp8_matmul_tiles
from pallas_kernels.fp8.quantize import E4M3, Quantized

TOKENS = 4096
SCALE = 4 / 128
"""Bytes of scales per element of a matrix in 1 x 128 tiles."""


def _quantize(function: str, width: int, layouts: int, inputs: int = 1) -> Case:
    x = jax.ShapeDtypeStruct((TOKENS, width), jnp.bfloat16)
    run = partial(getattr(fp8_quantize, function), backend="mosaic")
    return Case(run, (x,) * inputs, 0, x.size * (2 * inputs + layouts * (1 + SCALE)), "fp8")


def _quantize_weight(E: int, K: int, N: int) -> Case:
    w = jax.ShapeDtypeStruct((E, K, N), jnp.float32)
    run = partial(fp8_quantize.quantize_blocks_both, backend="mosaic")
    return Case(run, (w,), 0, w.size * 6, "fp8")


def _quantized(*shape: int, blocks: bool = False) -> Quantized:
    *lead, R, C = shape
    scale = (*lead, -(-R // 128) if blocks else R, -(-C // 128))
    return Quantized(jax.ShapeDtypeStruct(shape, E4M3), jax.ShapeDtypeStruct(scale, jnp.float32))  # pyright: ignore[reportArgumentType]


def _dense(N: int, K: int, M: int = TOKENS) -> Case:
    operands = _quantized(M, K), _quantized(N, K, blocks=True)
    size = M * K * (1 + SCALE) + N * K + 2 * M * N
    return Case(partial(fp8_matmul, backend="mosaic"), operands, 2 * M * N * K, size, "fp8")


def _weight_gradient(N: int, K: int, M: int = TOKENS) -> Case:
    operands = _quantized(K, M), _quantized(N, M)
    size = M * (K + N) * (1 + SCALE) + 4 * K * N
    run = partial(fp8_matmul_tiles, backend="mosaic")
    return Case(run, operands, 2 * M * N * K, size, "fp8", forward=False)


def _grouped(function: Callable, E: int, N: int, K: int, rows: int) -> Case:
    P, forward = padded_size(rows, E), function is fp8_grouped_matmul
    if forward:
        operands = _quantized(P, K), _quantized(E, N, K, blocks=True)
        size = P * K * (1 + SCALE) + E * N * K + 2 * P * N
    else:
        operands = _quantized(K, P), _quantized(N, P)
        size = P * (K + N) * (1 + SCALE) + 4 * E * K * N
    run = partial(function, backend="mosaic")
    groups, even = jax.ShapeDtypeStruct((E,), jnp.int32), np.full(E, rows // E)
    return Case(run, (*operands, groups), 2 * rows * N * K, size, "fp8", forward, lambda: [even])


ROWS = 65536
CASES = {
    "quantize 7168": _quantize("quantize_tiles", 7168, 1),
    "quantize transposed 7168": _quantize("quantize_tiles_transposed", 7168, 1),
    "quantize both 7168": _quantize("quantize_both", 7168, 2),
    "swiglu 2048": _quantize("swiglu_quantize", 2048, 1, inputs=2),
    "swiglu both 2048": _quantize("swiglu_quantize_both", 2048, 2, inputs=2),
    "quantize weights 8x7168x2048": _quantize_weight(8, 7168, 2048),
    "2112x7168": _dense(2112, 7168),
    "24576x1536": _dense(24576, 1536),
    "32768x512": _dense(32768, 512),
    "7168x16384": _dense(7168, 16384),
    "4096x7168": _dense(4096, 7168),
    "7168x2048": _dense(7168, 2048),
    "dw 7168x4096": _weight_gradient(4096, 7168),
    "dw 2048x7168": _weight_gradient(7168, 2048),
    "8 experts 4096x7168": _grouped(fp8_grouped_matmul, 8, 4096, 7168, ROWS),
    "256 experts 7168x2048": _grouped(fp8_grouped_matmul, 256, 7168, 2048, ROWS),
    "8 experts dw 7168x4096": _grouped(fp8_grouped_matmul_tiles, 8, 4096, 7168, ROWS),
    "256 experts dw 2048x7168": _grouped(fp8_grouped_matmul_tiles, 256, 7168, 2048, ROWS),
}
