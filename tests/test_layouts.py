"""Every layout computes what one device computes: all gradients, not only the loss.

Layouts of 8 emulated devices against the same step on one. Tolerances: tests/layout_helpers.py.
"""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from model.blueprint import blueprint
from model.config import ModelConfig
from model.recipe import Kernels, Recipe
from sharding.config import MeshConfig
from tests.layout_helpers import (
    FP32,
    LEAN,
    MODEL,
    ONE_DEVICE,
    SHALLOW,
    TRAIN,
    Result,
    assert_same_step,
    layout_of,
    random_rows,
    random_segments,
    step_on,
    take_step,
)
from training.config import OptimizerConfig
from training.recipe import recipe_of
from training.schedule import BatchPlan
from training.step import Trainer

LAYOUTS = {
    "cube": MeshConfig(fsdp=2, expert=2, tensor=2),
    "hybrid": MeshConfig(data=2, fsdp=2, expert=2),
    "expert 4 x tensor 2": MeshConfig(expert=4, tensor=2),
    "data 2 x tensor 4": MeshConfig(data=2, tensor=4),
    "data 2 x expert 4, no zero1": MeshConfig(data=2, expert=4, zero1=False),
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(fsdp=8),
    "expert 8": MeshConfig(expert=8),
}
WHOLE = ("cube", "hybrid", "expert 8")
"""Layouts of the model with its dense layer; others leave it out."""
QUICK = {
    "cube": (MeshConfig(fsdp=2, expert=2, tensor=2), 1),
    "hybrid": (MeshConfig(data=2, fsdp=2, expert=2), 1),
    "fsdp 8": (MeshConfig(fsdp=8), 1),
    "data 4 x tensor 2": (MeshConfig(data=4, tensor=2), 1),
    "tensor 4 x fsdp 2, sequence": (MeshConfig(tensor=4, fsdp=2, sequence=True), 1),
    "context 2 x fsdp 2 x tensor 2": (MeshConfig(context=2, fsdp=2, tensor=2), 1),
    "expert 4 on 2 nodes x data 2": (MeshConfig(data=2, expert=4, expert_nodes=2), 1),
    "1f1b 2 x expert 2": (MeshConfig(pipe=2, expert=2), 4),
}
"""Layout and number of micro batches of a smaller model, so that the default suite has one of every
kind; slow tests run the whole model on the same axes."""


class Case(NamedTuple):
    """A layout, the model of its step, and the micro batches."""

    mesh: MeshConfig
    model: ModelConfig
    micro: int

    def step(self) -> Result:
        return step_on(*self)


@pytest.fixture(
    params=[
        *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS),
        *(f"{name}, small" for name in QUICK),
    ]
)
def case(request) -> Case:
    if request.param in LAYOUTS:
        return Case(LAYOUTS[request.param], MODEL if request.param in WHOLE else SHALLOW, 1)
    mesh, micro = QUICK[request.param.removesuffix(", small")]
    return Case(mesh, LEAN, micro)


def test_a_step_is_the_one_device_step(case):
    """Gradients, new parameters, losses, norms; counts and biases to the bit; nothing dropped."""
    assert_same_step(case.step(), step_on(model=case.model))


def test_parameters_are_held_in_shards(case):
    """A device holds 1/n of every parameter that the rules cut n ways, and nothing else of it.

    `expert` cuts the experts, and every other matrix where it is stored (ZeRO).
    """
    result = case.step()
    mesh = case.mesh
    cuts = dict.fromkeys(("embed", "embed_pair", "latent"), mesh.fsdp * mesh.pipe)
    cuts |= dict.fromkeys(("vocab", "heads", "ffn", "expert_ffn"), mesh.tensor)
    cuts["experts"] = mesh.expert
    axes = blueprint(case.model).params_axes

    def check(param, names):
        shards = math.prod(cuts.get(name, 1) for name in names)
        if "experts" not in names and sum(name != "layers" for name in names) > 1:
            shards *= mesh.expert
        assert param.addressable_shards[0].data.size == param.size // shards, names

    jax.tree.map(check, result.state["params"], axes)


