"""The policy objective against NumPy in float64, written from the papers' formulas with loops.

Its gradients are central differences of that; what a paper holds constant (stop-gradient) enters
the formulas as a second copy of the log-probabilities, which is not varied.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.config import PUBLISHED, GRPOConfig
from rl.metrics import Largest, merge, numbers
from rl.objective import Answers, kl_estimate, loss_denominator, policy_loss
from sharding.config import MeshConfig
from sharding.mesh import make_layout
from sharding.partition import batch_sharding

BASE = GRPOConfig(group_size=2, clip_low=0.2, clip_high=0.28)
LENGTH = 7.0
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def option(**changes) -> GRPOConfig:
    if changes.get("aggregation") == "dr_grpo":
        changes.setdefault("dr_grpo_length", int(LENGTH))
    return dataclasses.replace(BASE, **changes)


# ---- the formulas, from scratch -----------------------------------------------------------------


def policy_term(config, rho, s, rho_0, s_0, A, logp):
    """One token. rho: its ratio, s: its answer's (GSPO), both also as constants (_0)."""
    low, high = 1 - config.clip_low, 1 + config.clip_high
    if config.ratio == "cispo":
        return min(max(rho_0, low), high) * A * logp
    r = {"grpo": rho, "gspo": s, "gspo_token": s_0 * rho / rho_0}[config.ratio]
    value = min(r * A, min(max(r, low), high) * A)
    return max(value, config.dual_clip * A) if config.dual_clip and A < 0 else value


def kl_term(config, logp, ref, rho):
    d = ref - logp
    estimates = {"k2": d * d / 2, "k3": np.exp(d) - d - 1, "v3_2": rho * (np.exp(d) - d - 1)}
    return estimates[config.kl_estimator]


def correction(config, t, answer, old, sampler):
    if config.mismatch == "none":
        return 1.0
    over = answer if config.mismatch_level == "sequence" else [t]
    w = np.exp(sum(old[u] - sampler[u] for u in over))
    if config.mismatch == "tis":
        return min(w, config.mismatch_cap)
    return w if config.mismatch_floor <= w <= config.mismatch_cap else 0.0


def expected_loss(logp_BT, constant_BT, case, config) -> float:
    """The loss, where `constant_BT` is the policy wherever no gradient flows."""
    total, tokens, rows = 0.0, 0, 0
    for b in range(len(logp_BT)):
        answer = [t for t in range(logp_BT.shape[1]) if case["mask"][b, t]]
        if not answer:
            continue
        tokens, rows = tokens + len(answer), rows + 1
        logp, constant, ref = logp_BT[b], constant_BT[b], case["ref"][b]
        old = constant if case["old"] is None else case["old"][b]
        sampler, n = case["sampler"][b], len(answer)
        s = np.exp(sum(logp[t] - old[t] for t in answer) / n)
        s_0 = np.exp(sum(constant[t] - old[t] for t in answer) / n)
        gone = sum(sampler[t] - constant[t] for t in answer) / n > config.off_policy_delta
        for t in answer:
            A = case["advantages"][b] if case["advantages"].ndim == 1 else case["advantages"][b, t]
            rho, rho_0 = np.exp(logp[t] - old[t]), np.exp(constant[t] - old[t])
            term = policy_term(config, rho, s, rho_0, s_0, A, logp[t])
            term *= correction(config, t, answer, old, sampler)
            if config.off_policy_delta and A < 0 and gone:
                term = 0.0
            term -= config.kl_coef * kl_term(config, logp[t], ref[t], rho)
            total -= term / {"grpo": n, "dapo": 1, "dr_grpo": LENGTH}[config.aggregation]
    return total / max(1, tokens if config.aggregation == "dapo" else rows)


def expected_gradient(case, config, step=1e-6):
    logp_BT, gradient_BT = case["logp"], np.zeros(case["logp"].shape)
    for b, t in np.argwhere(case["mask"]):
        change_BT = np.zeros(logp_BT.shape)
        change_BT[b, t] = step
        up, down = (
            expected_loss(logp_BT + d, logp_BT, case, config) for d in (change_BT, -change_BT)
        )
        gradient_BT[b, t] = (up - down) / (2 * step)
    return gradient_BT


# ---- cases --------------------------------------------------------------------------------------


