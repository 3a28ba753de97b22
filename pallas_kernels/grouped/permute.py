"""Dispatch plan and row movement of experts on one device, without a scatter-add.

Shape letters: N tokens, K choices per token, E experts, D width, R = N*K choices, M <= R sorted
rows that are kept (all, unless said otherwise).

Choices are numbered n*K + k ("flat") and sorted by expert. Both directions of every movement, and
both of their derivatives, are gathers: a sorted row knows its choice (`order`), a choice its
sorted row (`inverse`). Choices of experts outside [0, E) belong to other shards; they sit in the
tail after the last group and neither give nor receive anything, whatever the tail rows hold. Where
fewer rows are kept than there are choices, what is cut off is tail, or belongs to another part
(`part_of`).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.grouped.ragged import take


class Plan(NamedTuple):
    """Places of choices when sorted by expert, int32."""

    order_M: Array
    """Sorted position to flat choice."""
    inverse_R: Array
    """Flat choice to sorted position; M and more, or less than 0, are cut off."""
    group_sizes_E: Array
    """Choices of each expert; their sum is the first row of the tail."""

    def here(self, inverse: Array) -> Array:
        """Whether these choices, by their entries of `inverse_R`, have one of the rows."""
        return (inverse >= 0) & (inverse < jnp.sum(self.group_sizes_E))


def sort_by_expert(expert_ids_NK: Array, num_experts: int, max_rows: int | None = None) -> Plan:
    """Stable sort of the choices by expert.

    Args:
        expert_ids_NK: chosen experts, int [N, K]; ids outside [0, num_experts) go to the tail.
        num_experts: experts held here [E].
        max_rows: sorted rows to keep [M]; no fewer may be in a group (a run-time value: not
            checked). Tokens that choose an expert at most once need N * min(K, E).

    Raises:
        ValueError: ids are not an integer matrix, or too many for int32 positions.
    """
    if expert_ids_NK.ndim != 2 or not jnp.issubdtype(expert_ids_NK.dtype, jnp.integer):
        raise ValueError(
            f"expert ids have shape {expert_ids_NK.shape} and type {expert_ids_NK.dtype}; "
            "give integers [tokens, choices]"
        )
    R = expert_ids_NK.size
    if R >= 2**31:
        raise ValueError(f"{R} choices do not fit int32 positions; split the batch")
    ids_R = expert_ids_NK.reshape(R)
    ids_R = jnp.where((ids_R >= 0) & (ids_R < num_experts), ids_R, num_experts).astype(jnp.int32)
    order_R = stable_order(ids_R, num_experts + 1)
    inverse_R = (
        jnp.zeros_like(order_R)
        .at[order_R]
        .set(jnp.arange(R, dtype=jnp.int32), mode="promise_in_bounds", unique_indices=True)
    )
    group_sizes_E = jnp.sum(
        ids_R[:, None] == jnp.arange(num_experts, dtype=jnp.int32), axis=0, dtype=jnp.int32
    )
    return Plan(order_R[:max_rows], inverse_R, group_sizes_E)


def part_of(plan: Plan, start: Array | int, num_rows: int) -> Plan:
    """`num_rows` sorted rows, from `start` on, of a plan that keeps all, as a plan of their own.

    It may cut a group, and reach beyond the last row.
    """
    order_M = lax.dynamic_slice(jnp.pad(plan.order_M, (0, num_rows)), (start,), (num_rows,))
    ends_E = jnp.clip(jnp.cumsum(plan.group_sizes_E) - start, 0, num_rows)
    return Plan(order_M, plan.inverse_R - start, jnp.diff(ends_E, prepend=0))


def stable_order(keys_R: Array, num_keys: int) -> Array:
    """Positions that sort int32 keys in [0, num_keys), equal keys in their order, int32 [R]."""
    R = keys_R.size
    if num_keys * R >= 2**31:
        return jnp.argsort(keys_R, stable=True).astype(jnp.int32)
    # Key and position in one integer: a sort of one operand is the fast path of XLA on CPU and of
    # CUB on GPU, and the position makes it stable.
    return lax.sort(keys_R * R + jnp.arange(R, dtype=jnp.int32), is_stable=False) % R


def _keep(values: Array, keep: Array) -> Array:
    return jnp.where(keep[..., None], values, 0)


def _take_choices(rows: Array, inverse: Array) -> Array:
    """Sorted row of choices; any row for those that are cut off."""
    return take(rows, jnp.clip(inverse, 0, rows.shape[0] - 1))


def gather_rows(x_ND: Array, plan: Plan) -> Array:
    """Row of each choice's token, sorted by expert [M, D]; tail rows are copies like the others.

    The gradient of a token sums over its choices in fp32, those in the tail left out.

    Raises:
        ValueError: `x_ND` does not have the plan's number of tokens.
    """
    N, R = x_ND.shape[0], plan.inverse_R.size
    if N == 0 or R % N:
        raise ValueError(f"{N} rows do not fit a plan of {R} choices; use the plan's own tokens")
    return _gather_rows(R // N, x_ND, plan)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_rows(K: int, x_ND: Array, plan: Plan) -> Array:
    return take(x_ND, plan.order_M // K)


def _gather_rows_fwd(K: int, x_ND: Array, plan: Plan):
    return _gather_rows(K, x_ND, plan), plan


def _gather_rows_bwd(K: int, plan: Plan, dxs_MD: Array):
    return sum_rows(dxs_MD, K, plan), None


_gather_rows.defvjp(_gather_rows_fwd, _gather_rows_bwd)


def sum_rows(dxs_MD: Array, K: int, plan: Plan) -> Array:
    """Sum of the rows of each token's choices [N, D], in fp32, in the type of the rows."""
    inverse_NK = plan.inverse_R.reshape(-1, K)
    here_NK = plan.here(inverse_NK)
    # One gather per choice, added as they come: XLA makes a single pass, without an [N, K, D].
    dx_ND = sum(
        _keep(_take_choices(dxs_MD, inverse_NK[:, k]), here_NK[:, k]).astype(jnp.float32)
        for k in range(K)
    )
    return jnp.asarray(dx_ND, dxs_MD.dtype)


