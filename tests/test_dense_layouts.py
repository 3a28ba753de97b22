"""A dense model on every kind of layout: gradients and decoding are those of one device.

Two heads of keys for four of queries: `tensor` 2 cuts them, `tensor` 4 leaves them whole.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from generation.config import Sampling
from generation.decode import make_decoder
from generation.engine import Generator
from model.blueprint import bind, blueprint
from model.config import BandsConfig, ModelConfig
from model.costs import cache_bytes_per_token
from model.kernels import choose
from model.recipe import Recipe
from model.transformer import Tokens
from sharding.config import MeshConfig
from sharding.devices import PlannedDevice
from sharding.mesh import planned_layout
from tests.layout_helpers import (
    FP32,
    ONE_DEVICE,
    TRAIN,
    assert_same_step,
    layout_of,
    random_rows,
    random_segments,
    step_on,
    take_step,
)
from training.config import OptimizerConfig
from training.optimizer import is_1d, make_optimizer, muon_label
from training.recipe import recipe_of
from training.step import Trainer

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_dense_layers=2, num_heads=4,
    attention="grouped", num_kv_heads=2, qkv_bias=True, qk_norm=True, qk_rope_head_dim=8,
    v_head_dim=8, dense_ffn_size=48, rope_interleaved=False, tie_embeddings=True,
    bands=BandsConfig(original_max_position=32), init_std=0.2,
)  # fmt: skip
"""Everything that grouped attention may have, and tied embeddings."""
DEEP = dataclasses.replace(MODEL, num_layers=4, num_dense_layers=4)
"""For pipelines of four stages."""
ODD = dataclasses.replace(MODEL, num_heads=12, num_kv_heads=6, qk_norm=False)
"""Six heads of keys on four devices: three heads of queries read two of them."""

LAYOUTS = {
    "tensor 2 x fsdp 2 x data 2": (MeshConfig(tensor=2, fsdp=2, data=2), MODEL, 1),
    "tensor 4 x fsdp 2, sequence": (MeshConfig(tensor=4, fsdp=2, sequence=True), MODEL, 1),
    "context 2 x tensor 2 x fsdp 2": (MeshConfig(context=2, tensor=2, fsdp=2), MODEL, 1),
    "1f1b 2 x tensor 2": (MeshConfig(pipe=2, tensor=2), MODEL, 4),
}
"""Mesh, model and micro batches of the default suite."""
MORE = {
    "data 8": (MeshConfig(data=8), MODEL, 1),
    "fsdp 8": (MeshConfig(fsdp=8), MODEL, 1),
    "expert 2 x tensor 4": (MeshConfig(expert=2, tensor=4), MODEL, 1),
    "tensor 4, odd groups": (MeshConfig(tensor=4, data=2), ODD, 1),
    "context 4 x tensor 2": (MeshConfig(context=4, tensor=2), MODEL, 1),
    "context 2 x tensor 4, gather": (
        MeshConfig(context=2, tensor=4, context_exchange="gather"), MODEL, 1,
    ),
    "context 2 x tensor 4, odd groups": (MeshConfig(context=2, tensor=4), ODD, 1),
    "gpipe 2 x fsdp 2": (MeshConfig(pipe=2, fsdp=2, schedule="gpipe"), MODEL, 4),
    "interleaved 2": (MeshConfig(pipe=2, schedule="interleaved", pipe_chunks=2), DEEP, 4),
    "zb1p 2 x tensor 4": (MeshConfig(pipe=2, tensor=4, schedule="zb1p"), MODEL, 4),
    "dualpipe 2 x data 2": (MeshConfig(pipe=2, data=2, schedule="dualpipe"), DEEP, 4),
    "dualpipev 2 x context 2": (MeshConfig(pipe=2, context=2, schedule="dualpipev"), DEEP, 4),
    "overlap": (MeshConfig(fsdp=2, tensor=2, overlap=True), MODEL, 2),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_a_step_is_the_one_device_step(name):
    """Gradients of all weights, biases and norms; new parameters, losses and norms."""
    mesh, model, micro = (LAYOUTS | MORE)[name]
    assert_same_step(step_on(mesh, model, micro), step_on(model=model))


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(pipe=2, tensor=2),
        pytest.param(MeshConfig(pipe=2, fsdp=2, schedule="zb1p"), marks=pytest.mark.slow),
        pytest.param(MeshConfig(fsdp=2, tensor=2), marks=pytest.mark.slow),
    ],
    ids=["1f1b 2 x tensor 2", "zb1p 2 x fsdp 2", "fsdp 2 x tensor 2"],
)
def test_a_step_in_bf16_is_as_near_to_fp32_as_one_devices(mesh):
    """The worst of all parameters, biases among them: copies of them are not rounded."""

    def errors(result) -> float:
        want = jax.tree.leaves(jax.device_get(step_on(model=MODEL).state["opt"]))
        pairs = zip(jax.tree.leaves(result.state["opt"]), want, strict=True)
        return max(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b) for a, b in pairs)

    recipe = Recipe("bfloat16")
    one = errors(take_step(ONE_DEVICE, model=MODEL, recipe=recipe, micro=4))
    assert 0.01 < one < 0.04
    assert errors(take_step(mesh, model=MODEL, recipe=recipe, micro=4)) < 1.5 * one


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(pipe=2, fsdp=2), MeshConfig(data=2, tensor=2)],
    ids=["pipe 2 x fsdp 2", "data 2 x tensor 2"],
)
def test_a_step_through_the_kernels_is_traced_on_a_mesh(mesh, fp8):
    """For Hopper GPUs that are planned: what varies over devices, and what is held, fits."""
    model = dataclasses.replace(MODEL, vocab_size=256, qk_rope_head_dim=64, v_head_dim=64)
    train = dataclasses.replace(TRAIN, dtype="bfloat16", fp8=fp8, seq_len=128, micro_batch_size=2)
    layout = planned_layout(mesh, 4, PlannedDevice("cuda", "NVIDIA H100", "9.0"))
    kernels = choose("auto", model, train.dtype, layout, fp8).kernels
    assert kernels.attention == "mosaic"
    trainer = Trainer(model, train, recipe_of(train, kernels), layout)
    shape = train.batch_size // train.micro_batch_size, train.micro_batch_size, train.seq_len + 1
    batch = {"tokens": jax.ShapeDtypeStruct(shape, np.int32)}
    names = "learning_rate", "bias_update_rate", "mtp_weight"
    knobs = {name: jax.ShapeDtypeStruct((), np.float32) for name in names}
    state, _ = trainer.step.trace(trainer.abstract_state, batch, knobs).out_info
    assert jax.tree.structure(state) == jax.tree.structure(trainer.abstract_state)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(context=2, tensor=4), MeshConfig(pipe=2, tensor=2)])
def test_packed_documents(mesh):
    batch = {"tokens": random_rows(model=MODEL), "segments": random_segments()}
    micro = 4 if mesh.pipe > 1 else 1
    assert_same_step(
        take_step(mesh, batch, MODEL, micro=micro), take_step(ONE_DEVICE, batch, MODEL)
    )


def test_key_heads_are_cut_or_whole():
    """With fewer of them than shards, every device holds all of them and no other weight twice."""
    for tensor, parts in ((2, 2), (4, 1)):
        mesh = MeshConfig(tensor=tensor)
        trainer = take_step.__globals__["GradientTrainer"](MODEL, TRAIN, FP32, layout_of(mesh))
        held = trainer.abstract_state["params"]["dense_layers"]["attn"]
        for name, heads in (("w_k", parts), ("b_v", parts), ("w_q", tensor), ("w_o", tensor)):
            leaf = held[name]
            shard = np.prod(leaf.sharding.shard_shape(leaf.shape))
            assert leaf.size // shard == heads, (tensor, name)


# ---- decoding -----------------------------------------------------------------------------------

PROMPTS = [np.random.default_rng(n).integers(3, 64, n).astype(np.int32) for n in (5, 1, 21)]
NEW = 12


@functools.cache
def weights(model: ModelConfig = MODEL):
    rng = np.random.default_rng(3)
    draw = lambda x: 0.3 * rng.standard_normal(x.shape, np.float32)  # noqa: E731
    return {"params": jax.tree.map(draw, blueprint(model).params), "router_bias": {}}


def prepared(mesh: MeshConfig, model: ModelConfig):
    generator = Generator(model, FP32, layout_of(mesh))
    abstract = generator.abstract_weights
    placed = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), weights(model), abstract)
    return generator, generator.prepare(placed)


def full_logits(model: ModelConfig, ids_T: np.ndarray) -> np.ndarray:
    whole = bind(model, jax.tree.map(jnp.asarray, weights(model)["params"]), {})
    tokens = Tokens(jnp.asarray(ids_T)[None], jnp.arange(len(ids_T))[None], None)
    return np.asarray(whole(tokens, FP32).hidden_BTD @ whole.head_kernel())[0]


def test_decoded_positions_have_the_logits_of_the_full_forward_pass():
    _, held = prepared(ONE_DEVICE, MODEL)
    decoder = make_decoder(MODEL, held, FP32, mtp=False)
    ids = np.random.default_rng(0).integers(3, 64, 24).astype(np.int32)
    positions = jnp.arange(24)[None]
    hidden, cache, _ = decoder.read(ids[None, :9], positions[:, :9], 32)
    assert sum(x.size for x in jax.tree.leaves(cache)) / 32 * 2 == cache_bytes_per_token(MODEL)
    found = [decoder.logits(hidden[0])]
    for at in range(9, 24, 3):  # three tokens at a time
        part = slice(at, at + 3)
        hidden, cache, _ = decoder.read(ids[None, part], positions[:, part], cache)
        found.append(decoder.logits(hidden[0]))
    np.testing.assert_allclose(np.concatenate(found), full_logits(MODEL, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("mesh", "model"),
    [
        (ONE_DEVICE, MODEL),
        (MeshConfig(data=2, tensor=4), MODEL),
        pytest.param(MeshConfig(fsdp=2, tensor=2), MODEL, marks=pytest.mark.slow),
        pytest.param(MeshConfig(tensor=4), ODD, marks=pytest.mark.slow),
    ],
)
def test_greedy_text_is_the_argmax_of_the_full_forward_pass(mesh, model):
    generator, held = prepared(mesh, model)
    session = generator.start(held, PROMPTS, Sampling(temperature=0), NEW)
    rows = [[] for _ in PROMPTS]
    while not session.done:
        for row, ids in zip(rows, session.advance(), strict=True):
            row += ids.tolist()
    for prompt, row in zip(PROMPTS, rows, strict=True):
        text = [*prompt, *row]
        best = full_logits(model, np.array(text)).argmax(-1)
        assert row == best[len(prompt) - 1 : -1].tolist()
    assert len(set(itertools.chain(*rows))) > 3


def test_bf16_is_close():
    recipe = Recipe("bfloat16", remat="selective")
    exact, half = step_on(model=MODEL), take_step(model=MODEL, recipe=recipe)
    np.testing.assert_allclose(half.metrics["train/loss"], exact.metrics["train/loss"], rtol=2e-2)


def test_biases_of_heads_are_no_matrices():
    """Muon takes the projections of key heads as matrices, and neither it nor decay the biases."""
    attn = blueprint(MODEL).params_axes["dense_layers"]["attn"]
    assert {name: muon_label(attn[name]) for name in ("w_q", "w_k", "w_v", "w_o")} == dict.fromkeys(
        ("w_q", "w_k", "w_v", "w_o"), "muon"
    )
    assert all(is_1d(attn[name]) for name in ("b_q", "b_k", "b_v"))
    assert not is_1d(attn["w_k"])
    params = blueprint(MODEL).params
    make_optimizer(OptimizerConfig(name="muon"), blueprint(MODEL).params_axes).init(
        jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    )
