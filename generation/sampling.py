"""From logits to a token: temperature, top-k, top-p, and drawing.

Everything works on the distribution that results (`probabilities`), so that speculative decoding
can compare the distributions of draft and model. Logits that are not all finite give a distribution
of NaN, and that the token NO_TOKEN, which `check_drawn` makes an error of.

Letters: B rows, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np

from generation.config import Sampling

NO_TOKEN = -1
"""Drawn from what is no distribution."""


def probabilities(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Distribution that tokens are drawn from, fp32 [B, V]; one-hot at temperature 0; NaN where
    the logits are not all finite."""
    logits_BV = logits_BV.astype(jnp.float32)
    finite_B1 = jnp.isfinite(logits_BV).all(axis=-1, keepdims=True)
    return jnp.where(finite_B1, _probabilities(logits_BV, sampling), jnp.nan)


def _probabilities(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    if sampling.temperature == 0:
        return jax.nn.one_hot(jnp.argmax(logits_BV, axis=-1), logits_BV.shape[-1])
    p_BV = jax.nn.softmax(logits_BV / sampling.temperature, axis=-1)
    if 0 < sampling.top_k < p_BV.shape[-1]:
        p_BK, ids_BK = jax.lax.top_k(p_BV, sampling.top_k)
        cut_BV = jnp.put_along_axis(jnp.zeros_like(p_BV), ids_BK, p_BK, axis=-1, inplace=False)
        p_BV = _renormalised(cut_BV)
    if sampling.top_p < 1:
        ordered_BV = jnp.sort(p_BV, axis=-1, descending=True)
        before_BV = jnp.cumsum(ordered_BV, axis=-1) - ordered_BV
        kept_B = jnp.sum(before_BV < sampling.top_p, axis=-1, keepdims=True)
        least_B1 = jnp.take_along_axis(ordered_BV, kept_B - 1, axis=-1)
        p_BV = _renormalised(jnp.where(p_BV >= least_B1, p_BV, 0.0))
    return p_BV


def kept_tokens(p_BV: jax.Array, top_k: int) -> jax.Array:
    """What top-k and top-p left of a distribution: ids, the most probable first, -1 beyond them;
    int32 [B, top_k]."""
    p_BK, ids_BK = jax.lax.top_k(p_BV, top_k)
    return jnp.where(p_BK > 0, ids_BK, -1)


def _renormalised(p_BV: jax.Array) -> jax.Array:
    return p_BV / p_BV.sum(-1, keepdims=True)


def row_keys(
    key: jax.Array, streams_B: jax.Array, positions_B: jax.Array, purpose: int
) -> jax.Array:
    """A key per row and position [B]; a row's draws depend on its stream's number alone."""
    key = jax.random.fold_in(key, purpose)
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.vmap(jax.random.fold_in)(fold(key, streams_B), positions_B)


def draw(keys_B: jax.Array, p_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """One token per row from its distribution, int32 [B]; greedy needs no random numbers."""
    if sampling.temperature == 0:
        token_B = jnp.argmax(p_BV, axis=-1)
    else:
        draw_row = jax.vmap(lambda key, p: jax.random.categorical(key, jnp.log(p)))
        token_B = draw_row(keys_B, p_BV)
    return jnp.where(jnp.isnan(p_BV[:, 0]), NO_TOKEN, token_B).astype(jnp.int32)


def check_drawn(tokens: np.ndarray) -> np.ndarray:
    """The same tokens; FloatingPointError if one was drawn from logits that are not numbers."""
    if (tokens == NO_TOKEN).any():
        raise FloatingPointError(
            "the model's logits are not finite numbers, so no token can be drawn; its weights are "
            "damaged, or too large for --dtype. Score some tokens (generate.py score), or take an "
            "earlier checkpoint"
        )
    return tokens
