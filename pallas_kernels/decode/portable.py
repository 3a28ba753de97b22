"""Absorbed latent attention by XLA, on any device, and its definition in fp32.

Shape letters: as in `mla.py`.
"""

import jax.numpy as jnp
from jax import Array, lax


def portable(
    q_BQNL: Array,
    cache: Array,
    lengths_B: Array,
    block_table_BP: Array | None,
    scale: float,
    latent: int,
    precision: lax.PrecisionLike = None,
) -> Array:
    """`mla_decode` [B, Q, N, C] by two products over the whole cache, softmax in fp32.

    The rotary key takes part in the sum too: a slice of the cache would be a copy of it. Heads and
    queries are one axis in both products, or XLA:CPU transposes the cache for each.
    """
    (B, Q, N, L), cache_BSL = q_BQNL.shape, _rows(cache, block_table_BP)
    q_BML = q_BQNL.reshape(B, Q * N, L)
    s_BMS = scale * jnp.einsum(
        "BML,BSL->BMS", q_BML, cache_BSL, precision=precision, preferred_element_type=jnp.float32
    )
    limits_BQ1 = lengths_B[:, None, None] - jnp.arange(Q)[::-1, None]
    seen_BQS = jnp.arange(cache_BSL.shape[1]) < limits_BQ1
    s_BQNS = jnp.where(seen_BQS[:, :, None], s_BMS.reshape(B, Q, N, -1), -jnp.inf)
    peak_BQN1 = jnp.maximum(s_BQNS.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    p_BQNS = jnp.exp(s_BQNS - peak_BQN1)
    p_BQNS /= jnp.maximum(p_BQNS.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    p_BMS = p_BQNS.astype(q_BQNL.dtype).reshape(B, Q * N, -1)
    o_BML = jnp.einsum("BMS,BSL->BML", p_BMS, cache_BSL, precision=precision)
    return o_BML.reshape(B, Q, N, L)[..., :latent]


def reference(
    q_BQNL: Array,
    cache: Array,
    lengths_B: Array,
    block_table_BP: Array | None,
    scale: float,
    latent: int,
) -> Array:
    """`mla_decode` [B, Q, N, C] in fp32; slots beyond a row's length may hold NaN."""
    cache_BSL = _rows(cache, block_table_BP)
    filled_BS = jnp.arange(cache_BSL.shape[1]) < lengths_B[:, None]
    cache_BSL = jnp.where(filled_BS[..., None], cache_BSL.astype(jnp.float32), 0)
    exact = q_BQNL.astype(jnp.float32), cache_BSL, lengths_B, None
    return portable(*exact, scale, latent, lax.Precision.HIGHEST).astype(q_BQNL.dtype)


def _rows(cache: Array, block_table_BP: Array | None) -> Array:
    """The cache [B, S, L]; from pages, if there is a table of them."""
    if block_table_BP is None:
        return cache
    pages_BP = jnp.clip(block_table_BP, 0, cache.shape[0] - 1)
    return cache[pages_BP].reshape(len(block_table_BP), -1, cache.shape[2])