def make_case(seed, *, on_policy=False, per_token=False):
    """Six answers: prompts before and padding after them, one of one token, one of none."""
    rng = np.random.default_rng(seed)
    B, T = 6, 7
    mask_BT = np.zeros((B, T), bool)
    for row_T in mask_BT:
        start = rng.integers(0, 3)
        row_T[start : start + rng.integers(2, 5)] = True
    mask_BT[1], mask_BT[2] = np.arange(T) == 3, False
    old_BT = -rng.exponential(1.0, (B, T)) - 0.05
    moved = {"logp": 0.4, "sampler": 0.5, "ref": 0.6}
    case = {name: old_BT + rng.normal(0, width, (B, T)) for name, width in moved.items()}
    # fp32 values, so that both sides start from the same numbers
    case = {name: x.astype(np.float32).astype(float) for name, x in case.items()}
    case["old"] = None if on_policy else old_BT.astype(np.float32).astype(float)
    A = rng.normal(0, 1.5, (B, T) if per_token else B).astype(np.float32).astype(float)
    A[3] = 0.0
    return case | {"mask": mask_BT, "advantages": A}


def arrays(case, padding=np.nan):
    """fp32 arguments of `policy_loss`; outside of the mask stands what must not be read."""

    def place(x):
        if x is None:
            return None
        return jnp.asarray(np.where(case["mask"], x, padding) if x.ndim == 2 else x, jnp.float32)

    answers = Answers(
        jnp.asarray(case["mask"]), place(case["advantages"]), place(case["old"]),
        place(case["sampler"]), place(case["ref"]),
    )  # fmt: skip
    return place(case["logp"]), answers


def loss_and_gradient(case, config, padding=np.nan):
    logp_BT, answers = arrays(case, padding)
    denominator = loss_denominator(answers.mask_BT, config)
    value = jax.value_and_grad(policy_loss, has_aux=True)
    (loss, metrics), gradient_BT = value(logp_BT, answers, denominator, config)
    return loss, gradient_BT, metrics


def check(case, config):
    loss, gradient_BT, _ = loss_and_gradient(case, config)
    np.testing.assert_allclose(
        loss, expected_loss(case["logp"], case["logp"], case, config), **TOLERANCE
    )
    np.testing.assert_allclose(gradient_BT, expected_gradient(case, config), **TOLERANCE)


REACHING = 39
"""Seed of a case in which tokens lie on both sides of every limit; a test makes sure of it."""

SINGLE = [
    *({"ratio": r, "aggregation": a} for r, a in itertools.product(
        ("grpo", "gspo", "gspo_token", "cispo"), ("grpo", "dapo", "dr_grpo"))),
    {"kl_coef": 0.3, "kl_estimator": "k2", "aggregation": "dr_grpo"},
    {"kl_coef": 0.3, "kl_estimator": "k3", "aggregation": "grpo"},
    {"kl_coef": 0.3, "kl_estimator": "v3_2"},
    *({"mismatch": m, "mismatch_level": level, "mismatch_cap": 1.3} for m, level in
      itertools.product(("tis", "mis"), ("token", "sequence"))),
    {"mismatch": "mis", "mismatch_cap": 1.3, "mismatch_floor": 0.8},
    {"off_policy_delta": 0.05}, {"off_policy_delta": 0.05, "ratio": "gspo", "kl_coef": 0.1},
    {"dual_clip": 1.4}, {"dual_clip": 1.1, "ratio": "gspo"}, {"clip_low": 10.0, "clip_high": 10.0},
    {"clip_low": 0.0, "clip_high": 0.0},
]  # fmt: skip


@pytest.mark.parametrize(
    "changes", SINGLE, ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items())
)
def test_every_option(changes):
    check(make_case(REACHING), option(**changes))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_objectives(name):
    config = PUBLISHED[name]
    if config.dr_grpo_length:
        config = dataclasses.replace(config, dr_grpo_length=int(LENGTH))
    check(make_case(3, on_policy=True), config)


