"""Silent defects found in other systems that train this model, one named test each.

In every case the loss looked right. Tolerances: tests/layout_helpers.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import PRESETS, preset
from model.blueprint import blueprint
from model.moe import Router
from model.recipe import Recipe
from model.router import affinities, balance_loss, select, update_bias
from sharding.config import MeshConfig
from tests.layout_helpers import (
    FP32,
    KNOBS,
    LEAN,
    MODEL,
    ONE_DEVICE,
    ONE_LAYER,
    SCALAR_RTOL,
    TRAIN,
    assert_same_gradients,
    assert_same_step,
    layout_of,
    micro_batches,
    random_rows,
    random_segments,
    start,
    step_on,
    take_step,
)
from training.step import Trainer

CUBE = MeshConfig(fsdp=2, expert=2, tensor=2)
"""The step that is compared here is one that tests/test_layouts.py takes on every layout."""
RATE = KNOBS["bias_update_rate"]


def initial_bias() -> dict:
    return start(step_on().trainer)["router_bias"]


def bias_of(tree, part: str):
    return tree[part]["block"]["moe"]["router"]["bias"] if part == "mtp" else (
        tree[part]["moe"]["router"]["bias"]
    )  # fmt: skip


# Router bias


@pytest.mark.slow
def test_router_bias_is_the_same_on_every_device():
    """Elsewhere: counts were taken per device without a sum, so each device trained its own router
    while the bias claimed to be replicated, and a checkpoint kept one of 8 different values."""
    one = step_on().state["router_bias"]
    for part in ("moe_layers", "mtp"):
        bias = bias_of(step_on(CUBE).state["router_bias"], part)
        assert len(bias.addressable_shards) == 8
        for shard in bias.addressable_shards:
            np.testing.assert_array_equal(shard.data, bias_of(one, part))


def test_bias_update_is_the_sign_rule_for_every_layer_the_mtp_module_included():
    """Elsewhere: the update walked the main layers only, and an MTP module's bias stayed at 0."""
    counts_LE = step_on().metrics["counts_LE"]
    new, old = jax.device_get(step_on().state["router_bias"]), initial_bias()
    rows = {"moe_layers": slice(0, 2), "mtp": slice(2, 3)}
    for part, row in rows.items():
        expected = np.empty_like(bias_of(old, part))
        for layer, counts_E in enumerate(counts_LE[row]):
            for expert, count in enumerate(counts_E):
                sign = np.sign(counts_E.mean() - count)
                expected[layer, expert] = bias_of(old, part)[layer, expert] + RATE * sign
        np.testing.assert_array_equal(bias_of(new, part), expected)
        assert np.all(np.abs(expected - bias_of(old, part)).max(-1) > 0)


@pytest.mark.parametrize("name", [name for name in PRESETS if preset(name).model.num_moe_layers])
def test_bias_never_enters_the_combine_weights(name):
    """Elsewhere: for models whose *name* lacked a prefix, +5 on a bias made a weight of 1.9."""
    c = preset(name).model
    if c.topk_method != "noaux_tc":
        assert blueprint(c).router_bias == {}
        return
    logits_BTE = np.random.default_rng(0).standard_normal((1, 8, c.num_experts))
    scores_BTE = affinities(jnp.asarray(logits_BTE, jnp.float32), c)
    favoured = c.num_experts // 3
    bias_E = jnp.zeros(c.num_experts).at[favoured].set(5.0)
    plain_BTK, _ = select(scores_BTE, jnp.zeros(c.num_experts), c)
    ids_BTK, weights_BTK = select(scores_BTE, bias_E, c)
    assert np.all((ids_BTK == favoured).any(-1))
    assert not np.all((plain_BTK == favoured).any(-1))
    chosen = np.take_along_axis(np.asarray(scores_BTE, np.float64), np.asarray(ids_BTK), -1)
    expected = chosen / chosen.sum(-1, keepdims=True) * c.routed_scaling_factor
    np.testing.assert_allclose(weights_BTK, expected, rtol=1e-6)
    np.testing.assert_allclose(weights_BTK.sum(-1), c.routed_scaling_factor, rtol=1e-6)


def test_bias_has_no_gradient_no_optimizer_state_and_no_decay():
    """Elsewhere: the bias was a parameter, so the balance loss trained it and AdamW decayed it."""
    scores_BTE = jax.nn.sigmoid(jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 8))))
    valid_BT = jnp.ones((2, 4))

    def loss(bias_E):
        _, weights_BTK = select(scores_BTE, bias_E, MODEL)
        return weights_BTK[..., 0].sum() + balance_loss(scores_BTE, valid_BT, MODEL)

    np.testing.assert_array_equal(jax.grad(loss)(jnp.full(8, 0.1)), np.zeros(8))
    state = Trainer(MODEL, TRAIN, FP32, layout_of(ONE_DEVICE)).abstract_state
    for part in ("params", "opt"):
        paths = [
            jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state[part])
        ]
        assert paths
        assert not [path for path in paths if "bias" in path]


