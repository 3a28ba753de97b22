"""Training with images: a mixed batch's gradients on every layout are one device's, what is frozen
stays, and both losses are what they are said to be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.blueprint import bind, blueprint, initialize
from model.recipe import Recipe
from sharding.config import MeshConfig
from tests.layout_helpers import GRADIENT_RTOL, KNOBS, ONE_DEVICE, SCALAR_RTOL, layout_of
from training.config import OptimizerConfig, TrainConfig
from training.step import Trainer
from vision.config import EncoderConfig, ImageTraining, JanusConfig, TokenizerConfig
from vision.loss import Counts, count_targets, mixed_examples, mixed_loss
from vision.trainer import PARTS, ImageTrainer

MODEL = JanusConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_dense_layers=2, num_heads=4,
    attention="grouped", num_kv_heads=4, qk_rope_head_dim=8, v_head_dim=8, dense_ffn_size=48,
    rope_interleaved=False, max_position=64, init_std=0.2,
    encoder=EncoderConfig(16, 1, 4, 32, image_size=8, patch_size=4),
    tokenizer=TokenizerConfig(16, 4, 8, 32, (1, 1), 1),
    drawn_tokens=4, image_token_id=7,
)  # fmt: skip
TRAIN = TrainConfig(steps=5, seq_len=16, batch_size=8, optimizer=OptimizerConfig(clip_norm=0))
ALL = ImageTraining(learned="reading")
LAYOUTS = {
    "data 4": (MeshConfig(data=4), 1),
    "fsdp 4": (MeshConfig(fsdp=4), 2),
    "tensor 4": (MeshConfig(tensor=4), 1),
    "cube": (MeshConfig(data=2, fsdp=2, tensor=2), 1),
    "pipe 2": (MeshConfig(pipe=2), 4),
    "pipe 2 x fsdp 2": (MeshConfig(pipe=2, fsdp=2), 2),
}
QUICK = ("cube",)
"""In the default suite; the others are slow tests."""
NO_EFFECT = "encoder['layers']['k']['bias']"
"""The same on all keys of an image, so softmax does not see it: its gradient is rounding."""


class GradientTrainer(ImageTrainer):
    """Keeps the gradient it was given, and descends along it."""

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        zeros = lambda params: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        return optax.GradientTransformation(zeros, lambda grads, *_: (grads, grads))


def mixed_batch(rows: int = 8, seq_len: int = 16) -> dict[str, np.ndarray]:
    """Rows of text, of an image that is read and text, and of text and codes."""
    rng = np.random.default_rng(3)
    T, config = seq_len, MODEL
    tokens = rng.integers(8, config.vocab_size, (rows, T + 1)).astype(np.int32)
    codes = np.full((rows, T + 1), -1, np.int32)
    patches = np.full((rows, T + 1), -1, np.int32)
    learned = np.ones((rows, T + 1), np.float32)
    segments = np.ones((rows, T + 1), np.int32)
    segments[:, 9:] = 2
    segments[::3, -3:] = 0
    for row in range(rows):
        if row % 3 != 1:
            here = slice(1 + row % 2, 5 + row % 2)
            tokens[row, here], patches[row, here] = config.image_token_id, np.arange(4)
            learned[row, here] = 0
        if row % 3 != 2:
            codes[row, 10:14], tokens[row, 10:14] = rng.integers(0, 16, 4), 0
    pixels = rng.standard_normal((rows, 2, 8, 8, 3)).astype(np.float32)
    return {
        "tokens": tokens, "codes": codes, "patches": patches, "learned": learned,
        "segments": segments, "pixels": pixels,
    }  # fmt: skip


def start(trainer: Trainer):
    rng = np.random.default_rng(0)
    abstract = trainer.abstract_state
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)

    def draw(path, leaf):
        noise = 0.2 * rng.standard_normal(leaf.shape).astype(np.float32)
        return noise + np.float32(path[-1].key == "scale")

    return {**zeros, "params": jax.tree_util.tree_map_with_path(draw, abstract["params"])}


@functools.cache
def stepped(mesh: MeshConfig = ONE_DEVICE, micro: int = 1):
    """(trainer, state after one step, metrics) of the mixed batch."""
    train = dataclasses.replace(TRAIN, micro_batch_size=TRAIN.batch_size // micro)
    trainer = GradientTrainer(MODEL, train, Recipe(), layout_of(mesh), ALL)
    state = jax.device_put(start(trainer), trainer.shardings)
    batch = {k: v.reshape(micro, -1, *v.shape[1:]) for k, v in mixed_batch().items()}
    state, metrics = trainer.step(state, batch, KNOBS)
    return trainer, jax.device_get(state), jax.device_get(metrics)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS]
)
def test_gradients_of_a_mixed_batch_are_one_devices(name):
    trainer, state, metrics = stepped(*LAYOUTS[name])
    _, wanted, scalars = stepped()
    for part in blueprint(MODEL).params:
        got = jax.tree_util.tree_leaves_with_path(state["opt"][part])
        for (path, a), b in zip(got, jax.tree.leaves(wanted["opt"][part]), strict=True):
            where, largest = f"{part}{jax.tree_util.keystr(path)}", np.abs(b).max()
            if where == NO_EFFECT:
                assert max(np.abs(a).max(), largest) < 1e-6
                continue
            assert (largest > 0) == (part in trainer.learned), where
            assert np.abs(a - b).max() <= GRADIENT_RTOL * max(largest, 1e-12), where
    for metric in ("train/loss", "train/text_loss", "train/code_loss", "train/grad_norm"):
        assert metrics[metric] == pytest.approx(scalars[metric], rel=SCALAR_RTOL), metric


def test_the_loss_is_cross_entropy_over_all_targets():
    """Against logits written out: text on the language model's head, codes on the other."""
    batch = {name: jnp.asarray(rows) for name, rows in mixed_batch().items()}
    trainer, *_ = stepped()
    params = start(trainer)["params"]
    model = bind(MODEL, params, {})
    examples = mixed_examples(batch)
    counts = count_targets({name: rows[None] for name, rows in batch.items()})
    loss, parts = mixed_loss(model, examples, counts, Recipe())  # pyright: ignore
    hidden = model.forward(examples.tokens, Recipe(), None).hidden_BTD

    def nats(logits, targets, weights):
        logp = jax.nn.log_softmax(logits)
        return -(jnp.take_along_axis(logp, targets[..., None], -1)[..., 0] * weights).sum()

    text = nats(hidden @ model.head_kernel(), examples.targets_BT, examples.text_BT)
    drawn = nats(model.brush.logits(hidden), examples.codes_BT, examples.drawn_BT)  # pyright: ignore
    assert counts.text == examples.text_BT.sum()
    assert counts.drawn == examples.drawn_BT.sum() > 10
    assert float(loss) == pytest.approx(float((text + drawn) / counts.total), rel=1e-5)
    assert float(parts.text) == pytest.approx(float(text / counts.text), rel=1e-5)
    assert float(parts.drawn) == pytest.approx(float(drawn / counts.drawn), rel=1e-5)
    _, _, metrics = stepped()
    assert metrics["train/loss"] == pytest.approx(float(loss), rel=1e-5)


