"""The expert FFN over experts that are arrays of their own, against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped import expert_ffn
from pallas_kernels.grouped.separate import separate_expert_ffn, separate_experts

ATOL = {jnp.float32: 1e-5, jnp.bfloat16: 5e-2}
"""On results of order 1 to 4: fp32 in another order of sums; bf16 keeps 8 bits."""


def operands(sizes, width, inner, dtype, spare=0):
    keys = jax.random.split(jax.random.key(0), 4)
    E = len(sizes)
    shapes = [(E, width, inner), (E, width, inner), (E, inner, width)]
    weights = [
        (jax.random.normal(key, shape) * shape[1] ** -0.5).astype(dtype)
        for key, shape in zip(keys, shapes, strict=False)
    ]
    x = jax.random.normal(keys[3], (sum(sizes) + spare, width)).astype(dtype)
    return x, weights, jnp.array(sizes, jnp.int32)


@functools.partial(jax.jit, static_argnames="backend")
def found(x, weights, sizes, backend="portable"):
    apart = ([w[0] for w in separate_experts(stack, 1)] for stack in weights)
    return separate_expert_ffn(x, *apart, sizes, backend=backend)


@pytest.mark.parametrize("dtype", list(ATOL))
@pytest.mark.parametrize(
    ("sizes", "width", "inner"),
    [
        ([1, 0, 3, 1], 64, 32),
        ([0, 9, 0, 4], 32, 48),
        ([5], 30, 7),
        ([0, 1, 0, 0, 0, 1, 1], 40, 24),  # a row per tile, two levels of branches, the last ragged
        ([3, 0, 300, 1, 2], 16, 8),  # more rows than the largest tile
    ],
)
def test_equals_the_definition(sizes, width, inner, dtype):
    x, weights, sizes = operands(sizes, width, inner, dtype)
    y = found(x, weights, sizes)
    assert y.dtype == dtype
    wanted = expert_ffn(x, *weights, sizes, backend="reference")
    np.testing.assert_array_equal(found(x, weights, sizes, "reference"), wanted)
    np.testing.assert_allclose(
        y.astype(jnp.float32), wanted.astype(jnp.float32), rtol=0, atol=ATOL[dtype]
    )


def test_rows_beyond_the_groups_are_zeros():
    x, weights, sizes = operands([2, 1], 32, 16, jnp.float32, spare=3)
    y = found(x.at[3:].set(jnp.nan), weights, sizes)
    assert (y[3:] == 0).all()
    assert jnp.isfinite(y).all()


def test_shards_take_equal_parts_of_the_stack():
    stack = jnp.arange(6 * 2 * 3).reshape(6, 2, 3)
    apart = separate_experts(stack, 2)
    assert len(apart) == 3
    for j, array in enumerate(apart):
        np.testing.assert_array_equal(array, jnp.swapaxes(stack[jnp.array([j, 3 + j])], 1, 2))
