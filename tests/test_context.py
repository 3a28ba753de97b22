"""Sequences cut over devices compute what one device computes.

Attention alone, then whole steps (tolerances: tests/layout_helpers.py), then what it sends.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import model.context_attention
import model.loss
from generation.config import Sampling
from generation.engine import Generator
from generation.score import Scorer
from model.context_attention import context_attention
from model.mla import Form
from model.recipe import Recipe
from model.transformer import Block, Tokens, ids_ahead
from pallas_kernels.attention import mla_attention, starts_of_segments
from pallas_kernels.cross_entropy import linear as linear_cross_entropy
from sharding.config import MeshConfig
from sharding.context import balance, restore, whole_sequences
from sharding.partition import constrain, use_layout
from tests.layout_helpers import (
    FP32,
    LEAN,
    MODEL,
    ONE_DEVICE,
    SHALLOW,
    TRAIN,
    GradientTrainer,
    assert_same_step,
    layout_of,
    micro_batches,
    random_rows,
    random_segments,
    start,
    take_step,
)
from tests.small_model import CONFIG, weights

# ---- order --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_every_shard_has_the_same_work(shards):
    """Pairs of chunks that attention computes, those on the diagonal counted as half."""
    with use_layout(layout_of(MeshConfig(context=shards))):
        order = np.asarray(balance(jnp.arange(2 * shards), 0))
    assert sorted(order) == list(range(2 * shards))
    work = (order + 0.5).reshape(shards, 2).sum(1)
    assert set(work) == {2 * shards}


def test_restore_undoes_balance():
    x_BT = jnp.arange(3 * 16).reshape(3, 16)
    with use_layout(layout_of(MeshConfig(context=4))):
        moved = balance(x_BT)
        order = [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
        np.testing.assert_array_equal(moved[0], order)
        np.testing.assert_array_equal(restore(moved), x_BT)
        np.testing.assert_array_equal(balance(x_BT.T, 0), moved.T)
    np.testing.assert_array_equal(balance(x_BT), x_BT)


def test_mtp_reads_ahead_in_the_order_of_the_text():
    next_ids_BT = np.random.default_rng(0).integers(1, 99, (2, 16))
    want_KBT = np.stack([np.pad(next_ids_BT[:, k:], ((0, 0), (0, k))) for k in range(3)])
    np.testing.assert_array_equal(ids_ahead(jnp.asarray(next_ids_BT), 3), want_KBT)
    with use_layout(layout_of(MeshConfig(context=2))):
        got_KBT = restore(ids_ahead(balance(jnp.asarray(next_ids_BT)), 3), axis=2)
    np.testing.assert_array_equal(got_KBT, want_KBT)


# ---- attention ----------------------------------------------------------------------------------

B, T, N, H, NOPE, V, C = 2, 32, 4, 12, 8, 6, 10
SCALE = 0.3
SEGMENTS = np.array([[1] * 5 + [2] * 20 + [0] * 7, [1] * 17 + [2] * 15], np.int32)
"""Documents that end inside chunks, and one that whole shards see nothing of."""


def arrays(dtype=np.float32):
    """q, latents, w_ukv, and a gradient of the output."""
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, T, C + H - NOPE), (C, N, NOPE + V), (B, T, N, V)
    return [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes]


def one_device_attention(q_BTNH, latents_BTL, w_CNH, segments_BT):
    kv_BTNW = jnp.einsum("BTC,CNH->BTNH", latents_BTL[..., :C], w_CNH)
    start_BT = None if segments_BT is None else starts_of_segments(segments_BT)
    return mla_attention(q_BTNH, kv_BTNW, latents_BTL[..., C:], start_BT, scale=SCALE)


def cut_attention(q_BTNH, latents_BTL, w_CNH, segments_BT):
    q_BTNH, latents_BTL, segments_BT = jax.tree.map(balance, (q_BTNH, latents_BTL, segments_BT))
    return restore(
        context_attention(q_BTNH, (latents_BTL,), (w_CNH,), segments_BT, Form(SCALE, NOPE))
    )


def results(attention, layout, segments, dtype=np.float32):
    """Output and gradients with respect to q, latents and w_ukv, fp32 on the host."""
    *inputs, do = arrays(dtype)

    def run(*inputs):
        with use_layout(layout):
            out, pull = jax.vjp(lambda *x: attention(*x, segments), *inputs)
            return out, *pull(do)

    return [np.asarray(x, np.float32) for x in jax.jit(run)(*inputs)]


@functools.cache
def wanted(packed: bool):
    return results(one_device_attention, None, SEGMENTS if packed else None)


def assert_close(got, want, rtol):
    """Each against its largest entry."""
    for name, a, b in zip(("output", "dq", "dlatents", "dw_ukv"), got, want, strict=True):
        assert np.abs(a - b).max() <= rtol * np.abs(b).max(), name


CUTS = {
    "context 2": MeshConfig(context=2),
    "context 4": MeshConfig(context=4),
    "context 8": MeshConfig(context=8),
    "context 2 x tensor 2": MeshConfig(context=2, tensor=2),
    "data 2 x context 2 x tensor 2": MeshConfig(data=2, context=2, tensor=2),
    "context 4, gather": MeshConfig(context=4, context_exchange="gather"),
    "context 2 x tensor 2, gather": MeshConfig(context=2, tensor=2, context_exchange="gather"),
}
DEFAULT = (("context 4", "packed"), ("context 2 x tensor 2, gather", "packed"))


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        case if case in DEFAULT else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(CUTS, ("whole", "packed"))
    ],
)
def test_attention_is_the_one_device_attention(name, packed):
    """fp32; the worst measured is 1e-6."""
    segments = SEGMENTS if packed == "packed" else None
    got = results(cut_attention, layout_of(CUTS[name]), segments)
    assert_close(got, wanted(segments is not None), 1e-4)


@pytest.mark.parametrize("exchange", ["ring", pytest.param("gather", marks=pytest.mark.slow)])
def test_attention_some_rows_at_a_time(exchange, monkeypatch):
    monkeypatch.setattr(model.context_attention, "QUERY_ROWS", 2)
    config = MeshConfig(context=2, context_exchange=exchange)
    assert_close(results(cut_attention, layout_of(config), SEGMENTS), wanted(True), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["ring", "gather"])
def test_attention_in_bf16(exchange):
    """As near to fp32 as one device in bf16; the worst of both is an entry of dq, by 2%."""
    config = MeshConfig(context=4, context_exchange=exchange)
    for attention, layout in ((one_device_attention, None), (cut_attention, layout_of(config))):
        assert_close(results(attention, layout, SEGMENTS, jnp.bfloat16), wanted(True), 0.03)


def test_a_gradient_outside_of_the_layout_is_refused():
    """It would run on one device, in the wrong order."""
    layout = layout_of(MeshConfig(context=2))

    def loss(q_BTNH, latents_BTL, w_CNH):
        with use_layout(layout):
            return cut_attention(q_BTNH, latents_BTL, w_CNH, None).sum()

    with pytest.raises(AssertionError, match="use_layout"):
        jax.jit(jax.grad(loss)).lower(*arrays()[:3])


# ---- whole steps --------------------------------------------------------------------------------

DEEP = dataclasses.replace(SHALLOW, mtp_depth=2)
RECOMPUTE = Recipe(remat="selective")


@functools.cache
def packed_step(config: MeshConfig, recipe: Recipe = FP32, micro: int = 1):
    """With documents of uneven lengths, padding and two MTP modules."""
    batch = {"tokens": random_rows(), "segments": random_segments()}
    return take_step(config, batch, DEEP, recipe, micro)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "remat", "micro"),
    [
        (MeshConfig(fsdp=2, context=2, tensor=2, sequence=True), "none", 1),
        (MeshConfig(fsdp=2, context=2, tensor=2, context_exchange="gather"), "selective", 2),
        (MeshConfig(expert=2, context=4), "none", 1),
        (MeshConfig(context=8), "none", 1),
        (MeshConfig(expert=2, tensor=4, sequence=True), "selective", 1),
    ],
    ids=str,
)
def test_a_step_is_the_one_device_step(config, remat, micro):
    """Packed documents, with what is recomputed and micro batches that are added up."""
    got = packed_step(config, Recipe(remat=remat), micro)
    assert_same_step(got, packed_step(ONE_DEVICE))


@pytest.mark.slow
def test_a_step_without_documents():
    """That of the ring is one of the default suite's, in tests/test_layouts.py."""
    config = MeshConfig(data=2, context=2, context_exchange="gather")
    assert_same_step(take_step(config, model=LEAN), take_step(model=LEAN))


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["ring", "gather"])
def test_evaluation(exchange, monkeypatch):
    """Nats, targets, drafts and accepted drafts; logits in several chunks."""
    chunk_bytes = 4 * 8 * 4 * SHALLOW.vocab_size
    monkeypatch.setattr(model.loss, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(linear_cross_entropy, "PORTABLE_CHUNK_BYTES", chunk_bytes)
    mask = np.random.default_rng(1).integers(0, 2, (TRAIN.batch_size, TRAIN.seq_len))
    batch = {"tokens": random_rows(), "segments": random_segments(), "mask": mask.astype(np.int32)}
    batch = {name: micro_batches(rows) for name, rows in batch.items()}
    sums = []
    for config in (ONE_DEVICE, MeshConfig(fsdp=2, context=2, context_exchange=exchange)):
        trainer = GradientTrainer(SHALLOW, TRAIN, FP32, layout_of(config))
        state = start(trainer)
        # The first four tokens win nearly always, so that drafts agree often.
        state["params"]["head"]["kernel"][:, 4:] *= 0.1
        sums.append(jax.device_get(trainer.evaluate(state["params"], state["router_bias"], batch)))
    one, many = sums
    assert one["accepted"] > 0
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_generation_and_scoring():
    """They leave sequences whole: text of any length, and one new token at a time."""
    prompts = [np.arange(3, 3 + n, dtype=np.int32) for n in (5, 1, 17)]
    texts, scores = [], []
    for config in (ONE_DEVICE, MeshConfig(fsdp=2, context=2, tensor=2, sequence=True)):
        generator = Generator(CONFIG, FP32, layout_of(config))
        placement = jax.tree.map(lambda x: x.sharding, generator.abstract_weights)
        placed = jax.device_put(weights(), placement)
        scorer = Scorer(CONFIG, FP32, layout_of(config), mtp=True)
        scores.append(scorer.logits(placed, np.arange(3, 14, dtype=np.int32)[None])[:2])
        prepared = generator.prepare(placed)
        session = generator.start(prepared, prompts, Sampling(temperature=0), 6, speculate=True)
        rows = [[] for _ in prompts]
        while not session.done:
            for row, ids in zip(rows, session.advance(), strict=True):
                row += ids.tolist()
        texts.append(rows)
    assert texts[0] == texts[1]
    np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=1e-4)