def test_replicas_hold_the_same_values(case):
    """Shards of the same place on several devices are equal to the bit, or runs drift apart."""
    for array in jax.tree.leaves(case.step().state):
        by_place = {}
        for shard in array.addressable_shards:
            first = by_place.setdefault(str(shard.index), shard.data)
            np.testing.assert_array_equal(shard.data, first)


@functools.cache
def packed_step(config: MeshConfig, micro: int, remat: str):
    batch = {"tokens": random_rows(), "segments": random_segments()}
    return take_step(config, batch, SHALLOW, Recipe(remat=remat), micro)


@pytest.mark.slow
def test_packed_documents_recomputation_and_accumulation_on_a_mesh():
    """Documents of uneven lengths and padding, in 2 micro batches over 4 x 2 devices."""
    got = packed_step(LAYOUTS["cube"], 2, "full")
    assert_same_step(got, packed_step(ONE_DEVICE, 1, "none"))
    valid = (random_segments()[:, :-1] > 0).sum()
    np.testing.assert_array_equal(got.metrics["counts_LE"].sum(-1), MODEL.experts_per_token * valid)


@pytest.mark.slow
def test_accumulation_of_single_rows_on_a_mesh():
    """With what is cheap to compute computed again."""
    config = MeshConfig(fsdp=2, tensor=4)
    got = take_step(config, model=SHALLOW, recipe=Recipe(remat="selective"), micro=4)
    assert_same_step(got, step_on(model=SHALLOW))


@pytest.mark.slow
def test_hot_paths_in_regions_of_their_own():
    """Kernels see one device's part. So does the reference backend, which can be run here."""
    kernels = Kernels(attention="reference", experts="reference", loss="reference")
    got = take_step(LAYOUTS["cube"], model=SHALLOW, recipe=Recipe(kernels=kernels))
    assert_same_step(got, step_on(model=SHALLOW))


def distance(got: Result, want: Result) -> float:
    """Norm of the difference of all gradients, relative to the norm of what is wanted."""
    pairs = zip(jax.tree.leaves(got.state["opt"]), jax.tree.leaves(want.state["opt"]), strict=True)
    squares = [(np.sum(np.square(np.asarray(a) - b)), np.sum(np.square(b))) for a, b in pairs]
    return math.sqrt(sum(error for error, _ in squares) / sum(size for _, size in squares))


@pytest.mark.slow
def test_bf16_step_on_a_mesh():
    """bf16 moves a token in a hundred to another expert, which is most of a gradient's error: 0.12
    on one device, 0.24 where tensor shards also round their parts of a sum, 0.003 between layouts
    that round alike."""
    recipe = Recipe(dtype="bfloat16", remat="selective")
    one, replicas, cube = (
        jax.device_get(take_step(mesh, recipe=recipe)._replace(trainer=None))
        for mesh in (ONE_DEVICE, LAYOUTS["data 8"], LAYOUTS["cube"])
    )
    exact = jax.device_get(step_on()._replace(trainer=None))
    assert 0.01 < distance(one, exact) < 0.2
    assert distance(replicas, one) < 0.01
    assert distance(cube, exact) < 3 * distance(one, exact)
    chosen = TRAIN.batch_size * TRAIN.seq_len * MODEL.experts_per_token
    for result in (one, replicas, cube):
        for name, rtol in (
            ("train/loss", 0.005),
            ("train/mtp_loss", 0.005),
            ("train/grad_norm", 0.03),
        ):
            np.testing.assert_allclose(result.metrics[name], exact.metrics[name], rtol=rtol)
        assert result.metrics["moe/dropped_tokens"] == 0
        np.testing.assert_array_equal(result.metrics["counts_LE"].sum(-1), chosen)
        assert all(x.dtype == np.float32 for x in jax.tree.leaves(result.state["params"]))


def bytes_on_one_device(tree) -> int:
    """Of a tree of ShapeDtypeStructs with shardings."""
    sizes = (math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in tree)
    return sum(sizes)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("layout", [MeshConfig(data=8), MeshConfig(data=4, tensor=2)], ids=str)
