"""Attention's output as the backward pass finds it: whole, or in 12 or 8 bits.

DeepSeek-V3 report, section 3.3.3: what the linear layer after attention reads is cached in E5M6, in
1 x 128 tiles whose scales are powers of two. Here all that follows attention reads the rounded
values, forward and backward: recomputation from what is kept then gives the same bits, and one
array serves the gradient of that layer's weight and the backward pass of attention.

E5M6 is float16 without its last four bits of mantissa, rounded to nearest even; two values take
three bytes, one half of a tile beside the other. A tile's largest magnitude comes into the highest
binade below 2^16. E4M3 has the scales of `fp8/quantize.py`. A tile that holds a value that is not
finite becomes NaN as a whole.

Shape letters: R rows, C channels of all heads, t = ceil(C / 128) tiles of a row.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.scales import E4M3, TILE, reciprocal, tile_scale

Stash = Literal["", "e5m6", "e4m3"]
"""Type that the output is held in; "": its own."""
MANTISSA, BIAS, LARGEST_EXPONENT = 6, 15, 15
DROPPED = 23 - MANTISSA
"""Bits of an fp32 mantissa that E5M6 does not have."""
NOT_A_NUMBER = (31 << MANTISSA) | 32
LEAST_EXPONENT = -126
"""Least exponent of a scale: 2^126, its reciprocal, is a number in fp32."""


class Twelve(NamedTuple):
    """E5M6 values of tiles [..., t]: 192 bytes each, and the exponents of their scales, int8."""

    bytes: Array
    exponent: Array


class Eight(NamedTuple):
    """E4M3 values of tiles [..., t, 128], and their scales, fp32."""

    q: Array
    scale: Array


def through(x_BTNV: Array, stash: Stash, kept: str | None) -> Array:
    """Values as they will be read, of the type of `x`; what is held has the name `kept`.

    Its gradient is that of the identity.
    """
    if not stash:
        return _named(x_BTNV, kept)
    return _through(stash, kept, x_BTNV)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _through(stash: Stash, kept: str | None, x_BTNV: Array) -> Array:
    return _through_fwd(stash, kept, x_BTNV)[0]


def _through_fwd(stash: Stash, kept: str | None, x_BTNV: Array):
    # Here, not in a call of `_through`, where policies of recomputation would not see the name.
    return load(named(store(x_BTNV, stash), kept), x_BTNV.shape, x_BTNV.dtype), None


def _through_bwd(stash: Stash, kept: str | None, _, dx_BTNV: Array):
    return (dx_BTNV,)


_through.defvjp(_through_fwd, _through_bwd)


def store(x_BTNV: Array, stash: Stash) -> Twelve | Eight | Array:
    """The output as it is held; heads and channels are one axis of 1 x 128 tiles."""
    if not stash:
        return x_BTNV
    B, T = x_BTNV.shape[:2]
    x_BTC = x_BTNV.astype(jnp.float32).reshape(B, T, -1)
    x_BTtL = jnp.pad(x_BTC, ((0, 0), (0, 0), (0, -x_BTC.shape[2] % TILE))).reshape(B, T, -1, TILE)
    if stash == "e5m6":
        return _to_e5m6(x_BTtL)
    scale_BTt = tile_scale(jnp.max(jnp.abs(x_BTtL), axis=-1), False)
    return Eight((x_BTtL * reciprocal(scale_BTt)[..., None]).astype(E4M3), scale_BTt)


def load(held: Twelve | Eight | Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """[B, T, N, V] of what `store` made of it."""
    if isinstance(held, Twelve):
        x_BTtL = _from_e5m6(held)
    elif isinstance(held, Eight):
        x_BTtL = held.q.astype(jnp.float32) * held.scale[..., None]
    else:
        return held
    B, T, N, V = shape
    return x_BTtL.reshape(B, T, -1)[..., : N * V].reshape(shape).astype(dtype)


def named(held, kept: str | None):
    """What is held, with the name that policies of recomputation know it by."""
    return jax.tree.map(lambda x: _named(x, kept), held)


def _named(x: Array, kept: str | None) -> Array:
    return x if kept is None else checkpoint_name(x, kept)


def _to_e5m6(x_tL: Array) -> Twelve:
    largest_t = jnp.max(jnp.abs(x_tL), axis=-1)
    # Rounded up to the next value first, since rounding may carry into the next binade.
    bits_t = lax.bitcast_convert_type(largest_t, jnp.int32) + (1 << (DROPPED - 1))
    exponent_t = jnp.maximum((bits_t >> 23) - 127 - LARGEST_EXPONENT, LEAST_EXPONENT)
    bits_tL = lax.bitcast_convert_type(x_tL * _power(-exponent_t)[..., None], jnp.int32)
    magnitude = bits_tL & 0x7FFFFFFF
    rounded = magnitude + ((1 << (DROPPED - 1)) - 1) + ((magnitude >> DROPPED) & 1)
    normal = (rounded >> DROPPED) - ((127 - BIAS) << MANTISSA)
    # Below 2^-14 values lie 2^-20 apart; the sum rounds to such a multiple, in its last bits.
    value = lax.bitcast_convert_type(magnitude, jnp.float32)
    fine = lax.bitcast_convert_type(value + 2.0 ** (23 - 20), jnp.int32) & 0x7FFFFF
    code_tL = jnp.where(value < 2.0 ** (1 - BIAS), fine, normal)
    code_tL = jnp.where(jnp.isfinite(largest_t)[..., None], code_tL, NOT_A_NUMBER)
    code_tL |= (bits_tL >> 20) & 0x800
    a, b = jnp.split(code_tL, 2, axis=-1)
    packed = jnp.concatenate([a >> 4, ((a & 15) << 4) | (b >> 8), b & 255], axis=-1)
    return Twelve(packed.astype(jnp.uint8), exponent_t.astype(jnp.int8))


def _from_e5m6(held: Twelve) -> Array:
    high, middle, low = jnp.split(held.bytes.astype(jnp.int32), 3, axis=-1)
    code_tL = jnp.concatenate([high << 4 | middle >> 4, (middle & 15) << 8 | low], axis=-1)
    magnitude = code_tL & 0x7FF
    normal = lax.bitcast_convert_type((magnitude << DROPPED) + ((127 - BIAS) << 23), jnp.float32)
    x_tL = jnp.where(magnitude < 1 << MANTISSA, magnitude.astype(jnp.float32) * 2.0**-20, normal)
    x_tL = jnp.where(magnitude >= 31 << MANTISSA, jnp.nan, x_tL)
    x_tL = jnp.where(code_tL >= 0x800, -x_tL, x_tL)
    return x_tL * _power(held.exponent.astype(jnp.int32))[..., None]


def _power(exponent: Array) -> Array:
    """2^exponent, of -126 .. 127."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
