"""Cross-entropy of a linear head: its kernels, emulated and lowered, against NumPy in float64.

Tolerances: what sums in fp32 (loss, log-sum-exp, target's logit) 1e-5; gradients, whose bf16 parts
are rounded, 1e-2 and no more than 1.1 times the error of the same computation by XLA.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.cross_entropy.linear import (
    Parts,
    dlogits,
    logsumexp_and_target,
    loss_and_gradients,
    loss_sum,
    merge,
)
from pallas_kernels.cross_entropy.tiles import Blocks, candidates, choose_blocks, shared_memory
from pallas_kernels.mosaic import SMEM_BYTES
from tests.kernel_ladder import emulate, lower, relative_error

M, D, V = 275, 128, 224
"""Two rows of clusters, the second mostly empty; 2 steps of D; a tile of V and part of another."""
FEW = 139
"""Rows of a block and part of its peer's: half the work for the emulator."""
BLOCKS = Blocks(columns=128, depth=64, stages=2, clusters=1)
V3 = {"whole": (4096, 7168, 129280), "an eighth": (4096, 7168, 16160)}


@cache
def operands(scale: float = 0.1, rows: int = M):
    """x, w, targets and weights; targets at both ends, weights of 0, logits of about 10 scale."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((M, D)), jnp.bfloat16)
    w = jnp.asarray(scale * rng.standard_normal((D, V)), jnp.bfloat16)
    targets = rng.integers(0, V, M)
    targets[:4] = 0, V - 1, 127, 128
    weights = rng.random(M) * (rng.random(M) < 0.8)
    targets, weights = jnp.asarray(targets, jnp.int32), jnp.asarray(weights, jnp.float32)
    return x[:rows], w, targets[:rows], weights[:rows]


def exact(x, w, targets, weights):
    """In float64: log-sum-exp, target's logit, loss, dlogits, dx and dw."""
    x, w, weights = (np.asarray(a, np.float64) for a in (x, w, weights))
    logits, rows = x @ w, np.arange(len(x))
    largest = logits.max(axis=1)
    lse = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    target = logits[rows, targets]
    d = np.exp(logits - lse[:, None])
    d[rows, targets] -= 1
    d *= weights[:, None]
    return lse, target, (weights * (lse - target)).sum(), d, d @ w.T, x.T @ d


def assert_gradient(got, by_xla, want):
    assert relative_error(got, want) <= min(1e-2, 1.1 * relative_error(by_xla, want))


@cache
def compiled(function, backend, **options):
    """One compilation for all tests that call `function` so."""
    run = jax.jit(partial(function, backend=backend, blocks=BLOCKS, **options))
    return partial(emulate, run) if backend == "emulated" else run


@pytest.mark.parametrize("backend", ["emulated", "portable", "reference"])
@pytest.mark.parametrize("scale", [0.1, 300])
def test_statistics_of_rows(backend, scale):
    """Also where logits reach 1e4, whose exponentials alone would overflow."""
    x, w, targets, weights = operands(scale)
    lse, target, loss, *_ = exact(x, w, targets, weights)
    parts = compiled(logsumexp_and_target, backend)(x, w, targets)
    assert isinstance(parts, Parts)
    assert all(a.dtype == jnp.float32 and a.shape == (M,) for a in parts)
    assert relative_error(parts.lse(), lse) < 1e-6
    assert relative_error(parts.target_M, target) < 1e-6
    assert (np.asarray(parts.sum_M) >= 1).all()
    assert relative_error(jnp.sum(weights * (parts.lse() - parts.target_M)), loss) < 1e-5


def test_targets_of_other_devices_count_nothing():
    """Columns left of this part, right of it, and right of it but within its last tile."""
    x, w, targets, weights = operands()
    targets = targets.at[:3].set(jnp.array([-1, V, 10 * V]))
    lse = jnp.asarray(exact(x, w, targets % V, weights)[0], jnp.float32)
    for backend in ("emulated", "portable"):
        parts = compiled(logsumexp_and_target, backend)(x, w, targets)
        assert not np.asarray(parts.target_M[:3]).any()
        d = compiled(dlogits, backend)(x, w, targets, lse, jnp.ones(M))
        assert (np.asarray(d[:3]) > 0).all()
        assert (np.asarray(d[3:]) < 0).sum() == M - 3


