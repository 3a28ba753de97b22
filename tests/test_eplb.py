"""Placement of redundant experts: the published example, balance, and what is refused."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from sharding.experts.eplb import place_experts

LOAD = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
GOLDEN = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
"""DeepSeek's own example: 16 copies, 4 groups, 2 nodes, 8 devices."""


def device_load(load, placed, devices: int) -> np.ndarray:
    """Load of every device and layer when tokens spread evenly over an expert's copies."""
    share = load / placed.counts_LE
    by_copy = np.take_along_axis(share, placed.expert_of_LR, axis=1)
    return by_copy.reshape(len(load), devices, -1).sum(-1)


def test_the_published_example():
    placed = place_experts(LOAD, 16, 4, 2, 8)
    assert placed.expert_of_LR.tolist() == GOLDEN
    for layer in range(2):
        for expert, copies in enumerate(placed.copies_LEC[layer]):
            held = copies[copies >= 0]
            assert len(held) == placed.counts_LE[layer, expert]
            assert (placed.expert_of_LR[layer, held] == expert).all()


def test_copies_even_out_the_load():
    """A busiest device of 1.4 times the mean at most, from one of 2.3 times without copies."""
    load = np.random.default_rng(0).gamma(1.0, 1.0, (4, 64))
    plain = load.reshape(4, 16, 4).sum(-1)
    placed = device_load(load, place_experts(load, 80, 8, 4, 16), 16)
    assert (plain.max(1) / plain.mean(1)).mean() > 1.9
    assert (placed.max(1) / placed.mean(1)).max() < 1.4


def test_groups_that_do_not_divide_are_placed_globally():
    placed = place_experts(LOAD, 16, 3, 2, 8)
    assert placed.expert_of_LR.tolist() == place_experts(LOAD, 16, 1, 1, 8).expert_of_LR.tolist()


@hypothesis.given(st.data())
def test_every_expert_has_a_place_and_groups_stay_on_their_node(data):
    nodes, per_node = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    groups, size = nodes * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    devices, experts = nodes * per_node, groups * size
    copies = devices * data.draw(st.integers(-(-experts // devices), experts // devices + 4))
    seed = data.draw(st.integers(0, 99))
    load = np.random.default_rng(seed).integers(0, 50, (2, experts))
    placed = place_experts(load, copies, groups, nodes, devices)
    assert (placed.counts_LE >= 1).all()
    assert (placed.counts_LE.sum(1) == copies).all()
    for row in placed.expert_of_LR.reshape(2, nodes, -1):
        on_node = [set((experts // size).tolist()) for experts in row]
        assert sum(len(groups) for groups in on_node) == groups


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LOAD, 8, 4, 2, 8), "8 copies for 12 experts; every expert needs at least one"),
        ((LOAD, 18, 4, 2, 8), "18 copies do not split over 8 devices; give a divisor"),
        ((LOAD, 16, 5, 2, 8), "12 experts do not split over 5 groups; give a divisor"),
        ((LOAD[0], 16, 4, 2, 8), r"expert load has shape \(12,\)"),
        ((-LOAD, 16, 4, 2, 8), "finite and not negative"),
    ],
)
def test_what_cannot_be_placed_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        place_experts(*arguments)
