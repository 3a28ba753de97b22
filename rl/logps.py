"""Log-probabilities and entropy of the trainer, for the distribution that the sampler drew from.

That distribution is at the rollout's temperature, and, where top-p or top-k cut it, over the kept
tokens only: V3.2's Keep Sampling Mask (section 3.1). Without both, sampler and policy do not even
have the same actions, and their ratio means nothing.

Letters: B answers, T tokens, C tokens of a chunk, D hidden width, V vocabulary.
"""

import jax
import jax.numpy as jnp


def kept_by_threshold(
    logits_BTV: jax.Array, ids_BT: jax.Array, least_BT: jax.Array, temperature: float
) -> jax.Array:
    """bool [B, T, V]: tokens whose probability is at least `least_BT`, and the token drawn.

    least_BT: the sampler's smallest kept probability at `temperature`, before renormalising; 0
    keeps all. It replaces a mask of V bits per token. The probabilities here are the trainer's, so
    tokens at the very edge may fall on the other side; exact only with equal logits.
    """
    p_BTV = jax.nn.softmax(logits_BTV.astype(jnp.float32) / _above_zero(temperature), axis=-1)
    drawn_BTV = jax.nn.one_hot(ids_BT, logits_BTV.shape[-1], dtype=bool)
    return jax.lax.stop_gradient(p_BTV >= least_BT[..., None]) | drawn_BTV


def logps_and_entropy(
    logits_BTV: jax.Array,
    ids_BT: jax.Array,
    temperature: float,
    kept_BTV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of `ids_BT` and entropy of the distribution, nats, fp32 [B, T] each.

    Args:
      logits_BTV: of the token at the same position (not shifted).
      temperature: of the rollout; ValueError unless above 0 (greedy answers have no ratio).
      kept_BTV: bool, the sampler's kept tokens; they are renormalised. None: all. A drawn token
        that is not kept has -inf: the sampler cannot have drawn it.
    """  # fmt: skip
    logits_BTV = logits_BTV.astype(jnp.float32) / _above_zero(temperature)
    kept = True if kept_BTV is None else kept_BTV
    cut_BTV = jnp.where(kept, logits_BTV, -jnp.inf)
    log_sum_BT = jax.nn.logsumexp(cut_BTV, axis=-1)
    chosen_BT = jnp.take_along_axis(cut_BTV, ids_BT[..., None], axis=-1)[..., 0]
    p_BTV = jnp.exp(cut_BTV - log_sum_BT[..., None])
    mean_logit_BT = (p_BTV * jnp.where(kept, logits_BTV, 0.0)).sum(-1)
    return chosen_BT - log_sum_BT, log_sum_BT - mean_logit_BT


def chunked_logps_and_entropy(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    ids_BT: jax.Array,
    temperature: float,
    chunk: int = 128,
    least_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The same from hidden states, with the logits of `chunk` positions at a time.

    Backward computes them again, so no [B, T, V] array exists. hidden_BTD holds the state that
    predicts ids_BT (one position before it). least_BT: see `kept_by_threshold`; None keeps all.
    Products accumulate in fp32.
    """  # fmt: skip
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; give a number of positions, 1 or more")
    B, T, _ = hidden_BTD.shape
    pieces = -(-T // chunk)

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, pieces * chunk - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(B, pieces, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(hidden_BCD: jax.Array, ids_BC: jax.Array, least_BC: jax.Array | None):
        logits_BCV = jnp.einsum(
            "BCD,DV->BCV", hidden_BCD, head_DV, preferred_element_type=jnp.float32
        )
        kept_BCV = None
        if least_BC is not None:
            kept_BCV = kept_by_threshold(logits_BCV, ids_BC, least_BC, temperature)
        return logps_and_entropy(logits_BCV, ids_BC, temperature, kept_BCV)

    xs = (cut(hidden_BTD), cut(ids_BT), None if least_BT is None else cut(least_BT))
    _, results = jax.lax.scan(lambda _, x: (None, one(*x)), None, xs)
    logp_BT, entropy_BT = (jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :T] for x in results)
    return logp_BT, entropy_BT


def _above_zero(temperature: float) -> float:
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"the temperature of the rollout is {temperature}; log-probabilities need one above 0 "
            "(greedy answers have probability 1 and no ratio to learn from)"
        )
    return temperature
