"""The loss of policy optimisation: GRPO and what its successors changed, by option.

    loss = sum over b, t of  c_bt * (-w_bt * M_bt * surrogate_bt + beta * kl_bt) / denominator

    part              function            equation
    surrogate         surrogate           R1, eq. 1; DeepSeekMath, eq. 3; DAPO, eq. 10
                                          GSPO, eq. 7 and 14; CISPO: MiniMax-M1, eq. 4 and 5
    kl                kl_estimate         R1, eq. 2; DeepSeekMath, eq. 4; V3.2, eq. 7
    c, denominator    _token_share        R1, eq. 1; DAPO, eq. 12; Dr. GRPO, section 3.2
    w                 importance_weights  truncated and masked importance sampling, IcePop
    M                 off_policy_mask     V3.2, eq. 9

c is the aggregation, w the sampler's correction and M the off-policy mask: constants, all three.
Advantages and the answers that take part come from `rl/advantages.py`. The denominator is one of
the whole global batch and comes from the caller, so losses and gradients of micro batches add up to
those of the batch, however it is cut or laid over devices.

Letters: B answers, T tokens. All numbers fp32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rl.config import GRPOConfig
from rl.metrics import Largest, Mean, Metrics, answer_mean, masked_mean


class Answers(NamedTuple):
    """A batch of answers as they are known before the update; constants of the loss.

    Log-probabilities are of the tokens drawn, at the temperature that drew them. Positions where
    the mask is 0 are never read.
    """

    mask_BT: jax.Array
    """1 for tokens of the answer, its EOS included; 0 for prompt and padding."""
    advantages: jax.Array
    """[B], or [B, T] where tokens of an answer differ."""
    old_logp_BT: jax.Array | None = None
    """The policy at the time of the rollout: the trainer's numbers, or the sampler's (then the gap
    reads 0 and `mismatch` does nothing). None: it has not moved since, and the ratio is 1."""
    sampler_logp_BT: jax.Array | None = None
    """The sampler's own numbers; needed for `mismatch` and `off_policy_delta`."""
    ref_logp_BT: jax.Array | None = None
    """The reference; needed for `kl_coef`."""


def loss_denominator(mask_BT: jax.Array, config: GRPOConfig) -> jax.Array:
    """The divisor of the global batch's loss, fp32; at least 1.

    aggregation dapo: tokens. grpo, dr_grpo: answers with tokens. The mask is the whole batch's,
    after filters; it may have further axes in front, as [micro batches, B, T].
    """
    return jnp.maximum(_count(mask_BT, config), 1.0)