def combine_rows(y_MD: Array, weights_NK: Array, plan: Plan) -> Array:
    """out[n] = sum over k of weights[n, k] * y[row of choice (n, k)], summed in fp32 [N, D].

    Choices in the tail add nothing. The result has the type of `y_MD`. Source: DeepSeek-V3
    report, eq. 12 (the routed sum).

    Raises:
        ValueError: rows or weights do not have the plan's number of choices.
    """
    M, R = plan.order_M.size, plan.inverse_R.size
    if weights_NK.ndim != 2 or weights_NK.size != R or y_MD.shape[0] != M:
        raise ValueError(
            f"rows {y_MD.shape} and weights {weights_NK.shape} do not fit a plan of {R} choices "
            f"and {M} rows; give one weight [tokens, choices] per choice and the plan's rows"
        )
    return _combine_rows(y_MD, weights_NK, plan)


@jax.custom_vjp
def _combine_rows(y_MD: Array, weights_NK: Array, plan: Plan) -> Array:
    inverse_NK = plan.inverse_R.reshape(weights_NK.shape)
    here_NK = plan.here(inverse_NK)
    weights_NK = weights_NK.astype(jnp.float32)
    out_ND = sum(
        _keep(_take_choices(y_MD, inverse_NK[:, k]) * weights_NK[:, k, None], here_NK[:, k])
        for k in range(weights_NK.shape[1])
    )
    return jnp.asarray(out_ND, y_MD.dtype)


def _combine_rows_fwd(y_MD: Array, weights_NK: Array, plan: Plan):
    return _combine_rows(y_MD, weights_NK, plan), (y_MD, weights_NK, plan)


def _combine_rows_bwd(saved, dout_ND: Array):
    y_MD, weights_NK, plan = saved
    M, K = y_MD.shape[0], weights_NK.shape[1]
    num_here = jnp.sum(plan.group_sizes_E)
    here_M = jnp.arange(M, dtype=jnp.int32) < num_here
    dout_MD = take(dout_ND, plan.order_M // K).astype(jnp.float32)
    weights_M = take(weights_NK.reshape(-1), plan.order_M).astype(jnp.float32)
    dy_MD = _keep(dout_MD * weights_M[:, None], here_M)
    dweights_M = jnp.where(here_M, jnp.sum(dout_MD * y_MD.astype(jnp.float32), axis=1), 0)
    return dy_MD.astype(y_MD.dtype), of_choices(dweights_M, weights_NK, plan), None


_combine_rows.defvjp(_combine_rows_fwd, _combine_rows_bwd)


def of_choices(values_M: Array, like_NK: Array, plan: Plan) -> Array:
    """The value of each choice's row, 0 for choices without one, of the shape and type of like."""
    values_R = jnp.where(plan.here(plan.inverse_R), _take_choices(values_M, plan.inverse_R), 0)
    return values_R.reshape(like_NK.shape).astype(like_NK.dtype)
