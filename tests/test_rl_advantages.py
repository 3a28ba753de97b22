"""Advantages, filters and the trainer's log-probabilities, against float64 NumPy and by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.command import parse
from generation.config import Sampling
from generation.sampling import kept_tokens, probabilities
from rl.advantages import filtered_mask, group_advantages, informative_groups
from rl.config import PUBLISHED, GRPOConfig, RLConfig
from rl.logps import chunked_logps_and_entropy, logps_and_entropy
from rl.metrics import numbers

G, N = 4, 3
NAN = float("nan")
KINDS = ("grpo", "dr_grpo", "rloo", "gdpo")


def options(kind: str, **more) -> GRPOConfig:
    return GRPOConfig(group_size=G, advantage=kind, **more)


compiled_advantages = jax.jit(group_advantages, static_argnums=2)
compiled_logps = jax.jit(logps_and_entropy, static_argnums=2)


def advantages(rewards, kind, weights=(1.0, 1.0)):
    """Advantages [B] of rewards [B] or [2, B], and metrics as numbers.

    One reward is given to the compiled function twice, at half of its weight.
    """
    rewards_PB = np.broadcast_to(np.array(rewards, np.float32), (2, np.shape(rewards)[-1]))
    weights_P = np.array(weights, np.float32) / (1 if np.ndim(rewards) == 2 else 2)
    values_B, metrics = compiled_advantages(rewards_PB, weights_P, options(kind))
    return np.asarray(values_B), numbers(metrics)


# ---- the formulas, from scratch -----------------------------------------------------------------


def expected_group(rewards, kind, eps=1e-4):
    """Advantages of one group: rewards of one kind, NaN where unscorable."""
    known = [r for r in rewards if math.isfinite(r)]
    result = []
    for i, r in enumerate(rewards):
        others = [x for j, x in enumerate(rewards) if j != i and math.isfinite(x)]
        if not math.isfinite(r) or not others:
            result.append(0.0)
        elif kind == "rloo":
            result.append(r - sum(others) / len(others))
        else:
            mean = sum(known) / len(known)
            std = math.sqrt(sum((x - mean) ** 2 for x in known) / len(known))
            result.append((r - mean) / (std + eps) if kind == "grpo" else r - mean)
    return result


def expected_advantages(rewards_PB, weights_P, kind, eps=1e-4):
    rewards_PNG = np.array(rewards_PB, float).reshape(len(weights_P), -1, G)
    if kind != "gdpo":
        sums_NG = sum(w * r for w, r in zip(weights_P, rewards_PNG, strict=True))
        return np.array([expected_group(list(r), kind) for r in sums_NG]).reshape(-1)
    parts = [
        w * np.array([expected_group(list(r), "grpo") for r in rewards_NG])
        for w, rewards_NG in zip(weights_P, rewards_PNG, strict=True)
    ]
    total_B = sum(parts).reshape(-1)
    scorable_B = np.isfinite(rewards_PNG).any(0).reshape(-1)
    std = total_B[scorable_B].std() if scorable_B.any() else 0.0
    return total_B / (std + eps)


# ---- advantages ---------------------------------------------------------------------------------


@given(
    st.lists(
        st.sampled_from([0.0, 1.0, 0.25, -2.5, 0.75, NAN]), min_size=2 * G * N, max_size=2 * G * N
    ),
    st.sampled_from(KINDS),
    st.sampled_from([(1.0, 1.0), (0.5, 2.0), (1.0, -1.0)]),
)
def test_advantages_are_the_formulas(rewards, kind, weights):
    rewards_PB = np.array(rewards, np.float32).reshape(2, -1)
    found_B, metrics = advantages(rewards_PB, kind, weights)
    expected_B = expected_advantages(rewards_PB.astype(float), weights, kind)
    np.testing.assert_allclose(found_B, expected_B, rtol=1e-5, atol=1e-5)
    groups = found_B.reshape(N, G)
    np.testing.assert_allclose(groups.sum(-1), 0.0, atol=1e-4)
    assert metrics["zero_variance_groups"] == pytest.approx((groups == 0).all(-1).mean())
    assert metrics["advantage_abs"] == pytest.approx(np.abs(found_B).mean(), rel=1e-5)


def test_advantages_by_hand():
    rewards = [1, 0, 0, 0, 1, 1, 0, 0, 5, 5, 5, 5]
    third = 1 / math.sqrt(3)
    cases = {
        "grpo": [3 * third, -third, -third, -third, 1, 1, -1, -1],
        "dr_grpo": [0.75, -0.25, -0.25, -0.25, 0.5, 0.5, -0.5, -0.5],
        "rloo": [1, -1 / 3, -1 / 3, -1 / 3, 2 / 3, 2 / 3, -2 / 3, -2 / 3],
    }
    for kind, expected in cases.items():
        found_B, metrics = advantages(rewards, kind)
        np.testing.assert_allclose(found_B, [*expected, 0, 0, 0, 0], rtol=3e-4)
        assert metrics["zero_variance_groups"] == pytest.approx(1 / 3)
        assert metrics["unscorable_answers"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_give_exactly_zero(kind):
    """The fp32 mean of sixteen rewards of 0.1 is not 0.1, and large ones err by more than the eps:
    divided by its own std, that error would look like an advantage."""
    config = GRPOConfig(group_size=16, advantage=kind)
    rewards_1B = np.repeat(np.float32([0.1, 0.7, 1e6 / 3]), 16)[None]
    found_B, metrics = compiled_advantages(rewards_1B, np.ones(1, np.float32), config)
    assert (np.asarray(found_B) == 0).all()
    assert numbers(metrics)["zero_variance_groups"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_unscorable_answers_get_zero_and_leave_the_others_alone(kind):
    rewards = [1, 0, NAN, float("inf"), NAN, NAN, NAN, 1, NAN, NAN, NAN, NAN]
    found_B, metrics = advantages(rewards, kind)
    assert found_B[0] == -found_B[1] > 0.4
    assert (found_B[2:] == 0).all()  # nothing to compare a lone answer with
    assert metrics["unscorable_answers"] == pytest.approx(9 / 12)
    assert metrics["zero_variance_groups"] == pytest.approx(2 / 3)


def test_a_reward_of_weight_zero_is_only_watched():
    rewards = [[1, 0, 0, 1] * N, [NAN] * G * N]
    for kind in KINDS:
        found_B, metrics = advantages(rewards, kind, [1.0, 0.0])
        size = {"dr_grpo": 1 / 2, "rloo": 2 / 3}.get(kind, 1.0)
        assert found_B == pytest.approx([size, -size, -size, size] * N, rel=1e-3)
        assert metrics["unscorable_answers"] == 0


def test_gdpo_tells_apart_what_the_sum_mixes_up():
    """A rare reward and a common one of the same size: by the sum, their answers are equals."""
    rewards = [[1, 0, 0, 0] + [0] * 8, [0, 1, 1, 0] + [0] * 8]
    by_sum, _ = advantages(rewards, "grpo")
    by_part, _ = advantages(rewards, "gdpo")
    assert by_sum[0] == by_sum[1] > by_sum[3]
    assert by_part[0] > by_part[1] > by_part[3]
    assert by_part.std() == pytest.approx(1, rel=1e-3)


def test_shapes_of_rewards():
    with pytest.raises(ValueError, match="10 answers cannot be cut into groups of 4"):
        advantages([0.0] * 10, "grpo")
    with pytest.raises(ValueError, match=r"weights \[1\]; give rewards \[P, B\]"):
        advantages([[0.0] * G] * 2, "grpo", [1.0])


# ---- filters ------------------------------------------------------------------------------------


def test_filters_leave_out_dull_groups_and_cut_answers():
    advantages_B = jnp.array([1.0, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1e-30])
    assert informative_groups(advantages_B, G).tolist() == [True, False, True]
    truncated_B = jnp.arange(12) == 1
    mask_BT = jnp.ones((12, 2), bool)

    def kept(**flags):
        config = options("grpo", **flags)
        mask, metrics = filtered_mask(mask_BT, advantages_B, truncated_B, config)
        shares = numbers(metrics)
        assert shares["truncated_answers"] == pytest.approx(1 / 12)
        assert shares["filtered_answers"] == pytest.approx(1 - np.asarray(mask)[:, 0].mean())
        return [b for b in range(12) if mask[b].all()]

    assert kept() == list(range(12))
    assert kept(overlong_filter=True) == [0, *range(2, 12)]
    assert kept(dynamic_sampling=True) == [*range(4), *range(8, 12)]
    assert kept(dynamic_sampling=True, overlong_filter=True) == [0, 2, 3, 8, 9, 10, 11]
    with pytest.raises(ValueError, match=r"truncated \[11\]"):
        filtered_mask(mask_BT, advantages_B, truncated_B[:11], options("grpo"))


# ---- log-probabilities --------------------------------------------------------------------------


def make_logits(seed=0, B=2, T=5, V=11, K=4):
    """Logits, drawn tokens, and the K tokens that each was drawn from."""
    rng = np.random.default_rng(seed)
    logits_BTV = rng.normal(0, 2, (B, T, V)).astype(np.float32)
    kept_BTK = rng.permuted(np.broadcast_to(np.arange(V), (B, T, V)), axis=-1)[..., :K].copy()
    ids_BT = kept_BTK[..., 1].copy()
    kept_BTK[0, :, 2:] = -1
    return logits_BTV, ids_BT, kept_BTK


def expected_logps(logits_BTV, ids_BT, temperature, kept_BTK):
    logp_BT, entropy_BT = np.zeros(ids_BT.shape), np.zeros(ids_BT.shape)
    for b, t in np.ndindex(*ids_BT.shape):
        kept = kept_BTK[b, t][kept_BTK[b, t] >= 0]
        p = np.exp(logits_BTV[b, t, kept].astype(float) / temperature)
        p /= p.sum()
        logp_BT[b, t] = np.log(p[kept == ids_BT[b, t]][0])
        entropy_BT[b, t] = -(p * np.log(p)).sum()
    return logp_BT, entropy_BT


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("cut", [False, True])
def test_log_probabilities_and_entropy(temperature, cut):
    logits_BTV, ids_BT, kept_BTK = make_logits()
    every_BTK = np.broadcast_to(np.arange(11), (2, 5, 11))
    expected = expected_logps(logits_BTV, ids_BT, temperature, kept_BTK if cut else every_BTK)
    found = compiled_logps(logits_BTV, ids_BT, temperature, kept_BTK if cut else None)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6)


def test_gradient_with_tokens_left_out_is_finite_and_stays_inside():
    logits_BTV, ids_BT, kept_BTK = make_logits(1)
    kept_BTK[1, 0] = [-1, ids_BT[1, 0], -1, -1]  # nothing else could be drawn

    def total(logits_BTV):
        logp_BT, entropy_BT = logps_and_entropy(logits_BTV, ids_BT, 0.7, jnp.asarray(kept_BTK))
        return (logp_BT + entropy_BT).sum()

    gradient_BTV = np.asarray(jax.jit(jax.grad(total))(logits_BTV))
    kept_BTV = (kept_BTK[..., None] == np.arange(11)).any(2)
    assert np.isfinite(gradient_BTV).all()
    assert (gradient_BTV[~kept_BTV] == 0).all()
    assert (gradient_BTV[kept_BTV & (kept_BTV.sum(-1, keepdims=True) > 1)] != 0).all()
    np.testing.assert_allclose(gradient_BTV.sum(-1), 0, atol=1e-5)


def test_a_drawn_token_that_was_not_kept_has_no_probability():
    logits_BTV, ids_BT, kept_BTK = make_logits(2)
    kept_BTK[0, 0, 1] = -1
    logp_BT, _ = compiled_logps(logits_BTV, ids_BT, 1.0, kept_BTK)
    assert np.isneginf(logp_BT[0, 0])
    assert np.isfinite(np.asarray(logp_BT).ravel()[1:]).all()


def test_the_distribution_is_the_samplers():
    """Tokens taken from the sampler's own distribution give back its numbers."""
    sampling = Sampling(1.2, top_k=6, top_p=0.7)
    logits_BTV, _, _ = make_logits(3)

    @jax.jit
    def sampler(logits_BTV):
        p_BTV = jnp.stack([probabilities(x, sampling) for x in logits_BTV])
        return p_BTV, jnp.stack([kept_tokens(p_TV, sampling.top_k) for p_TV in p_BTV])

    sampled_BTV, kept_BTK = map(np.asarray, sampler(logits_BTV))
    assert kept_BTK.shape == (2, 5, 6)
    assert (kept_BTK == -1).any()
    for kept_K, p_V in zip(kept_BTK.reshape(-1, 6), sampled_BTV.reshape(-1, 11), strict=True):
        assert sorted(kept_K[kept_K >= 0]) == list(np.flatnonzero(p_V))
    logp_BT, entropy_BT = compiled_logps(
        logits_BTV, sampled_BTV.argmax(-1), sampling.temperature, kept_BTK
    )
    np.testing.assert_allclose(logp_BT, np.log(sampled_BTV.max(-1)), rtol=1e-5, atol=1e-6)
    plogp_BTV = sampled_BTV * np.log(np.where(sampled_BTV > 0, sampled_BTV, 1))
    np.testing.assert_allclose(entropy_BT, -plogp_BTV.sum(-1), rtol=1e-5, atol=1e-6)


