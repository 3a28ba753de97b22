"""Attention of a few new tokens over a cache of keys and values that groups of queries share.

A slot holds a value, then a key: as the latent kernel reads a slot, whose first channels are the
value. A head of keys is to it a row of its own, and the queries are 0 on the value's channels. So a
step reads every key and value once, which is all that bounds it.

Letters: B rows, Q new tokens of a row, K heads of keys, G queries of a key head, N = K G heads,
S slots, H channels of a head, L = 2 H channels of a slot.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.decode import mla
from pallas_kernels.mosaic import Backend


def grouped_decode(
    q_BQNH: Array,
    cache_BKSL: Array,
    lengths_B: Array,
    *,
    scale: float,
    backend: Backend = "portable",
) -> Array:
    """Attention [B, Q, N, H] of a row's last Q tokens over its cache; arguments as of `mla_decode`.

    Query i of Q sees the slots below lengths[b] - (Q - 1 - i), of which there must be one. Slots
    from lengths[b] on may hold anything finite.
    """
    if backend not in ("mosaic", "emulated"):
        exact = backend == "reference"
        run = q_BQNH, cache_BKSL, lengths_B, scale, lax.Precision.HIGHEST if exact else None
        return portable(*run)
    (B, Q, N, H), (_, K, S, L) = q_BQNH.shape, cache_BKSL.shape
    q_BKQGH = q_BQNH.reshape(B, Q, K, N // K, H).swapaxes(1, 2)
    q_RQGL = jnp.pad(q_BKQGH, (*((0, 0),) * 4, (H, 0))).reshape(B * K, Q, N // K, L)
    o_RQGH = mla.mla_decode(
        q_RQGL,
        cache_BKSL.reshape(B * K, S, L),
        jnp.repeat(lengths_B, K),
        scale=scale,
        latent=H,
        backend=backend,
    )
    return o_RQGH.reshape(B, K, Q, N // K, H).swapaxes(1, 2).reshape(B, Q, N, H)


def unsupported(channels: int, heads: int, dtype: Any) -> str | None:
    """Reason why the kernel cannot take heads of this width, a clause; None if it can."""
    return mla.unsupported(channels, channels, heads, dtype)


def portable(
    q_BQNH: Array,
    cache_BKSL: Array,
    lengths_B: Array,
    scale: float,
    precision: lax.PrecisionLike = None,
) -> Array:
    """`grouped_decode` by two products over the whole cache, softmax in fp32."""
    (B, Q, N, H), (_, K, S, _) = q_BQNH.shape, cache_BKSL.shape
    values_BKSH, keys_BKSH = jnp.split(cache_BKSL, 2, axis=-1)
    q_BKMH = q_BQNH.reshape(B, Q, K, N // K, H).swapaxes(1, 2).reshape(B, K, -1, H)
    options = {"precision": precision, "preferred_element_type": jnp.float32}
    logits_BKMS = scale * jnp.einsum("BKMH,BKSH->BKMS", q_BKMH, keys_BKSH, **options)
    limits_BQ = lengths_B[:, None] - jnp.arange(Q)[::-1]
    limits_BM = jnp.repeat(limits_BQ, N // K, axis=1)
    seen_BMS = jnp.arange(S) < limits_BM[..., None]
    logits_BKMS = jnp.where(seen_BMS[:, None], logits_BKMS, -jnp.inf)
    p_BKMS = jnp.exp(logits_BKMS - logits_BKMS.max(axis=-1, keepdims=True))
    p_BKMS /= p_BKMS.sum(axis=-1, keepdims=True)
    o_BKMH = jnp.einsum(
        "BKMS,BKSH->BKMH", p_BKMS.astype(q_BQNH.dtype), values_BKSH, precision=precision
    )
    return o_BKMH.reshape(B, K, Q, N // K, H).swapaxes(1, 2).reshape(B, Q, N, H)
