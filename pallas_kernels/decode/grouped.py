"""Attention of a few new tokens over a cache of keys and values that groups of queries share.

The kernel reads slots that hold a value, then a key: as the latent kernel reads a slot, whose first
channels are the value. A head of keys is to it a row of its own, and the queries are 0 on the
value's channels. So a step reads every key and value once, which is all that bounds it. XLA reads
values and keys as arrays of their own, slots last: on a CPU both products then run along rows, and
neither operand is copied first.

Letters: B rows, Q new tokens of a row, T tokens, K heads of keys, G queries of a key head, N = K G
heads, S slots, H channels of a head, L = 2 H channels of a slot.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.decode import mla
from pallas_kernels.mosaic import Backend


def kept(k_BTKH: Array, v_BTKH: Array, backend: Backend) -> tuple[Array, ...]:
    """Keys and values of tokens as a cache holds them: for the kernel one array [B, K, T, L], for
    XLA values and keys [B, K, H, T]."""
    if slot_axis(backend) == 2:
        return (jnp.concatenate([v_BTKH, k_BTKH], axis=-1).swapaxes(1, 2),)
    return tuple(jnp.moveaxis(x_BTKH, 1, -1) for x_BTKH in (v_BTKH, k_BTKH))


def slot_axis(backend: Backend) -> int:
    """Axis of a cache's arrays that slots lie along."""
    return 2 if backend in ("mosaic", "emulated") else 3


def grouped_decode(
    q_BQNH: Array,
    cache: tuple[Array, ...],
    lengths_B: Array,
    *,
    scale: float,
    backend: Backend = "portable",
) -> Array:
    """Attention [B, Q, N, H] of a row's last Q tokens over its cache, which is laid out as `kept`
    lays it out; the other arguments as of `mla_decode`.

    Query i of Q sees the slots below lengths[b] - (Q - 1 - i), of which there must be one. Slots
    from lengths[b] on may hold anything finite.
    """
    if slot_axis(backend) == 3:
        exact = lax.Precision.HIGHEST if backend == "reference" else None
        v_BKHS, k_BKHS = cache
        return portable(q_BQNH, v_BKHS, k_BKHS, lengths_B, scale, exact)
    (cache_BKSL,) = cache
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
    v_BKHS: Array,
    k_BKHS: Array,
    lengths_B: Array,
    scale: float,
    precision: lax.PrecisionLike = None,
) -> Array:
    """`grouped_decode` by two products over the whole cache, softmax in fp32."""
    (B, Q, N, H), (_, K, _, S) = q_BQNH.shape, k_BKHS.shape
    q_BKMH = q_BQNH.reshape(B, Q, K, N // K, H).swapaxes(1, 2).reshape(B, K, -1, H)
    options = {"precision": precision, "preferred_element_type": jnp.float32}
    logits_BKMS = scale * jnp.einsum("BKMH,BKHS->BKMS", q_BKMH, k_BKHS, **options)
    limits_BQ = lengths_B[:, None] - jnp.arange(Q)[::-1]
    limits_BM = jnp.repeat(limits_BQ, N // K, axis=1)
    seen_BMS = jnp.arange(S) < limits_BM[..., None]
    logits_BKMS = jnp.where(seen_BMS[:, None], logits_BKMS, -jnp.inf)
    p_BKMS = jnp.exp(logits_BKMS - logits_BKMS.max(axis=-1, keepdims=True))
    p_BKMS /= p_BKMS.sum(axis=-1, keepdims=True)
    o_BKMH = jnp.einsum("BKMS,BKHS->BKMH", p_BKMS.astype(q_BQNH.dtype), v_BKHS, precision=precision)
    return o_BKMH.reshape(B, K, Q, N // K, H).swapaxes(1, 2).reshape(B, Q, N, H)
