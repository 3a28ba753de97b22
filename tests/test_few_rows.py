"""The expert FFN for a few rows per expert against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.few_rows import expert_ffn_few_rows, has_few_rows

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
    return x, *weights, jnp.array(sizes, jnp.int32)


@pytest.mark.parametrize("dtype", list(ATOL))
@pytest.mark.parametrize(
    ("sizes", "width", "inner"),
    [([1, 0, 3, 1], 64, 32), ([0, 9, 0, 4], 32, 48), ([5], 30, 7), ([0, 0, 1], 40, 24)],
)
def test_equals_the_definition(sizes, width, inner, dtype):
    arguments = operands(sizes, width, inner, dtype)
    found = expert_ffn_few_rows(*arguments)
    assert found.dtype == dtype
    wanted = expert_ffn(*arguments, backend="reference")
    np.testing.assert_allclose(
        found.astype(jnp.float32), wanted.astype(jnp.float32), rtol=0, atol=ATOL[dtype]
    )


def test_rows_beyond_the_groups_are_zeros():
    x, *rest = operands([2, 1], 32, 16, jnp.float32, spare=3)
    found = expert_ffn_few_rows(x.at[3:].set(jnp.nan), *rest)
    assert (found[3:] == 0).all()
    assert jnp.isfinite(found).all()


def test_it_is_what_a_few_rows_get_and_has_the_usual_gradient():
    arguments = operands([1, 0, 2, 1], 32, 16, jnp.float32)
    assert has_few_rows(4, 4)
    assert not has_few_rows(17, 4)
    np.testing.assert_array_equal(expert_ffn(*arguments), expert_ffn_few_rows(*arguments))

    def total(backend):
        return lambda x: expert_ffn(x, *arguments[1:], backend=backend).sum()

    np.testing.assert_allclose(
        jax.grad(total("auto"))(arguments[0]),
        jax.grad(total("reference"))(arguments[0]),
        rtol=0,
        atol=1e-5,
    )
