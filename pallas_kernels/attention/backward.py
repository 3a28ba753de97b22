"""Backward pass of latent attention in its expanded form, by two kernels.

Shape letters: as in `attention/mla.py`; K blocks of keys.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention.blocks import BLOCK
from pallas_kernels.attention.dkv import key_gradients
from pallas_kernels.attention.dq import query_gradients
from pallas_kernels.attention.tiles import Plan


def backward(
    q_BTNH: Array,
    kv_BTNW: Array,
    k_rope_BTR: Array,
    start_BT: Array,
    o_BTNV: Array,
    lse_BNT: Array,
    do_BTNV: Array,
    *,
    dq: Plan,
    dkv: Plan,
) -> tuple[Array, Array, Array]:
    """Gradients of q, kv and k_rope, of their shapes and types.

    Args:
        q_BTNH, kv_BTNW, k_rope_BTR, start_BT: as `forward.forward` takes them.
        o_BTNV, lse_BNT: as it returns them.
        do_BTNV: gradient of the outputs, bfloat16.
        dq, dkv: plans of the two kernels.
    """
    # The part of dS that all keys of a row share (FlashAttention-2, section 3.1.2).
    delta_BTN = jnp.sum(o_BTNV.astype(jnp.float32) * do_BTNV.astype(jnp.float32), axis=-1)
    delta_BNT = jnp.swapaxes(delta_BTN, 1, 2)
    operands = q_BTNH, kv_BTNW, k_rope_BTR, start_BT, do_BTNV, lse_BNT
    dq_BTNH, delta_BNT = query_gradients(*operands, delta_BNT, dq)
    dkv_BTNW, dk_rope_BTNR = key_gradients(*operands, delta_BNT, last_seeing(start_BT), dkv)
    dk_rope_BTR = jnp.sum(dk_rope_BTNR, axis=2, dtype=jnp.float32)
    return dq_BTNH, dkv_BTNW, dk_rope_BTR.astype(k_rope_BTR.dtype)


def last_seeing(start_BT: Array) -> Array:
    """Numbers of rows that may see each block's last key, and its first key, by start [B, 2, K]."""
    first_K = jnp.arange(0, start_BT.shape[1], BLOCK, dtype=start_BT.dtype)
    keys_2K = jnp.stack([first_K + BLOCK - 1, first_K])
    count = jax.vmap(lambda start_T: jnp.searchsorted(start_T, keys_2K, side="right"))
    return count(start_BT).astype(jnp.int32)
