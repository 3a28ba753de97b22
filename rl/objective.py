"""The loss of policy optimisation: GRPO and what its successors changed, by option.

    loss = sum over b, t of  c_bt * (-w_bt * M_bt * surrogate_bt + beta * kl_bt) / denominator

with c the aggregation, w the sampler's correction and M the off-policy mask, all constants. The
denominator is one of the whole global batch and comes from the caller, so losses and gradients of
micro batches add up to those of the batch, however it is cut or laid over devices.

Letters: B answers, T tokens. All numbers fp32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rl.config import GRPOConfig
from rl.kl import k3, kl_estimate
from rl.metrics import Mean, Metrics, masked_mean
from rl.mismatch import importance_weights, off_policy_mask, sampler_gap
from rl.surrogate import Surrogate, effective_log_ratio, surrogate


class Answers(NamedTuple):
    """What is known of a batch of answers before the update; constants of the loss.

    All log-probabilities are of the tokens drawn, at the temperature that drew them. Positions
    where the mask is 0 are never read.
    """

    mask_BT: jax.Array
    """1 for tokens of the answer, its EOS included; 0 for prompt and padding."""
    advantages: jax.Array
    """[B], or [B, T] where tokens of an answer differ."""
    old_logp_BT: jax.Array | None = None
    """The policy at the time of the rollout: the trainer's numbers, or the sampler's (then the gap
    reads 0 and `mismatch` does nothing). None: it has not moved since, and the ratio is 1."""
    sampler_logp_BT: jax.Array | None = None
    """What the sampler itself computed; needed for `mismatch` and `off_policy_delta`."""
    ref_logp_BT: jax.Array | None = None
    """The reference; needed for `kl_coef`."""


def loss_denominator(mask_BT: jax.Array, config: GRPOConfig) -> jax.Array:
    """What the loss of the global batch is divided by, fp32; at least 1.

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
    check_answers(logp_BT, answers, config)
    mask_BT, logp_BT, answers = _cleaned(logp_BT, answers)
    constant_BT = jax.lax.stop_gradient(logp_BT)
    old_BT = constant_BT if answers.old_logp_BT is None else answers.old_logp_BT
    log_ratio_BT = logp_BT - old_BT
    effective_BT = effective_log_ratio(logp_BT, log_ratio_BT, mask_BT, config)
    term = surrogate(logp_BT, effective_BT, answers.advantages, config)
    factor_BT, metrics = _corrections(constant_BT, old_BT, mask_BT, answers, config)

    share_BT = _token_share(mask_BT, config)
    count = _count(mask_BT, config)
    policy = -(share_BT * factor_BT * term.objective_BT).sum()
    metrics |= {"policy_loss": Mean(policy, count)}
    metrics |= _policy_metrics(term, constant_BT, old_BT, effective_BT, mask_BT, answers)
    total = policy
    if answers.ref_logp_BT is not None:
        kl_BT = kl_estimate(logp_BT, answers.ref_logp_BT, log_ratio_BT, config.kl_estimator)
        kl = (share_BT * kl_BT).sum()
        metrics |= {"kl_loss": Mean(kl, count)}
        metrics |= {"kl": masked_mean(k3(constant_BT, answers.ref_logp_BT), mask_BT)}
        if config.kl_coef:  # not times 0: a reference far away would make it NaN
            total += config.kl_coef * kl
    return total / denominator, jax.tree.map(jax.lax.stop_gradient, metrics)


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


def _cleaned(logp_BT: jax.Array, answers: Answers) -> tuple[jax.Array, jax.Array, Answers]:
    """Mask in fp32, and everything else 0 outside of it: padding may hold NaN or infinity."""
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
    return mask_BT, clean(logp_BT), cleaned


def _corrections(
    logp_BT: jax.Array, old_BT: jax.Array, mask_BT: jax.Array, answers: Answers, config: GRPOConfig
) -> tuple[jax.Array, Metrics]:
    """w * M of every token, constant [B, T], with their metrics."""
    factor_BT = mask_BT
    sampler_BT = answers.sampler_logp_BT
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


def _policy_metrics(
    term: Surrogate, logp_BT: jax.Array, old_BT: jax.Array, effective_BT: jax.Array,
    mask_BT: jax.Array, answers: Answers,
) -> Metrics:  # fmt: skip
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


def check_answers(logp_BT: jax.Array, answers: Answers, config: GRPOConfig) -> None:
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
