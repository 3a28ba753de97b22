"""The FP8 block format of released checkpoints: E4M3 values, one fp32 factor per 128 x 128 block.

`weight_scale_inv` multiplies, despite its name: W[i, j] = q[i, j] * scale_inv[i // 128, j // 128].
Blocks at the lower and right edge are smaller (576 rows have five rows of factors).
"""

import ml_dtypes
import numpy as np

BLOCK = 128
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0
"""Largest finite E4M3 value."""
_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
"""Value of each byte: looking it up is five times as fast as a conversion."""


def scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the factors of a matrix."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def dequantize(q: np.ndarray, scale_inv: np.ndarray, row: int = 0, column: int = 0) -> np.ndarray:
    """fp32 values of a part of a matrix whose first element is [row, column] of the whole.

    `scale_inv` holds the factors of the blocks that the part touches, in order.
    """
    rows = (np.arange(row, row + q.shape[0]) // BLOCK) - row // BLOCK
    columns = (np.arange(column, column + q.shape[1]) // BLOCK) - column // BLOCK
    result = np.take(_VALUES, q.view(np.uint8))
    # Factor by factor row: an expanded matrix of factors would be as large as the result.
    for block in range(int(rows[-1]) + 1 if len(rows) else 0):
        first, last = np.searchsorted(rows, [block, block + 1])
        result[first:last] *= scale_inv[block][columns]
    return result


def quantize(
    w: np.ndarray, old_scale_inv: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(E4M3 values, fp32 factors) of an fp32 or bf16 matrix; a block's factor is its amax / 448.

    A block that is exactly what its old factor and E4M3 values give keeps that factor, so weights
    that came from FP8 and did not change return bit by bit, whatever rule chose their factors.
    Blocks of zeros get the factor 1.

    Raises ValueError for values that are not finite.
    """
    if not np.isfinite(w.astype(np.float32)).all():
        raise ValueError("holds values that are not finite, which FP8 weights cannot express")
    q = np.empty(w.shape, E4M3)
    scale_inv = np.empty(scale_shape(w.shape), np.float32)
    for (i, j), _ in np.ndenumerate(scale_inv):
        at = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
        block = w[at].astype(np.float32)
        if old_scale_inv is not None:
            old = old_scale_inv[i, j]
            values = (block / old).astype(E4M3)
            if np.array_equal((values.astype(np.float32) * old).astype(w.dtype), w[at]):
                q[at], scale_inv[i, j] = values, old
                continue
        largest = np.abs(block).max()
        scale = np.float32(largest / LARGEST) if largest else np.float32(1)
        # A subnormal factor loses so many bits that 448 could be exceeded.
        scale = max(scale, np.float32(np.finfo(np.float32).tiny))
        q[at] = np.clip(block / scale, -LARGEST, LARGEST).astype(E4M3)
        scale_inv[i, j] = scale
    return q, scale_inv