def test_gradient_of_logits():
    x, w, targets, weights = operands()
    lse, _, _, want, *_ = exact(x, w, targets, weights)
    arguments = x, w, targets, jnp.asarray(lse, jnp.float32), weights
    got, by_xla = (compiled(dlogits, b)(*arguments) for b in ("emulated", "portable"))
    assert got.dtype == jnp.bfloat16
    assert_gradient(got, by_xla, want)


def in_chunks(backend, recompute=False):
    """Loss and gradients: by kernels in chunks of 256 rows, by XLA in chunks of 46."""
    rows = 46 if backend == "portable" else 256
    options = {"recompute": recompute, "chunk_bytes": rows * (2 if recompute else 4) * V}
    return compiled(loss_and_gradients, backend, **options)


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients(recompute):
    """In two chunks; in one where logits are computed twice."""
    arguments = operands(rows=FEW if recompute else M)
    *_, loss, _, dx, dw = exact(*arguments)
    got, by_xla = in_chunks("emulated", recompute)(*arguments), in_chunks("portable")(*arguments)
    assert [a.dtype for a in got] == [a.dtype for a in by_xla]
    assert got[1].dtype == jnp.bfloat16
    assert got[0].dtype == got[2].dtype == jnp.float32
    assert relative_error(got[0], loss) < 1e-5
    assert relative_error(by_xla[0], loss) < 1e-5
    assert_gradient(got[1], by_xla[1], dx)
    assert_gradient(got[2], by_xla[2], dw)


def test_definition():
    *_, loss, _, dx, dw = exact(*operands())
    got = compiled(loss_and_gradients, "reference")(*operands())
    assert relative_error(got[0], loss) < 1e-6
    assert relative_error(got[1], dx) < 3e-3
    assert relative_error(got[2], dw) < 3e-3


def test_confident_rows_keep_their_gradient():
    """Where softmax is near 1 at the target, what is left is not the rounding of 1."""
    column = np.arange(M) % D
    x = jax.nn.one_hot(column, D, dtype=jnp.bfloat16)
    w = jnp.zeros((D, V), jnp.bfloat16).at[np.arange(D), np.arange(D)].set(12)
    arguments = x, w, jnp.asarray(column, jnp.int32), jnp.ones(M)
    got, by_xla = in_chunks("emulated")(*arguments), in_chunks("portable")(*arguments)
    for mine, theirs, want in zip(got[1:], by_xla[1:], exact(*arguments)[-2:], strict=True):
        assert_gradient(mine, theirs, want)


