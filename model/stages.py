"""The model as a pipeline sees it: before the stack of layers, one of them, and after them.

The stack is `ModelConfig.stack`: the layers with experts, or all of a model without any.

Letters: B batch, T sequence, D hidden width, L layers, E experts.
"""

from typing import Any

import jax
import jax.numpy as jnp

from model.blueprint import Tree, bind_around, bind_part, blueprint, prepare_parts
from model.config import ModelConfig
from model.costs import count_weights
from model.loss import (
    Examples,
    LossParts,
    LossWeights,
    balance_of_output,
    loss_of_hidden,
    make_examples,
)
from model.moe import MoEStats
from model.recipe import Recipe
from sharding.held import master
from sharding.partition import constrain
from sharding.pipeline.stage_weights import Weights
from sharding.pipeline.stages import Stages

ROUTED = ("w_gate", "w_up", "w_down")
VOCABULARY = ("embed", "head")
"""Arrays of which every rank has a part."""


def split_weights(config: ModelConfig, params: Tree, router_bias: Tree) -> Weights:
    """Parameters and router biases as a pipeline takes them."""
    stack = config.stack
    vocab = {name: params[name] for name in VOCABULARY if name in params}
    around = {name: part for name, part in params.items() if name not in (stack, *VOCABULARY)}
    first = {name: around.pop(name) for name in config.first_parts if name in around}
    bias = {name: part for name, part in router_bias.items() if name != stack}
    return Weights(vocab, first, around, params[stack], bias, router_bias.get(stack, {}))


def join_weights(config: ModelConfig, weights: Weights) -> Tree:
    """The parameters' tree again, or that of their gradients."""
    return {**weights.vocab, **weights.first, **weights.last, config.stack: weights.layers}


def pipeline_stages(config: ModelConfig, recipe: Recipe, balance_weight: float) -> Stages:
    """Functions for `sharding/pipeline/executor.py:run`; micro is (Examples, LossWeights without
    balance).

    Their objectives add up to `model/loss.py:training_loss`.
    """
    prepare_parts(config)

    def weights_of(micro) -> LossWeights:
        num_targets, num_sequences, mtp = micro[1]
        return LossWeights(num_targets, num_sequences, mtp, balance_weight)

    def ids(micro):
        examples: Examples = micro[0]
        return examples.tokens.ids_BT, examples.targets_KBT[:-1]

    def embed(vocab: Tree, ids_BT: jax.Array) -> jax.Array:
        module: Any = bind_part(config, "embed", vocab["embed"], {})
        return module(ids_BT, recipe)

    def first(weights: Tree, x_BTD: jax.Array, micro) -> jax.Array:
        return bind_around(config, weights, {}).dense(x_BTD, micro[0].tokens, recipe)

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

    def last(weights: Tree, bias: Tree, x_BTD: jax.Array, ahead_KBTD: jax.Array, micro):
        model, tokens = bind_around(config, weights, bias), micro[0].tokens
        output = model.after(x_BTD, tokens, recipe, ahead_KBTD)
        objective, parts = balance_of_output(output, weights_of(micro), config)
        return (jnp.stack([output.hidden_BTD, *output.mtp_hidden]), objective), parts

    def loss(vocab: Tree, hidden_BTD: jax.Array, micro, k: jax.Array):
        targets_BT, weights_BT = micro[0].targets_KBT[k], micro[0].weights_KBT[k]
        tied = config.tie_embeddings
        kernel = master(vocab["embed"]["table"]).T if tied else master(vocab["head"]["kernel"])
        arrays = hidden_BTD, kernel, targets_BT, weights_BT
        return loss_of_hidden(*arrays, k, weights_of(micro), config, recipe)

    def place(x_BTD: jax.Array) -> jax.Array:
        return constrain(x_BTD, "batch", "stream", "embed")

    prepare = jax.vmap(lambda rows: make_examples(rows, config.mtp_depth))
    return Stages(prepare, ids, embed, first, layer, last, loss, place)


def merge_parts(parts: LossParts, stats: MoEStats | None, num_sequences: jax.Array) -> LossParts:
    """What `training_loss` reports, from that of the last stage and the layers' statistics."""
    if stats is None:
        return parts
    return parts._replace(
        balance=parts.balance + stats.balance.sum() / num_sequences,
        counts_LE=jnp.concatenate([stats.counts_E, parts.counts_LE]),
        served=jax.tree.map(lambda total, layers: total + layers.sum(), parts.served, stats.served),
    )


def stage_costs(config: ModelConfig) -> tuple[float, float]:
    """What is computed before and after the stack, in its layers, by active parameters."""
    plan = blueprint(config)
    K, E = config.experts_per_token, config.num_experts

    def active(block: Tree) -> float:
        routed = [w for name, w in block.get("moe", {}).items() if name in ROUTED]
        return count_weights(block) - (1 - K / max(E, 1)) * count_weights(routed)

    layer = active(plan.params[config.stack]) / config.stack_size
    before = count_weights(
        [plan.params[n] for n in config.first_parts if n in plan.params and n != config.stack]
    )
    head = config.vocab_size * config.hidden_size * (1 + config.mtp_depth)
    modules = plan.params.get("mtp", {})
    after = head + count_weights(modules) - count_weights(modules.get("block", {}))
    return before / layer, (after + active(modules.get("block", {}))) / layer
