"""DeepSeekMoE: shared experts for every token, routed experts for the tokens that chose them.

V3 report, eq. 12. Letters: B batch, T sequence, N = B*T tokens of one device, K choices per token,
M rows sorted by expert, D hidden width, E experts, F inner width of one expert.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.layers import (
    SwiGLU,
    as_computed,
    fp8_parts,
    fp8_weight,
    from_stream,
    router_bias,
    to_stream,
    weight,
)
from model.recipe import Recipe, keep
from model.router import affinities, balance_loss, expert_counts, select
from pallas_kernels.fp8 import fp8_expert_ffn
from pallas_kernels.grouped import combine_rows, expert_sums, gather_rows, part_of, sort_by_expert
from sharding.experts.dispatch import Local, exchange
from sharding.experts.rounds import Count, Span, in_rounds
from sharding.held import is_held, values_of
from sharding.partition import Names, as_term, constrain, max_over, on_shards, sum_over, vary

W_IN = ("experts", "embed", "expert_ffn")
"""Logical axes of the experts' gate and up weights."""
W_OUT = ("experts", "expert_ffn", "embed")
"""Logical axes of their down weights."""

Routed = Callable[..., tuple[jax.Array, "Served"]]
"""(x_BTD, ids_BTK, weights_BTK, recipe) to weighted sums [B, T, D] and how they came about."""


class Served(NamedTuple):
    """Counts of the experts' work, fp32, over all devices."""

    dropped: jax.Array
    """Routed token-expert pairs that no expert computed; must be 0."""
    further: jax.Array
    """Rounds beyond the first that the exchange or an expert's buffer took, on the device with the
    most of them."""


class MoEStats(NamedTuple):
    """Statistics of a MoE layer; sums over the tokens it was given, over all devices."""

    counts_E: jax.Array
    """Tokens routed to each expert."""
    balance: jax.Array
    """Sequence-wise balance loss before its factor, summed over sequences."""
    served: Served
    ids_BTK: jax.Array | None = None
    """The experts of every token, where the recipe asks for them."""


class Router(nnx.Module):
    """The fp32 gate, and the selection bias where the method has one."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.hidden_size, config.num_experts)
        self.kernel = weight(rngs, shape, ("embed", "router"), config.init_std)
        self.bias = router_bias(config.num_experts) if config.topk_method == "noaux_tc" else None

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Gate logits [B, T, E]; fp32 operands whatever the recipe, or near ties flip experts."""
        kernel_DE = as_computed(self.kernel).astype(jnp.float32)
        logits_BTE = jnp.einsum(
            "BTD,DE->BTE", x_BTD.astype(jnp.float32), kernel_DE, precision=jax.lax.Precision.HIGHEST
        )
        return constrain(logits_BTE, "batch", "seq", "router")


class MoE(nnx.Module):
    """Shared and routed experts. Dropless: every choice of every token is computed."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c, std = config, config.init_std
        D, E, F = c.hidden_size, c.num_experts, c.expert_ffn_size
        self.router = Router(c, rngs)
        self.w_gate = weight(rngs, (E, D, F), W_IN, std)
        self.w_up = weight(rngs, (E, D, F), W_IN, std)
        self.w_down = weight(rngs, (E, F, D), W_OUT, std)
        shared_width = c.num_shared_experts * F
        self.shared = SwiGLU(rngs, D, shared_width, std) if shared_width else None
        self.config = config

    def __call__(
        self,
        x_BTD: jax.Array,
        valid_BT: jax.Array,
        recipe: Recipe,
        replayed_BTK: jax.Array | None = None,
        routed: Routed | None = None,
    ) -> tuple[jax.Array, MoEStats]:
        """Output [B, T, D] and the layer's statistics over valid tokens.

        `replayed_BTK` are experts chosen before (`model/router.py:select`). `routed` stands in for
        the method of this name where the experts' weights are held elsewhere (`generation`).
        """
        c, bias = self.config, self.router.bias
        x_BTD = from_stream(x_BTD)
        scores_BTE = affinities(self.router.logits(x_BTD), c)
        ids_BTK, weights_BTK = select(
            scores_BTE, None if bias is None else bias[...], c, replayed_BTK
        )
        ids_BTK, weights_BTK = keep(ids_BTK), keep(weights_BTK)
        y_BTD, served = (routed or self.routed)(x_BTD, ids_BTK, weights_BTK, recipe)
        y_BTD = to_stream(y_BTD)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD, recipe)
        counts_E = expert_counts(ids_BTK, valid_BT, c.num_experts)
        balance, routes = balance_loss(scores_BTE, valid_BT, c), ids_BTK if recipe.routes else None
        return y_BTD, MoEStats(counts_E, balance, served, routes)

    def routed(self, x_BTD, ids_BTK, weights_BTK, recipe: Recipe) -> tuple[jax.Array, Served]:
        """Weighted sum of the chosen experts' outputs [B, T, D], and how it came about."""
        params: Any = tuple(w.get_value() for w in (self.w_gate, self.w_up, self.w_down))
        names = W_IN, W_IN, W_OUT
        if recipe.fp8:
            parts = [fp8_parts(*pair) for pair in zip(params, names, strict=True)]
            params = tuple(x for arrays, _ in parts for x in arrays)
            names = tuple(axes for _, of_weight in parts for axes in of_weight)
        elif is_held(params[0]) or params[0].dtype != x_BTD.dtype:
            # Copies to multiply by, and master weights or stand-ins, which no forward pass reads,
            # for gradients in fp32 (model/layers.py:_in_type).
            copies = (jax.lax.stop_gradient(values_of(w)).astype(x_BTD.dtype) for w in params)
            masters = (w.stand_in if is_held(w) else w for w in params)
            params, names = (*copies, *masters), 2 * names
        groups = self.config.num_expert_groups, self.config.groups_per_token
        local = functools.partial(_local_experts, recipe)
        rows = x_BTD, ids_BTK, weights_BTK
        return routed_on_shards(*rows, params, names, local, groups)