def policy_loss(
    logp_BT: jax.Array, answers: Answers, denominator: jax.Array, config: GRPOConfig
) -> tuple[jax.Array, Metrics]:
    """Loss of some rows of a batch, and metrics to be merged over all of them.

    Args:
      logp_BT: log-probabilities of the drawn tokens under the policy; the gradient flows here.
      answers: everything else about these rows.
      denominator: `loss_denominator` of the global batch that the rows are part of.
      config: the objective. aggregation grpo: R1, eq. 1; dapo: DAPO, eq. 12; dr_grpo: Dr. GRPO,
        section 3.2. Corrections act on the policy term and not on the KL (V3.2, eq. 8).

    Metrics: policy_loss and kl_loss (without beta; both as they enter the loss), kl (k3 to the
    reference), old_kl (k3 to the old policy), ratio, clip_low, clip_high (shares of tokens),
    answer_nll, answer_length, zero_advantage (share of answers); with sampler_logp_BT those of
    `sampler_gap`, and where they are on those of `importance_weights` and `off_policy_masked`
    (share of answers with a masked token).

    Raises ValueError for shapes or types that do not fit and for arrays that the options need.
    """
    _check(logp_BT, answers, config)
    logp_BT, answers = _cleaned(logp_BT, answers)
    mask_BT = answers.mask_BT
    constant_BT = jax.lax.stop_gradient(logp_BT)
    old_BT = constant_BT if answers.old_logp_BT is None else answers.old_logp_BT
    log_ratio_BT = logp_BT - old_BT
    effective_BT = effective_log_ratio(logp_BT, log_ratio_BT, mask_BT, config)
    term = surrogate(logp_BT, effective_BT, answers.advantages, config)
    factor_BT, metrics = _corrections(constant_BT, old_BT, answers, config)

    share_BT = _token_share(mask_BT, config)
    count = _count(mask_BT, config)
    policy = -(share_BT * factor_BT * term.objective_BT).sum()
    metrics |= {"policy_loss": Mean(policy, count)}
    metrics |= _policy_metrics(term, constant_BT, old_BT, effective_BT, answers)
    total = policy
    if answers.ref_logp_BT is not None:
        kl_BT = kl_estimate(logp_BT, answers.ref_logp_BT, log_ratio_BT, config.kl_estimator)
        kl = (share_BT * kl_BT).sum()
        metrics |= {"kl_loss": Mean(kl, count)}
        metrics |= {"kl": masked_mean(k3(constant_BT, answers.ref_logp_BT), mask_BT)}
        if config.kl_coef:  # not times 0: a reference far away would make it NaN
            total += config.kl_coef * kl
    return total / denominator, jax.tree.map(jax.lax.stop_gradient, metrics)


# ---- The policy term -----------------------------------------------------------------------------


class Surrogate(NamedTuple):
    """The term of every token, to be maximised."""

    objective_BT: jax.Array
    clipped_low_BT: jax.Array
    """Bool: the ratio was too low and the token has no gradient (cispo: a bounded weight)."""
    clipped_high_BT: jax.Array
    """Bool: the ratio was too high (dual clip included)."""


def effective_log_ratio(
    logp_BT: jax.Array, log_ratio_BT: jax.Array, mask_BT: jax.Array, config: GRPOConfig
) -> jax.Array:
    """log of the ratio that is clipped, [B, T], from the log of the token's own ratio.

    grpo and cispo: the token's own (R1, eq. 1). gspo: the mean of the answer, in every token
    (GSPO, eq. 7). gspo_token: the same value, with the gradient of the token's own log-probability
    (GSPO, eq. 14).
    """
    if config.ratio in ("grpo", "cispo"):
        return log_ratio_BT
    mean_B1 = answer_mean(log_ratio_BT, mask_BT)
    if config.ratio == "gspo":
        return jnp.broadcast_to(mean_B1, log_ratio_BT.shape)
    assert config.ratio == "gspo_token", config.ratio
    return jax.lax.stop_gradient(mean_B1) + logp_BT - jax.lax.stop_gradient(logp_BT)


def surrogate(
    logp_BT: jax.Array, log_ratio_BT: jax.Array, advantages_BT: jax.Array, config: GRPOConfig
) -> Surrogate:
    """min(ratio * A, clip(ratio) * A) of every token (R1, eq. 1), or what replaces it.

    log_ratio_BT is that of `effective_log_ratio`. With dual_clip = c the value for A < 0 is at
    least c * A (Ye et al. 2020, 1912.09729). cispo: constant clip(ratio) * A * log policy
    (MiniMax-M1, eq. 4 and 5), where every token keeps its gradient.
    """
    low, high = 1 - config.clip_low, 1 + config.clip_high
    ratio_BT = jnp.exp(jax.lax.stop_gradient(log_ratio_BT))
    if config.ratio == "cispo":
        weight_BT = jnp.clip(ratio_BT, low, high) * advantages_BT
        return Surrogate(weight_BT * logp_BT, ratio_BT < low, ratio_BT > high)
    below_BT = (advantages_BT < 0) & (ratio_BT < low)
    above_BT = (advantages_BT > 0) & (ratio_BT > high)
    bound_BT = jnp.where(below_BT, low, high)
    if config.dual_clip:
        beyond_BT = (advantages_BT < 0) & (ratio_BT > config.dual_clip)
        bound_BT = jnp.where(beyond_BT, config.dual_clip, bound_BT)
        above_BT |= beyond_BT
    # A min() of both products would give 0 * inf, NaN, where a ratio that is clipped anyway, or
    # has no advantage, overflows: the exponential is taken only where it is the value.
    constant_BT = below_BT | above_BT | (advantages_BT == 0)
    free_BT = jnp.exp(jnp.where(constant_BT, 0.0, log_ratio_BT))
    value_BT = jnp.where(constant_BT, bound_BT, free_BT)
    return Surrogate(value_BT * advantages_BT, below_BT, above_BT)


