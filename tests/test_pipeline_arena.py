"""The flat array of a rank's weights: what is laid in is read, added to and taken out again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.pipeline.arena import COLUMNS, Arena

LAYER_OF = np.array([[0, -1, -1], [1, 2, 3]])
"""Rank 0 is at both ends of the model and has room for what is computed there."""
AT_END = np.array([True, False])


def weights(seed: int, slots: int = 3):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    layers = {"w": draw(slots, 40, 64), "gain": draw(slots, 5)}
    first = {"dense": draw(2, 30, 32), "gain": draw(4)}
    last = {"mtp": draw(1, 50, 32), "wide": draw(1, 100, 100)}
    return layers, first, last


def arena(whole: bool = True) -> Arena:
    return Arena(*weights(0), LAYER_OF, AT_END, AT_END, whole=whole)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_laid_in_is_read_added_to_and_taken_out(rank, whole):
    """On every rank what it holds; sums of what it does not hold are zeros."""
    places, ends = arena(whole), (jnp.bool(AT_END[rank]),) * 2
    layers, first, last = weights(1)
    at = jnp.int32(rank)
    stored = places.pack(layers, first, last, at, ends)
    held = [slot for slot, layer in enumerate(LAYER_OF[rank]) if layer >= 0]
    sums, one = jax.tree.map(jnp.zeros_like, stored), jax.tree.map(lambda x: x[0], layers)
    for slot in held:
        got = places.layer(stored, jnp.int32(slot))
        want = jax.tree.map(lambda x: x[slot], layers)  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, got, want)
        sums = places.add_layer(sums, one, jnp.int32(slot))
        sums = places.add_layer(sums, one, jnp.int32(slot))
    if AT_END[rank]:
        for name, tree in (("first", first), ("last", last)):
            got = places.end(name, stored, at)
            jax.tree.map(np.testing.assert_array_equal, got, tree)
            sums = places.add_end(name, sums, tree, at)
    d_layers, d_first, d_last = places.unpack(sums, at, ends)
    for slot in held:
        got = jax.tree.map(lambda x: x[slot], d_layers)  # noqa: B023
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), got, one)
    for got, tree in ((d_first, first), (d_last, last)):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, AT_END[rank] * b), got, tree)


def test_empty_slots_hold_what_the_ends_compute():
    """Two empty slots take the dense layers and the module; what fits nowhere lies behind."""
    rows = lambda x: -(-x.size // COLUMNS)  # noqa: E731
    layers, first, last = weights(0)
    slot = rows(layers["w"][0])
    assert arena().rows_of_slot == slot == 3
    behind = rows(last["wide"])
    assert arena().rows == 3 * slot + behind
    placed = arena()
    starts = [int(p.start[0]) for p in (placed.first["dense"], placed.last["mtp"])]
    assert sorted(starts) == [slot, slot + 2], "in the empty slots, one after the other"
    assert rows(first["dense"]) == rows(last["mtp"]) == 2
    assert arena(whole=False).rows == 0
