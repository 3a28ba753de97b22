"""The model as a pipeline sees it: before the stack of layers, one of them, and after them.

The stack is `ModelConfig.stack`: it is cut into stages; everything else is computed with the first
or last of them.

Letters: B batch, T sequence, D hidden width, L layers, E experts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from model.blueprint import Tree, bind_around, bind_part, blueprint, prepare_parts
from model.config import ModelConfig
from model.costs import count_weights
from model.loss import LossParts, LossWeights, training_loss
from model.moe import MoEStats
from model.recipe import Recipe
from sharding.partition import constrain
from sharding.pipeline.executor import Stages, Weights

ROUTED = ("w_gate", "w_up", "w_down")


def split_weights(config: ModelConfig, params: Tree, router_bias: Tree) -> Weights:
    """Parameters and router biases as a pipeline takes them."""
    outer = {name: part for name, part in params.items() if name != config.stack}
    outer_bias = {name: part for name, part in router_bias.items() if name != config.stack}
    return Weights(outer, params[config.stack], outer_bias, router_bias.get(config.stack, {}))


def join_weights(config: ModelConfig, outer: Tree, layers: Tree) -> Tree:
    """The parameters' tree again, or that of their gradients."""
    return {**outer, config.stack: layers}


Last = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]
"""`objective, parts = last(model, micro, x_BTD)`: a loss of its own, from the stack's result."""


def pipeline_stages(
    config: ModelConfig, recipe: Recipe, balance_weight: float, own_loss: Last | None = None
) -> Stages:
    """Functions for `sharding/pipeline/executor.py:run`; micro is (Examples, LossWeights without
    balance).

    Their objectives add up to `model/loss.py:training_loss`. With `own_loss`, of models without
    experts, micro is whatever that takes; its first part has `tokens`.
    """
    prepare_parts(config)

    def weights_of(micro) -> LossWeights:
        num_targets, num_sequences, mtp = micro[1]
        return LossWeights(num_targets, num_sequences, mtp, balance_weight)

    def first(outer: Tree, bias: Tree, micro) -> jax.Array:
        return bind_around(config, outer, bias).before(micro[0].tokens, recipe)

    def block(weights: Tree, bias: Tree, x_BTD: jax.Array, tokens):
        module: Any = bind_part(config, config.stack, weights, bias)
        return module(x_BTD, tokens, recipe)

    recompute = recipe.rematerialize(block)

    def layer(weights: Tree, bias: Tree, x_BTD: jax.Array, micro):
        x_BTD, stats = recompute(weights, bias, x_BTD, micro[0].tokens)
        if stats is None:
            return (x_BTD, jnp.zeros(())), None
        assert isinstance(stats, MoEStats)
        scale = balance_weight / weights_of(micro).num_sequences
        return (x_BTD, scale * stats.balance), jax.lax.stop_gradient(stats)

    def last(outer: Tree, bias: Tree, x_BTD: jax.Array, micro):
        model = bind_around(config, outer, bias)
        if own_loss is not None:
            return own_loss(model, micro, x_BTD)
        return training_loss(model, micro[0], weights_of(micro), recipe, x_BTD)

    def place(x_BTD: jax.Array) -> jax.Array:
        return constrain(x_BTD, "batch", "stream", "embed")

    return Stages(first, layer, last, place)


def merge_parts(parts: LossParts, stats: MoEStats | None, num_sequences: jax.Array) -> LossParts:
    """What `training_loss` reports, from that of the last stage and the layers' statistics."""
    if stats is None:
        return parts
    return parts._replace(
        balance=parts.balance + stats.balance.sum() / num_sequences,
        counts_LE=jnp.concatenate([stats.counts_E, parts.counts_LE]),
        dropped=parts.dropped + stats.dropped.sum(),
    )


def stage_costs(config: ModelConfig) -> tuple[float, float]:
    """What is computed before and after the stack, in its layers, by active parameters."""
    plan = blueprint(config)
    K, E = config.experts_per_token, config.num_experts

    def active(block: Tree) -> float:
        routed = [w for name, w in block.get("moe", {}).items() if name in ROUTED]
        return count_weights(block) - (1 - K / max(E, 1)) * count_weights(routed)

    layer = active(plan.params[config.stack]) / config.stack_size
    before = count_weights(plan.params["dense_layers"]) if config.num_dense_layers else 0
    if config.stack == "dense_layers":
        before = 0
    head = config.vocab_size * config.hidden_size * (1 + config.mtp_depth)
    modules = plan.params.get("mtp", {})
    after = head + count_weights(modules) - count_weights(modules.get("block", {}))
    return before / layer, (after + active(modules.get("block", {}))) / layer
