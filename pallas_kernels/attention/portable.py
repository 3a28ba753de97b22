"""Expanded latent attention by XLA, on any device, and its definition in fp32.

Shape letters: as in `mla.py`; Q queries of a block.
"""

import jax
import jax.numpy as jnp
from jax import Array

QUERY_BLOCK = 128
MAX_BLOCKS = 16


def portable(
    q_BTNH: Array, kv_BTNW: Array, k_rope_BTR: Array, start_BT: Array | None, scale: float
) -> Array:
    """`mla_attention` [B, T, N, V] in blocks of queries, each against the keys up to its own end.

    About half of the products of the full square are never computed, and no T x T array exists.
    The rotary key is copied to every head: XLA:CPU computes one product per block faster than two.
    """
    T = q_BTNH.shape[1]
    k_BTNH, v_BTNV = _keys_values(q_BTNH, kv_BTNW, k_rope_BTR)
    block = max(QUERY_BLOCK, -(-T // MAX_BLOCKS))
    outputs = []
    for first in range(0, T, block):
        end = min(first + block, T)
        logits_BNQS = scale * jnp.einsum(
            "BQNH,BSNH->BNQS",
            q_BTNH[:, first:end],
            k_BTNH[:, :end],
            preferred_element_type=jnp.float32,
        )
        p_BNQS = masked_softmax(logits_BNQS, pairs(start_BT, first, end)).astype(v_BTNV.dtype)
        outputs.append(jnp.einsum("BNQS,BSNV->BQNV", p_BNQS, v_BTNV[:, :end]))
    return jnp.concatenate(outputs, axis=1)


def reference(
    q_BTNH: Array, kv_BTNW: Array, k_rope_BTR: Array, start_BT: Array | None, scale: float
) -> Array:
    """`mla_attention` [B, T, N, V] over all pairs at once, in fp32."""
    q32, kv32, k_rope32 = (x.astype(jnp.float32) for x in (q_BTNH, kv_BTNW, k_rope_BTR))
    k_BTNH, v_BTNV = _keys_values(q32, kv32, k_rope32)
    with jax.default_matmul_precision("highest"):
        logits_BNTS = scale * jnp.einsum("BTNH,BSNH->BNTS", q32, k_BTNH)
        seen = pairs(start_BT, 0, q_BTNH.shape[1])
        p_BNTS = jax.nn.softmax(jnp.where(seen, logits_BNTS, -jnp.inf), axis=-1)
        return jnp.einsum("BNTS,BSNV->BTNV", p_BNTS, v_BTNV).astype(q_BTNH.dtype)


def _keys_values(q_BTNH: Array, kv_BTNW: Array, k_rope_BTR: Array) -> tuple[Array, Array]:
    """Whole keys [B, T, N, H] and values [B, T, N, V] of every head."""
    R = k_rope_BTR.shape[2]
    P = q_BTNH.shape[3] - R
    k_rope_BTNR = jnp.broadcast_to(k_rope_BTR[:, :, None], (*kv_BTNW.shape[:3], R))
    return jnp.concatenate([kv_BTNW[..., :P], k_rope_BTNR], axis=-1), kv_BTNW[..., P:]


def pairs(start_BT: Array | None, first: int, end: int) -> Array:
    """Which keys [0, end) the rows [first, end) see [B or 1, 1, Q, S]."""
    key_S, row_Q1 = jnp.arange(end), jnp.arange(first, end)[:, None]
    pairs_QS = key_S <= row_Q1
    if start_BT is None:
        return pairs_QS[None, None]
    return (pairs_QS & (key_S >= start_BT[:, first:end, None]))[:, None]


@jax.custom_vjp
def masked_softmax(logits_BNQS: Array, mask: Array) -> Array:
    """Softmax over the last axis of the entries where `mask`, others 0; no row may be all masked.

    For the backward pass it keeps its result and nothing else: logits, mask and exponentials of
    every layer would be the largest arrays of training at short sequences.
    """
    return jax.nn.softmax(jnp.where(mask, logits_BNQS, -jnp.inf), axis=-1)


def _masked_softmax_fwd(logits_BNQS: Array, mask: Array):
    p_BNQS = masked_softmax(logits_BNQS, mask)
    return p_BNQS, p_BNQS


def _masked_softmax_bwd(p_BNQS: Array, dp_BNQS: Array):
    mean_BNQ1 = jnp.sum(p_BNQS * dp_BNQS, axis=-1, keepdims=True)
    return p_BNQS * (dp_BNQS - mean_BNQ1), None


masked_softmax.defvjp(_masked_softmax_fwd, _masked_softmax_bwd)
