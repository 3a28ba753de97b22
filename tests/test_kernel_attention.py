"""Expanded latent attention: the kernels on CPU against float64, lowered for Hopper, and the rest.

Errors are relative, Frobenius. A kernel's must be below 1e-2 and at most 1.1 times that of the same
computation by XLA, with every operand and result of a product in bfloat16 and fp32 sums.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import backward as mla_attention_backward
from pallas_kernels.attention import mla_attention, starts_of_segments, unsupported
from pallas_kernels.attention.blocks import (
    SMEM_BYTES,
    Blocks,
    Sizes,
    candidates,
    choose_blocks,
    smem_bytes,
)
from pallas_kernels.attention.tiles import Plan, section_heads, tile_at
from tests.kernel_ladder import emulate, lower, relative_error

SCALE = 0.13
V3 = Sizes(B=1, T=4096, N=128, P=128, R=64, V=128)
SMALL = Sizes(B=1, T=1024, N=8, P=64, R=32, V=64)
TINY = Sizes(B=1, T=200, N=2, P=32, R=16, V=32)
BLOCKS = Blocks(forward_keys=128, forward_stages=2, dq_keys=64, dq_stages=2, dkv_stages=2)
NAMES = "output", "queries", "keys and values", "rotary keys"


def operands(sizes, dtype="bfloat16", seed=0):
    """q, kv, k_rope and the gradient of the output."""
    B, T, N, P, R, V = sizes
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, P + R), (B, T, N, P + V), (B, T, R), (B, T, N, V)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def starts(T, *borders):
    """First position that each row sees, of segments that begin at 0 and at the borders."""
    segments = np.searchsorted(borders, np.arange(T), side="right")
    return starts_of_segments(jnp.asarray(segments)[None])


def pairs(start_BT):
    T = start_BT.shape[1]
    t, s = np.arange(T)[:, None], np.arange(T)
    return ((s <= t) & (s >= np.asarray(start_BT)[:, :, None]))[:, None]


def exact(q, kv, k_rope, do, start_BT):
    """The output and the gradients of q, kv and k_rope in float64."""
    q, kv, k_rope, do = (np.asarray(x, np.float64) for x in (q, kv, k_rope, do))
    P = q.shape[3] - k_rope.shape[2]
    k, v, q_nope, q_rope = kv[..., :P], kv[..., P:], q[..., :P], q[..., P:]
    logits = np.einsum("btnp,bsnp->bnts", q_nope, k) + np.einsum("btnr,bsr->bnts", q_rope, k_rope)
    p = np.where(pairs(start_BT), np.exp(SCALE * logits), 0)
    p /= p.sum(-1, keepdims=True)
    o = np.einsum("bnts,bsnv->btnv", p, v)
    dp = np.einsum("btnv,bsnv->bnts", do, v)
    ds = SCALE * p * (dp - (o * do).sum(-1).transpose(0, 2, 1)[..., None])
    dq = np.einsum("bnts,bsnp->btnp", ds, k), np.einsum("bnts,bsr->btnr", ds, k_rope)
    dkv = np.einsum("bnts,btnp->bsnp", ds, q_nope), np.einsum("bnts,btnv->bsnv", p, do)
    dk_rope = np.einsum("bnts,btnr->bsr", ds, q_rope)
    return o, np.concatenate(dq, -1), np.concatenate(dkv, -1), dk_rope


def by_xla(q, kv, k_rope, do, start_BT):
    """The same in bfloat16 by XLA, as a model without kernels has it: the rotary key in every head.

    `jax.vjp` would promote dS to fp32 on CPU, which is not what tensor cores multiply.
    """
    q, kv, k_rope, do = (x.astype(jnp.bfloat16) for x in (q, kv, k_rope, do))
    P = q.shape[3] - k_rope.shape[2]
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*q.shape[:3], q.shape[3] - P))
    k, v = jnp.concatenate([kv[..., :P], k_rope], axis=-1), kv[..., P:]
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
    p = jax.nn.softmax(jnp.where(pairs(start_BT), SCALE * logits, -jnp.inf), axis=-1)
    o = jnp.einsum("bnts,bsnv->btnv", p.astype(q.dtype), v)
    dp = jnp.einsum("btnv,bsnv->bnts", do, v).astype(jnp.float32)
    ds = (SCALE * p * (dp - jnp.sum(p * dp, axis=-1, keepdims=True))).astype(q.dtype)
    dk = jnp.einsum("bnts,btnh->bsnh", ds, q)
    dv = jnp.einsum("bnts,btnv->bsnv", p.astype(q.dtype), do)
    dkv = jnp.concatenate([dk[..., :P], dv], axis=-1)
    return o, jnp.einsum("bnts,bsnh->btnh", ds, k), dkv, dk[..., P:].sum(axis=2)


def with_gradients(q, kv, k_rope, do, start_BT=None, **options):
    """The output and the gradients of q, kv and k_rope."""
    o, vjp = jax.vjp(
        partial(mla_attention, start_BT=start_BT, scale=SCALE, **options), q, kv, k_rope
    )
    return (o, *vjp(do))


# ---- the kernels, emulated ----------------------------------------------------------------------


def test_kernels_match_float64_and_xla():
    """Packed rows, no multiple of a block; blocks with a mask at both ends; a scan of layers."""
    sizes = V3._replace(T=264, N=1)
    arrays, start_BT = operands(sizes), starts(sizes.T, 100, 250)

    def in_a_scan(*arrays):
        def layer(_, arrays):
            return None, with_gradients(*arrays, start_BT, backend="emulated", blocks=BLOCKS)

        stacked = jax.tree.map(lambda x: x[None], arrays)
        return jax.tree.map(lambda x: x[0], jax.lax.scan(layer, None, stacked)[1])

    got, want = emulate(jax.jit(in_a_scan), *arrays), exact(*arrays, start_BT)
    for name, g, w, xla in zip(NAMES, got, want, by_xla(*arrays, start_BT), strict=True):
        assert g.dtype == jnp.bfloat16
        error = relative_error(g, w)
        assert error < 1e-2, name
        assert error <= 1.1 * relative_error(xla, w), name


def test_programs_share_tiles_and_rings_wrap():
    """Four tiles of one program, ten steps through two slots; segments of one row, and borders at
    those of blocks."""
    sizes = TINY._replace(T=256, N=2)
    arrays, start_BT = operands(sizes, seed=1), starts(sizes.T, 1, 128, 129, 255)
    blocks = BLOCKS._replace(forward_keys=64, programs=1)
    run = partial(mla_attention, scale=SCALE, backend="emulated", blocks=blocks)
    o = emulate(run, *arrays[:3], start_BT)
    assert relative_error(o, exact(*arrays, start_BT)[0]) < 3e-3


@pytest.mark.parametrize("programs", [132, 1536])
def test_every_tile_is_one_programs(programs):
    """Heads in sections that fit into L2; of each section the longest tiles first."""
    sizes = V3._replace(B=2, T=16384, N=6)
    plan = Plan(SCALE, sizes, BLOCKS.forward, programs, emulated=True)
    assert sizes.tiles == 1536
    assert section_heads(sizes) == 4
    rounds = jnp.arange(-(-1536 // programs))

    def mine(_):
        return jax.vmap(partial(tile_at, plan=plan, last_first=True))(rounds)

    tiles = jax.vmap(mine, axis_name="program", out_axes=1)(jnp.arange(programs))
    tiles = np.stack(tiles, axis=-1).reshape(-1, 3)[:1536]
    assert {tuple(t) for t in tiles.tolist()} == set(np.ndindex(2, 6, 128))
    assert (np.diff(tiles[:, 2].reshape(3, 512), axis=1) <= 0).all()


def test_rotary_gradients_are_summed_over_heads(monkeypatch):
    """In fp32, of the kernel's own per head."""
    sizes = TINY._replace(T=128, N=3)
    q, kv, k_rope, do = operands(sizes)
    per_head = jnp.asarray(np.random.default_rng(0).standard_normal((1, 128, 3, 16)), jnp.bfloat16)
    delta = jnp.zeros((1, 3, 128))
    monkeypatch.setattr(mla_attention_backward, "query_gradients", lambda *_: (q, delta))
    monkeypatch.setattr(mla_attention_backward, "key_gradients", lambda *_: (kv, per_head))
    plan = Plan(SCALE, sizes, BLOCKS.dq, 3, emulated=True)
    inputs = q, kv, k_rope, starts(128), do, delta, do
    dk_rope = mla_attention_backward.backward(*inputs, dq=plan, dkv=plan)[2]
    assert relative_error(dk_rope, np.asarray(per_head, np.float64).sum(axis=2)) < 2e-3


