"""Grouped attention: every way to compute it against its definition, and cuDNN's call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import grouped_attention
from pallas_kernels.decode import grouped_decode, kept

SCALE = 0.25


def arrays(dtype, B=1, T=160, N=4, K=2, H=16):
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def packed(T: int) -> jax.Array:
    """Documents of 50 tokens."""
    return jnp.asarray(np.arange(T) // 50 * 50, jnp.int32)[None]


def with_gradients(backend, arrays, start_BT):
    def loss(q, k, v):
        o = grouped_attention(q, k, v, start_BT, scale=SCALE, backend=backend)
        return (o.astype(jnp.float32) * jnp.sin(jnp.arange(o.size)).reshape(o.shape)).sum(), o

    grads, o = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)
    return [np.asarray(x, np.float32) for x in (o, *grads)]


@pytest.mark.parametrize(("N", "K"), [(4, 2), (4, 1), (3, 3), (8, 2)])
@pytest.mark.parametrize("documents", [False, True])
def test_portable_is_the_reference(N, K, documents):
    given = arrays(jnp.float32, B=1 + (not documents), N=N, K=K)
    start_BT = packed(160) if documents else None
    pairs = (with_gradients(b, given, start_BT) for b in ("portable", "reference"))
    for ours, exact in zip(*pairs, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-5)


def test_kernels_are_the_reference():
    """Emulated; the tolerance is two roundings to bfloat16 of values up to 4."""
    given, start_BT = arrays(jnp.bfloat16), packed(160)
    pairs = (with_gradients(b, given, start_BT) for b in ("emulated", "reference"))
    for ours, exact in zip(*pairs, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=0.02, atol=0.03)


@pytest.mark.parametrize(
    ("backend", "dtype", "atol"), [("portable", "float32", 1e-5), ("emulated", "bfloat16", 0.02)]
)
def test_decoding_is_the_reference(backend, dtype, atol):
    """Two tokens at a time over rows of different lengths, whose other slots hold anything."""
    B, S, N, K, H, Q = 2, 64, 4, 2, 32, 2
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.normal(size=(B, Q, N, H)), dtype)
    kv = [jnp.asarray(rng.normal(size=(B, S, K, H)), dtype) for _ in range(2)]
    lengths = jnp.asarray([9, 40], jnp.int32)
    found = grouped_decode(q, kept(*kv, backend), lengths, scale=SCALE, backend=backend)
    keys, values = (np.asarray(x, np.float64).swapaxes(1, 2) for x in kv)
    for b in range(B):
        for i in range(Q):
            seen = int(lengths[b]) - (Q - 1 - i)
            for n in range(N):
                k, v = keys[b, n * K // N, :seen], values[b, n * K // N, :seen]
                p = np.exp(SCALE * k @ np.asarray(q[b, i, n], np.float64))
                wanted = p @ v / p.sum()
                np.testing.assert_allclose(
                    np.asarray(found[b, i, n], np.float64), wanted, rtol=0, atol=atol
                )


@pytest.mark.parametrize("documents", [False, True])
def test_cudnn_is_called_on_a_gpu(documents, monkeypatch):
    """Lowered for one that is not there: forward and backward are cuDNN's, keys are not repeated,
    and what is seen is causal, or a mask where documents are packed."""
    from jax._src.cudnn import fused_attention_stablehlo as library

    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(library, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(library, "is_cuda_compute_capability_equal", lambda _: False)
    given = arrays(jnp.bfloat16, T=128, N=8, K=2, H=64)
    start_BT = packed(128) if documents else None

    def loss(q, k, v):
        o = grouped_attention(q, k, v, start_BT, scale=SCALE, backend="cudnn")
        return o.astype(jnp.float32).sum()

    names = ("Softmax", "SoftmaxBackward", "ScaleBiasSoftmax", "ScaleBiasSoftmaxBackward")
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(f"__cudnn$fmha{n}") for n in names]
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    lowered = jax.export.export(gradient, platforms=["cuda"], disabled_checks=unchecked)(*given)
    text = lowered.mlir_module()
    calls = [line for line in text.splitlines() if "custom_call @__cudnn$fmha" in line]
    assert sum("Backward" in line for line in calls) == 1
    assert len(calls) == 2
    assert all("1x128x2x64" in line or "1x2x128x64" in line for line in calls)
