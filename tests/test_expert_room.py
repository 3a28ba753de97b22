"""Rooms of the buffers of expert rows: what is derived, what a user sets, what is printed."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import preset
from model.recipe import Recipe
from sharding.config import MeshConfig
from sharding.experts.room import SMALL, buffers, room
from tests.layout_helpers import layout_of
from training.config import TrainConfig
from training.step import Trainer
from training.summary import expert_buffers

V3 = {"num_experts": 256, "tokens": 4096, "choices": 8, "groups": (8, 4), "row_bytes": 2 * 7168}
LARGE = SMALL + 1


def rooms_of_v3(capacity: float, exchange="dense"):
    """On 8 nodes of 8, as in the V3 report."""
    config = MeshConfig(expert=64, expert_nodes=8, exchange=exchange, exchange_capacity=capacity)
    return buffers(shards=(8, 8), config=config, **V3)


def test_rooms_of_v3():
    """A token needs 4 nodes of 8 at most, 8 devices at most, and is computed 8 times."""
    derived = rooms_of_v3(0)
    assert derived.nodes.mean <= 4096 * 4 / 8
    assert derived.choices.mean == 8 * 4096
    # 30,144 rows for 32,768 choices: 1.087 of a row's experts are on the device it comes to.
    assert math.isclose(8 * derived.devices.mean, 30_144, rel_tol=1e-3)
    for buffer, headroom in zip(derived, (1.34, 1.32, 1.27), strict=True):
        assert math.isclose(buffer.rows / buffer.mean, headroom, abs_tol=0.005)
    whole = rooms_of_v3(math.inf)
    assert (whole.nodes.rows, whole.devices.rows) == (4096, 8 * 4096)
    assert whole.choices.rows == 64 * 4096 * 4
    # With room for all at every level a buffer would be 25 times what even load fills of it.
    assert whole.choices.rows > 25 * derived.choices.rows / 1.3


def test_a_gather_brings_all_tokens_and_computes_in_parts():
    nodes, devices, choices = rooms_of_v3(0, "gather")
    assert (nodes.number, devices.number) == (1, 1)
    assert choices.most == 64 * 4096 * 4
    assert choices.rows == rooms_of_v3(0).choices.rows


@given(st.integers(1, 10**6), st.floats(0, 1), st.sampled_from([0, 0.5, 1, 1.25, 4, math.inf]))
def test_a_room_is_no_more_than_all_and_no_less_than_asked(most, share, capacity):
    mean = share * most
    rows = room(mean, most, capacity, LARGE)
    assert rows <= most
    assert rows == most or (rows % 8 == 0 and rows >= (capacity or 1.25) * mean)
    if capacity == math.inf:
        assert rows == most or mean == 0


def test_small_buffers_hold_everything_unless_a_user_says_otherwise():
    assert room(100, 1000, 0, SMALL) == 1000
    assert room(100, 1000, 0, LARGE) == 168
    assert room(100, 1000, 1.25, 0) == 128


@pytest.mark.parametrize("capacity", [0, 1.5])
def test_the_rooms_are_told_at_the_start(capacity):
    """For what is cut over devices alone."""
    model = preset("v3_671b").model
    train = TrainConfig(steps=1, seq_len=4096, batch_size=8, dtype="bfloat16")

    def lines(**axes):
        layout = layout_of(MeshConfig(**axes, exchange_capacity=capacity))
        return expert_buffers(model, Trainer(model, train, Recipe("bfloat16"), layout))

    assert not lines(fsdp=8)
    device, choices = lines(expert=8)
    assert device.startswith("to a device: 8 x ")
    assert " GiB)" in device
    rows = 49_152 if capacity else 41_688
    assert f"computed at a time: {rows:,} rows" in choices
    assert "further rounds" in choices