def test_norms_are_not_decayed_and_matrices_are():
    """Elsewhere: an empty mask by default decayed norm gains together with everything else."""
    trainer = Trainer(MODEL, TRAIN, FP32, layout_of(ONE_DEVICE))
    params = start(trainer)["params"]

    @jax.jit
    def idle_direction(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return trainer.optimizer.update(zeros, trainer.optimizer.init(params), params)[0]

    decay = TRAIN.optimizer.weight_decay
    norms = 0
    for path, direction in jax.tree_util.tree_leaves_with_path(idle_direction(params)):
        param = functools.reduce(lambda tree, key: tree[key.key], path, params)
        norm = path[-1].key == "scale"
        norms += norm
        np.testing.assert_allclose(direction, 0 if norm else decay * param, rtol=1e-6)
    # Four per kind of layer (two of them on latents), the MTP module's three, and the last one.
    assert norms == 3 * 4 + 3 + 1


# Gate precision


def test_gate_is_fp32_in_a_bf16_recipe():
    """Elsewhere: logits in bf16 by default. fp32 with exact products agrees with float64 to 1e-6;
    bf16's 8 bits would be off by 4e-3."""
    router = Router(MODEL, nnx.Rngs(0))
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 32)), jnp.bfloat16)
    logits_BTE = router.logits(x_BTD)
    assert logits_BTE.dtype == jnp.float32
    exact = np.asarray(x_BTD, np.float64) @ np.asarray(router.kernel[...], np.float64)
    np.testing.assert_allclose(logits_BTE, exact, atol=1e-6 * np.abs(exact).max())
    state = Trainer(MODEL, TRAIN, Recipe(dtype="bfloat16"), layout_of(ONE_DEVICE)).abstract_state
    assert {x.dtype for x in jax.tree.leaves(state["router_bias"])} == {jnp.dtype(jnp.float32)}


def test_a_bias_update_of_a_thousandth_is_not_rounded_away():
    """Elsewhere: bf16 biases, where 0.6016 + 0.001 = 0.6016 and training them stops."""
    rate = jnp.float32(0.001)
    assert jnp.bfloat16(0.6016) + rate.astype(jnp.bfloat16) == jnp.bfloat16(0.6016)
    old_LE = jnp.full((1, 8), 0.6016, jnp.float32)
    counts_LE = jnp.asarray([[0, 8, 4, 4, 4, 4, 4, 4]], jnp.float32)
    new_LE = update_bias(old_LE, counts_LE, rate)
    np.testing.assert_allclose(new_LE - old_LE, [[0.001, -0.001] + [0] * 6], atol=1e-7)
    # And selection sees it: expert 1 trails expert 0 by 0.0005 before the update.
    c = dataclasses.replace(MODEL, num_expert_groups=1, groups_per_token=1, experts_per_token=1)
    scores_BTE = jnp.full((1, 1, 8), 0.1).at[0, 0, :2].set(jnp.asarray([0.5005, 0.5]))
    assert select(scores_BTE, old_LE[0], c)[0].item() == 0
    assert select(scores_BTE, old_LE[0].at[1].add(rate), c)[0].item() == 1


# Balance loss


@pytest.mark.parametrize("K", [1, 4])
def test_balance_loss_is_1_at_uniform_load(K):
    """Elsewhere: K times the paper's scale (4.03 for K = 4), on a softmax over sigmoid + bias."""
    E = 8
    c = dataclasses.replace(MODEL, num_experts=E, num_expert_groups=1, groups_per_token=1,
                            experts_per_token=K)  # fmt: skip
    # Token t prefers experts t .. t + K - 1, so that every expert serves K of E tokens.
    preferred = (np.arange(E)[None, :] - np.arange(E)[:, None]) % E < K
    scores_TE = np.where(preferred, 0.9, 0.1).astype(np.float32)
    loss = balance_loss(jnp.asarray(np.stack([scores_TE] * 3)), jnp.ones((3, E)), c)
    np.testing.assert_allclose(loss, 3.0, rtol=1e-6)  # summed over 3 sequences
    skewed = balance_loss(jnp.asarray(scores_TE[:1][:, None]), jnp.ones((1, 1)), c)
    expected = E / K * K * 0.9 / (K * 0.9 + (E - K) * 0.1)  # all tokens on the first K experts
    np.testing.assert_allclose(skewed, expected, rtol=1e-6)


