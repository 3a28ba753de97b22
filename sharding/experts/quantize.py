"""Rows in FP8 for the wire: 1 x 128 tiles, one fp32 scale each (V3 report, section 3.3.2).

Shape letters: R rows, D width, T = ceil(D / 128) tiles of a row.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

TILE = 128
LEAST = 1e-4
"""Least magnitude that a scale is made of, where a tile's largest entry is smaller."""


def quantize(x_RD: Array, dtype: Any) -> tuple[Array, Array]:
    """q [R, D] of 8-bit type `dtype` and fp32 scales [R, T]; x is about q * scale.

    Scales are the least powers of two that fit a tile's largest entry (V3 report, section 3.3.3).
    A tile that holds a value that is not finite becomes NaN as a whole.
    """
    largest = float(jnp.finfo(dtype).max)
    x_RTL = _tiles(x_RD.astype(jnp.float32))
    need_RT = jnp.maximum(jnp.max(jnp.abs(x_RTL), axis=-1), LEAST) / largest
    mantissa_RT, exponent_RT = jnp.frexp(need_RT)
    exponent_RT = jnp.where(mantissa_RT == 0.5, exponent_RT - 1, exponent_RT)
    scale_RT = jnp.ldexp(jnp.ones_like(need_RT), exponent_RT)
    scale_RT = jnp.where(jnp.isfinite(need_RT), scale_RT, jnp.nan)
    q_RTL = jnp.clip(x_RTL / scale_RT[..., None], -largest, largest).astype(dtype)
    return _rows(q_RTL, x_RD.shape[1]), scale_RT


def dequantize(q_RD: Array, scale_RT: Array, dtype: Any) -> Array:
    """q * scale [R, D] in `dtype`."""
    x_RTL = _tiles(q_RD.astype(jnp.float32)) * scale_RT[..., None]
    return _rows(x_RTL, q_RD.shape[1]).astype(dtype)


def _tiles(x_RD: Array) -> Array:
    R, D = x_RD.shape
    return jnp.pad(x_RD, ((0, 0), (0, -D % TILE))).reshape(R, -1, TILE)


def _rows(x_RTL: Array, width: int) -> Array:
    return x_RTL.reshape(x_RTL.shape[0], -1)[:, :width]
