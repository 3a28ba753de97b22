"""Causal attention whose heads of keys and values are shared by groups of queries.

By XLA in blocks of queries (`portable`), by cuDNN through XLA on a GPU (`cudnn`), and by the
kernels of latent attention (`mosaic`, `emulated`), which want keys of every head and a rotary key
that all heads share: keys are repeated for them, and that one is 0.

Letters: B batch, T query and S key positions, K heads of keys, G queries of a key head, N = K G
heads, H channels, Q queries of a block.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention import blocks
from pallas_kernels.attention.mla import mla_attention
from pallas_kernels.attention.portable import by_blocks, by_blocks_vjp, pairs
from pallas_kernels.grouped.ragged import zeros_varying
from pallas_kernels.mosaic import Backend
from pallas_kernels.stash import Stash, through

ROTARY = 16
"""Channels of the rotary key that the kernels of latent attention ask for; here they are 0."""
CUDNN_CHANNELS = 128
"""The widest head whose gradients cuDNN makes on every GPU that it supports."""


def grouped_attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    start_BT: Array | None = None,
    *,
    scale: float,
    backend: Backend = "portable",
    kept: str | None = None,
    stash: Stash = "",
) -> Array:
    """softmax(scale q k^T) v [B, T, N, H], fp32 softmax; row t sees the keys start[t] <= s <= t.

    Head n reads head n // G of the keys and values. `start_BT`, `backend`, `kept` and `stash` are
    those of `mla_attention`; "cudnn" is a backend of its own, with a mask of T x T where `start_BT`
    is given. Differentiable in q, k and v. Raises ValueError for what a kernel cannot take.
    """
    if backend in ("mosaic", "emulated"):
        group = q_BTNH.shape[2] // k_BTKH.shape[2]
        kv_BTNW = jnp.repeat(jnp.concatenate([k_BTKH, v_BTKH], axis=-1), group, axis=2)
        q_BTNL = jnp.pad(q_BTNH, ((0, 0), (0, 0), (0, 0), (0, ROTARY)))
        none_BTR = zeros_varying((*k_BTKH.shape[:2], ROTARY), k_BTKH.dtype, (k_BTKH,))
        options = {"scale": scale, "backend": backend, "kept": kept, "stash": stash}
        return mla_attention(q_BTNL, kv_BTNW, none_BTR, start_BT, **options)
    run: Any = {"cudnn": _cudnn, "portable": portable, "reference": reference}[backend]
    return through(run(q_BTNH, k_BTKH, v_BTKH, start_BT, scale), stash, kept)


def unsupported(channels: int, dtype: Any) -> str | None:
    """Reason why the kernels cannot take heads of this width, a clause; None if they can."""
    return blocks.unsupported(channels, ROTARY, channels, dtype)


def cudnn_unsupported(channels: int, dtype: Any) -> str | None:
    """Reason why cuDNN cannot, a clause; None if it can."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"attention's operands are {jnp.dtype(dtype)}, and cuDNN multiplies 16-bit types"
    if channels % 8 or channels > CUDNN_CHANNELS:
        return f"heads have {channels} channels; cuDNN takes multiples of 8 up to {CUDNN_CHANNELS}"
    return None


def portable(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, start_BT: Array | None, scale: float
) -> Array:
    """`grouped_attention` in blocks of queries, each against the keys up to its own end."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    o_BTKGH: Any = _attend(scale, q_BTKGH, k_BTKH, v_BTKH, start_BT)
    return o_BTKGH.reshape(B, T, N, H)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, q_BTKGH, k_BTKH, v_BTKH, start_BT) -> Array:
    return by_blocks(scale, q_BTKGH, k_BTKH, v_BTKH, start_BT)[0]


def _attend_fwd(scale: float, q_BTKGH, k_BTKH, v_BTKH, start_BT):
    o_BTKGH, kept = by_blocks(scale, q_BTKGH, k_BTKH, v_BTKH, start_BT)
    return o_BTKGH, (q_BTKGH, k_BTKH, v_BTKH, kept)


def _attend_bwd(scale: float, saved, do_BTKGH: Array):
    q_BTKGH, k_BTKH, v_BTKH, kept = saved
    dq, dk_BTKH, dv_BTKH = by_blocks_vjp(scale, q_BTKGH, k_BTKH, v_BTKH, kept, do_BTKGH)
    return dq, dk_BTKH.astype(k_BTKH.dtype), dv_BTKH.astype(v_BTKH.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def reference(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, start_BT: Array | None, scale: float
) -> Array:
    """`grouped_attention` over all pairs at once, every head's keys written out, in fp32."""
    group = q_BTNH.shape[2] // k_BTKH.shape[2]
    q32 = q_BTNH.astype(jnp.float32)
    k32, v32 = (jnp.repeat(x.astype(jnp.float32), group, axis=2) for x in (k_BTKH, v_BTKH))
    with jax.default_matmul_precision("highest"):
        logits_BNTS = scale * jnp.einsum("BTNH,BSNH->BNTS", q32, k32)
        seen = pairs(start_BT, 0, q_BTNH.shape[1])
        p_BNTS = jax.nn.softmax(jnp.where(seen, logits_BNTS, -jnp.inf), axis=-1)
        return jnp.einsum("BNTS,BSNH->BTNH", p_BNTS, v32).astype(q_BTNH.dtype)


def _cudnn(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, start_BT: Array | None, scale: float
) -> Array:
    mask = None if start_BT is None else pairs(start_BT, 0, q_BTNH.shape[1])
    try:
        return jax.nn.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, mask=mask, scale=scale, is_causal=True, implementation="cudnn"
        )
    except RuntimeError as error:  # JAX asks the library for its version while it traces
        raise ValueError(
            f"grouped attention is cuDNN's on this GPU, and there is none here ({error}); "
            "kernels=portable computes it by XLA, in more memory"
        ) from None
