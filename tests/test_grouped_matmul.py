"""Grouped matmul and expert FFN against their dense references.

Tolerances, as a share of the largest reference value: fp32 1e-5 (order of summation only);
bf16 2e-2 (results, and the FFN's inner activations, are rounded to 8 bits of mantissa).
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.grouped import expert_ffn
from pallas_kernels.grouped.matmul import grouped_matmul
from pallas_kernels.grouped.ragged import Tiling, choose_tiling

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
ROWS = 70
GROUPS = {  # all in a buffer of ROWS rows, so that one compilation serves them
    "uneven": [5, 33, 1, 12],
    "empty groups": [0, 17, 0, 20],
    "one giant group": [0, 0, 70, 0],
    "full buffer": [9, 29, 21, 11],
    "no rows": [0, 0, 0, 0],
    "last row alone": [16, 37, 16, 1],
}
K, N = 12, 7
TILING = Tiling(8, 2)


def operands(sizes, dtype="float32", garbage=0.0, rows=ROWS):
    """Rows, dy and two kinds of weights; `garbage` fills the rows no group owns."""
    rng = np.random.default_rng(0)
    tail = np.arange(rows)[:, None] >= sum(sizes)
    x = np.where(tail, garbage, rng.standard_normal((rows, K)))
    dy_matmul = np.where(tail, garbage, rng.standard_normal((rows, N)))
    dy_ffn = np.where(tail, garbage, rng.standard_normal((rows, K)))
    w = [rng.standard_normal((len(sizes), *s)) for s in ((K, N), (K, N), (N, K))]
    cast = partial(jnp.asarray, dtype=dtype)
    return cast(x), cast(dy_matmul), cast(dy_ffn), [*map(cast, w)], jnp.array(sizes, jnp.int32)


@cache
def compiled(operation, **options):
    """y and the gradients of rows and weights, as a jitted function of `operands`."""

    def run(x, dy_matmul, dy_ffn, weights, group_sizes):
        if operation == "matmul":
            function, arguments, dy = grouped_matmul, (x, weights[0]), dy_matmul
        else:
            function, arguments, dy = expert_ffn, (x, *weights), dy_ffn
        y, vjp = jax.vjp(partial(function, group_sizes_E=group_sizes, **options), *arguments)
        return [y, *vjp(dy)]

    return jax.jit(run)


def assert_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("operation", ["matmul", "ffn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", GROUPS)
def test_values_and_gradients_match_reference(name, dtype, operation):
    inputs = operands(GROUPS[name], dtype)
    got = compiled(operation, tiling=TILING)(*inputs)
    want = compiled(operation, backend="reference")(*inputs)
    assert [g.dtype for g in got] == [w.dtype for w in want]
    assert_close(got, want, TOLERANCE[dtype])
    for rows in got[:2]:  # y and dx
        assert not np.asarray(rows, np.float32)[sum(GROUPS[name]) :].any()


@pytest.mark.parametrize("operation", ["matmul", "ffn"])
@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_garbage_beyond_the_groups_reaches_nothing(backend, operation):
    options = {"tiling": TILING} if backend == "portable" else {"backend": backend}
    run = compiled(operation, **options)
    got, want = (run(*operands([9, 0, 21, 3], garbage=g)) for g in (np.nan, 0.0))
    assert_close(got, want, 0)


def test_reference_is_the_definition():
    """The oracle itself, against one NumPy product per expert in float64."""
    sizes = GROUPS["uneven"]
    x, _, _, (w, *_), group_sizes = operands(sizes)
    want, start = np.zeros((ROWS, N)), 0
    for e, n in enumerate(sizes):
        want[start : start + n] = np.float64(x[start : start + n]) @ np.float64(w[e])
        start += n
    assert_close([grouped_matmul(x, w, group_sizes, backend="reference")], [want], 1e-6)


@pytest.mark.parametrize("tiling", [Tiling(1, 1), Tiling(128, 1), Tiling(4, 16), None])
def test_any_tiling_gives_the_same(tiling):
    inputs = operands(GROUPS["uneven"])
    got = compiled("ffn", tiling=tiling)(*inputs)
    assert_close(got, compiled("ffn", backend="reference")(*inputs), TOLERANCE["float32"])


def test_one_compilation_serves_all_group_sizes():
    """Sizes are run-time values: the work follows them, the program does not."""
    run = jax.jit(partial(grouped_matmul, tiling=TILING))
    for sizes in GROUPS.values():
        x, _, _, (w, *_), group_sizes = operands(sizes)
        run(x, w, group_sizes)
    assert run._cache_size() == 1


@pytest.mark.parametrize("operation", ["matmul", "ffn"])
def test_shard_map_matches_unsharded(operation):
    """Each of 2 devices has its own rows, experts and group sizes, as in expert parallelism."""
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices: XLA_FLAGS=--xla_force_host_platform_device_count=2")
    shards = [
        operands([5, 33], rows=41, garbage=np.nan),
        operands([20, 0], rows=41, garbage=np.nan),
    ]
    joined = jax.tree.map(lambda *a: jnp.concatenate(a), *shards)

    run = compiled(operation, tiling=TILING)
    mesh = jax.make_mesh(
        (2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )
    spec = P("expert")
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True))
    want = jax.tree.map(lambda *a: jnp.concatenate(a), *(run(*s) for s in shards))
    assert_close(sharded(*joined), want, TOLERANCE["float32"])


def test_tiling_follows_the_shapes():
    """Few rows per expert: small tiles. Wide weights: one tile fills the cores."""
    assert choose_tiling(8192, 16, 256 * 128) == Tiling(128, 8)
    assert choose_tiling(12288, 64, 256 * 128) == Tiling(64, 16)
    assert choose_tiling(4096, 8, 2048 * 1408).batch == 1
    assert choose_tiling(1, 1, 1) == Tiling(1, 1)
    assert choose_tiling(10, 64, 8).rows == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_MK": jnp.ones((3, 5))}, "width 5"),
        ({"x_MK": jnp.ones((3, K), jnp.bfloat16)}, "cast"),
        ({"w_EKN": jnp.ones((3, K, N))}, "with 2 groups"),
        ({"group_sizes_E": jnp.ones(2)}, "integer"),
        ({"backend": "fast"}, "'fast'"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    good = {
        "x_MK": jnp.ones((3, K)),
        "w_EKN": jnp.ones((2, K, N)),
        "group_sizes_E": jnp.ones(2, int),
    }
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**(good | change))


def test_no_rows_at_all():
    assert grouped_matmul(jnp.ones((0, K)), jnp.ones((2, K, N)), jnp.zeros(2, int)).shape == (0, N)
