"""Dispatch plan and row movement against plain NumPy and plain indexing.

Tolerance: fp32 1e-6 of the largest value (sums of at most K terms, in another order).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels.grouped import permute
from pallas_kernels.grouped.permute import combine_rows, gather_rows, sort_by_expert

N, K, D, E = 13, 3, 5, 4


def choices(seed=0, low=-1, high=E + 2):
    """Ids with some outside [0, E), tokens and weights."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(low, high, (N, K)).astype(np.int32)
    x, weights = rng.standard_normal((N, D)), rng.standard_normal((N, K))
    return jnp.array(ids), jnp.array(x, jnp.float32), jnp.array(weights, jnp.float32)


def here(ids):
    return (np.asarray(ids) >= 0) & (np.asarray(ids) < E)


jitted_sort = jax.jit(sort_by_expert, static_argnums=1)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(-2, E + 2), min_size=24, max_size=24))
def test_plan_is_a_stable_sort(ids):
    ids = np.array(ids, np.int32)[:, None]
    plan = jitted_sort(jnp.array(ids), E)
    key = np.where(here(ids), ids, E).ravel()
    np.testing.assert_array_equal(plan.order_M, np.argsort(key, kind="stable"))
    np.testing.assert_array_equal(plan.inverse_R[plan.order_M], np.arange(key.size))
    np.testing.assert_array_equal(plan.group_sizes_E, np.bincount(key, minlength=E + 1)[:E])


def test_order_without_packed_keys_is_the_same():
    """So many experts that expert and position do not fit one int32."""
    keys = jnp.array(np.random.default_rng(0).integers(0, E, N * K), jnp.int32)
    packed, argsorted = permute.stable_order(keys, E), permute.stable_order(keys, 2**30)
    np.testing.assert_array_equal(packed, argsorted)
    assert packed.dtype == argsorted.dtype == jnp.int32


def move(ids, x, weights, scale_RD, tail):
    """Dispatch, a stand-in for the experts, tail rows overwritten, combine."""
    plan = sort_by_expert(ids, E)
    xs = gather_rows(x, plan)
    in_tail = jnp.arange(N * K) >= jnp.sum(plan.group_sizes_E)
    y = jnp.where(in_tail[:, None], tail, jnp.tanh(xs) * scale_RD)
    return combine_rows(y, weights, plan)


def plain(ids, x, weights, scale_RD):
    """The same in flat order, by indexing and autodiff."""
    plan = sort_by_expert(ids, E)
    flat = jnp.tanh(jnp.repeat(x, K, axis=0)) * scale_RD[plan.inverse_R]
    weights = jnp.where(here(ids), weights, 0)
    return jnp.einsum("NKD,NK->ND", flat.reshape(N, K, D), weights)


def check_close(got, want):
    for a, b in zip(got, want, strict=True):
        assert np.isfinite(np.asarray(a)).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("tail", [0.0, np.nan])
def test_movement_and_gradients_match_plain_indexing(tail):
    ids, x, weights = choices()
    rng = np.random.default_rng(1)
    scale, dout = (jnp.array(rng.standard_normal(s), jnp.float32) for s in ((N * K, D), (N, D)))

    def run(function):
        y, vjp = jax.vjp(function, x, weights)
        return [y, *vjp(dout)]

    got = jax.jit(lambda: run(lambda x, w: move(ids, x, w, scale, tail)))()
    check_close(got, run(lambda x, w: plain(ids, x, w, scale)))