def test_chunks_give_the_same_numbers_and_gradient():
    rng = np.random.default_rng(5)
    hidden_BTD = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32)
    head_DV = jnp.asarray(rng.normal(size=(4, 11)), jnp.float32)
    _, ids_BT, kept_BTK = make_logits(5)

    def whole(hidden_BTD, head_DV):
        logits_BTV = jnp.einsum("BTD,DV->BTV", hidden_BTD, head_DV)
        return logps_and_entropy(logits_BTV, ids_BT, 0.7, kept_BTK)

    def cut(hidden_BTD, head_DV):
        return chunked_logps_and_entropy(hidden_BTD, head_DV, ids_BT, 0.7, 2, kept_BTK)

    @jax.jit
    def both(hidden_BTD, head_DV):
        def value(f):
            results, backward = jax.vjp(f, hidden_BTD, head_DV)
            seeds_BT = jnp.arange(10.0).reshape(2, 5)
            return *results, *backward((seeds_BT, 0.3 * seeds_BT))

        return value(cut), value(whole)

    for x, y in zip(*both(hidden_BTD, head_DV), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, float("inf")])
def test_temperatures_without_log_probabilities(temperature):
    with pytest.raises(ValueError, match="need one above 0"):
        logps_and_entropy(jnp.zeros((1, 1, 2)), jnp.zeros((1, 1), int), temperature)


