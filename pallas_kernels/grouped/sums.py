"""The routed sum of DeepSeekMoE on one device, as one function with one derivative.

out[n] = sum over k of weights[n, k] * expert(ids[n, k])(x[n]): rows gathered, computed, weighed and
summed. As one function it keeps less for its derivative than its parts do, and computes less again:
the gradient of a weight is <h, dh>, of the width F, where <y, dout> would need y, of the width D,
and with it the last product. What the backward pass holds are gate and up [M, F] and the rows that
it is at: of x, dout and dx [M, D] two at a time, by XLA one, as its tiles pick theirs themselves.

Shape letters: N tokens, K choices per token, M sorted rows, E experts, D model width, F expert
width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.grouped.experts import (
    Rows,
    Way,
    Weights,
    backward,
    choose_way,
    expert_ffn,
    forward,
)
from pallas_kernels.grouped.matmul import check_backend, check_operands
from pallas_kernels.grouped.permute import (
    Plan,
    combine_rows,
    gather_rows,
    of_choices,
    sum_rows,
)
from pallas_kernels.grouped.products import unsupported
from pallas_kernels.grouped.ragged import take
from pallas_kernels.mosaic import Backend


def expert_sums(
    x_ND: Array,
    weights_NK: Array,
    experts: tuple[Array, ...],
    plan: Plan,
    *,
    backend: Backend = "portable",
) -> Array:
    """Weighted sum of each token's experts [N, D], over the choices that `plan` has rows for.

    The same as `combine_rows(expert_ffn(gather_rows(x, plan), ..), weights, plan)`, gradients
    included. Source: DeepSeek-V3 report, eq. 12 (the routed sum).

    Args:
        x_ND: tokens.
        weights_NK: router weights, fp32.
        experts: gate and up [E, D, F], down [E, F, D], of the type of x. Behind them may follow the
            master weights that they are copies of: `masters` of `expert_ffn`.
        plan: of `sort_by_expert`, for these tokens; or of `part_of`.
        backend: as of `expert_ffn`.

    Raises:
        ValueError: shapes, types or the backend do not fit.
    """
    gate, up, down, *rest = experts
    weights: Weights = (gate, up, down)
    masters = tuple(rest) or weights
    named = {"w_gate": gate, "w_up": up, "w_down": down}
    check_operands(x_ND, plan.group_sizes_E, **named)
    _, D, F = gate.shape
    check_backend(backend, unsupported(D, F, x_ND.dtype))
    if backend == "reference" or not plan.order_M.size:
        rows = gather_rows(x_ND, plan)
        given = None if masters is weights else masters
        y_MD = expert_ffn(rows, gate, up, down, plan.group_sizes_E, backend=backend, masters=given)
        return combine_rows(y_MD, weights_NK, plan)
    way = choose_way(backend, plan.order_M.size, weights, masters)
    return _sums(way, x_ND, weights_NK, weights, plan, masters)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(way: Way, x_ND: Array, weights_NK: Array, experts: Weights, plan: Plan, masters) -> Array:
    return _run(way, False, x_ND, weights_NK, experts, plan)[0]


def _run(way: Way, keep: bool, x_ND: Array, weights_NK: Array, experts: Weights, plan: Plan):
    x = Rows(x_ND, plan.order_M // weights_NK.shape[1])
    y_MD, kept = forward(way, keep, x, experts, plan.group_sizes_E)
    return combine_rows(y_MD, weights_NK, plan), kept


def _sums_fwd(way: Way, x_ND: Array, weights_NK: Array, experts: Weights, plan: Plan, masters):
    out_ND, kept = _run(way, True, x_ND, weights_NK, experts, plan)
    return out_ND, (x_ND, weights_NK, experts, plan, kept)


def _sums_bwd(way: Way, saved, dout_ND: Array):
    x_ND, weights_NK, experts, plan, kept = saved
    K = weights_NK.shape[1]
    x, dout = (Rows(a, plan.order_M // K) for a in (x_ND, dout_ND))
    here_M = jnp.arange(plan.order_M.size, dtype=jnp.int32) < jnp.sum(plan.group_sizes_E)
    weights_M = take(weights_NK.reshape(-1), plan.order_M).astype(jnp.float32)
    weights_M = jnp.where(here_M, weights_M, 0)
    dx_MD, dw, dweights_M = backward(way, x, experts, plan.group_sizes_E, kept, dout, weights_M)
    assert dweights_M is not None
    return sum_rows(dx_MD, K, plan), of_choices(dweights_M, weights_NK, plan), None, None, dw


_sums.defvjp(_sums_fwd, _sums_bwd)
