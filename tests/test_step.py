"""The train step and the evaluation against numpy, on one device.

Layouts: tests/test_layouts.py. Defects of other systems: tests/test_regressions.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model.loss
from model.blueprint import bind
from model.loss import cross_entropy_sum, greedy_ids, inputs_and_targets
from pallas_kernels.cross_entropy import linear as linear_cross_entropy
from sharding.config import MeshConfig
from tests.layout_helpers import (
    FP32,
    KNOBS,
    ONE_DEVICE,
    ONE_LAYER,
    TRAIN,
    layout_of,
    micro_batches,
    random_rows,
    random_segments,
    start,
)
from training.config import OptimizerConfig
from training.step import Trainer

CLIP = 0.25
"""Below the gradient norm of the first step."""
TRAINER = Trainer(
    ONE_LAYER,
    dataclasses.replace(
        TRAIN,
        ema_decay=0.9,
        optimizer=OptimizerConfig(clip_norm=CLIP, moment_dtype="float32"),
    ),
    FP32,
    layout_of(ONE_DEVICE),
)
BATCH = {"tokens": micro_batches(random_rows())}
KEPT = ("params", "router_bias", "opt", "ema")
BROKEN = {**KNOBS, "mtp_weight": np.float32(np.nan)}
"""Knobs that make the loss and every gradient NaN."""


OVERFLOWING = {**KNOBS, "mtp_weight": np.float32(1e30)}
"""Knobs that leave the loss finite while the squares in the gradient norm overflow."""


def fresh() -> dict:
    return jax.device_put(start(TRAINER), TRAINER.shardings)


def step(state, knobs=KNOBS):
    """One step, results on the host; jitted once for the whole file."""
    state, metrics = TRAINER.step(state, BATCH, knobs)
    return state, jax.device_get(metrics)


@functools.cache
def first_step():
    state, metrics = step(fresh())
    return start(TRAINER), jax.device_get(state), metrics


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))


def norm(tree) -> float:
    return np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in jax.tree.leaves(tree)))


def test_update_is_adamw_with_the_knobs_learning_rate():
    """From the moments the step stored; their values are checked in test_optimizer."""
    old, new, _ = first_step()
    adam = new["opt"][0]

    def check(path, before, after, mu, nu):
        # Bias correction of the first step: mu / 0.1 and nu / 0.05.
        direction = (mu / 0.1) / (np.sqrt(nu / 0.05) + 1e-8)
        decay = 0.0 if path[-1].key == "scale" else 0.1
        expected = before - KNOBS["learning_rate"] * (direction + decay * before)
        np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-6)

    jax.tree_util.tree_map_with_path(check, old["params"], new["params"], adam.mu, adam.nu)


def test_gradients_are_clipped_by_their_global_norm():
    """The metric is the norm before; what reaches the optimizer has the clip norm."""
    _, new, metrics = first_step()
    assert metrics["train/grad_norm"] > 2 * CLIP
    gradients = jax.tree.map(lambda mu: mu / 0.1, new["opt"][0].mu)
    np.testing.assert_allclose(norm(gradients), CLIP, rtol=1e-5)


def test_norm_metrics():
    old, new, metrics = first_step()
    np.testing.assert_allclose(metrics["train/param_norm"], norm(new["params"]), rtol=1e-5)
    change = jax.tree.map(np.subtract, new["params"], old["params"])
    np.testing.assert_allclose(metrics["train/update_norm"], norm(change), rtol=1e-4)


def test_ema_follows_the_updated_weights():
    old, new, _ = first_step()

    def check(before, after, average):
        np.testing.assert_allclose(average, 0.9 * before + 0.1 * after, rtol=1e-5, atol=1e-6)

    jax.tree.map(check, old["ema"], new["params"], new["ema"])


def test_load_metric_is_the_busiest_expert_of_the_worst_layer():
    _, _, metrics = first_step()
    loads = [counts.max() / counts.mean() for counts in metrics["counts_LE"]]
    assert len(loads) == 2
    np.testing.assert_allclose(metrics["moe/load_max_over_mean"], max(loads), rtol=1e-6)
    assert metrics["moe/dropped_tokens"] == 0


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_bias_moves_by_the_knobs_rate(rate):
    old, _, metrics = first_step()
    new, _ = step(fresh(), {**KNOBS, "bias_update_rate": np.float32(rate)})
    moved = [
        np.abs(after - before)
        for after, before in zip(
            jax.tree.leaves(jax.device_get(new["router_bias"])),
            jax.tree.leaves(old["router_bias"]),
            strict=True,
        )
    ]
    uneven = metrics["counts_LE"] != metrics["counts_LE"].mean(-1, keepdims=True)
    np.testing.assert_allclose(np.concatenate(moved), rate * uneven, atol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    """Two in a row, then a sound one: the total stays, the count in a row goes back to 0."""
    state, metrics = step(fresh(), BROKEN)
    assert np.isnan(metrics["train/grad_norm"])
    assert [int(state[k]) for k in ("step", "skipped", "skipped_in_row")] == [1, 1, 1]
    state, _ = step(state, BROKEN)
    assert [int(state[k]) for k in ("step", "skipped", "skipped_in_row")] == [2, 2, 2]
    assert_equal({k: state[k] for k in KEPT}, {k: start(TRAINER)[k] for k in KEPT})
    state, _ = step(state)
    assert [int(state[k]) for k in ("step", "skipped", "skipped_in_row")] == [3, 2, 0]
    # Sound again, and as if the broken ones had never been.
    _, new, _ = first_step()
    assert_equal({k: state[k] for k in KEPT}, {k: new[k] for k in KEPT})


def test_a_finite_loss_does_not_vouch_for_the_gradient():
    state, metrics = step(fresh(), OVERFLOWING)
    assert np.isfinite(metrics["train/mtp_loss"] * np.float32(1e30))
    assert np.isinf(metrics["train/grad_norm"])
    assert int(state["skipped"]) == 1
    assert_equal({k: state[k] for k in KEPT}, {k: start(TRAINER)[k] for k in KEPT})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_bad_weight_is_enough(value):
    """One entry of one weight: the loss, or only the gradient, is not finite."""
    host = start(TRAINER)
    host["params"]["head"]["kernel"][0, 0] = value
    kept = {k: jax.tree.map(np.copy, host[k]) for k in KEPT}
    state, _ = step(jax.device_put(host, TRAINER.shardings))
    assert int(state["skipped"]) == 1
    assert_equal({k: state[k] for k in KEPT}, kept)


def test_the_state_passed_in_is_consumed():
    """Donated: the update needs no second copy of parameters and moments."""
    old, _ = step(fresh())
    step(old)
    for path, array in jax.tree_util.tree_leaves_with_path(old):
        assert array.is_deleted(), jax.tree_util.keystr(path)


def test_knobs_are_values_not_constants():
    """Schedules change them every step; nothing is compiled again."""
    state, before = fresh(), TRAINER.step._cache_size()
    for i in range(3):
        knobs = {name: np.float32(0.01 * (i + 1)) for name in KNOBS}
        state, _ = step(state, knobs)
    assert before <= 1
    assert TRAINER.step._cache_size() == 1
    unmoved, metrics = step(fresh(), {**KNOBS, "learning_rate": np.float32(0)})
    assert metrics["train/update_norm"] == 0
    assert_equal(unmoved["params"], start(TRAINER)["params"])


def test_init_makes_what_the_state_promises():
    """Weights N(0, init_std), gains 1, biases and counters 0, the average equal to the weights."""
    trainer = dataclasses.replace(TRAINER, model=dataclasses.replace(ONE_LAYER, mtp_depth=0))
    state = trainer.init(jax.random.key(3))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), trainer.abstract_state)
    assert_equal(state["params"], state["ema"])
    rest = (state["router_bias"], state["opt"], state["step"], state["skipped"])
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(rest))
    for path, param in jax.tree_util.tree_leaves_with_path(jax.device_get(state["params"])):
        if path[-1].key == "scale":
            np.testing.assert_array_equal(param, 1)
        else:
            # Three standard errors of a standard deviation.
            np.testing.assert_allclose(param.std(), 0.2, rtol=3 / np.sqrt(2 * param.size))


def test_a_batch_that_does_not_split_is_refused():
    train = dataclasses.replace(TRAIN, batch_size=6)
    with pytest.raises(ValueError, match=r"has size 6, which does not split over data=4"):
        Trainer(ONE_LAYER, train, FP32, layout_of(MeshConfig(data=4)))


# Evaluation


@jax.jit
def hidden_states(params, bias, batch):
    """Of the main model and of the MTP module."""
    inputs, targets_BT, _ = inputs_and_targets(batch)
    output = bind(ONE_LAYER, params, bias)(inputs, FP32, next_ids_BT=targets_BT)
    return output.hidden_BTD, output.mtp_hidden[0]


@functools.cache
def evaluated(seed: int):
    """What `evaluate` sums, and full logits of the main model and of the MTP module, float64."""
    host = start(TRAINER)
    params, bias = host["params"], host["router_bias"]
    # The first four tokens win nearly always, so that drafts agree often.
    params["head"]["kernel"][:, 4:] *= 0.1
    batch = {"tokens": random_rows(seed), "segments": random_segments()}
    rows = {name: micro_batches(array) for name, array in batch.items()}
    sums = jax.device_get(TRAINER.evaluate(params, bias, rows))
    kernel = params["head"]["kernel"].astype(np.float64)
    main, ahead = (np.asarray(x) @ kernel for x in hidden_states(params, bias, batch))
    return sums, batch, main, ahead


def test_evaluation_is_the_cross_entropy_of_the_full_logits():
    """Summed over targets that lie in the same document as their input."""
    sums, batch, logits, _ = evaluated(0)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    tokens, segments = batch["tokens"], batch["segments"]
    nats = targets = 0
    for row in range(tokens.shape[0]):
        for i in range(tokens.shape[1] - 1):
            if segments[row, i] and segments[row, i] == segments[row, i + 1]:
                nats -= log_p[row, i, tokens[row, i + 1]]
                targets += 1
    assert sums["targets"] == targets
    np.testing.assert_allclose(sums["nats"], nats, rtol=1e-5)


def test_acceptance_compares_a_draft_with_the_main_models_own_choice():
    """The MTP module at i drafts token i + 2; the main model chooses it at i + 1."""
    shifted = []
    for seed in range(4):
        sums, batch, main, ahead = evaluated(seed)
        own_BT, draft_BT = main.argmax(-1), ahead.argmax(-1)
        segments = batch["segments"]
        drafts = (segments[:, :-2] == segments[:, 2:]) & (segments[:, :-2] > 0)
        assert sums["drafts"] == drafts.sum() > 50
        assert sums["accepted"] == ((draft_BT[:, :-1] == own_BT[:, 1:]) & drafts).sum() > 5
        shifted.append(((draft_BT[:, :-1] == own_BT[:, :-1]) & drafts).sum() - sums["accepted"])
    assert any(shifted), "the wrong position would count the same: the batches prove nothing"


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 1 << 20])
def test_chunks_of_logits_change_nothing(chunk_bytes, monkeypatch):
    """Loss, both gradients and greedy choices; one position, a few, or all of them at a time."""
    monkeypatch.setattr(model.loss, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(linear_cross_entropy, "PORTABLE_CHUNK_BYTES", chunk_bytes)
    rng = np.random.default_rng(0)
    x_BTD, w_DV = rng.standard_normal((2, 12, 8)), rng.standard_normal((8, 40))
    x_BTD, w_DV = jnp.asarray(x_BTD, jnp.float32), jnp.asarray(w_DV, jnp.float32)
    targets_BT = jnp.asarray(rng.integers(0, 40, (2, 12)), jnp.int32)
    weights_BT = jnp.asarray(rng.uniform(size=(2, 12)), jnp.float32)

    def direct(x_BTD, w_DV):
        log_p = jax.nn.log_softmax(x_BTD @ w_DV)
        chosen = jnp.take_along_axis(log_p, targets_BT[..., None], -1)[..., 0]
        return -jnp.sum(weights_BT * chosen)

    def ours(x_BTD, w_DV):
        return cross_entropy_sum(x_BTD, w_DV, targets_BT, weights_BT)

    got = jax.jit(jax.value_and_grad(ours, (0, 1)))(x_BTD, w_DV)
    want = jax.jit(jax.value_and_grad(direct, (0, 1)))(x_BTD, w_DV)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), got, want)
    np.testing.assert_allclose(jax.jit(ours)(x_BTD, w_DV), want[0], rtol=1e-6)
    np.testing.assert_array_equal(greedy_ids(x_BTD, w_DV), (x_BTD @ w_DV).argmax(-1))
