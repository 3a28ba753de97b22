"""The tuner and the table of times, with a clock that is made up: what needs a GPU is the clock."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.cases import Case, Tunable
from bench.kernel_times import inputs, roofline, time_case, tune
from bench.kernels import all_cases
from pallas_kernels import tuned


class Tile(NamedTuple):
    rows: int
    stages: int


class Blocks(NamedTuple):
    forward: Tile
    splits: int


CHOICES = [Blocks(Tile(64, 2), 1), Blocks(Tile(128, 2), 1), Blocks(Tile(128, 4), 2)]


def scaled(blocks):
    return lambda x, index: x[index] * blocks.splits


CASE = Case(
    scaled(CHOICES[0]),
    (jax.ShapeDtypeStruct((8, 4), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int32)),
    flops=2e12,
    bytes=1e9,
    integers=lambda: [np.array([7, 0, 2])],
    baselines={"other": lambda x, index: x[index]},
    tunable=Tunable("made_up", "M8", CHOICES, scaled),
)


def test_the_fastest_blocks_that_fit_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    asked = []

    def fits(function, case):
        # The largest tile spills, say.
        return not np.array_equal(function(np.ones((8, 4)), np.arange(3)), 2 * np.ones((3, 4)))

    def clock(function, arguments):
        asked.append(function(*arguments).shape)
        return 1.0 if len(asked) == 1 else 0.5

    assert tune(CASE, fits, clock, "nvidia_h200") == (CHOICES[1], 0.5)
    assert asked == [(3, 4), (3, 4)]
    entry = json.loads((tmp_path / "nvidia_h200" / "made_up.json").read_text())["M8"]
    assert entry["ms"] == 500
    assert entry["jax"] == jax.__version__
    monkeypatch.setattr(tuned, "device_name", lambda: "nvidia_h200")
    assert tuned.tuned_blocks("made_up", "M8", Blocks) == CHOICES[1]


def test_nothing_that_fits_is_an_error():
    with pytest.raises(ValueError, match="none of 3 blocks for made_up M8 compiles"):
        tune(CASE, lambda function, case: False, lambda function, arguments: 0.0, "nvidia_h200")
    assert tune(CASE._replace(tunable=None), lambda *_: True, lambda *_: 0.0) is None


def test_integers_are_the_cases_own():
    x, index = inputs(CASE)
    assert x.shape == (8, 4)
    assert 0.5 < float(jnp.std(x)) < 1.5
    assert index.tolist() == [7, 0, 2]


def test_kernel_and_baselines_are_timed():
    times = time_case(CASE, lambda function, arguments: float(function(*arguments).shape[0]))
    assert times == {"kernel": 3.0, "other": 3.0}


def test_roofline():
    assert roofline(CASE) == pytest.approx(2e12 / 989e12)
    assert roofline(CASE._replace(peak="fp8", bytes=4.8e9)) == pytest.approx(2e12 / 1979e12)
    assert roofline(CASE._replace(flops=0)) == pytest.approx(1e9 / 4.8e12)


def test_every_case_can_be_run():
    """Every integer argument has values, and as many; tunable cases have blocks to try."""
    for name, case in all_cases().items():
        leaves = jax.tree.leaves(case.arguments)
        wanted = [x.size for x in leaves if jnp.issubdtype(x.dtype, jnp.integer)]
        assert [np.size(x) for x in case.integers()] == wanted, name
        assert case.tunable is None or len(case.tunable.candidates) > 0, name
