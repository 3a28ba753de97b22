"""Causal multi-head latent attention in its expanded form, for training and prefill.

Every head has keys and values of its own, made from the latents by one up-projection; all heads
share one rotary key per token. Neither is copied: keys and values are read as the up-projection
wrote them, side by side, and the rotary key where it is (V2 report, section 2.1; V3 report, eq. 1
to 11). Packed documents are told apart by the first position that a row may see, not by a mask.

Letters: B batch, T query and S key positions, N heads, P channels without position, R rotary
channels, V value channels; H = P + R channels of a query, W = P + V of a key and its value.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import library
from pallas_kernels.attention.backward import backward
from pallas_kernels.attention.blocks import (
    BLOCK,
    Blocks,
    Sizes,
    Tile,
    check_blocks,
    choose_blocks,
    unsupported,
)
from pallas_kernels.attention.forward import forward
from pallas_kernels.attention.portable import portable, reference
from pallas_kernels.attention.tiles import Plan
from pallas_kernels.mosaic import Backend
from pallas_kernels.stash import Stash, load, named, store, through
from pallas_kernels.tuned import tuned_blocks


def mla_attention(
    q_BTNH: Array,
    kv_BTNW: Array,
    k_rope_BTR: Array,
    start_BT: Array | None = None,
    *,
    scale: float,
    backend: Backend = "portable",
    kept: str | None = None,
    stash: Stash = "",
    blocks: Blocks | None = None,
) -> Array:
    """softmax(scale (q_nope k_nope^T + q_rope k_rope^T)) v, fp32 softmax, row t over its keys s.

    Row t sees the keys start[t] <= s <= t. Differentiable in q, kv and k_rope.

    Args:
        q_BTNH: queries [B, T, N, P + R], per head channels without position, then rotated ones.
        kv_BTNW: [B, T, N, P + V], per head the key's channels without position, then the value.
        k_rope_BTR: rotated keys [B, T, R], shared by all heads.
        start_BT: first position that each row may see, int32 [B, T]: start[t] <= t, and it does not
            decrease with t (run-time values: not checked). None is 0 everywhere.
        scale: factor of the logits.
        backend: see `mosaic.Backend`. Kernels take bfloat16; the others any floating type.
        kept: name of outputs and the kernels' log-sums for policies of recomputation: with both
            stored, a backward pass does not run the forward kernel again.
        stash: type that outputs are held in for the backward pass; they are rounded to it
            (`stash.py`).
        blocks: how the kernels cut the call; by default tuned, or from the shapes.

    Returns:
        [B, T, N, V], of the type of `q_BTNH`.

    Raises:
        ValueError: shapes or types do not fit each other, or not the kernels.
    """
    sizes = _check(q_BTNH, kv_BTNW, k_rope_BTR, start_BT)
    B, T, N, P, R, V = sizes
    if 0 in (B, T, N):
        return jnp.zeros((B, T, N, V), q_BTNH.dtype)
    if backend in ("portable", "reference"):
        run = portable if backend == "portable" else reference
        return through(run(q_BTNH, kv_BTNW, k_rope_BTR, start_BT, scale), stash, kept)
    if backend == "library":
        return library.attend(q_BTNH, kv_BTNW, k_rope_BTR, start_BT, scale, kept, stash)
    if backend not in ("mosaic", "emulated"):
        raise ValueError(
            f"backend is {backend!r}; use 'mosaic', 'emulated', 'library', 'portable' or "
            "'reference'"
        )
    if reason := unsupported(P, R, V, q_BTNH.dtype):
        raise ValueError(f"{reason}; use backend='portable'")
    # Rows beyond the last see themselves and each other, and no row sees them.
    rest = -T % BLOCK
    if start_BT is None:
        start_BT = jnp.zeros((B, T), jnp.int32)
    sizes = sizes._replace(T=T + rest)
    blocks = blocks or _blocks(sizes)
    check_blocks(sizes, blocks)
    call = _Call(scale, sizes, blocks, backend == "emulated", kept, stash)
    operands = [_pad(x, rest) for x in (q_BTNH, kv_BTNW, k_rope_BTR)]
    o_BTNV: Any = _kernels(call, *operands, _pad(start_BT.astype(jnp.int32), rest, T))
    return o_BTNV[:, :T]


def starts_of_segments(segments_BT: Array) -> Array:
    """The first position of each row's segment, int32 [B, T], of segment ids [B, T].

    A segment is a maximal run of equal ids: `start_BT` of `mla_attention` for packed documents.
    """
    T = segments_BT.shape[1]
    first_BT = jnp.concatenate(
        [jnp.ones_like(segments_BT[:, :1], bool), segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1
    )
    return lax.cummax(jnp.where(first_BT, jnp.arange(T, dtype=jnp.int32), 0), axis=1)


def _check(q_BTNH: Array, kv_BTNW: Array, k_rope_BTR: Array, start_BT: Array | None) -> Sizes:
    """Sizes of a call; ValueError unless its arrays fit each other."""
    if q_BTNH.ndim != 4 or kv_BTNW.ndim != 4 or kv_BTNW.shape[:3] != q_BTNH.shape[:3]:
        raise ValueError(
            f"queries have shape {q_BTNH.shape} and keys with values {kv_BTNW.shape}; give "
            "[batch, positions, heads, channels] with the same first three"
        )
    B, T, N, H = q_BTNH.shape
    if k_rope_BTR.ndim != 3 or k_rope_BTR.shape[:2] != (B, T):
        raise ValueError(
            f"rotary keys have shape {k_rope_BTR.shape}; give [{B}, {T}, channels]: one per token, "
            "for all heads"
        )
    R, W = k_rope_BTR.shape[2], kv_BTNW.shape[3]
    P = H - R
    if P <= 0 or W <= P:
        raise ValueError(
            f"queries have {H} channels, {R} of them rotary; keys with values have {W}, which must "
            f"be the {P} others and at least one value channel"
        )
    types = {x.dtype for x in (q_BTNH, kv_BTNW, k_rope_BTR)}
    if len(types) > 1:
        raise ValueError(
            f"queries are {q_BTNH.dtype}, keys with values {kv_BTNW.dtype}, rotary keys "
            f"{k_rope_BTR.dtype}; cast them to one type"
        )
    start_type = jnp.int32 if start_BT is None else start_BT.dtype
    start_shape = (B, T) if start_BT is None else start_BT.shape
    if start_shape != (B, T) or not jnp.issubdtype(start_type, jnp.integer):
        raise ValueError(
            f"start has shape {start_shape} and type {start_type}; give one integer per row, "
            f"[{B}, {T}]"
        )
    return Sizes(B, T, N, P, R, W - P)


def _pad(x: Array, rest: int, value: int = 0) -> Array:
    """`rest` more positions at the end of axis 1, filled with `value`."""
    widths = (0, 0), (0, rest), *((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=value)


def _blocks(sizes: Sizes) -> Blocks:
    """Tuned blocks, or those that the shapes suggest."""
    return tuned_blocks("mla_attention", spelled(sizes), Blocks) or choose_blocks(sizes)


def spelled(sizes: Sizes) -> str:
    """A call as files of timed blocks name it."""
    return " ".join(f"{name}{size}" for name, size in sizes._asdict().items())


# ---- by kernels ---------------------------------------------------------------------------------


class _Call(NamedTuple):
    """Static facts of a call."""

    scale: float
    sizes: Sizes
    blocks: Blocks
    emulated: bool
    kept: str | None
    stash: Stash

    def plan(self, tile: Tile, programs: int) -> Plan:
        """Plan of one kernel, with a program per tile if `programs` is 0."""
        tiles = self.sizes.tiles
        return Plan(self.scale, self.sizes, tile, min(programs or tiles, tiles), self.emulated)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernels(call: _Call, q_BTNH: Array, kv_BTNW: Array, k_rope_BTR: Array, start_BT: Array):
    return _kernels_fwd(call, q_BTNH, kv_BTNW, k_rope_BTR, start_BT)[0]


def _kernels_fwd(call: _Call, q_BTNH: Array, kv_BTNW: Array, k_rope_BTR: Array, start_BT: Array):
    plan = call.plan(call.blocks.forward, call.blocks.programs)
    o_BTNV, lse_BNT = forward(q_BTNH, kv_BTNW, k_rope_BTR, start_BT, plan)
    held, lse_BNT = named((store(o_BTNV, call.stash), lse_BNT), call.kept)
    saved = q_BTNH, kv_BTNW, k_rope_BTR, start_BT, held, lse_BNT
    return load(held, o_BTNV.shape, o_BTNV.dtype), saved


def _kernels_bwd(call: _Call, saved, do_BTNV: Array):
    q_BTNH, kv_BTNW, k_rope_BTR, start_BT, held, lse_BNT = saved
    o_BTNV = load(held, do_BTNV.shape, do_BTNV.dtype)
    dq = call.plan(call.blocks.dq, call.blocks.programs)
    # A program per tile: within a loop over tiles this kernel spills registers.
    dkv = call.plan(call.blocks.dkv, programs=0)
    operands = q_BTNH, kv_BTNW, k_rope_BTR, start_BT, o_BTNV, lse_BNT, do_BTNV
    return *backward(*operands, dq=dq, dkv=dkv), None


_kernels.defvjp(_kernels_fwd, _kernels_bwd)