def test_whole_sequences():
    layout = whole_sequences(layout_of(MeshConfig(context=2, tensor=2, sequence=True)))
    x_BT = jnp.zeros((2, 7))
    with use_layout(layout):
        np.testing.assert_array_equal(balance(x_BT), x_BT)
        assert constrain(x_BT, "batch", "stream").shape == x_BT.shape


# ---- what is sent -------------------------------------------------------------------------------

WIDE = dataclasses.replace(
    MODEL, hidden_size=96, q_lora_rank=48, kv_lora_rank=24, qk_nope_head_dim=20, v_head_dim=20,
    dense_ffn_size=80,
)  # fmt: skip
"""No two sizes of interest are equal."""


@functools.cache
def collectives(config: MeshConfig) -> dict[str, list[tuple[int, ...]]]:
    """Shapes that a dense layer's forward and backward pass moves, by collective."""
    graph, weights = nnx.split(Block(WIDE, nnx.Rngs(0), moe=False))
    layout = layout_of(config)

    def loss(weights, x_BTD):
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
        tokens = Tokens(positions_BT, positions_BT, None)
        x_BTD = constrain(x_BTD, "batch", "stream", "embed")
        y_BTD, _ = nnx.merge(graph, weights)(x_BTD, tokens, FP32)
        return jnp.square(constrain(y_BTD, "batch", "stream", "embed")).sum()

    def run(weights, x_BTD):
        with use_layout(layout):
            return jax.value_and_grad(loss, (0, 1))(weights, x_BTD)

    x_BTD = jax.ShapeDtypeStruct((B, T, WIDE.hidden_size), np.float32)
    text = jax.jit(run).lower(weights, x_BTD).compile().as_text()
    pattern = r" = (.*) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)\("
    moved: dict[str, list[tuple[int, ...]]] = {}
    for shapes, name in re.findall(pattern, text):
        for sizes in re.findall(r"f32\[([\d,]+)\]", shapes):
            moved.setdefault(name, []).append(tuple(map(int, sizes.split(","))))
    return moved