@st.composite
def configs(draw):
    """Any options together; no clip at 1 exactly, where an on-policy ratio has two slopes."""
    ratio = draw(st.sampled_from(["grpo", "gspo", "gspo_token", "cispo"]))
    mismatch = draw(st.sampled_from(["none", "tis", "mis"]))
    return option(
        ratio=ratio,
        aggregation=draw(st.sampled_from(["grpo", "dapo", "dr_grpo"])),
        clip_low=draw(st.sampled_from([0.05, 0.2, 10.0])),
        clip_high=draw(st.sampled_from([0.05, 0.28, 10.0])),
        dual_clip=0.0 if ratio == "cispo" else draw(st.sampled_from([0.0, 1.2, 3.0])),
        kl_coef=draw(st.sampled_from([0.0, 0.5])),
        kl_estimator=draw(st.sampled_from(["k2", "k3", "v3_2"])),
        mismatch=mismatch,
        mismatch_level=draw(st.sampled_from(["token", "sequence"])),
        mismatch_cap=draw(st.sampled_from([1.1, 2.0])),
        mismatch_floor=draw(st.sampled_from([0.0, 0.7])) if mismatch == "mis" else 0.0,
        off_policy_delta=draw(st.sampled_from([0.0, 0.1])),
    )


def any_options_together(config, seed, on_policy, per_token):
    per_token &= config.ratio != "gspo"
    check(make_case(seed, on_policy=on_policy, per_token=per_token), config)


ANY = (configs(), st.integers(0, 2**32), st.booleans(), st.booleans())
test_any_options_together = settings(max_examples=15)(given(*ANY)(any_options_together))
test_any_options_together_at_length = pytest.mark.slow(
    settings(max_examples=500)(given(*ANY)(any_options_together))
)


def test_the_case_of_single_options_reaches_every_limit():
    limited = option(mismatch="mis", mismatch_cap=1.3, mismatch_floor=0.8, off_policy_delta=0.05)
    sequence = option(ratio="gspo", mismatch="tis", mismatch_cap=1.3, mismatch_level="sequence")
    for config in (limited, sequence):
        shares = numbers(loss_and_gradient(make_case(REACHING), config)[2])
        names = ["clip_low", "clip_high", "mismatch_limited"]
        for name in names + ["off_policy_masked"] * (config.off_policy_delta > 0):
            assert 0 < shares[name] < 1, name


# ---- by hand ------------------------------------------------------------------------------------


def full(answers, advantages):
    """A case of `make_case`'s size (what is compiled, is compiled for that) whose first rows and
    tokens are given, by name, as lists of lists; the rest is empty."""
    case = {"advantages": np.zeros(6), "mask": np.zeros((6, 7), bool)}
    case["advantages"][: len(advantages)] = advantages
    for name, rows in answers.items():
        rows = None if rows is None else np.array(rows, float)
        case[name] = rows if rows is None else np.zeros((6, 7))
        if rows is not None:
            case[name][: rows.shape[0], : rows.shape[1]] = rows
            case["mask"][: rows.shape[0], : rows.shape[1]] = True
    return case


def one_token(ratio, advantage, config, **more):
    given = {"logp": -0.5 + np.log(ratio), "old": -0.5, "sampler": -0.5, "ref": -0.5} | more
    case = full({name: [[x]] for name, x in given.items()}, [advantage])
    loss, gradient_BT, metrics = loss_and_gradient(case, config)
    return float(loss), float(gradient_BT[0, 0]), numbers(metrics)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.1, 1, -1.1, -1.1, None),
        (2.0, 1, -1.28, 0, "clip_high"),  # already more probable than the clip lets it become
        (2.0, -1, 2.0, 2.0, None),
        (0.5, 1, -0.5, -0.5, None),
        (0.5, -1, 0.8, 0, "clip_low"),
        (0.9, -1, 0.9, 0.9, None),
    ],
)
def test_clip_on_both_sides_for_both_signs(ratio, advantage, loss, gradient, clipped):
    found = one_token(ratio, advantage, option())
    assert found[:2] == pytest.approx((loss, gradient), abs=1e-6)
    for name in ("clip_low", "clip_high"):
        assert found[2][name] == (name == clipped)


def test_a_ratio_on_the_bound_is_not_clipped():
    for advantage in (1, -1):
        found = one_token(1.0, advantage, option(clip_low=0.0, clip_high=0.0))
        assert found[:2] == pytest.approx((-advantage, -advantage))


