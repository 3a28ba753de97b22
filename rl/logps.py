"""Log-probabilities and entropy of the trainer, for the distribution that the sampler drew from.

That distribution is at the rollout's temperature and, where top-k and top-p cut it, over the kept
tokens alone: V3.2's Keep Sampling Mask (section 3.1). Otherwise sampler and policy would not have
the same actions, and their ratio would mean nothing. Kept tokens come as a list of at most top-k
ids: a mask over V3's vocabulary would be 16 kB per token.

Letters: B answers, T tokens, n chunks of C tokens, D hidden width, V vocabulary, K kept tokens.
"""

import jax
import jax.numpy as jnp


def logps_and_entropy(
    logits_BTV: jax.Array,
    ids_BT: jax.Array,
    temperature: float,
    kept_BTK: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of `ids_BT` and entropy of the distribution, nats, fp32 [B, T] each.

    Args:
      logits_BTV: logits of the token at the same position (not shifted).
      ids_BT: the drawn tokens.
      temperature: temperature of the rollout; ValueError unless above 0.
      kept_BTK: int32, the tokens that the sampler drew from, in any order, -1 beyond them; they are
        renormalised. None: all. A drawn token that is not among them has -inf: the sampler cannot
        have drawn it.
    """
    logits_BTV = logits_BTV.astype(jnp.float32) / _above_zero(temperature)
    chosen_BT = jnp.take_along_axis(logits_BTV, ids_BT[..., None], axis=-1)[..., 0]
    if kept_BTK is not None:
        kept = kept_BTK >= 0
        among_BT = ((kept_BTK == ids_BT[..., None]) & kept).any(-1)
        chosen_BT = jnp.where(among_BT, chosen_BT, -jnp.inf)
        logits_BTV = jnp.take_along_axis(logits_BTV, jnp.maximum(kept_BTK, 0), axis=-1)
        cut_BTV = jnp.where(kept, logits_BTV, -jnp.inf)
    else:
        kept, cut_BTV = True, logits_BTV
    log_sum_BT = jax.nn.logsumexp(cut_BTV, axis=-1)
    p_BTV = jnp.exp(cut_BTV - log_sum_BT[..., None])
    mean_logit_BT = (p_BTV * jnp.where(kept, logits_BTV, 0.0)).sum(-1)
    return chosen_BT - log_sum_BT, log_sum_BT - mean_logit_BT


def chunked_logps_and_entropy(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    ids_BT: jax.Array,
    temperature: float,
    chunk: int = 128,
    kept_BTK: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`logps_and_entropy` from hidden states, with the logits of `chunk` positions at a time.

    Backward computes them again, so no [B, T, V] array exists. hidden_BTD holds the state that
    predicts ids_BT (one position before it). Products accumulate in fp32.
    """
    cut, join = chunks(ids_BT.shape[1], chunk)

    @jax.checkpoint
    def one(hidden_BCD: jax.Array, ids_BC: jax.Array, kept_BCK: jax.Array | None):
        logits_BCV = jnp.einsum(
            "BCD,DV->BCV", hidden_BCD, head_DV, preferred_element_type=jnp.float32
        )
        return logps_and_entropy(logits_BCV, ids_BC, temperature, kept_BCK)

    xs = (cut(hidden_BTD), cut(ids_BT), None if kept_BTK is None else cut(kept_BTK))
    _, (logp_nBC, entropy_nBC) = jax.lax.scan(lambda _, x: (None, one(*x)), None, xs)
    return join(logp_nBC), join(entropy_nBC)


def chunks(T: int, chunk: int):
    """Functions that cut [B, T, ..] into [n, B, C, ..], C = `chunk` positions each, and join it."""
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; give a number of positions, 1 or more")
    n = -(-T // chunk)

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, n * chunk - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(len(x), n, chunk, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :T]

    return cut, join


def _above_zero(temperature: float) -> float:
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"the temperature of the rollout is {temperature}; log-probabilities need one above 0 "
            "(greedy answers have probability 1 and no ratio to learn from)"
        )
    return temperature
