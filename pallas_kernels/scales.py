"""E4M3 and the scales of its tiles of 128: what FP8 products and what waits in few bits share.

Source: DeepSeek-V3 report, section 3.3.2.
"""

import jax.numpy as jnp
from jax import Array, lax

E4M3 = jnp.float8_e4m3fn
TILE = 128
LARGEST = 448.0
"""Largest finite E4M3 value."""
LEAST_SCALE = float(jnp.finfo(jnp.float32).tiny)
"""A subnormal scale would lose so many bits that 448 could be exceeded."""


def tile_scale(largest: Array, power_of_two: bool) -> Array:
    """fp32 scale of tiles whose largest magnitudes are given: largest / 448, rounded to nearest.

    Divided in integers: compilers for GPUs give fp32 divisions the last bits that come cheapest.
    largest = mantissa * 2^e and 448 = 7 * 2^6, so the mantissa of the scale is 8/7 or 4/7 of it.
    """
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    mantissa = _mantissa(bits)
    large = mantissa * 8 >= 7 << 24
    mantissa = lax.div(jnp.where(large, mantissa * 8, mantissa * 16) + 7, jnp.int32(14))
    unit = lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)
    scale = mantissa.astype(jnp.float32) * 2.0**-23 * (unit * jnp.where(large, 2.0**-8, 2.0**-9))
    scale = jnp.where(largest == 0, 1.0, jnp.maximum(scale, LEAST_SCALE))
    if not power_of_two:
        return scale
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    up = lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
    return jnp.where(scale < jnp.inf, up, scale)


def reciprocal(scale: Array, start: Array | None = None) -> Array:
    """1 / scale, rounded to nearest, from `start`, which may be 2 units of the last place off.

    With mantissas r and s of 24 bits, 2^46 or 2^47 - r s is what r leaves over, and small enough
    for the low 32 bits, where both powers are 0, to tell it exactly.
    """
    bits = lax.bitcast_convert_type(1.0 / scale if start is None else start, jnp.int32)
    mantissa = _mantissa(lax.bitcast_convert_type(scale, jnp.int32))
    for _ in range(2):
        left = -(_mantissa(bits) * mantissa)
        bits += jnp.where(left * 2 > mantissa, 1, 0) - jnp.where(left * 2 < -mantissa, 1, 0)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _mantissa(bits: Array) -> Array:
    """24 bits, of normal numbers."""
    return (bits & 0x7FFFFF) | 0x800000
