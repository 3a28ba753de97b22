"""Attention's output in 12 and 8 bits: every code, every rounding, and what follows from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import mla_attention, through
from pallas_kernels.attention.stash import Twelve, load, store
from tests.kernel_ladder import relative_error

store_e5m6 = jax.jit(lambda x: store(x, "e5m6"))


def as_tiles(x: np.ndarray) -> np.ndarray:
    """[B, T, N, V] with one tile of 128 per row."""
    return np.asarray(x, np.float32).reshape(1, -1, 1, 128)


def e5m6_values() -> np.ndarray:
    """All 1,984 finite magnitudes of 5 bits of exponent and 6 of mantissa, in order."""
    subnormal = np.arange(64) * 2.0**-20
    normal = [(1 + np.arange(64) / 64) * 2.0 ** (e - 15) for e in range(1, 31)]
    return np.concatenate([subnormal, *normal])


def test_every_value_of_e5m6_comes_back():
    """Each beside the largest one, which fixes the scale at 1, and with both signs."""
    values = e5m6_values()
    x = np.full((16, 2, 64), values[-1])
    x[:, 0, :62] = np.resize(values, 16 * 62).reshape(16, 62)
    x[:, 1, :62] = -x[:, 0, :62]
    x = as_tiles(x)
    for more in range(3):  # 992 values a turn
        shifted = np.resize(np.roll(values, -992 * more), 16 * 62).reshape(16, 62)
        tiles = x.reshape(16, 2, 64).copy()
        tiles[:, 0, :62], tiles[:, 1, :62] = shifted, -shifted
        tiles = as_tiles(tiles)
        held = store_e5m6(tiles)
        assert (held.exponent == 0).all()
        np.testing.assert_array_equal(load(held, tiles.shape, jnp.float32), tiles)


def test_rounding_is_to_the_nearest_and_ties_to_even():
    """Against a search among all values, in float64, for normal and subnormal magnitudes."""
    values, rng = e5m6_values(), np.random.default_rng(0)
    x = 2.0 ** rng.uniform(-22, 15.9, (64, 128)) * rng.choice([-1, 1], (64, 128))
    middle = (values[1:] + values[:-1]) / 2  # exactly between two neighbours
    x[:, 1:31] = np.resize(middle, (64, 30))
    x[:, 0] = values[-1]
    x = np.float32(x)
    magnitude = np.float64(np.abs(x))
    above = np.clip(np.searchsorted(values, magnitude), 1, len(values) - 1)
    low, high = values[above - 1], values[above]
    up = (magnitude - low > high - magnitude) | (
        (magnitude - low == high - magnitude) & (above % 2 == 0)
    )
    want = np.sign(x) * np.where(up, high, low)
    got = load(store_e5m6(as_tiles(x)), (1, 64, 1, 128), jnp.float32)
    np.testing.assert_array_equal(np.reshape(got, x.shape), want)


def test_scales_are_powers_of_two_that_keep_every_tile_exact_to_6_bits():
    """Tiles of any size down to 1e-36, one whose rounding carries into the next binade, zeros."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((40, 128)) * 10.0 ** rng.integers(-33, 36, (40, 1))
    x[0] = 0
    x[1], x[1, 5] = 1.0, 1.999  # would be 2 * 2^15 at the scale of its own binade
    x = np.float32(x)
    held = store_e5m6(as_tiles(x))
    assert isinstance(held, Twelve)
    assert (held.bytes.nbytes, held.exponent.nbytes) == (40 * 192, 40)
    got = np.reshape(load(held, (1, 40, 1, 128), jnp.float32), x.shape)
    normal = np.abs(x) > np.abs(x).max(1, keepdims=True) * 2.0**-29
    assert (np.abs(got - x)[normal] <= np.abs(x)[normal] * 2.0**-7).all()
    assert got[1, 5] == 2
    assert not got[0].any()


@pytest.mark.parametrize("stash", ["e5m6", "e4m3"])
def test_what_is_not_finite_is_seen(stash):
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((4, 128), np.float32)
        x[2, 7] = bad
        got = np.reshape(through(as_tiles(x), stash, None), x.shape)
        assert not np.isfinite(got[2, 7])
        assert np.isfinite(np.delete(got, 2, 0)).all()


@pytest.mark.parametrize(
    ("stash", "low", "high"), [("e5m6", 1e-3, 5e-3), ("e4m3", 0.02, 0.04), ("", 0, 0)]
)
def test_attention_gives_the_held_values_and_the_gradient_of_its_own(stash, low, high):
    """Heads of 24 channels, 72 in all: a tile that is not full. The gradient passes unrounded."""
    rng = np.random.default_rng(2)
    shapes = (2, 40, 3, 40), (2, 40, 3, 48), (2, 40, 16)
    q, kv, rope = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in shapes)

    def run(stash):
        attend = lambda *a: mla_attention(*a, scale=0.2, stash=stash)  # noqa: E731
        o, pull = jax.vjp(attend, q, kv, rope)
        return o, pull(jnp.ones_like(o))

    (got, gradients), (want, wanted) = run(stash), run("")
    assert got.dtype == jnp.bfloat16
    assert low <= relative_error(got, want) <= high
    jax.tree.map(np.testing.assert_array_equal, gradients, wanted)
