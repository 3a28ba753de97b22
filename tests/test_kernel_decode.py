"""Absorbed decoding over the latent cache: the kernel, emulated, and XLA against float64.

A kernel's error may be 1.1 times that of XLA on the same bf16 operands. Slots beyond a row's length
hold NaN, for "portable" large numbers: nothing may come of them.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode.mla import (
    Blocks,
    candidates,
    choose_blocks,
    combine,
    mla_decode,
    seconds,
    unsupported,
)
from tests.kernel_ladder import emulate, lower, relative_error

C, R, S = 64, 16, 320
L = C + R
SCALE = 0.3


@cache
def operands(lengths=(300, 1), queries=2, heads=6, slots=S):
    """q, cache [B, S, L] and lengths; NaN beyond a row's length."""
    rng = np.random.default_rng(len(lengths) + queries)
    q = rng.standard_normal((len(lengths), queries, heads, L))
    k = rng.standard_normal((len(lengths), slots, L))
    k[np.arange(slots) >= np.array(lengths)[:, None]] = np.nan
    return jnp.asarray(q, jnp.bfloat16), jnp.asarray(k, jnp.bfloat16), jnp.array(lengths, jnp.int32)


def paged(k_BSL, size, seed=0):
    """The same cache in shuffled pages, and its table; pages wholly beyond a row are nowhere."""
    B, slots, _ = k_BSL.shape
    pages = np.asarray(k_BSL, np.float32).reshape(B * slots // size, size, L)
    order = np.random.default_rng(seed).permutation(len(pages))
    table = np.argsort(order).reshape(B, -1)
    empty = np.isnan(pages[:, 0, 0]).reshape(table.shape)
    table = np.where(empty, np.array([-7, 10**9])[np.arange(table.shape[1]) % 2], table)
    return jnp.asarray(pages[order], jnp.bfloat16), jnp.asarray(table, jnp.int32)


def exact(q_BQNL, k_BSL, lengths_B):
    q, k = np.asarray(q_BQNL, np.float64), np.asarray(k_BSL, np.float64)
    B, Q, N, _ = q.shape
    o = np.zeros((B, Q, N, C))
    for b, i in np.ndindex(B, Q):
        seen = int(lengths_B[b]) - (Q - 1 - i)
        if seen > 0:
            s = SCALE * q[b, i] @ k[b, :seen].T
            p = np.exp(s - s.max(axis=-1, keepdims=True))
            o[b, i] = p @ k[b, :seen, :C] / p.sum(axis=-1, keepdims=True)
    return o


def finite(cache):
    """The same cache with large numbers in place of NaN, as the portable backend needs it."""
    return jnp.nan_to_num(cache, nan=1e4)


run = partial(mla_decode, scale=SCALE, latent=C)


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xla_is_the_definition(backend, dtype):
    q, k, lengths = operands((300, 1, 0))
    q, k = q.astype(dtype), k.astype(dtype)
    clean = finite if backend == "portable" else lambda cache: cache
    got = run(q, clean(k), lengths, backend=backend)
    assert got.dtype == dtype
    assert relative_error(got, exact(q, k, lengths)) < (1e-6 if dtype == "float32" else 4e-3)
    pages, table = paged(k, 64)
    again = run(q, clean(pages.astype(dtype)), lengths, block_table_BP=table, backend=backend)
    np.testing.assert_array_equal(np.float32(again), np.float32(got))


def check(kernel, q, cache, k, lengths, **options):
    """`kernel` on `cache`, which holds `k` [B, S, L], against float64 and XLA."""
    got = emulate(partial(kernel, **options), q, cache, lengths)
    assert got.dtype == q.dtype
    assert got.shape == (*q.shape[:3], C)
    want = exact(q, k, lengths)
    error = relative_error(got, want)
    assert error < 1e-2
    assert error <= 1.1 * relative_error(run(q, finite(k), lengths), want)


def test_kernel():
    """Two blocks of queries, the second almost empty; a row whose first query sees no slot; a cache
    that ends within a tile."""
    q, k, lengths = operands((300, 1), 2, 33, slots=312)
    check(jax.jit(partial(run, backend="emulated", blocks=Blocks(1))), q, k, k, lengths)


def test_kernel_reads_pages_in_any_order_and_joins_splits():
    """Lengths at and just beyond the end of a pair of tiles, the latter before a page that is
    nowhere; the third split has nothing to do, and for the last row none has."""
    q, k, lengths = operands((256, 129, 0), 3, 4, slots=256)
    pages, table = paged(k, 64)
    kernel = partial(run, backend="emulated", blocks=Blocks(3))
    check(kernel, q, pages, k, lengths, block_table_BP=table)


WIDTHS = {"V3": (512, 64, 128, 1, 1), "V3, 1/8": (512, 64, 16, 2, 4), "tiny": (64, 16, 4, 3, 2)}


@pytest.mark.parametrize("name", WIDTHS)
def test_kernel_lowers_for_cuda(name):
    latent, rotary, heads, queries, splits = WIDTHS[name]
    B, slots, shape = 4, 4096, jax.ShapeDtypeStruct
    q = shape((B, queries, heads, latent + rotary), jnp.bfloat16)
    pages = shape((B * slots // 64, 64, latent + rotary), jnp.bfloat16)
    table, lengths = shape((B, slots // 64), jnp.int32), shape((B,), jnp.int32)
    kernel = partial(
        mla_decode, scale=SCALE, latent=latent, backend="mosaic", blocks=Blocks(splits)
    )
    lower(lambda q, k, n, t: kernel(q, k, n, block_table_BP=t), q, pages, lengths, table)


@pytest.mark.parametrize(
    ("heads", "width", "takes"),
    [(128, (512, 64), True), (16, (128, 32), True), (4, (64, 16), True), (128, (1024, 64), False)],
)
def test_presets_are_supported(heads, width, takes):
    assert (unsupported(*width, heads, jnp.bfloat16) is None) == takes


def test_splits_follow_the_shapes():
    """Many rows fill the GPU; a few are cut until they do; never finer than a pair of tiles."""
    assert choose_blocks(128, 128, 4096, 512, 576) == Blocks(1)
    assert choose_blocks(4, 128, 4096, 512, 576).splits * 8 <= 132
    assert choose_blocks(4, 128, 4096, 512, 576).splits * 8 > 100
    assert choose_blocks(1, 16, 128, 512, 576) == Blocks(1)
    sizes = 2, 128, 1000, 512, 576
    found = candidates(*sizes[:3])
    assert [b.splits for b in found] == [1, 2, 3, 4, 8]
    times = [seconds(*sizes, blocks) for blocks in found]
    assert choose_blocks(*sizes) == found[times.index(min(times))]


def test_a_split_without_slots_changes_nothing():
    o = jnp.arange(12.0).reshape(2, 1, 2, 3)
    lse = jnp.array([[[3.0, -5.0]], [[-1e30, -1e30]]])
    np.testing.assert_array_equal(combine(o, lse), o[0])
    nothing = combine(jnp.zeros((2, 1, 2, 3)), jnp.full((2, 1, 2), -1e30))
    np.testing.assert_array_equal(nothing, jnp.zeros((1, 2, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_BQNL": jnp.ones((2, 3, L), jnp.bfloat16)}, "give .rows, tokens, heads"),
        ({"cache": jnp.ones((2, S, L + 1), jnp.bfloat16)}, f"have {L} channels"),
        ({"cache": jnp.ones((3, S, L), jnp.bfloat16)}, "has 3 rows, queries have 2"),
        ({"cache": jnp.ones((2, S, L))}, "cache is float32"),
        ({"lengths_B": jnp.ones((2,))}, "lengths has shape .2,. and type float32"),
        ({"block_table_BP": jnp.ones((3, 5), jnp.int32)}, "block table has shape .3, 5."),
        (
            {
                "cache": jnp.ones((9, 80, L), jnp.bfloat16),
                "block_table_BP": jnp.ones((2, 5), jnp.int32),
            },
            "pages of 80 slots",
        ),
        ({"cache": jnp.ones((2, 100, L), jnp.bfloat16)}, "100 slots is not a multiple of 8"),
        ({"latent": L}, f"give 1 to {L - 1}"),
        ({"scale": 0.0}, "positive"),
        ({"backend": "fast"}, "'fast'"),
        ({"blocks": Blocks(0)}, "give 1 to 64"),
        ({"latent": 40}, "latent width 40 is not a multiple of 32"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    q, k, lengths = operands()
    good = {"q_BQNL": q, "cache": k, "lengths_B": lengths, "scale": SCALE, "latent": C}
    with pytest.raises(ValueError, match=message):
        mla_decode(**(good | {"backend": "emulated"} | change))


def test_the_kernel_says_that_it_has_no_gradient():
    q, k, lengths = operands()
    kernel = partial(run, cache=k, lengths_B=lengths, backend="emulated")
    with pytest.raises(ValueError, match="no gradient; use backend='portable'"):
        jax.grad(lambda q: kernel(q).sum())(q)