# ---- published objectives -----------------------------------------------------------------------


def test_a_published_objective_is_chosen_and_options_override_it():
    chosen = ["--config", "r1_zero", "--rl.objective-of", "r1"]
    assert parse(chosen).run.rl.objective == PUBLISHED["r1"]
    found = parse([*chosen, "--rl.objective.kl-coef", "0.01", "--rl.prompts-per-step", "4"]).run.rl
    assert found.objective == dataclasses.replace(PUBLISHED["r1"], kl_coef=0.01)
    assert (found.objective_of, found.prompts_per_step) == ("r1", 4)
    with pytest.raises(SystemExit):
        parse(["--config", "r1_zero", "--rl.objective-of", "r2"])
    with pytest.raises(ValueError, match="did you mean 'dapo'"):
        RLConfig().following("dapoo")
    with pytest.raises(ValueError, match="has the defaults; in Python"):
        RLConfig(objective_of="r1")


def test_published_objectives_differ_from_r1_only_where_their_papers_do():
    def differences(name):
        mine, r1 = (dataclasses.asdict(PUBLISHED[n]) for n in (name, "r1"))
        return {field for field in mine if mine[field] != r1[field]} - {"clip_low", "clip_high"}

    assert differences("v3_2") == {"advantage", "kl_estimator", "off_policy_delta"}
    assert differences("dapo") == {"dynamic_sampling", "overlong_filter", "aggregation", "kl_coef"}
    assert differences("gspo") == {"ratio", "kl_coef"}
    assert differences("deepseekmath") == {"group_size", "kl_coef"}
