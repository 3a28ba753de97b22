"""Advantages from the rewards of a group of answers to one prompt, and which answers take part.

A reward that is NaN or infinite is unscorable: that answer's advantage is 0 and the others of its
group are compared without it. Equal rewards give exactly 0, not a rounding error divided by
another one. Compute advantages once over the whole batch of a rollout, before it is cut.

Letters: B answers, group after group; N groups; G answers of a group; P rewards of an answer; T
tokens.
"""

import jax
import jax.numpy as jnp

from rl.config import GRPOConfig
from rl.metrics import Mean, Metrics


def group_advantages(
    rewards_PB: jax.Array, weights_P: jax.Array, config: GRPOConfig
) -> tuple[jax.Array, Metrics]:
    """Advantage of every answer, fp32 [B], and metrics.

    Args:
      rewards_PB: P rewards of every answer; answers N * G + g, g = 0..G-1, belong to prompt N.
      weights_P: weight of each reward in the sum; a reward of weight 0 is not looked at.
      config: `advantage` decides between
        grpo     (r - mean) / (std + eps), std over G, not G - 1 (DeepSeekMath, section 4.1.2)
        dr_grpo  r - mean (Dr. GRPO, section 3.2; V3.2, section 3.1)
        rloo     r - mean of the other answers (RLOO, 2402.14740)
        gdpo     sum over P of weight * grpo's, divided by its std over the batch (2601.05242);
                 its mean over the batch is 0 already. A reward that is unscorable counts 0 there,
                 the answer's other rewards count as ever.

    Metrics: `zero_variance_groups` (share of groups whose advantages are all 0: they teach
    nothing), `unscorable_answers` (share), `advantage_abs` (mean).

    Raises ValueError where the shapes do not fit together or B is no multiple of group_size.
    """
    if rewards_PB.ndim != 2 or weights_P.shape != rewards_PB.shape[:1]:
        raise ValueError(
            f"rewards have shape {list(rewards_PB.shape)} and weights {list(weights_P.shape)}; "
            "give rewards [P, B] and weights [P]"
        )
    G = config.group_size
    if not rewards_PB.shape[1] or rewards_PB.shape[1] % G:
        raise ValueError(
            f"{rewards_PB.shape[1]} answers cannot be cut into groups of {G}; give every prompt "
            "group_size answers"
        )
    r_PNG = rewards_PB.astype(jnp.float32).reshape(rewards_PB.shape[0], -1, G)
    w_P11 = weights_P.astype(jnp.float32)[:, None, None]
    r_PNG = jnp.where(w_P11 == 0, 0.0, r_PNG)  # a reward that is only watched may be unscorable
    if config.advantage == "gdpo":
        known_PNG = jnp.isfinite(r_PNG)
        known_NG = (known_PNG & (w_P11 != 0)).any(0)
        a_PNG = _standardised(r_PNG, known_PNG, config.advantage_eps)
        sum_NG = (w_P11 * a_PNG).sum(0)
        std = jnp.sqrt(jnp.square(sum_NG).sum() / jnp.maximum(known_NG.sum(), 1))
        a_NG = sum_NG / (std + config.advantage_eps)
    else:
        r_NG = (w_P11 * r_PNG).sum(0)
        known_NG = jnp.isfinite(r_NG)
        if config.advantage == "grpo":
            a_NG = _standardised(r_NG, known_NG, config.advantage_eps)
        else:
            a_NG = _centred(r_NG, known_NG)
            if config.advantage == "rloo":
                n_N1 = known_NG.sum(-1, keepdims=True)
                a_NG *= n_N1 / jnp.maximum(n_N1 - 1, 1)  # r - mean of others, in terms of the mean
    useful_N = informative_groups(a_NG.reshape(-1), G)
    metrics: Metrics = {
        "zero_variance_groups": _share(~useful_N),
        "unscorable_answers": _share(~known_NG),
        "advantage_abs": Mean(jnp.abs(a_NG).sum(), jnp.float32(a_NG.size)),
    }
    return a_NG.reshape(-1), metrics


def informative_groups(advantages_B: jax.Array, group_size: int) -> jax.Array:
    """DAPO's dynamic sampling: bool [N], false for groups whose answers all got the same reward.

    (DAPO, eq. 11.) Such groups have advantages of exactly 0, which is what is looked at, so it
    holds for graded rewards and for groups with unscorable answers too.
    """
    return (advantages_B.reshape(-1, group_size) != 0).any(-1)


def filtered_mask(
    mask_BT: jax.Array, advantages_B: jax.Array, truncated_B: jax.Array, config: GRPOConfig
) -> tuple[jax.Array, Metrics]:
    """The mask with rows of zeros for answers that DAPO leaves out, fp32 [B, T], and metrics.

    Args:
      mask_BT: 1 for tokens of answers, their EOS included; 0 elsewhere.
      advantages_B: of `group_advantages`. An answer that is left out has counted in its group.
      truncated_B: bool, answers cut at the length limit, without an EOS.
      config: `dynamic_sampling` leaves out groups without any difference (DAPO, eq. 11);
        `overlong_filter` leaves out truncated answers (DAPO, section 3.4).

    An answer left out counts in no mean either, so take the denominator from the mask returned.
    Metrics: `truncated_answers` and `filtered_answers`, shares of all answers.
    """
    if truncated_B.shape != mask_BT.shape[:1] or advantages_B.shape != mask_BT.shape[:1]:
        raise ValueError(
            f"the mask has shape {list(mask_BT.shape)}, truncated {list(truncated_B.shape)}, "
            f"advantages {list(advantages_B.shape)}; give [B, T], [B] and [B]"
        )
    kept_B = jnp.ones(mask_BT.shape[0], bool)
    if config.dynamic_sampling:
        kept_B &= jnp.repeat(informative_groups(advantages_B, config.group_size), config.group_size)
    if config.overlong_filter:
        kept_B &= ~truncated_B
    metrics: Metrics = {
        "truncated_answers": _share(truncated_B),
        "filtered_answers": _share(~kept_B),
    }
    return mask_BT.astype(jnp.float32) * kept_B[:, None], metrics


def _centred(r_xG: jax.Array, known_xG: jax.Array) -> jax.Array:
    """r - mean over the known of the last axis; 0 where unknown and where all known are equal."""
    n_x1 = jnp.maximum(known_xG.sum(-1, keepdims=True), 1)
    r_xG = jnp.where(known_xG, r_xG, 0.0)
    mean_x1 = r_xG.sum(-1, keepdims=True) / n_x1
    highest_x1 = jnp.where(known_xG, r_xG, -jnp.inf).max(-1, keepdims=True)
    lowest_x1 = jnp.where(known_xG, r_xG, jnp.inf).min(-1, keepdims=True)
    return jnp.where(known_xG & (highest_x1 > lowest_x1), r_xG - mean_x1, 0.0)


def _standardised(r_xG: jax.Array, known_xG: jax.Array, eps: float) -> jax.Array:
    centred_xG = _centred(r_xG, known_xG)
    n_x1 = jnp.maximum(known_xG.sum(-1, keepdims=True), 1)
    std_x1 = jnp.sqrt(jnp.square(centred_xG).sum(-1, keepdims=True) / n_x1)
    return centred_xG / (std_x1 + eps)


def _share(x: jax.Array) -> Mean:
    return Mean(x.sum().astype(jnp.float32), jnp.float32(x.size))
