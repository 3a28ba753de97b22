"""A model with everything of V3 at the smallest size, and its train step on any layout.

Compiling is the cost of these tests (6 to 20 core-seconds per layout), so a step is compiled and
run once per layout and returns all that the tests compare.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from model.config import ModelConfig
from model.recipe import Recipe
from sharding.config import MeshConfig
from sharding.mesh import axis_sizes, make_layout
from sharding.partition import Layout
from training.config import OptimizerConfig, TrainConfig
from training.step import Trainer

GRADIENT_RTOL = 1e-4
"""Of a gradient, relative to the largest entry of the one-device gradient of the same parameter.
Sums run in other orders; the worst of all layouts is 3e-6."""
SCALAR_RTOL = 1e-5
"""Of losses and norms; the worst measured is 1e-6."""

ONE_DEVICE = MeshConfig()
FP32 = Recipe()
MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=3, num_dense_layers=1, num_heads=4,
    q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
    dense_ffn_size=48, expert_ffn_size=16, num_experts=8, num_shared_experts=1,
    experts_per_token=3, num_expert_groups=4, groups_per_token=2, routed_scaling_factor=2.5,
    mtp_depth=1, init_std=0.2,
)  # fmt: skip
"""Weights of order 1/sqrt(d), so that no gradient is small enough to hide a wrong one."""
SHALLOW = dataclasses.replace(MODEL, num_layers=2, num_dense_layers=0)
"""Without the dense layer: a third less to compile, and every term of the loss is still there."""
LEAN = dataclasses.replace(SHALLOW, mtp_depth=0)
"""Nor with the MTP module: half of what MODEL costs, for layouts that other tests run whole."""
ONE_LAYER = dataclasses.replace(SHALLOW, num_layers=1)
"""With its MTP module; for tests of the step on one device."""
TRAIN = TrainConfig(
    steps=10, seq_len=16, batch_size=8, balance_weight=0.05, optimizer=OptimizerConfig(clip_norm=0)
)
KNOBS = {
    "learning_rate": np.float32(0.1),
    "bias_update_rate": np.float32(0.001),
    "mtp_weight": np.float32(0.3),
}


class GradientTrainer(Trainer):
    """A Trainer whose optimizer keeps the gradient it was given, and descends along it."""

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        zeros = lambda params: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        return optax.GradientTransformation(zeros, lambda grads, *_: (grads, grads))


class Result(NamedTuple):
    """One step from the common start."""

    trainer: Trainer
    state: dict[str, Any]
    """On the devices; `opt` is the gradient."""
    metrics: dict[str, np.ndarray]


def layout_of(config: MeshConfig) -> Layout:
    """The layout on the first devices it needs."""
    count = math.prod(axis_sizes(config).values())
    return make_layout(config, jax.devices()[:count])


def random_rows(seed: int = 0, model: ModelConfig = MODEL, train: TrainConfig = TRAIN):
    """Token rows [sequences, T+1]."""
    shape = (train.batch_size, train.seq_len + 1)
    return np.random.default_rng(seed).integers(0, model.vocab_size, shape).astype(np.int32)


def random_segments(train: TrainConfig = TRAIN):
    """Documents of uneven lengths, and padding that grows from row to row."""
    segments = np.zeros((train.batch_size, train.seq_len + 1), np.int32)
    for row in range(train.batch_size):
        end = train.seq_len + 1 - row % 8
        segments[row, :end] = 1 + np.arange(end) // (4 + row % 8)
    return segments


def micro_batches(rows: np.ndarray, count: int = 1) -> np.ndarray:
    """[sequences, T+1] cut into [count, sequences / count, T+1]."""
    return rows.reshape(count, -1, rows.shape[-1])


def start(trainer: Trainer, seed: int = 0) -> dict[str, Any]:
    """Initial values on the host, drawn in the order of the tree: the same for every layout.

    Drawn by numpy, which compiles nothing. Gains and router biases are not at 1 and 0, so that a
    step that forgot them would show.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        gain = path[-1].key == "scale"
        return np.float32(1) + np.float32(0.1) * noise if gain else trainer.model.init_std * noise

    abstract = trainer.abstract_state
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    params = jax.tree_util.tree_map_with_path(draw, abstract["params"])
    bias = jax.tree_util.tree_map_with_path(draw, abstract["router_bias"])
    ema = {"ema": params} if "ema" in abstract else {}
    return {**zeros, "params": params, "router_bias": bias} | ema


def take_step(
    config: MeshConfig = ONE_DEVICE,
    batch: dict[str, np.ndarray] | None = None,
    model: ModelConfig = MODEL,
    recipe: Recipe = FP32,
    micro: int = 1,
    train: TrainConfig = TRAIN,
) -> Result:
    """Compile and run one step on `config`'s devices; `micro` batches are accumulated."""
    batch = batch or {"tokens": random_rows(model=model, train=train)}
    train = dataclasses.replace(train, micro_batch_size=train.batch_size // micro)
    trainer = GradientTrainer(model, train, recipe, layout_of(config))
    state = jax.device_put(start(trainer), trainer.shardings)
    batch = {name: micro_batches(rows, micro) for name, rows in batch.items()}
    state, metrics = trainer.step(state, batch, KNOBS)
    return Result(trainer, state, jax.device_get(metrics))


def step_on(config: MeshConfig = ONE_DEVICE, model: ModelConfig = MODEL, micro: int = 1) -> Result:
    """The step of the common batch, compiled once per layout and model."""
    return _step_on(config, model, micro)


@functools.cache
def _step_on(config: MeshConfig, model: ModelConfig, micro: int) -> Result:
    return take_step(config, model=model, micro=micro)


def assert_same_gradients(got: Any, want: Any, rtol: float = GRADIENT_RTOL) -> None:
    """Every parameter's gradient, each against its own largest entry; names the worst."""
    errors = {}
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(jax.device_get(got)),
        jax.tree.leaves(jax.device_get(want)),
        strict=True,
    ):
        largest = np.abs(b).max()
        assert largest > 0, f"{jax.tree_util.keystr(path)} has no gradient: nothing is compared"
        errors[jax.tree_util.keystr(path)] = np.abs(a - b).max() / largest
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= rtol, f"{worst}: {errors[worst]:.1e} of its largest entry"


def assert_same_step(got: Result, want: Result) -> None:
    """Gradients, parameters, losses, norms, expert counts and router biases of two steps agree."""
    assert_same_gradients(got.state["opt"], want.state["opt"])
    assert_same_gradients(got.state["params"], want.state["params"])
    for name, value in want.metrics.items():
        if name == "counts_LE":
            np.testing.assert_array_equal(got.metrics[name], value)
        else:
            np.testing.assert_allclose(
                got.metrics[name], value, rtol=SCALAR_RTOL, atol=1e-6, err_msg=name
            )
    assert got.metrics["moe/dropped_tokens"] == 0
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(got.state["router_bias"]),
        jax.device_get(want.state["router_bias"]),
    )