# ---- KL to the reference -------------------------------------------------------------------------


def k3(logp_BT: jax.Array, other_logp_BT: jax.Array) -> jax.Array:
    """other/policy - log(other/policy) - 1, nats, never negative (DeepSeekMath, eq. 4).

    Its mean under the policy is KL(policy, other); the gradient of its mean is not that of the KL.
    """
    d_BT = other_logp_BT - logp_BT
    return jnp.expm1(d_BT) - d_BT  # exp(d) - 1 loses all digits of a small d


def kl_estimate(
    logp_BT: jax.Array, ref_logp_BT: jax.Array, log_ratio_BT: jax.Array, estimator: str
) -> jax.Array:
    """KL to the reference per token, nats, fp32 [B, T], as a term of the loss.

    Args:
      logp_BT, ref_logp_BT: log-probabilities of the drawn tokens, policy and reference.
      log_ratio_BT: log(policy / policy that drew them), per token, for v3_2.
      estimator: k2, half the squared log-ratio, whose gradient under the policy is the KL's; k3
        (R1, eq. 2); v3_2, k3 times policy / old policy, unbiased in value and gradient also for
        answers of the old policy (V3.2, eq. 7). The plain log-ratio, k1, is none of them: as a term
        of the loss its expected gradient is zero.
    """
    if estimator == "k2":
        return 0.5 * jnp.square(logp_BT - ref_logp_BT)
    if estimator == "k3":
        return k3(logp_BT, ref_logp_BT)
    assert estimator == "v3_2", estimator
    return jnp.exp(log_ratio_BT) * k3(logp_BT, ref_logp_BT)


# ---- Averages ------------------------------------------------------------------------------------


def _count(mask_BT: jax.Array, config: GRPOConfig) -> jax.Array:
    """The part of the denominator that these rows bring."""
    tokens_B = mask_BT.astype(jnp.float32).sum(-1)
    if config.aggregation == "dapo":
        return tokens_B.sum()
    return (tokens_B > 0).astype(jnp.float32).sum()


def _token_share(mask_BT: jax.Array, config: GRPOConfig) -> jax.Array:
    """c: the weight of each token before the division by the denominator, [B, T]."""
    if config.aggregation == "dapo":
        return mask_BT
    if config.aggregation == "grpo":
        return mask_BT / jnp.maximum(mask_BT.sum(-1, keepdims=True), 1.0)
    assert config.aggregation == "dr_grpo", config.aggregation
    return mask_BT / config.dr_grpo_length


# ---- Corrections: the sampler, and policies that have moved --------------------------------------


