"""Attention by XLA in blocks of queries, and latent attention's definition in fp32.

Shape letters: as in `mla.py`; Q queries of a block; K heads of keys, G queries of a key head: latent
attention has keys of every head, and G = 1.
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

    The rotary key is copied to every head: XLA:CPU computes one product per block faster than two.
    All heads' gradients of it are added up in fp32.
    """
    return _attend(scale, q_BTNH, kv_BTNW, k_rope_BTR, start_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, q_BTNH, kv_BTNW, k_rope_BTR, start_BT) -> Array:
    return _attend_fwd(scale, q_BTNH, kv_BTNW, k_rope_BTR, start_BT)[0]


def _attend_fwd(scale: float, q_BTNH, kv_BTNW, k_rope_BTR, start_BT):
    k_BTNH, v_BTNV = _keys_values(q_BTNH, kv_BTNW, k_rope_BTR)
    o_BTNGV, kept = by_blocks(scale, q_BTNH[:, :, :, None], k_BTNH, v_BTNV, start_BT)
    return o_BTNGV[:, :, :, 0], (q_BTNH, kv_BTNW, k_rope_BTR, kept)


def _attend_bwd(scale: float, saved, do_BTNV: Array):
    q_BTNH, kv_BTNW, k_rope_BTR, kept = saved
    k_BTNH, v_BTNV = _keys_values(q_BTNH, kv_BTNW, k_rope_BTR)
    P, dtype = q_BTNH.shape[3] - k_rope_BTR.shape[2], q_BTNH.dtype
    q_BTNGH, do_BTNGV = q_BTNH[:, :, :, None], do_BTNV[:, :, :, None]
    dq, dk_BTNH, dv_BTNV = by_blocks_vjp(scale, q_BTNGH, k_BTNH, v_BTNV, kept, do_BTNGV)
    dkv_BTNW = jnp.concatenate([dk_BTNH[..., :P], dv_BTNV], axis=-1).astype(dtype)
    dk_rope_BTR = jnp.sum(dk_BTNH[..., P:], axis=2).astype(dtype)
    return dq[:, :, :, 0], dkv_BTNW, dk_rope_BTR, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def by_blocks(
    scale: float, q_BTKGH: Array, k_BTKH: Array, v_BTKV: Array, start_BT: Array | None
) -> tuple[Array, list[Array]]:
    """softmax(scale q k^T) v [B, T, K, G, V], and what `by_blocks_vjp` wants of each block.

    About half of the products of the full square are never computed, and no T x T array exists.
    For the backward pass a block keeps its probabilities and nothing else of that size.
    """
    outputs, kept = [], []
    for first, end in _blocks(q_BTKGH.shape[1]):
        # In the order of the product: XLA:CPU transposes the logits otherwise.
        logits_BKQGS = scale * jnp.einsum(
            "BQKGH,BSKH->BKQGS",
            q_BTKGH[:, first:end],
            k_BTKH[:, :end],
            preferred_element_type=jnp.float32,
        )
        seen = pairs(start_BT, first, end)[:, :, :, None]
        p_BKQGS = jax.nn.softmax(jnp.where(seen, logits_BKQGS, -jnp.inf), axis=-1)
        kept.append(p_BKQGS)
        p_BKQGS = p_BKQGS.astype(v_BTKV.dtype)
        outputs.append(jnp.einsum("BKQGS,BSKV->BQKGV", p_BKQGS, v_BTKV[:, :end]))
    return jnp.concatenate(outputs, axis=1), kept


def by_blocks_vjp(
    scale: float, q_BTKGH: Array, k_BTKH: Array, v_BTKV: Array, kept: list[Array], do_BTKGV: Array
) -> tuple[Array, Array, Array]:
    """Gradients of q, in its type, and of k and v in fp32: what blocks and heads add to them is
    added up there."""
    dtype = q_BTKGH.dtype
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    dq, dk_BTKH, dv_BTKV = [], None, None
    # The last block sees every key; the others add to the first ones.
    for (first, end), p_BKQGS in reversed(list(zip(_blocks(q_BTKGH.shape[1]), kept, strict=True))):
        do_BQKGV, q_BQKGH = do_BTKGV[:, first:end], q_BTKGH[:, first:end]
        dp_BKQGS = product("BQKGV,BSKV->BKQGS", do_BQKGV, v_BTKV[:, :end])
        mean_BKQG1 = jnp.sum(p_BKQGS * dp_BKQGS, axis=-1, keepdims=True)
        ds_BKQGS = scale * (p_BKQGS * (dp_BKQGS - mean_BKQG1))
        k_BSKH, q_BQKGH = (x.astype(jnp.float32) for x in (k_BTKH[:, :end], q_BQKGH))
        dq.append(product("BKQGS,BSKH->BQKGH", ds_BKQGS, k_BSKH).astype(dtype))
        dk_BSKH = product("BKQGS,BQKGH->BSKH", ds_BKQGS, q_BQKGH)
        dv_BSKV = product("BKQGS,BQKGV->BSKV", p_BKQGS.astype(dtype), do_BQKGV)
        dk_BTKH = dk_BSKH if dk_BTKH is None else dk_BTKH.at[:, :end].add(dk_BSKH)
        dv_BTKV = dv_BSKV if dv_BTKV is None else dv_BTKV.at[:, :end].add(dv_BSKV)
    assert dk_BTKH is not None
    assert dv_BTKV is not None
    return jnp.concatenate(dq[::-1], axis=1), dk_BTKH, dv_BTKV


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
