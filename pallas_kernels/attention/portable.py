"""Expanded latent attention by XLA, on any device, and its definition in fp32.

Shape letters: as in `mla.py`; Q queries of a block.
"""

from collections.abc import Iterator
from functools import partial

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
    For the backward pass each block keeps its probabilities and nothing else of that size. There,
    what several blocks add to a key, and all heads to the rotary key, is added up in fp32.
    """
    return _attend(scale, q_BTNH, kv_BTNW, k_rope_BTR, start_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, q_BTNH, kv_BTNW, k_rope_BTR, start_BT) -> Array:
    return _attend_fwd(scale, q_BTNH, kv_BTNW, k_rope_BTR, start_BT)[0]


def _attend_fwd(scale: float, q_BTNH, kv_BTNW, k_rope_BTR, start_BT):
    k_BTNH, v_BTNV = _keys_values(q_BTNH, kv_BTNW, k_rope_BTR)
    outputs, kept = [], []
    for first, end in _blocks(q_BTNH.shape[1]):
        logits_BNQS = scale * jnp.einsum(
            "BQNH,BSNH->BNQS",
            q_BTNH[:, first:end],
            k_BTNH[:, :end],
            preferred_element_type=jnp.float32,
        )
        pairs = _pairs(start_BT, first, end)
        p_BNQS = jax.nn.softmax(jnp.where(pairs, logits_BNQS, -jnp.inf), axis=-1)
        kept.append(p_BNQS)
        outputs.append(jnp.einsum("BNQS,BSNV->BQNV", p_BNQS.astype(v_BTNV.dtype), v_BTNV[:, :end]))
    return jnp.concatenate(outputs, axis=1), (q_BTNH, kv_BTNW, k_rope_BTR, kept)


def _attend_bwd(scale: float, saved, do_BTNV: Array):
    q_BTNH, kv_BTNW, k_rope_BTR, kept = saved
    k_BTNH, v_BTNV = _keys_values(q_BTNH, kv_BTNW, k_rope_BTR)
    P, dtype = q_BTNH.shape[3] - k_rope_BTR.shape[2], q_BTNH.dtype
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    dq, dk_BTNH, dv_BTNV = [], None, None
    # The last block sees every key; the others add to the first ones.
    for (first, end), p_BNQS in reversed(list(zip(_blocks(q_BTNH.shape[1]), kept, strict=True))):
        do_BQNV, q_BQNH = do_BTNV[:, first:end], q_BTNH[:, first:end]
        dp_BNQS = product("BQNV,BSNV->BNQS", do_BQNV, v_BTNV[:, :end])
        mean_BNQ1 = jnp.sum(p_BNQS * dp_BNQS, axis=-1, keepdims=True)
        ds_BNQS = scale * (p_BNQS * (dp_BNQS - mean_BNQ1))
        k_BSNH, q_BQNH = (x.astype(jnp.float32) for x in (k_BTNH[:, :end], q_BQNH))
        dq.append(product("BNQS,BSNH->BQNH", ds_BNQS, k_BSNH).astype(dtype))
        dk_BSNH = product("BNQS,BQNH->BSNH", ds_BNQS, q_BQNH)
        dv_BSNV = product("BNQS,BQNV->BSNV", p_BNQS.astype(dtype), do_BQNV)
        dk_BTNH = dk_BSNH if dk_BTNH is None else dk_BTNH.at[:, :end].add(dk_BSNH)
        dv_BTNV = dv_BSNV if dv_BTNV is None else dv_BTNV.at[:, :end].add(dv_BSNV)
    assert dk_BTNH is not None
    dkv_BTNW = jnp.concatenate([dk_BTNH[..., :P], dv_BTNV], axis=-1).astype(dtype)
    dk_rope_BTR = jnp.sum(dk_BTNH[..., P:], axis=2).astype(dtype)
    return jnp.concatenate(dq[::-1], axis=1), dkv_BTNW, dk_rope_BTR, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _blocks(T: int) -> Iterator[tuple[int, int]]:
    """First row and end of every block of queries."""
    block = max(QUERY_BLOCK, -(-T // MAX_BLOCKS))
    return ((first, min(first + block, T)) for first in range(0, T, block))


def reference(
    q_BTNH: Array, kv_BTNW: Array, k_rope_BTR: Array, start_BT: Array | None, scale: float
) -> Array:
    """`mla_attention` [B, T, N, V] over all pairs at once, in fp32."""
    q32, kv32, k_rope32 = (x.astype(jnp.float32) for x in (q_BTNH, kv_BTNW, k_rope_BTR))
    k_BTNH, v_BTNV = _keys_values(q32, kv32, k_rope32)
    with jax.default_matmul_precision("highest"):
        logits_BNTS = scale * jnp.einsum("BTNH,BSNH->BNTS", q32, k_BTNH)
        pairs = _pairs(start_BT, 0, q_BTNH.shape[1])
        p_BNTS = jax.nn.softmax(jnp.where(pairs, logits_BNTS, -jnp.inf), axis=-1)
        return jnp.einsum("BNTS,BSNV->BTNV", p_BNTS, v_BTNV).astype(q_BTNH.dtype)


def _keys_values(q_BTNH: Array, kv_BTNW: Array, k_rope_BTR: Array) -> tuple[Array, Array]:
    """Whole keys [B, T, N, H] and values [B, T, N, V] of every head."""
    R = k_rope_BTR.shape[2]
    P = q_BTNH.shape[3] - R
    k_rope_BTNR = jnp.broadcast_to(k_rope_BTR[:, :, None], (*kv_BTNW.shape[:3], R))
    return jnp.concatenate([kv_BTNW[..., :P], k_rope_BTNR], axis=-1), kv_BTNW[..., P:]


def _pairs(start_BT: Array | None, first: int, end: int) -> Array:
    """Which keys [0, end) the rows [first, end) see [B or 1, 1, Q, S]."""
    key_S, row_Q1 = jnp.arange(end), jnp.arange(first, end)[:, None]
    pairs_QS = key_S <= row_Q1
    if start_BT is None:
        return pairs_QS[None, None]
    return (pairs_QS & (key_S >= start_BT[:, first:end, None]))[:, None]
