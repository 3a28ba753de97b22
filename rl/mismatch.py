"""Sampler against trainer: the same weights, other numbers. Measured, weighted away, or masked.

Letters: B answers, T tokens.
"""

import jax
import jax.numpy as jnp

from rl.config import GRPOConfig
from rl.metrics import Largest, Metrics, masked_mean
from rl.surrogate import answer_mean


def sampler_gap(
    trainer_logp_BT: jax.Array, sampler_logp_BT: jax.Array, mask_BT: jax.Array, threshold: float
) -> Metrics:
    """How far two log-probabilities of the drawn tokens are apart, in nats.

    Give the trainer's for the weights that drew them. Metrics: `sampler_gap` (mean of the absolute
    difference), `sampler_gap_max`, `sampler_gap_share` (share of tokens beyond `threshold`) and
    `sampler_kl` (mean of log(sampler / trainer): an estimate of KL(sampler, trainer)).
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
    """V3.2's M (eq. 9), fp32 [B, T]: 0 where A < 0 and mean over the answer of
    log(sampler / policy) > delta, else 1.

    Mistakes that the policy would hardly make any more teach it little and unsettle it. The
    policy is the current one, so the mask covers both its updates since and the sampler's numbers.
    """  # fmt: skip
    gone_B1 = answer_mean(sampler_logp_BT - logp_BT, mask_BT) > delta
    return jnp.where((advantages_BT < 0) & gone_B1, 0.0, 1.0)