CHANNELS = WIDE.kv_lora_rank + WIDE.qk_rope_head_dim


@pytest.mark.parametrize("shards", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_ring_sends_latents_and_their_gradients(shards):
    """To the neighbour; latents n-1 times forward and backward, gradients n times.

    XLA merges the first of both passes, which follow each other here. With 4 shards the body of a
    loop, counted once, holds the steps in the middle.
    """
    moved = collectives(MeshConfig(context=shards))
    latents = (B, T // shards, CHANNELS)
    times = {2: 1 + 2, 4: 1 + 1 + (1 + 1) + 2}[shards]
    assert moved["collective-permute"] == [latents] * times
    assert moved.keys() == {"collective-permute", "all-reduce"}
    activations = {shape for shape in moved["all-reduce"] if shape[0] == B}
    assert activations <= {latents}


def test_gathering_sends_latents_once():
    moved = collectives(MeshConfig(context=2, context_exchange="gather"))
    assert moved["all-gather"] == [(2, B, T // 2, CHANNELS)]
    assert moved["reduce-scatter"] == [(1, B, T // 2, CHANNELS)]
    assert moved.keys() == {"all-gather", "reduce-scatter", "all-reduce"}


def test_sequence_parallelism_gathers_activations_and_no_weights():
    """Latents instead of the hidden state at the attention, the hidden state at the MLP."""
    moved = collectives(MeshConfig(tensor=2, sequence=True))
    assert moved.keys() == {"all-gather", "all-reduce"}, "XLA:CPU has no reduce-scatter here"
    latents = [(B, T, CHANNELS), (B, T, WIDE.q_lora_rank)]
    # Forward before the MLP; backward of both outputs.
    hidden = [(B, T, WIDE.hidden_size)] * 3
    assert sorted(moved["all-gather"]) == sorted(latents + hidden)
    assert "all-gather" not in collectives(MeshConfig(tensor=2))


def test_half_of_the_square_is_never_computed():
    """Of 16 blocks of one chunk squared, two devices compute 5 each, the diagonals whole."""
    B, T, N, H, V, C = 1, 512, 2, 64, 64, 8
    shapes = (B, T, N, H), (B, T, C + 4), (C, N, H - 4 + V)
    layout = layout_of(MeshConfig(context=2))

    def run(*inputs):
        with use_layout(layout):
            q, latents, w = inputs
            return context_attention(q, (latents,), (w,), None, Form(SCALE, H - 4))

    abstract = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    flops = jax.jit(run).lower(*abstract).compile().cost_analysis()["flops"]
    block = 2 * (T // 4) ** 2 * N * (H + V)
    expansion = 2 * T * C * N * (H - 4 + V)
    assert 5 * block + expansion <= flops < 5.5 * block + expansion


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "length", "message"),
    [
        (MeshConfig(context=4), 20, r"20 tokens .* context=4: .* multiple of 8"),
        (MeshConfig(tensor=2, sequence=True), 15, r"15 tokens .* tensor=2, .* multiple of 2"),
        (MeshConfig(context=2, tensor=4, sequence=True), 20, r"multiple of 8, or leave"),
    ],
)
def test_sequences_that_do_not_split_are_refused(config, length, message):
    train = dataclasses.replace(TRAIN, seq_len=length)
    with pytest.raises(ValueError, match=message):
        GradientTrainer(SHALLOW, train, FP32, layout_of(config))