# ---- the kernels, lowered -----------------------------------------------------------------------


def test_kernels_lower_for_hopper():
    B, T, N, P, R, V = V3
    array = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    q, kv, k_rope, do = (
        array((B, T, N, P + R)),
        array((B, T, N, P + V)),
        array((B, T, R)),
        array((B, T, N, V)),
    )
    start = jax.ShapeDtypeStruct((B, T), jnp.int32)
    text = lower(partial(with_gradients, backend="mosaic"), q, kv, k_rope, do, start)
    for kernel in ("forward", "query_gradients", "key_gradients"):
        assert f"attention_{kernel}" in text


def test_blocks_fit_shared_memory():
    for sizes in (V3, SMALL, TINY._replace(T=256)):
        found = candidates(sizes)
        assert choose_blocks(sizes) == found[0]
        assert len(set(found)) == len(found) > 1
        for blocks in found:
            assert max(smem_bytes(sizes, blocks)) <= SMEM_BYTES
    assert choose_blocks(V3) == Blocks(128, 2, 64, 3, 3)


# ---- without kernels ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_definition_and_portable_match_float64(backend):
    """Two batches with segments of their own; blocks of queries that do not divide the rows."""
    sizes = Sizes(B=2, T=150, N=2, P=8, R=4, V=6)
    arrays = operands(sizes, "float32")
    start_BT = jnp.concatenate([starts(150, 40, 41), starts(150)])
    got = jax.jit(partial(with_gradients, backend=backend))(*arrays, start_BT)
    for name, g, w in zip(NAMES, got, exact(*arrays, start_BT), strict=True):
        assert relative_error(g, w) < 1e-5, name