def test_vocabulary_in_two_parts():
    """Each part gets the whole's log-sum-exp; dx adds up, dw is each part's own."""
    x, w, targets, weights = operands(rows=FEW)
    *_, loss, _, dx, dw = exact(x, w, targets, weights)
    halves = [(w[:, i : i + V // 2], targets - i) for i in (0, V // 2)]
    parts = [compiled(logsumexp_and_target, "portable")(x, *half) for half in halves]
    whole = merge(
        Parts(*(jnp.stack(a) for a in zip(*parts, strict=True))),
        partial(jnp.max, axis=0),
        partial(jnp.sum, axis=0),
    )

    def of_half(w, targets, whole, backend):
        return loss_and_gradients(
            x, w, targets, weights, combine=lambda _: whole, backend=backend, blocks=BLOCKS
        )

    run = jax.jit(of_half, static_argnums=3)
    got = [emulate(lambda *a: run(*a, "emulated"), *half, whole) for half in halves]
    by_xla = [run(*half, whole, "portable") for half in halves]
    assert relative_error(got[0][0], loss) < 1e-5
    assert got[0][0] == got[1][0]
    sums = [sum(np.asarray(g[1], np.float64) for g in both) for both in (got, by_xla)]
    assert_gradient(*sums, dx)
    assert_gradient(*(jnp.concatenate([g[2] for g in both], 1) for both in (got, by_xla)), dw)


def test_shard_map_over_the_vocabulary():
    """Two devices, half of the vocabulary each, by XLA; and the kernels' lowering there."""
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices: XLA_FLAGS=--xla_force_host_platform_device_count=2")
    x, w, targets, weights = operands()
    mesh = jax.make_mesh(
        (2,), ("v",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )
    whole = partial(
        merge,
        largest_over=lambda a: jax.lax.pmax(a, "v"),
        sum_over=lambda a: jax.lax.psum(a, "v"),
    )

    def on_shard(x, w, targets, weights, backend, chunk_bytes):
        vary = partial(jax.lax.pcast, axis_name="v", to="varying")
        x, targets, weights = vary(x), vary(targets), vary(weights)
        targets = targets - jax.lax.axis_index("v") * w.shape[1]
        loss, dx, dw = loss_and_gradients(
            x, w, targets, weights, combine=whole, backend=backend, chunk_bytes=chunk_bytes
        )
        return jax.lax.pmax(loss, "v"), jax.lax.psum(dx, "v"), dw

    def run(backend, chunk_bytes):
        specs = (P(), P(None, "v"), P(), P())
        body = partial(on_shard, backend=backend, chunk_bytes=chunk_bytes)
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=(P(), P(), P(None, "v")))

    got = jax.jit(run("portable", 46 * 4 * V))(x, w, targets, weights)
    *_, loss, _, dx, dw = exact(x, w, targets, weights)
    assert relative_error(got[0], loss) < 1e-5
    assert relative_error(got[1], dx) < 1e-2
    assert relative_error(got[2], dw) < 1e-2
    wide = jax.ShapeDtypeStruct((D, 2 * V), jnp.bfloat16)
    lower(run("mosaic", 256 * 4 * V), x, wide, targets, weights)


@pytest.mark.parametrize(("vocabulary", "recompute"), [("whole", False), ("an eighth", True)])
def test_lowers_for_cuda_at_the_shapes_of_v3(vocabulary, recompute):
    m, d, v = V3[vocabulary]
    arrays = [
        ((m, d), jnp.bfloat16),
        ((d, v), jnp.bfloat16),
        ((m,), jnp.int32),
        ((m,), jnp.float32),
    ]
    run = partial(loss_and_gradients, backend="mosaic", recompute=recompute)
    text = lower(run, *(jax.ShapeDtypeStruct(*a) for a in arrays))
    assert text.count("@mosaic_gpu_v2") == 1 + recompute


def test_blocks_fit():
    for m, d, v in (*V3.values(), (4096, 512, 16384), (256, 256, 4096), (8, 64, 16)):
        assert choose_blocks(m, d, v) in candidates(m, d, v)
        assert all(shared_memory(b) <= SMEM_BYTES for b in candidates(m, d, v))
    assert choose_blocks(*V3["whole"]) == Blocks(columns=256, depth=64, stages=4, clusters=66)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_DV": jnp.ones((64, V), jnp.bfloat16)}, r"\(64, 224\)"),
        ({"w_DV": jnp.ones((D, V))}, "cast"),
        ({"targets_M": jnp.zeros(3, int)}, "275 rows"),
        ({"backend": "fast"}, "'fast'"),
        (
            {"backend": "mosaic", "x_MD": jnp.ones((M, D)), "w_DV": jnp.ones((D, V))},
            "float32.*port",
        ),
        (
            {
                "backend": "mosaic",
                "x_MD": jnp.ones((M, 32), jnp.bfloat16),
                "w_DV": jnp.ones((32, V), jnp.bfloat16),
            },
            "width 32",
        ),
        (
            {"backend": "emulated", "w_DV": jnp.ones((D, 104), jnp.bfloat16)},
            "104 columns of the vocabulary are not a multiple of 16",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    names = ("x_MD", "w_DV", "targets_M", "weights_M")
    with pytest.raises(ValueError, match=message):
        loss_sum(**(dict(zip(names, operands(), strict=True)) | change))
