"""The routed sum as one function, and in parts, against the functions that it is made of.

Tolerances, as a share of the largest value: fp32 1e-5 (order of sums), bf16 2e-2.

Letters: N tokens, K choices per token, D width, F inner width, E experts, M sorted rows.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped import (
    combine_rows,
    expert_ffn,
    expert_sums,
    gather_rows,
    part_of,
    sort_by_expert,
)

N, K, D, F, E = 37, 3, 16, 8, 5
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
ROUTINGS = ["even", "all to one", "none here"]


def choices(routing: str) -> np.ndarray:
    """Experts of each token, distinct; those from E on are of other shards [N, K]."""
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(E + 4), (N, 1)), axis=1)[:, :K].astype(np.int32)
    if routing == "all to one":
        ids = np.broadcast_to(np.array([2, E, E + 1], np.int32), (N, K))
    return ids if routing != "none here" else ids + E


def operands(dtype: str):
    """Tokens, router weights, experts and a cotangent."""
    rng = np.random.default_rng(1)
    cast = partial(jnp.asarray, dtype=dtype)
    x, dout = (cast(rng.standard_normal((N, D))) for _ in range(2))
    experts = tuple(cast(rng.standard_normal((E, *s))) for s in ((D, F), (D, F), (F, D)))
    return x, jnp.asarray(rng.uniform(0.2, 1, (N, K)), jnp.float32), experts, dout


def apart(x, weights, experts, plan, backend):
    y = expert_ffn(gather_rows(x, plan), *experts, plan.group_sizes_E, backend=backend)
    return combine_rows(y, weights, plan)


@cache
def compiled(function, backend: str, rows: int = 0):
    """Output and gradients; with `rows` summed over parts of so many rows."""

    def run(ids, x, weights, experts, dout):
        plan = sort_by_expert(ids, E)
        plans = (
            [plan] if not rows else [part_of(plan, start, rows) for start in range(0, N * K, rows)]
        )

        def total(x, weights, experts):
            found = [function(x, weights, experts, one, backend=backend) for one in plans]
            return sum(y.astype(jnp.float32) for y in found)

        y, vjp = jax.vjp(total, x, weights, experts)
        return y, *vjp(dout.astype(jnp.float32))

    return jax.jit(run)


def check(got, want, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_one_function_is_its_three_parts(routing, dtype):
    ids, values = choices(routing), operands(dtype)
    got = compiled(expert_sums, "portable")(ids, *values)
    check(got, compiled(apart, "reference")(ids, *values), TOLERANCE[dtype])
    assert routing == "none here" or all(np.abs(np.asarray(g)).max() > 0 for g in got[:3])


@pytest.mark.parametrize("rows", [8, 40])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_parts_hold_each_choice_once(routing, rows):
    """Whatever the edges cut: groups, the tail; the last part is not full."""
    ids, values = choices(routing), operands("float32")
    got = compiled(expert_sums, "portable", rows)(ids, *values)
    check(got, compiled(expert_sums, "portable")(ids, *values), TOLERANCE["float32"])


def test_rows_of_other_shards_reach_nothing():
    """A token without a choice here may hold anything, and so may its router weights."""
    ids = choices("even")
    ids[::3] = E
    x, weights, experts, dout = operands("float32")
    absent = (ids == E).all(1)
    want = compiled(expert_sums, "portable")(ids, x, weights, experts, dout)
    x, dout = (jnp.where(absent[:, None], jnp.nan, a) for a in (x, dout))
    weights = jnp.where(absent[:, None], jnp.nan, weights)
    check(compiled(expert_sums, "portable")(ids, x, weights, experts, dout), want, 0)


def test_no_output_is_kept_for_the_backward_pass():
    """Gate and up of every row, and nothing of its width that was not given."""
    x, weights, experts, _ = operands("float32")
    plan = sort_by_expert(choices("even"), E)
    kept = jax.vjp(lambda *v: expert_sums(*v, plan), x, weights, experts)[1]
    shapes = [a.shape for a in jax.tree.leaves(kept) if a.ndim == 2]
    assert sum(shape[1] == F for shape in shapes) == 2
    assert [shape for shape in shapes if shape[1] == D] == [(N, D)]