def test_segments_are_maximal_runs():
    segments = jnp.asarray([[7, 7, 3, 3, 3, 7, 0, 0], [1] * 8])
    got = starts_of_segments(segments)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, [[0, 0, 2, 2, 2, 5, 6, 6], [0] * 8])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_BTNH": jnp.ones((1, 4, 2, 12, 1))}, "same first three"),
        ({"kv_BTNW": jnp.ones((1, 4, 3, 16))}, "same first three"),
        ({"k_rope_BTR": jnp.ones((1, 5, 4))}, r"one per token"),
        ({"kv_BTNW": jnp.ones((1, 4, 2, 8))}, "at least one value channel"),
        ({"k_rope_BTR": jnp.ones((1, 4, 4), jnp.bfloat16)}, "cast them"),
        ({"start_BT": jnp.ones((1, 4))}, "one integer per row"),
        ({"backend": "fast"}, "'fast'"),
        ({"backend": "mosaic"}, "multiply bfloat16; use backend='portable'"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    good = {
        "q_BTNH": jnp.ones((1, 4, 2, 12)),
        "kv_BTNW": jnp.ones((1, 4, 2, 16)),
        "k_rope_BTR": jnp.ones((1, 4, 4)),
    }
    with pytest.raises(ValueError, match=message):
        mla_attention(**(good | change), scale=SCALE)


def test_what_kernels_do_not_take_is_named():
    assert unsupported(128, 64, 128, jnp.bfloat16) is None
    assert "multiples of 16" in unsupported(24, 16, 24, jnp.bfloat16)
    assert "of the same width" in unsupported(128, 64, 64, jnp.bfloat16)
    assert "320 is the most" in unsupported(192, 64, 192, jnp.bfloat16)
    assert "at most 256 columns" in unsupported(32, 240, 32, jnp.bfloat16)
    arrays = operands(TINY)[:3]
    for blocks, message in [
        (BLOCKS._replace(forward_keys=96), "64 or 128"),
        (BLOCKS._replace(dkv_stages=1), "at least 2 stages"),
        (BLOCKS._replace(forward_stages=20), "fewer stages"),
    ]:
        with pytest.raises(ValueError, match=message):
            mla_attention(*arrays, scale=SCALE, backend="mosaic", blocks=blocks)


def test_no_rows_at_all():
    q, kv, k_rope, _ = operands(TINY._replace(T=0))
    assert mla_attention(q, kv, k_rope, scale=SCALE).shape == (1, 0, 2, 32)