def routed_on_shards(
    x_BTD: jax.Array,
    ids_BTK: jax.Array,
    weights_BTK: jax.Array,
    params: tuple[Any, ...],
    names: tuple[Names, ...],
    local: Local,
    groups: tuple[int, int],
) -> tuple[jax.Array, Served]:
    """Tokens to the devices of their experts: weighted sums [B, T, D], and how they came about.

    `params` are what `local` takes, gate, up and down say, each with one entry per expert, laid out
    by the logical axes `names`. `local` and `groups` are those of
    `sharding/experts/dispatch.py:exchange`.
    """
    tokens, choices = ("batch", "seq", "embed"), ("batch", "seq", "choices")
    region = functools.partial(_experts_on_shard, local=local, groups=groups)
    run = on_shards(region, (tokens, choices, choices, *names), (tokens, (), ()))
    y_BTD, *served = run(x_BTD, ids_BTK, weights_BTK, *params)
    return y_BTD, Served(*served)


def _experts_on_shard(x_BTD, ids_BTK, weights_BTK, *params, local, groups):
    """One device's part: its tokens to their experts, the weighted sums back."""
    B, T, D = x_BTD.shape
    K = ids_BTK.shape[-1]
    rows = x_BTD.reshape(B * T, D), ids_BTK.reshape(B * T, K), weights_BTK.reshape(B * T, K)
    y_ND, count = exchange(*rows, params, len(params[0]), local, groups)
    # Over all devices, choices made minus choices that some expert computed.
    missed = vary(B * T * K - count.computed)
    dropped = max_over(sum_over(missed, "batch", "seq"), "expert_ffn")
    further = max_over(vary(count.further), "batch", "seq", "expert_ffn")
    return y_ND.reshape(B, T, D), dropped.astype(jnp.float32), as_term(further.astype(jnp.float32))


def _local_experts(recipe: Recipe, params, x_ND, ids_NK, weights_NK, rows: int):
    """`weighted_sums` over stacked weights: gate and up [E, D, F], down [E, F, D].

    `params` may have six entries, the last three standing for the first in gradients; with FP8
    those of `fp8_parts` of every weight.
    """
    backend = recipe.kernels.experts
    sums = functools.partial(expert_sums, backend=backend)
    if recipe.fp8:
        sums = sums_by(functools.partial(_fp8_experts, backend=backend))
    return weighted_sums(sums, params, x_ND, ids_NK, weights_NK, rows)


def _fp8_experts(x_MD, *arrays, backend):
    """`fp8_expert_ffn` of the parts of three weights."""
    *parts, sizes_E = arrays
    n = len(parts) // 3
    gate, up, down = (fp8_weight(parts[i * n : (i + 1) * n]) for i in range(3))
    return fp8_expert_ffn(x_MD, gate, up, down, sizes_E, backend=backend)


def sums_by(ffn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`expert_sums` by a function of rows sorted by expert, such as `expert_ffn`."""

    def sums(x_ND, weights_NK, params, plan):
        y_MD = ffn(gather_rows(x_ND, plan), *params, plan.group_sizes_E)
        return combine_rows(y_MD, weights_NK, plan)

    return sums


def weighted_sums(
    sums: Callable[..., jax.Array], params, x_ND, ids_NK, weights_NK, rows: int
) -> tuple[jax.Array, Count]:
    """Weighted sums [N, D] over the experts held here, and what was computed.

    Choices are sorted by expert, and `sums(x, weights, params, plan)` computes `rows` of them at a
    time, in as many rounds as it takes. Ids outside of [0, E) add nothing.
    """
    num_experts, (N, K) = len(params[0]), ids_NK.shape
    most = N * min(K, num_experts)  # a token chooses an expert at most once
    plan = sort_by_expert(ids_NK, num_experts, most)
    if rows >= most:
        y_ND = sums(x_ND, weights_NK, params, plan)
        return y_ND, Count(jnp.sum(plan.group_sizes_E), jnp.int32(0))

    def one_round(span: Span, floats, plan):
        params, x_ND, weights_NK = floats
        now = part_of(plan, *span)
        return sums(x_ND, weights_NK, params, now), Count(jnp.sum(now.group_sizes_E), jnp.int32(0))

    needed, like = jnp.sum(plan.group_sizes_E), jax.ShapeDtypeStruct(x_ND.shape, x_ND.dtype)
    return in_rounds(one_round, (params, x_ND, weights_NK), plan, needed, rows, like)