def _corrections(
    logp_BT: jax.Array, old_BT: jax.Array, answers: Answers, config: GRPOConfig
) -> tuple[jax.Array, Metrics]:
    """w * M of every token, constant [B, T], with their metrics."""
    mask_BT, sampler_BT = answers.mask_BT, answers.sampler_logp_BT
    factor_BT = mask_BT
    if sampler_BT is None:
        return factor_BT, {}
    metrics = sampler_gap(old_BT, sampler_BT, mask_BT, config.gap_threshold)
    if config.mismatch != "none":
        w_BT, of_weights = importance_weights(old_BT, sampler_BT, mask_BT, config)
        factor_BT *= w_BT
        metrics |= of_weights
    if config.off_policy_delta:
        m_BT = off_policy_mask(
            logp_BT, sampler_BT, mask_BT, answers.advantages, config.off_policy_delta
        )
        factor_BT *= m_BT
        masked_B = ((m_BT == 0) & (mask_BT > 0)).any(-1).astype(jnp.float32)
        metrics |= {"off_policy_masked": masked_mean(masked_B, mask_BT.max(-1))}
    return factor_BT, metrics


def sampler_gap(
    trainer_logp_BT: jax.Array, sampler_logp_BT: jax.Array, mask_BT: jax.Array, threshold: float
) -> Metrics:
    """Distance between two log-probabilities of the drawn tokens, in nats.

    The trainer's are those of the weights that drew them. Metrics: `sampler_gap` (mean of the
    absolute difference), `sampler_gap_max`, `sampler_gap_share` (share of tokens beyond
    `threshold`) and `sampler_kl` (mean of log(sampler / trainer), an estimate of KL(sampler,
    trainer)).
    """
    d_BT = jnp.where(mask_BT > 0, sampler_logp_BT - trainer_logp_BT, 0.0)
    gap_BT = jnp.abs(d_BT)
    return {
        "sampler_gap": masked_mean(gap_BT, mask_BT),
        "sampler_gap_max": Largest(gap_BT.max()),
        "sampler_gap_share": masked_mean((gap_BT > threshold).astype(jnp.float32), mask_BT),
        "sampler_kl": masked_mean(d_BT, mask_BT),
    }


def importance_weights(
    old_logp_BT: jax.Array, sampler_logp_BT: jax.Array, mask_BT: jax.Array, config: GRPOConfig
) -> tuple[jax.Array, Metrics]:
    """Constant weights old policy / sampler of the policy term, fp32 [B, T], and metrics.

    mismatch_level token: of the token; sequence: the product over the answer, unbiased but of large
    variance for long ones. mismatch tis: min(w, cap) (Yao et al. 2025); mis: w where
    floor <= w <= cap, else 0 (Liu et al. 2025; with a floor and tokens: IcePop, Ling team 2025).

    Metrics: `mismatch_weight` (mean) and `mismatch_limited` (share of tokens whose weight was
    lowered to the cap or set to 0).
    """
    log_w_BT = jnp.where(mask_BT > 0, old_logp_BT - sampler_logp_BT, 0.0)
    if config.mismatch_level == "sequence":
        log_w_BT = jnp.broadcast_to(log_w_BT.sum(-1, keepdims=True), log_w_BT.shape)
    w_BT = jnp.exp(jax.lax.stop_gradient(log_w_BT))
    limited_BT = w_BT > config.mismatch_cap
    if config.mismatch == "tis":
        w_BT = jnp.minimum(w_BT, config.mismatch_cap)
    else:
        assert config.mismatch == "mis", config.mismatch
        limited_BT |= w_BT < config.mismatch_floor
        w_BT = jnp.where(limited_BT, 0.0, w_BT)
    return w_BT, {
        "mismatch_weight": masked_mean(w_BT, mask_BT),
        "mismatch_limited": masked_mean(limited_BT.astype(jnp.float32), mask_BT),
    }


def off_policy_mask(
    logp_BT: jax.Array,
    sampler_logp_BT: jax.Array,
    mask_BT: jax.Array,
    advantages_BT: jax.Array,
    delta: float,
) -> jax.Array:
    """V3.2's M (eq. 9), fp32 [B, T]: 0 where A < 0 and the answer's mean of
    log(sampler / policy) is above delta, else 1.

    Mistakes that the policy would hardly make any more teach it little and unsettle it. The
    policy is the current one, so the mask covers both its updates since and the sampler's numbers.
    """
    gone_B1 = answer_mean(sampler_logp_BT - logp_BT, mask_BT) > delta
    return jnp.where((advantages_BT < 0) & gone_B1, 0.0, 1.0)