def test_the_clip_of_r1_has_no_lower_side():
    r1 = dataclasses.replace(PUBLISHED["r1"], kl_coef=0.0)
    for ratio, advantage in [(1e-3, -1), (10.9, 1), (10.9, -1)]:
        found = one_token(ratio, advantage, r1)
        assert found[:2] == pytest.approx((-ratio * advantage,) * 2, rel=1e-5)
        assert found[2]["clip_low"] == found[2]["clip_high"] == 0
    assert one_token(12.0, 1, r1)[:2] == pytest.approx((-11.0, 0.0))


def test_dual_clip_bounds_what_a_negative_advantage_costs():
    assert one_token(5.0, -1, option(dual_clip=3.0))[:2] == pytest.approx((3.0, 0.0))
    assert one_token(2.0, -1, option(dual_clip=3.0))[:2] == pytest.approx((2.0, 2.0), rel=1e-5)
    assert one_token(5.0, 1, option(dual_clip=3.0))[:2] == pytest.approx((-1.28, 0.0))


@pytest.mark.parametrize("ratio", [3.0, 0.1])
def test_cispo_keeps_the_gradient_of_clipped_tokens(ratio):
    config = option(ratio="cispo")
    logp, weight = -0.5 + np.log(ratio), min(max(ratio, 0.8), 1.28)
    for advantage in (2.0, -2.0):
        loss, gradient, metrics = one_token(ratio, advantage, config)
        assert (loss, gradient) == pytest.approx(
            (-weight * advantage * logp, -weight * advantage), rel=1e-5
        )
        assert metrics["clip_high"] + metrics["clip_low"] == 1


def test_ratios_beyond_fp32_do_no_harm_where_they_are_clipped_or_have_no_advantage():
    far = {"logp": -0.5, "old": -300.5}
    for config in (option(), option(ratio="gspo"), option(ratio="cispo")):
        for advantage in (1, 0):
            loss, gradient, _ = one_token(1.0, advantage, config, **far)
            assert np.isfinite([loss, gradient]).all(), (config, advantage)
    assert one_token(1.0, 1, option(), **far)[:2] == pytest.approx((-1.28, 0.0))
    for level in ("token", "sequence"):
        tis = option(mismatch="tis", mismatch_level=level)
        assert one_token(1.0, 1, tis, sampler=-300.0)[:2] == pytest.approx((-2.0, -2.0))
        mis = option(mismatch="mis", mismatch_level=level)
        assert one_token(1.0, 1, mis, sampler=-300.0)[:2] == (0.0, 0.0)


def test_on_policy_every_ratio_has_the_plain_policy_gradient():
    case = make_case(5, on_policy=True)
    lengths_B = np.maximum(case["mask"].sum(-1), 1)
    plain_BT = -(case["advantages"] / lengths_B)[:, None] * case["mask"] / 5  # one row is empty
    for ratio in ("grpo", "gspo", "gspo_token", "cispo"):
        config = option(ratio=ratio, aggregation="grpo")
        np.testing.assert_allclose(loss_and_gradient(case, config)[1], plain_BT, **TOLERANCE)


