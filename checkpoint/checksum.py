"""Fingerprints of arrays, to notice bytes that changed on disk.

The storage layer reports files that are cut or missing, but a flipped bit inside array data comes
back as a plausible number. One 32-bit word per array, computed where the array lives, closes that:
all arithmetic is modulo 2^32, so the order of the sum, and with it the layout over devices, does
not matter, and a checkpoint is verified on another mesh than it was written from.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Odd multipliers per dimension (the first digits of the golden ratio, pi, e, sqrt 2, sqrt 3, ...).
_STRIDES = (0x9E3779B1, 0x243F6A89, 0xB7E15163, 0x6A09E667, 0xBB67AE85, 0x3C6EF373, 0xA54FF53B)
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """32-bit fingerprint of the bits and their positions, per array.

    Any single changed word changes the result (its weight is odd, so the product changes modulo
    2^32); exchanged words do, unless their weights agree.
    """
    # One after the other: programs with collectives in flight at once can starve each other of the
    # threads that emulated devices share.
    return {name: int(_weighted_sum(array)) for name, array in arrays.items()}


def part_checksum(part: np.ndarray, start: tuple[int, ...]) -> int:
    """Share of a part of an array in its fingerprint; `start` is its first element's index.

    The fingerprint is the sum over all parts modulo 2^32. In main memory, for arrays that never
    are in it whole. Takes four times the part's memory.
    """
    words = np.ascontiguousarray(part).view(f"u{part.dtype.itemsize}").astype(np.uint32)
    weights = np.zeros(part.shape, np.uint32)
    for dim, stride in zip(range(part.ndim), _STRIDES, strict=False):
        places = np.arange(start[dim], start[dim] + part.shape[dim], dtype=np.uint32)
        weights += (places * np.uint32(stride)).reshape((-1,) + (1,) * (part.ndim - dim - 1))
    words += np.uint32(1)
    words *= weights | np.uint32(1)
    return int(words.sum(dtype=np.uint32))


@jax.jit
def _weighted_sum(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    weights = jnp.zeros(words.shape, jnp.uint32)
    for dim, stride in zip(range(words.ndim), _STRIDES, strict=False):
        weights += lax.broadcasted_iota(jnp.uint32, words.shape, dim) * jnp.uint32(stride)
    # The zero word counts too: an array of zeros in place of nothing is not the same.
    return jnp.sum((words + jnp.uint32(1)) * (weights | jnp.uint32(1)), dtype=jnp.uint32)