def test_targets_end_with_their_examples():
    """Nothing is predicted across examples, nor of images that are read, nor of padding."""
    batch = {name: jnp.asarray(rows) for name, rows in mixed_batch().items()}
    examples = mixed_examples(batch)
    counted = np.asarray(examples.text_BT + examples.drawn_BT)
    assert counted.max() == 1
    assert not counted[:, 8].any()  # from the first example to the second
    assert not counted[::3, -3:].any()
    assert not counted[np.asarray(batch["patches"][:, 1:]) >= 0].any()
    np.testing.assert_array_equal(examples.drawn_BT > 0, batch["codes"][:, 1:] >= 0)


@pytest.mark.parametrize("learned", ["adaptors", "tokenizer"])
def test_what_is_frozen_stays_and_has_no_state(learned):
    images = ImageTraining(learned=learned)
    trainer = ImageTrainer(MODEL, TRAIN, Recipe(), layout_of(MeshConfig()), images)
    before = start(trainer)
    batch = {name: rows[None] for name, rows in mixed_batch().items()}
    if learned == "tokenizer":
        batch = {"paint": batch["pixels"][:, :, 0]}
    state, metrics = trainer.step(jax.device_put(before, trainer.shardings), batch, KNOBS)
    assert np.isfinite(metrics["train/loss"])
    for name, part in before["params"].items():
        pairs = zip(jax.tree.leaves(part), jax.tree.leaves(state["params"][name]), strict=True)
        changed = [bool((a != np.asarray(b)).any()) for a, b in pairs]
        assert any(changed) == (name in PARTS[learned]), name
    held = sum(x.size for x in jax.tree.leaves(trainer.abstract_state["opt"])) - 1
    parts = [before["params"][name] for name in PARTS[learned]]
    assert held == 2 * sum(x.size for x in jax.tree.leaves(parts))


def test_no_weight_is_weakly_typed():
    """Or the second step, which reads what the first returned, would compile anew."""
    config = dataclasses.replace(MODEL, num_layers=1, num_dense_layers=1)
    params, _ = jax.eval_shape(lambda: initialize(config, jax.random.key(0)))
    assert not [x for x in jax.tree.leaves(params) if x.weak_type]


def test_counts_never_divide_by_zero():
    assert Counts(jnp.float32(0), jnp.float32(0)).total == 1
