"""Expanded latent attention by the library's flash attention, with its gradients.

The library wants whole keys, so the rotary key is copied to every head: 2 B T N H bytes that our
kernels do not write. Packed documents are told apart by each row's first key, as ours are. Triton's
backward pass (compute capability 8) makes an array of [B, T, T] bools of it: 16 MB for a sequence
of 4096; without documents there is none.

Letters: as in `attention/mla.py`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.library.installed import module, operation, parts, refusal, untracked
from pallas_kernels.stash import Stash, load, named, store


class _Call(NamedTuple):
    """Static facts of a call."""

    scale: float
    kept: str | None
    part: str
    stash: Stash


def attend(
    q_BTNH: Array,
    kv_BTNW: Array,
    k_rope_BTR: Array,
    start_BT: Array | None,
    scale: float,
    kept: str | None = None,
    stash: Stash = "",
) -> Array:
    """`mla_attention` [B, T, N, V]; arguments as there, checked.

    Raises:
        ValueError: the type is not bfloat16 (the library would round in silence), or the library
            cannot serve the device.
    """
    part = parts().attention
    if part != "xla" and q_BTNH.dtype != jnp.bfloat16:
        raise ValueError(
            f"queries are {q_BTNH.dtype}, and the library multiplies bfloat16; "
            "use backend='portable'"
        )
    return _attend(_Call(scale, kept, part, stash), q_BTNH, kv_BTNW, k_rope_BTR, start_BT)


def attention_refusal(nope: int, rotary: int, value: int, dtype: Any) -> str | None:
    """The library's reason to refuse heads of these widths; None if it takes them."""
    if dtype != jnp.bfloat16:
        return f"queries are {jnp.dtype(dtype)}, and the library multiplies bfloat16"
    T, array = 256, partial(jax.ShapeDtypeStruct, dtype=dtype)

    def with_gradients(q, kv, k_rope, start):
        def total(q, kv, k_rope):
            return attend(q, kv, k_rope, start, 1.0).astype(jnp.float32).sum()

        return jax.grad(total, (0, 1, 2))(q, kv, k_rope)

    q, kv = array((1, T, 2, nope + rotary)), array((1, T, 2, nope + value))
    start = jax.ShapeDtypeStruct((1, T), jnp.int32)
    return refusal(with_gradients, q, kv, array((1, T, rotary)), start)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, q_BTNH, kv_BTNW, k_rope_BTR, start_BT) -> Array:
    return _forward(call, q_BTNH, kv_BTNW, k_rope_BTR, start_BT)[0]


def _operands(q_BTNH, kv_BTNW, k_rope_BTR, start_BT) -> tuple[tuple[Array, ...], Any]:
    """Queries, whole keys and values of every head, and the library's mask."""
    R = k_rope_BTR.shape[2]
    P = q_BTNH.shape[3] - R
    k_rope_BTNR = jnp.broadcast_to(k_rope_BTR[:, :, None], (*kv_BTNW.shape[:3], R))
    k_BTNH = jnp.concatenate([kv_BTNW[..., :P], k_rope_BTNR], axis=-1)
    start_B1T = None if start_BT is None else start_BT[:, None].astype(jnp.int32)
    return (q_BTNH, k_BTNH, kv_BTNW[..., P:]), module("attention.base").Mask(
        is_causal=True, k_start=start_B1T
    )


def _forward(call: _Call, *operands):
    def run(*operands):
        arrays, mask = _operands(*operands)
        attention = operation("attention", call.part)
        return attention(*arrays, mask=mask, logits_scale=call.scale, return_residuals=True)

    o_BTNV, sums = _untracked(run, operands)
    held, sums = named((store(o_BTNV, call.stash), sums), call.kept)
    return load(held, o_BTNV.shape, o_BTNV.dtype), (operands, held, sums)


def _backward(call: _Call, saved, do_BTNV: Array):
    operands, held, (largest_BNT, sum_BNT) = saved
    o_BTNV = load(held, do_BTNV.shape, do_BTNV.dtype)
    run = partial(_gradients, call)
    return *_untracked(run, operands, o_BTNV, largest_BNT, sum_BNT, do_BTNV), None


def _gradients(call: _Call, q_BTNH, kv_BTNW, k_rope_BTR, start_BT, o_BTNV, largest, total, do_BTNV):
    """Gradients of q, kv and k_rope."""
    arrays, mask = _operands(q_BTNH, kv_BTNW, k_rope_BTR, start_BT)
    attention = operation("attention", call.part)
    if attention.vjp is None:
        run = partial(attention, mask=mask, logits_scale=call.scale)
        dq, dk, dv = jax.vjp(run, *arrays)[1](do_BTNV)
    else:
        options = dict(attention.bind(*arrays, mask=mask, logits_scale=call.scale).kwargs)
        del options["return_residuals"]
        found = attention.vjp((largest, total), o_BTNV, do_BTNV, *arrays, **options)
        dq, dk, dv = (found[name] for name in "qkv")
    P = dk.shape[3] - k_rope_BTR.shape[2]
    # Of all heads, so in fp32.
    dk_rope = dk[..., P:].astype(jnp.float32).sum(axis=2).astype(dk.dtype)
    return dq, jnp.concatenate([dk[..., :P], dv], axis=-1), dk_rope


def _untracked(run, operands, *more: Array):
    """`untracked`, where there may be no starts."""
    *arrays, start_BT = operands
    if start_BT is None:
        return untracked(lambda q, kv, k, *more: run(q, kv, k, None, *more), *arrays, *more)
    return untracked(run, *operands, *more)


_attend.defvjp(_forward, _backward)