def test_zero1_keeps_no_copy_of_optimizer_state(name, layout):
    """With ZeRO-1 a device holds 1/8 of the moments, counters and small rests aside."""
    train = dataclasses.replace(TRAIN, optimizer=OptimizerConfig(name=name), ema_decay=0.9)
    held = {}
    for zero1 in (True, False):
        config = dataclasses.replace(layout, zero1=zero1)
        state = Trainer(MODEL, train, Recipe(), layout_of(config)).abstract_state
        for part in ("params", "opt", "ema"):
            held[part, zero1] = bytes_on_one_device(jax.tree.leaves(state[part]))
    assert held["params", True] == held["params", False]
    for part in ("opt", "ema"):
        # Every dimension of this model's parameters but a few norms' divides by data.
        assert held[part, True] <= 1.02 * held[part, False] / layout.data + 64


CUTS = [
    cut
    for cut in itertools.product((1, 2, 4, 8), repeat=6)
    if math.prod(cut) == 8 and cut[0] <= 2 and cut[5] <= 4
]
"""Every way to cut 8 devices along all axes; pipe up to 2 stages, tensor up to the 4 heads."""


@st.composite
def layouts(draw) -> MeshConfig:
    """Any product of axes and any options that go with it."""
    pipe, data, fsdp, expert, context, tensor = draw(st.sampled_from(CUTS))
    capacity = draw(st.sampled_from([0.0, 1.0, 1.5]))
    return MeshConfig(
        pipe=pipe, data=data, fsdp=fsdp, expert=expert, context=context, tensor=tensor,
        zero1=draw(st.booleans()),
        expert_nodes=draw(st.sampled_from([n for n in (1, 2, 4) if expert % n == 0])),
        exchange=draw(st.sampled_from(["dense", "gather"])),
        exchange_capacity=capacity,
        context_exchange=draw(st.sampled_from(["ring", "gather"])),
        sequence=draw(st.booleans()),
        overlap=pipe == 1 and draw(st.booleans()),
        schedule=draw(st.sampled_from(["1f1b", "gpipe", "zb1p", "dualpipe"])),
    )  # fmt: skip


@st.composite
def models(draw) -> ModelConfig:
    """Variants of the small model: routing methods, latents, kinds of layers, shared experts."""
    method = draw(st.sampled_from(["noaux_tc", "group_limited_greedy", "greedy"]))
    grouped = {} if method != "greedy" else {"num_expert_groups": 1, "groups_per_token": 1}
    return dataclasses.replace(
        MODEL,
        topk_method=method,
        scoring=draw(st.sampled_from(["sigmoid", "softmax"])),
        normalize_topk=draw(st.booleans()),
        q_lora_rank=draw(st.sampled_from([None, 16])),
        num_layers=2,
        num_dense_layers=draw(st.integers(0, 1)),
        num_shared_experts=draw(st.integers(0, 2)),
        experts_per_token=draw(st.integers(2, 4)),
        mtp_depth=draw(st.integers(0, 1)),
        **grouped,
    )


@pytest.mark.slow
@hypothesis.settings(max_examples=2, phases=[hypothesis.Phase.generate])
@hypothesis.given(layouts(), models(), st.sampled_from([1, 2]), st.booleans())
def test_any_layout_of_any_model(layout, model, micro, packed):
    """The property behind the lists here and in tests/test_pipeline.py."""
    train = dataclasses.replace(TRAIN, batch_size=32)
    if layout.pipe > 1:
        micro = 4
    elif layout.overlap:
        micro = 2
    batch = {"tokens": random_rows(model=model, train=train)}
    if packed:
        batch["segments"] = random_segments(train)
    hypothesis.note(f"{micro} micro batches")
    assert_same_step(
        take_step(layout, batch, model, micro=micro, train=train),
        take_step(batch=batch, model=model, train=train),
    )


def test_layers_unrolled_are_the_same_step():
    """Both layers with experts are in one round of the loop."""
    unrolled = take_step(recipe=dataclasses.replace(FP32, unroll=2))
    assert_same_step(unrolled, step_on())


def test_layers_are_not_unrolled_in_a_pipeline():
    train = dataclasses.replace(TRAIN, unroll=2)
    with pytest.raises(ValueError, match=r"train.unroll=2 is not for pipelines"):
        Trainer(MODEL, train, FP32, layout_of(MeshConfig(pipe=2)))
    assert recipe_of(train, Kernels()).unroll == 2
    with pytest.raises(ValueError, match="unroll"):
        BatchPlan(dataclasses.replace(TRAIN, unroll=0))