# Gradient accumulation


@functools.cache
def gradients_of(micro: int):
    """`loss, gradients = f(lambda, alpha, segments)` over the common rows in `micro` batches."""
    state = start(Trainer(ONE_LAYER, TRAIN, FP32, layout_of(ONE_DEVICE)))
    tokens = micro_batches(random_rows(), micro)

    @jax.jit
    def run(mtp_weight, balance_weight, segments):
        train = dataclasses.replace(TRAIN, balance_weight=balance_weight)
        trainer = Trainer(ONE_LAYER, train, FP32, layout_of(ONE_DEVICE))
        batch = {"tokens": tokens, "segments": segments}
        found = trainer.gradients(state, batch, {"mtp_weight": mtp_weight})
        return found.loss, found.metrics["train/loss"], found.grads

    def call(mtp_weight, balance_weight, segments=None):
        segments = random_segments() if segments is None else segments
        weights = np.float32(mtp_weight), np.float32(balance_weight)
        return jax.device_get(run(*weights, micro_batches(segments, micro)))

    return call


def test_auxiliary_losses_keep_their_gradient_under_accumulation():
    """Elsewhere: the total was divided by the number of tokens, normalised auxiliary terms with it;
    at 4M tokens a step MTP and balance loss were off, and the reported loss unchanged."""
    whole, cut = gradients_of(1), gradients_of(4)
    loss, main, _ = whole(0.3, 0.05)
    np.testing.assert_allclose(cut(0.3, 0.05)[:2], (loss, main), rtol=SCALAR_RTOL)
    assert_same_gradients(cut(0.3, 0.05)[2], whole(0.3, 0.05)[2])
    without = whole(0, 0)[2], cut(0, 0)[2]
    for weights, touched in (((1, 0), ("mtp",)), ((0, 1), ("moe_layers", "moe", "router"))):
        own = [
            jax.tree.map(np.subtract, f(*weights)[2], base)
            for f, base in zip((whole, cut), without, strict=True)
        ]
        for key in touched:
            own = [tree[key] for tree in own]
        # A difference of gradients of order 1: rounding is relative to those.
        assert_same_gradients(own[1], own[0], rtol=1e-3)


def test_uneven_documents_count_by_their_tokens():
    """Elsewhere: a mean of micro-batch means, where a short document weighs as much as a long one.
    Here: the sum over valid targets of all micro batches over their number."""
    segments = random_segments()
    targets = ((segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0)).sum(-1)
    means, counts = [], []
    for part in range(4):
        alone = np.zeros_like(segments)
        rows = slice(2 * part, 2 * part + 2)
        alone[rows] = segments[rows]
        means.append(gradients_of(1)(0, 0, alone)[1])
        counts.append(targets[rows].sum())
    total = gradients_of(4)(0, 0)[1]
    np.testing.assert_allclose(total, np.average(means, weights=counts), rtol=SCALAR_RTOL)
    assert abs(total - np.mean(means)) > 1e-3


# Layouts


def test_expert_parallelism_does_not_scale_expert_gradients():
    """Elsewhere: expert gradients were multiplied by the number of expert shards."""
    for part in ("moe_layers", "mtp"):
        got, want = (step_on(mesh).state["opt"][part] for mesh in (CUBE, ONE_DEVICE))
        if part == "mtp":
            got, want = got["block"], want["block"]
        assert_same_gradients(got["moe"], want["moe"])


def test_gradient_norm_is_that_of_all_gradients():
    """Elsewhere: the norm left out the experts, or was 8 times another layout's."""
    leaves = jax.tree.leaves(jax.device_get(step_on().state["opt"]))
    norm = np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in leaves))
    moe = step_on().state["opt"]["moe_layers"]["moe"]["w_down"]
    assert norm - np.sqrt(norm**2 - np.square(moe).sum()) > 1e-3 * norm
    for mesh in (CUBE, ONE_DEVICE):
        np.testing.assert_allclose(step_on(mesh).metrics["train/grad_norm"], norm, rtol=SCALAR_RTOL)


@pytest.mark.slow
def test_recomputation_does_not_count_tokens_twice():
    """Elsewhere: a counter written in the forward pass was written again by recomputation."""
    again = take_step(model=LEAN, recipe=Recipe(remat="full"))
    assert_same_step(again, step_on(model=LEAN))
    chosen = TRAIN.batch_size * TRAIN.seq_len * LEAN.experts_per_token
    np.testing.assert_array_equal(again.metrics["counts_LE"].sum(-1), [chosen] * 2)