def test_gspo_token_is_gspo_where_an_answer_has_one_advantage():
    case = make_case(6)
    token, whole = (
        loss_and_gradient(case, option(ratio=ratio, aggregation="grpo"))
        for ratio in ("gspo_token", "gspo")
    )
    np.testing.assert_allclose(token[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(token[1], whole[1], rtol=1e-5, atol=1e-7)


def test_the_off_policy_mask_takes_only_far_mistakes():
    sampler = [[-0.2, -0.8], [-0.2, -0.8], [-0.9, -0.9]]  # mean 0.5, 0.5 and 0.1 away
    same = {"logp": [[-1.0] * 2] * 3, "old": None, "ref": [[-1.3] * 2] * 3}
    case = full(same | {"sampler": sampler}, [-1, 1, -1])
    _, gradient_BT, metrics = loss_and_gradient(case, option(off_policy_delta=0.4))
    expected = [[0, 0], [-1 / 6] * 2, [1 / 6] * 2]
    np.testing.assert_allclose(gradient_BT[:3, :2], expected, atol=1e-7)
    assert numbers(metrics)["off_policy_masked"] == pytest.approx(1 / 3)
    # the KL term of a masked answer stays (V3.2, eq. 8)
    held = loss_and_gradient(case, option(off_policy_delta=0.4, kl_coef=1.0, kl_estimator="k2"))
    np.testing.assert_allclose(held[1][0, :2], [0.3 / 6] * 2, rtol=1e-5)


def test_an_empty_batch_has_loss_zero():
    case = make_case(7) | {"mask": np.zeros((6, 7), bool)}
    for config in (SPLIT, option(aggregation="dr_grpo"), option(ratio="gspo", aggregation="grpo")):
        loss, gradient_BT, _ = loss_and_gradient(case, config)
        assert loss == 0
        assert not gradient_BT.any()


# ---- KL -----------------------------------------------------------------------------------------


def test_kl_estimators_and_their_gradients_in_expectation():
    """Exact expectations over five tokens, drawn by the policy or by an old one."""
    rng = np.random.default_rng(8)
    z_V, ref_V, old_V = jax.nn.log_softmax(rng.normal(size=(3, 5)).astype(np.float32))

    def expected(z_V, drew_V, estimator):
        logp_V = jax.nn.log_softmax(z_V)
        return jnp.exp(drew_V) @ kl_estimate(logp_V, ref_V, logp_V - drew_V, estimator)

    def true_kl(z_V):
        logp_V = jax.nn.log_softmax(z_V)
        return jnp.exp(logp_V) @ (logp_V - ref_V)

    @jax.jit
    def everything(z_V):
        value = jax.value_and_grad(expected)
        cases = [(drew, e) for drew in ("policy", "old") for e in ("k2", "k3", "v3_2")]
        drew = {"policy": z_V, "old": old_V}
        return jax.value_and_grad(true_kl)(z_V), {c: value(z_V, drew[c[0]], c[1]) for c in cases}

    (kl, gradient_V), found = everything(z_V)
    for case in [("policy", "k3"), ("policy", "v3_2"), ("old", "v3_2")]:
        assert found[case][0] == pytest.approx(float(kl), rel=1e-5), case
    for case in [("policy", "k2"), ("policy", "v3_2"), ("old", "v3_2")]:
        np.testing.assert_allclose(found[case][1], gradient_V, atol=1e-6, err_msg=str(case))
    # of k3 it is that of the other KL, KL(reference, policy): biased even on-policy
    reverse_V = np.exp(z_V) - np.exp(ref_V)
    np.testing.assert_allclose(found["policy", "k3"][1], reverse_V, atol=1e-6)
    assert np.abs(found["old", "k3"][1] - gradient_V).max() > 1e-2


def test_small_kl_keeps_its_digits():
    d = np.float32(1e-4)
    found = kl_estimate(jnp.float32(0.0), jnp.float32(d), jnp.float32(0.0), "k3")
    assert found == pytest.approx(float(np.expm1(float(d)) - float(d)), rel=2e-3)


# ---- parts of a batch, meshes, metrics ----------------------------------------------------------

SPLIT = option(
    kl_coef=0.1, mismatch="tis", mismatch_cap=1.2, off_policy_delta=0.1, kl_estimator="v3_2"
)


@pytest.mark.parametrize(
    "aggregation",
    ["grpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dapo", "dr_grpo"))],
)
def test_micro_batches_over_devices_add_up_to_the_batch(aggregation):
    length = int(LENGTH) if aggregation == "dr_grpo" else 0
    config = dataclasses.replace(SPLIT, aggregation=aggregation, dr_grpo_length=length)
    case = make_case(9)
    loss, gradient_BT, whole = loss_and_gradient(case, config)
    order = np.array([5, 2, 0, 1, 4, 3])  # pairs, so cut within groups and with unlike tokens
    cut = jax.tree.map(lambda x: x[order].reshape(3, 2, *x.shape[1:]), arrays(case))
    layout = make_layout(MeshConfig(fsdp=2), jax.devices()[:2])
    rows = batch_sharding(layout, (None, "batch"))
    cut = jax.tree.map(lambda x: jax.device_put(x, rows), cut)

    @jax.jit
    def accumulate(logp_MBT, answers):
        denominator = loss_denominator(answers.mask_BT, config)
        value = jax.value_and_grad(policy_loss, has_aux=True)

        def body(totals, micro):
            (part, metrics), part_BT = value(*micro, denominator, config)
            return (totals[0] + part, merge(totals[1], metrics)), part_BT

        shapes = jax.eval_shape(lambda micro: value(*micro, denominator, config)[0], first(cut))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(body, zeros, (logp_MBT, answers))

    def first(tree):
        return jax.tree.map(lambda x: x[0], tree)

    (total, merged), gradient_MBT = accumulate(*cut)
    assert total == pytest.approx(float(loss), rel=1e-5)
    np.testing.assert_allclose(
        gradient_MBT.reshape(6, 7), gradient_BT[order], rtol=1e-5, atol=1e-8
    )  # fmt: skip
    assert numbers(merged) == pytest.approx(numbers(whole), rel=1e-5, abs=1e-7)
    of_loss = numbers(whole)
    expected = of_loss["policy_loss"] + config.kl_coef * of_loss["kl_loss"]
    assert expected == pytest.approx(float(loss), rel=1e-5)


