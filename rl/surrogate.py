"""The policy term: ratio of the policy to the old one, times the advantage, clipped.

Letters: B answers, T tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rl.config import GRPOConfig


class Surrogate(NamedTuple):
    """The term of every token, to be maximised."""

    objective_BT: jax.Array
    clipped_low_BT: jax.Array
    """Bool: the ratio was too low and the token has no gradient (cispo: a bounded weight)."""
    clipped_high_BT: jax.Array
    """Bool: the ratio was too high (dual clip included)."""


def answer_mean(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean over the tokens of each answer, [B, 1]; 0 for an answer without tokens."""
    lengths_B1 = jnp.maximum(mask_BT.sum(-1, keepdims=True), 1.0)
    return (x_BT * mask_BT).sum(-1, keepdims=True) / lengths_B1


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
