"""Which experts a token goes to, with which weight, and how their load is kept even.

V3 report section 2.1.2, eq. 12-20; V2's variants differ by the config's fields only.
Letters: B batch, T sequence, E experts, G groups of M = E/G experts, K experts per token, L layers.
"""

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from sharding.partition import on_shards


def affinities(logits_BTE: jax.Array, config: ModelConfig) -> jax.Array:
    """Score of every expert for every token, fp32 (eq. 15)."""
    logits_BTE = logits_BTE.astype(jnp.float32)
    if config.scoring == "sigmoid":
        return jax.nn.sigmoid(logits_BTE)
    return jax.nn.softmax(logits_BTE, axis=-1)


def _limit_to_groups(choice_BTE: jax.Array, config: ModelConfig) -> jax.Array:
    """Remove the experts of all but the best groups (node-limited routing)."""
    G = config.num_expert_groups
    if config.topk_method == "greedy" or config.groups_per_token == G:
        return choice_BTE
    grouped_BTGM = choice_BTE.reshape(*choice_BTE.shape[:-1], G, -1)
    if config.topk_method == "noaux_tc":
        group_BTG = _top_k(grouped_BTGM, 2)[0].sum(-1)
        removed = -jnp.inf
    else:
        # V2 masks with 0, which no softmax score falls below.
        group_BTG = grouped_BTGM.max(-1)
        removed = 0.0
    kept_BTg = _top_k(group_BTG, config.groups_per_token)[1]
    kept_BTG = jax.nn.one_hot(kept_BTg, G, dtype=jnp.bool).any(-2)
    return jnp.where(kept_BTG[..., None], grouped_BTGM, removed).reshape(choice_BTE.shape)


def _top_k(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of the last axis and their places, of arrays [B, T, ...].

    On each device for its own tokens: XLA's partitioner would gather those of all devices.
    """
    names = ("batch", "seq", *(None,) * (x.ndim - 2))
    return on_shards(lambda x: tuple(jax.lax.top_k(x, count)), (names,), (names, names))(x)


def select(
    scores_BTE: jax.Array,
    bias_E: jax.Array | None,
    config: ModelConfig,
    replayed_BTK: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Chosen experts (int32 [B, T, K]) and their weights (fp32 [B, T, K]).

    The bias decides who is chosen and never enters a weight (eq. 16). `replayed_BTK` are choices
    made before, by the sampler of a rollout say: they are kept, with the weights of these scores
    (V3.2 report, section 3.1, Keep Routing); tokens whose entries are negative choose anew.
    """
    choice_BTE = jax.lax.stop_gradient(scores_BTE)
    if bias_E is not None:
        choice_BTE = choice_BTE + bias_E.astype(jnp.float32)
    ids_BTK = _top_k(_limit_to_groups(choice_BTE, config), config.experts_per_token)[1]
    if replayed_BTK is not None:
        ids_BTK = jnp.where(replayed_BTK < 0, ids_BTK, replayed_BTK)
    weights_BTK = jnp.take_along_axis(scores_BTE, ids_BTK, axis=-1)
    if config.normalize_topk:
        weights_BTK = weights_BTK / (weights_BTK.sum(-1, keepdims=True) + 1e-20)
    return ids_BTK, weights_BTK * config.routed_scaling_factor


def expert_counts(ids_BTK: jax.Array, valid_BT: jax.Array, num_experts: int) -> jax.Array:
    """Valid tokens routed to each expert, over the whole batch: fp32 [E], exact up to 2^24."""
    hits_BTKE = jax.nn.one_hot(ids_BTK, num_experts, dtype=jnp.float32)
    return jnp.einsum("BTKE,BT->E", hits_BTKE, valid_BT)


def balance_loss(scores_BTE: jax.Array, valid_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Sequence-wise balance loss without its factor alpha, summed over sequences (eq. 17-20).

    f counts the top K of the unbiased scores and carries no gradient; P is the mean of the scores
    normalised over all experts. Uniform routing gives 1 per sequence.
    """
    E, K = config.num_experts, config.experts_per_token
    tokens_B = jnp.maximum(valid_BT.sum(1), 1.0)
    top_BTK = _top_k(jax.lax.stop_gradient(scores_BTE), K)[1]
    hits_BTE = jax.nn.one_hot(top_BTK, E, dtype=jnp.float32).sum(2)
    f_BE = E / K * jnp.einsum("BTE,BT->BE", hits_BTE, valid_BT) / tokens_B[:, None]  # eq. 18
    share_BTE = scores_BTE / scores_BTE.sum(-1, keepdims=True)  # eq. 19
    p_BE = jnp.einsum("BTE,BT->BE", share_BTE, valid_BT) / tokens_B[:, None]  # eq. 20
    return jnp.sum(f_BE * p_BE)


def update_bias(bias_LE: jax.Array, counts_LE: jax.Array, rate: jax.Array) -> jax.Array:
    """b += rate * sign(mean load - load), with counts of the whole global batch (section 2.1.2)."""
    mean_L1 = counts_LE.mean(-1, keepdims=True)
    return bias_LE + rate * jnp.sign(mean_L1 - counts_LE)


def load_max_over_mean(counts_LE: jax.Array) -> jax.Array:
    """Load of the busiest expert over the mean load, per layer [L]; 1 is perfect balance."""
    return counts_LE.max(-1, initial=0.0) / jnp.maximum(counts_LE.mean(-1), 1e-9)