# ---- Metrics and checks --------------------------------------------------------------------------


def _policy_metrics(
    term: Surrogate,
    logp_BT: jax.Array,
    old_BT: jax.Array,
    effective_BT: jax.Array,
    answers: Answers,
) -> Metrics:
    mask_BT = answers.mask_BT
    answered_B = mask_BT.max(-1)
    zero_B = (answers.advantages == 0).all(-1).astype(jnp.float32)
    return {
        "ratio": masked_mean(jnp.exp(effective_BT), mask_BT),
        "clip_low": masked_mean(term.clipped_low_BT.astype(jnp.float32), mask_BT),
        "clip_high": masked_mean(term.clipped_high_BT.astype(jnp.float32), mask_BT),
        "old_kl": masked_mean(k3(old_BT, logp_BT), mask_BT),
        "answer_nll": masked_mean(-logp_BT, mask_BT),
        "answer_length": masked_mean(mask_BT.sum(-1), answered_B),
        "zero_advantage": masked_mean(zero_B, answered_B),
    }


def _cleaned(logp_BT: jax.Array, answers: Answers) -> tuple[jax.Array, Answers]:
    """The mask in fp32, and 0 for everything outside of it: padding may hold NaN or infinity."""
    mask_BT = answers.mask_BT.astype(jnp.float32)

    def clean(x_BT: jax.Array) -> jax.Array:
        return jnp.where(mask_BT > 0, x_BT, 0.0)

    def constant(x_BT: jax.Array | None) -> jax.Array | None:
        return None if x_BT is None else jax.lax.stop_gradient(clean(x_BT))

    advantages = answers.advantages
    advantages_BT = advantages[:, None] if advantages.ndim == 1 else advantages
    cleaned = Answers(
        mask_BT,
        jax.lax.stop_gradient(clean(advantages_BT)),
        constant(answers.old_logp_BT),
        constant(answers.sampler_logp_BT),
        constant(answers.ref_logp_BT),
    )
    return clean(logp_BT), cleaned


def _check(logp_BT: jax.Array, answers: Answers, config: GRPOConfig) -> None:
    """Raise ValueError unless shapes and types fit and every array that `config` needs is there."""
    shape = logp_BT.shape
    if len(shape) != 2:
        raise ValueError(f"log-probabilities have shape {list(shape)}; give [B, T]")
    advantages = answers.advantages
    arrays = {"logp": logp_BT, "mask": answers.mask_BT, "old_logp": answers.old_logp_BT}
    arrays |= {"sampler_logp": answers.sampler_logp_BT, "ref_logp": answers.ref_logp_BT}
    for name, array in arrays.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {list(array.shape)}, logp has {list(shape)}")
        if array is not None and name != "mask" and array.dtype != jnp.float32:
            raise ValueError(
                f"{name} is {array.dtype}; ratios of nearly equal probabilities need float32"
            )
    if advantages.shape not in (shape, shape[:1]):
        raise ValueError(
            f"advantages have shape {list(advantages.shape)}; give {[shape[0]]} or {list(shape)}"
        )
    if advantages.ndim == 2 and config.ratio == "gspo":
        raise ValueError(
            "ratio='gspo' has one advantage per answer; for advantages of tokens there is "
            "ratio='gspo_token'"
        )
    if config.kl_coef and answers.ref_logp_BT is None:
        raise ValueError(f"kl_coef is {config.kl_coef}, but there is no ref_logp of a reference")
    if answers.sampler_logp_BT is None and (config.mismatch != "none" or config.off_policy_delta):
        raise ValueError(
            f"mismatch={config.mismatch!r} and off_policy_delta={config.off_policy_delta} compare "
            "with the sampler, but there is no sampler_logp"
        )