def test_metrics_of_the_gap_between_sampler_and_trainer():
    case = make_case(11)
    metrics = loss_and_gradient(case, option(gap_threshold=0.4))[2]
    d = (case["sampler"] - case["old"])[case["mask"]]
    found = numbers(metrics)
    expected = {
        "sampler_gap": np.abs(d).mean(),
        "sampler_gap_max": np.abs(d).max(),
        "sampler_gap_share": (np.abs(d) > 0.4).mean(),
        "sampler_kl": d.mean(),
        "ratio": np.exp(case["logp"] - case["old"])[case["mask"]].mean(),
        "answer_nll": -case["logp"][case["mask"]].mean(),
        "answer_length": case["mask"].sum() / 5,
        "zero_advantage": 1 / 5,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert isinstance(metrics["sampler_gap_max"], Largest)
    nothing = loss_and_gradient(case | {"mask": np.zeros((6, 7), bool)}, option())[2]
    assert np.isnan(numbers(nothing)["ratio"])


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({"kl_coef": 0.1}, {"ref_logp_BT": None}, "no ref_logp"),
        ({"mismatch": "tis"}, {"sampler_logp_BT": None}, "no sampler_logp"),
        ({"off_policy_delta": 0.1}, {"sampler_logp_BT": None}, "no sampler_logp"),
        ({}, {"old_logp_BT": jnp.zeros((6, 8))}, r"old_logp has shape \[6, 8\]"),
        ({}, {"old_logp_BT": jnp.zeros((6, 7), jnp.bfloat16)}, "old_logp is bfloat16"),
        ({}, {"advantages": jnp.zeros(5)}, r"advantages have shape \[5\]; give \[6\] or \[6, 7\]"),
        ({"ratio": "gspo"}, {"advantages": jnp.zeros((6, 7))}, "gspo_token"),
    ],
)
def test_what_the_options_need(changes, fields, message):
    logp_BT, answers = arrays(make_case(12))
    with pytest.raises(ValueError, match=message):
        policy_loss(logp_BT, answers._replace(**fields), jnp.float32(1), option(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": "gpso"}, "ratio is 'gpso'; did you mean 'gspo'"),
        ({"advantage": "drgrpo"}, "did you mean 'dr_grpo'"),
        ({"aggregation": "tokens"}, "It is one of grpo, dapo, dr_grpo"),
        ({"kl_estimator": "k1"}, "It is one of k2, k3, v3_2"),
        ({"group_size": 1}, "give 2 or more"),
        ({"advantage_eps": 0.0}, "advantage_eps is 0.0"),
        ({"clip_high": -0.1}, "clip_high is -0.1"),
        ({"clip_low": float("nan")}, "clip_low is nan"),
        ({"clip_high": float("inf")}, "clip_high is inf"),
        ({"dual_clip": 0.5}, "dual_clip is 0.5; give a number above 1"),
        ({"dual_clip": 3.0, "ratio": "cispo"}, "dual_clip does nothing"),
        ({"dr_grpo_length": 100}, "others do not use it"),
        ({"aggregation": "dr_grpo", "dr_grpo_length": 0}, "dr_grpo_length is 0"),
        ({"dr_grpo_length": -1}, "give a number of tokens"),
        ({"mismatch_floor": 0.5}, "only 'mis'"),
        ({"mismatch": "mis", "mismatch_floor": 3.0}, "no weight lies between"),
    ],
)
def test_options_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**changes)
