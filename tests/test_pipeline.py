"""Pipelines compute what one device computes: every schedule, alone and with every other axis.

One step on emulated devices against the same step on one. Tolerances: tests/layout_helpers.py.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import numpy as np
import pytest

from model.config import ModelConfig
from model.recipe import Recipe
from model.stages import stage_costs
from sharding.config import MeshConfig
from sharding.pipeline.schedule import make_schedule
from sharding.pipeline.stage_weights import place_layers
from tests.layout_helpers import (
    KNOBS,
    MODEL,
    ONE_DEVICE,
    TRAIN,
    Result,
    assert_same_step,
    layout_of,
    micro_batches,
    random_rows,
    random_segments,
    take_step,
)
from training.step import Trainer

DEEP = dataclasses.replace(MODEL, num_layers=6)
"""One dense and five MoE layers: they divide by no number of stages."""
MOE = dataclasses.replace(MODEL, num_layers=5, num_dense_layers=0, mtp_depth=0)
"""The five MoE layers alone: half to compile, for layouts whose schedule others run whole."""
EVEN = dataclasses.replace(MOE, num_layers=8)
"""A layer for each of eight stages: no rank has an empty slot."""
ROWS = dataclasses.replace(TRAIN, batch_size=16)


class Case(NamedTuple):
    """A pipeline, its micro batches and model, and what is recomputed."""

    layout: MeshConfig
    micro: int = 4
    model: ModelConfig = MOE
    remat: str = "none"


PIPELINES = {
    "gpipe": Case(MeshConfig(pipe=2, schedule="gpipe")),
    "interleaved": Case(MeshConfig(pipe=2, schedule="interleaved", pipe_chunks=2)),
    "zb1p": Case(MeshConfig(pipe=4, schedule="zb1p"), model=DEEP),
    "dualpipe": Case(MeshConfig(pipe=2, schedule="dualpipe"), model=DEEP),
    "dualpipev": Case(MeshConfig(pipe=2, schedule="dualpipev")),
    "dualpipe 4, all recomputed": Case(MeshConfig(pipe=4, schedule="dualpipe"), 8, remat="full"),
    "1f1b, a layer per stage": Case(MeshConfig(pipe=8), 8, EVEN),
    "dualpipev, a layer per stage": Case(MeshConfig(pipe=4, schedule="dualpipev"), 8, EVEN),
    "1f1b 2 x fsdp 2 x tensor 2": Case(MeshConfig(pipe=2, fsdp=2, tensor=2)),
    "zb1p 2 x expert 4, part recomputed": Case(
        MeshConfig(pipe=2, expert=4, schedule="zb1p"), remat="selective"
    ),
    "dualpipe 2 x expert 2 x tensor 2, part recomputed": Case(
        MeshConfig(pipe=2, expert=2, tensor=2, schedule="dualpipe"), remat="selective"
    ),
    "dualpipev 2 x expert 4 on 2 nodes": Case(
        MeshConfig(pipe=2, expert=4, expert_nodes=2, schedule="dualpipev")
    ),
    "1f1b 2 x data 2 x context 2": Case(MeshConfig(pipe=2, data=2, context=2)),
    "dualpipe 2 x context 2 x expert 2": Case(
        MeshConfig(pipe=2, context=2, expert=2, schedule="dualpipe")
    ),
    "interleaved 2 x data 2 x fsdp 2": Case(
        MeshConfig(pipe=2, data=2, fsdp=2, schedule="interleaved", pipe_chunks=2)
    ),
    "gpipe 4 x tensor 2, sequence": Case(
        MeshConfig(pipe=4, tensor=2, sequence=True, schedule="gpipe")
    ),
}
"""The default suite has a pipeline in tests/test_layouts.py. With a layer per stage no layer is
behind a branch."""


@functools.cache
def one_device(model=DEEP) -> Result:
    return take_step(ONE_DEVICE, model=model, train=ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipelined_step_is_the_one_device_step(name):
    """Gradients, new parameters, losses, norms; counts and biases to the bit; nothing dropped."""
    case = PIPELINES[name]
    recipe = Recipe(remat=case.remat)
    got = take_step(case.layout, model=case.model, recipe=recipe, micro=case.micro, train=ROWS)
    assert_same_step(got, one_device(case.model))


@pytest.mark.slow
def test_documents_and_two_mtp_modules_in_a_pipeline():
    """Packed documents of uneven lengths and padding; modules share embedding and head."""
    model = dataclasses.replace(DEEP, mtp_depth=2)
    batch = {"tokens": random_rows(train=ROWS), "segments": random_segments(ROWS)}
    got = take_step(MeshConfig(pipe=2), batch, model, micro=4, train=ROWS)
    assert_same_step(got, take_step(ONE_DEVICE, batch, model, train=ROWS))


@pytest.mark.slow
def test_pairs_of_micro_batches_are_the_one_device_step():
    layout = MeshConfig(fsdp=2, expert=2, overlap=True)
    assert_same_step(take_step(layout, model=MOE, micro=4, train=ROWS), one_device(MOE))


def test_a_rank_holds_its_share_of_weights_and_moments():
    """Stored over `pipe` along their width: 1/4 of everything but norms and biases."""

    def held(layout: MeshConfig) -> int:
        state = Trainer(DEEP, ROWS, Recipe(), layout_of(layout)).abstract_state
        leaves = jax.tree.leaves((state["params"], state["opt"]))
        return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)

    assert held(MeshConfig(pipe=4)) < 0.27 * held(ONE_DEVICE)


def counts(name: str, ranks: int, layers: int, before=0.0, after=0.0, chunks: int = 1):
    """Layers of every stage."""
    schedule = make_schedule(name, ranks, 2 * ranks, chunks)
    placed = place_layers(schedule, layers, before, after)
    by_stage = {}
    for rank, held in enumerate(schedule.stage_of):
        for chunk, stage in enumerate(held):
            layers_here = [layer for layer in placed.layer_of[rank, chunk] if layer >= 0]
            # Both ranks that hold a stage of DualPipe hold the same layers.
            assert by_stage.setdefault(stage, layers_here) == layers_here
            assert placed.is_first[rank, chunk] == (stage == 0)
            assert placed.is_last[rank, chunk] == (stage == schedule.num_stages - 1)
    in_order = [by_stage[stage] for stage in range(schedule.num_stages)]
    assert list(itertools.chain(*in_order)) == list(range(placed.layer_of.max() + 1))
    return [len(layers) for layers in in_order]


def test_layers_are_spread_by_what_surrounds_them():
    assert counts("1f1b", 4, 8) == [2, 2, 2, 2]
    assert counts("1f1b", 4, 9) == [2, 2, 2, 3]
    assert counts("1f1b", 4, 10, before=1, after=3) == [2, 3, 4, 1]
    assert counts("dualpipev", 2, 8, after=1) == [2, 2, 2, 2]
    assert counts("dualpipe", 4, 10) == [2, 2, 3, 3]
    assert counts("interleaved", 2, 4, chunks=2) == [1, 1, 1, 1]


def test_v3_on_sixteen_stages():
    """Three dense layers before and head and MTP after count as layers: facts of the real model."""
    from configs import preset

    before, after = stage_costs(preset("v3_671b").model)
    held = counts("dualpipe", 16, 58, before, after)
    assert 2.5 < before < 3.5, "three dense layers"
    assert 4 < after < 5, "the head twice, and a module with a layer of experts"
    assert held == [1, *[4] * 14, 1]


@pytest.mark.parametrize(
    ("layout", "micro", "message"),
    [
        (
            MeshConfig(pipe=8),
            8,
            "8 stages, but the model has 5 layers to cut; lower pipe to at most",
        ),
        (MeshConfig(pipe=2, schedule="dualpipe"), 2, "micro"),
        (MeshConfig(pipe=2, schedule="interleaved", pipe_chunks=2), 1, "micro"),
        (MeshConfig(pipe=2, overlap=True), 2, "mesh.overlap computes micro batches in pairs"),
        (MeshConfig(overlap=True), 1, "Make their number even"),
    ],
)
def test_what_does_not_fit_is_refused_before_compilation(layout, micro, message):
    train = dataclasses.replace(ROWS, micro_batch_size=16 // micro)
    with pytest.raises(ValueError, match=message):
        Trainer(DEEP, train, Recipe(), layout_of(layout))


@pytest.mark.slow
def test_the_program_does_not_grow_with_layers_or_micro_batches():
    """Lowered text of twice the layers and of twice the micro batches is as long."""

    def length(layers: int, micro: int) -> int:
        model = dataclasses.replace(MODEL, num_layers=1 + layers)
        train = dataclasses.replace(ROWS, micro_batch_size=16 // micro)
        trainer = Trainer(model, train, Recipe(), layout_of(MeshConfig(pipe=2)))
        batch = {"tokens": micro_batches(random_rows(train=ROWS), micro)}
        return len(trainer.step.lower(trainer.abstract_state, batch, KNOBS).as_text())

    short = length(4, 4)
    assert length(8, 4) < 1.02 * short
    # Constants of the table are longer; nothing else is.
    assert length(4, 8) < 1.02 * short