@pytest.mark.parametrize("held", [1, 2])
def test_a_shorter_buffer_changes_nothing(held):
    """Tokens that choose an expert once fill N * min(K, E) rows at most; the rest is tail."""
    ids = np.random.default_rng(2).permuted(np.tile(np.arange(E), (N, 1)), axis=1)[:, :K]
    ids[:, 0], ids[:, 1:] = 0, np.where(ids[:, 1:] == 0, E, ids[:, 1:])  # expert 0: every token
    _, x, weights = choices()
    dout = jnp.array(np.random.default_rng(3).standard_normal((N, D)), jnp.float32)

    def run(max_rows):
        def experts(x, weights):
            plan = sort_by_expert(jnp.asarray(ids, jnp.int32), held, max_rows)
            assert plan.order_M.size == (max_rows or N * K)
            y = jnp.tanh(gather_rows(x, plan))
            in_tail = jnp.arange(len(y)) >= jnp.sum(plan.group_sizes_E)
            return combine_rows(jnp.where(in_tail[:, None], jnp.nan, y), weights, plan)

        y, vjp = jax.vjp(experts, x, weights)
        return [y, *vjp(dout)]

    got, want = run(N * min(K, held)), run(None)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(b).max() > 0


def test_nan_cotangents_of_the_tail_reach_no_token():
    ids, x, _ = choices()
    plan = sort_by_expert(ids, E)
    tail = np.arange(N * K)[:, None] >= int(plan.group_sizes_E.sum())
    assert tail.any()
    _, vjp = jax.vjp(lambda x: gather_rows(x, plan), x)
    (dx,) = vjp(jnp.where(tail, np.nan, jnp.ones((N * K, D), jnp.float32)))
    np.testing.assert_array_equal(dx, np.repeat(here(ids).sum(1)[:, None], D, 1).astype(np.float32))


def test_all_choices_elsewhere():
    _, x, weights = choices()
    plan = sort_by_expert(jnp.full((N, K), E, jnp.int32), E)
    nothing = jnp.full((N * K, D), np.nan, jnp.float32)
    y, vjp = jax.vjp(lambda y, w: combine_rows(y, w, plan), nothing, weights)
    for a in (y, *vjp(x)):
        assert not np.asarray(a).any()


def test_no_scatter_of_rows():
    """Scatters are slow and, on GPUs, unordered: only the int32 inverse may use one."""
    ids, x, weights = choices()
    scale = jnp.ones((N * K, D), jnp.float32)
    gradient = jax.grad(lambda x, w: move(ids, x, w, scale, 0.0).sum(), argnums=(0, 1))
    text = jax.jit(gradient).lower(x, weights).as_text()
    assert text.count('"stablehlo.scatter"(') == 1


def test_bf16_sums_in_fp32():
    """256 + 1 + 1 is 258 in fp32; adding in bf16 would stay at 256."""
    plan = sort_by_expert(jnp.zeros((1, 3), jnp.int32), 1)
    y = jnp.array([[256.0], [1.0], [1.0]], jnp.bfloat16)
    out = combine_rows(y, jnp.ones((1, 3), jnp.bfloat16), plan)
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 0]) == 258.0


def test_shard_map_matches_unsharded():
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices: XLA_FLAGS=--xla_force_host_platform_device_count=2")
    scale = jnp.ones((2 * N * K, D), jnp.float32)
    shards = [(*choices(seed), scale[: N * K]) for seed in (0, 1)]

    def run(ids, x, weights, scale):
        y, vjp = jax.vjp(lambda x, w: move(ids, x, w, scale, 0.0), x, weights)
        return [y, *vjp(y)]

    mesh = jax.make_mesh(
        (2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )
    spec = P("data")
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True))
    got = sharded(*(jnp.concatenate(a) for a in zip(*shards, strict=True)))
    want = [jnp.concatenate(a) for a in zip(*(run(*s) for s in shards), strict=True)]
    check_close(got, want)


def test_what_does_not_fit_is_named():
    ids, x, weights = choices()
    plan = sort_by_expert(ids, E)
    with pytest.raises(ValueError, match="integers"):
        permute.sort_by_expert(weights, E)
    with pytest.raises(ValueError, match="11 rows"):
        gather_rows(x[:11], plan)
    with pytest.raises(ValueError, match="do not fit a plan"):
        combine_rows(jnp.ones((4, D)), weights, plan)
