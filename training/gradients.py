"""Loss and gradients of a step over all its micro batches: one after the other, or in a pipeline.

Both give sums over micro batches whose terms are divided by counts of the whole global batch, so
the result does not depend on how the batch is cut.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from model.blueprint import Tree, bind, blueprint
from model.config import ModelConfig
from model.held import hold_all, is_quantized
from model.loss import (
    LossParts,
    LossWeights,
    inputs_and_targets,
    make_examples,
    training_loss,
)
from model.recipe import Recipe
from model.stages import (
    join_weights,
    merge_parts,
    pipeline_stages,
    split_weights,
    stage_costs,
)
from model.transformer import DeepSeekV3
from sharding.copies import is_gathered, sum_of_shards
from sharding.held import gradients_of, values_of, with_stand_ins
from sharding.partition import Layout, pipeline_ranks, stored_axes
from sharding.pipeline.executor import Result, run
from sharding.pipeline.schedule import Schedule, make_schedule
from sharding.pipeline.stage_weights import check_vocabulary, place_layers
from sharding.pipeline.stages import Stages
from sharding.pipeline.ticks import Table, tick_table

Batch = dict[str, jax.Array]
MicroLoss = Callable[[DeepSeekV3, Batch, LossWeights], tuple[jax.Array, Any]]
"""`loss, parts = micro_loss(model, micro, weights)`; parts are sums, or what an `add` takes."""


def loss_weights(batch: Batch, mtp_weight: jax.Array, balance_weight: float) -> LossWeights:
    """Denominators over the whole global batch [micro batches, sequences, T+1]."""
    num_micro, num_rows = batch["tokens"].shape[:2]
    flat = {name: rows.reshape(-1, rows.shape[-1]) for name, rows in batch.items()}
    num_targets = jnp.maximum(inputs_and_targets(flat)[2].sum(), 1.0)
    return LossWeights(num_targets, jnp.float32(num_micro * num_rows), mtp_weight, balance_weight)


def gradients_of_shards(
    config: ModelConfig,
    recipe: Recipe,
    layout: Layout,
    params: Tree,
    router_bias: Tree,
    batch: Batch,
    weights: LossWeights,
    in_pairs: bool = False,
) -> tuple[jax.Array, LossParts, Tree]:
    """`accumulated_gradients`, of every device's own rows, added up once over the devices."""
    plan = blueprint(config)

    def of_rows(params: Tree, router_bias: Tree, batch: Batch, weights: LossWeights):
        inputs = params, router_bias, batch, weights
        loss, parts, grads = accumulated_gradients(config, recipe, *inputs, in_pairs)
        return (loss, parts), grads

    (loss, parts), grads = sum_of_shards(
        of_rows,
        layout,
        copies(config, recipe, layout, params, gathered=True),
        (router_bias, plan.router_bias_axes),
        batch,
        jax.tree.map(jnp.float32, weights),
    )
    return loss, parts, grads


def copies(
    config: ModelConfig, recipe: Recipe, layout: Layout, params: Tree, gathered: bool = False
) -> tuple[Tree, Tree]:
    """Weights as a step outside of a pipeline holds them, and their logical axes: copies of what
    products read in FP8, which is then quantised once, and, if asked, of what devices gather."""
    plan = blueprint(config)
    axes = stored_axes(layout, plan.params, plan.params_axes)

    def is_copied(w: jax.Array, names: Any) -> bool:
        return is_quantized(w, names, recipe) or (gathered and is_gathered(w, names, layout))

    return hold_all(params, axes, recipe, is_copied)


def accumulated_gradients(
    config: ModelConfig, recipe: Recipe, params: Tree, router_bias: Tree, batch: Batch,
    weights: LossWeights, in_pairs: bool = False, micro_loss: MicroLoss | None = None,
    add: Callable[[Any, Any], Any] | None = None,
) -> tuple[jax.Array, Any, Tree]:  # fmt: skip
    """Loss, its parts and its gradient (fp32 sums), one micro batch at a time or two.

    Args:
      params: may be copies (`sharding/held.py`); the gradient is of the weights.
      micro_loss: instead of `training_loss`, whose parts are LossParts.
      add: the parts of two micro batches together, where they are not sums; zeros change nothing.
    """
    if in_pairs:
        batch = {name: rows.reshape(-1, 2, *rows.shape[1:]) for name, rows in batch.items()}

    def loss_of(params, micro: Batch):
        model = bind(config, params, router_bias)
        if micro_loss is not None:
            return micro_loss(model, micro, weights)
        if not in_pairs:
            return training_loss(model, make_examples(micro, config.mtp_depth), weights, recipe)
        pair = [{name: rows[i] for name, rows in micro.items()} for i in range(2)]
        return _loss_of_pair(model, pair, weights, recipe)

    def grad_of(params, micro: Batch):
        found, cotangents = jax.value_and_grad(loss_of, has_aux=True)(params, micro)
        return found, values_of(gradients_of(cotangents))

    params = with_stand_ins(params)

    def body(total, micro: Batch):
        ((loss, parts), grads), ((more, others), more_grads) = total, grad_of(params, micro)
        parts = jax.tree.map(jnp.add, parts, others) if add is None else add(parts, others)
        return ((loss + more, parts), jax.tree.map(jnp.add, grads, more_grads)), None

    first = jax.tree.map(lambda rows: rows[0], batch)
    if jax.tree.leaves(batch)[0].shape[0] == 1:
        (loss, parts), grads = grad_of(params, first)
    else:
        found, shapes = jax.eval_shape(grad_of, params, first)
        zeros = (
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found),
            jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes),
        )
        ((loss, parts), grads), _ = jax.lax.scan(body, zeros, batch)
    return loss, parts, grads


def _loss_of_pair(model: DeepSeekV3, pair: list[Batch], weights: LossWeights, recipe: Recipe):
    """`training_loss` of two micro batches, computed side by side."""
    examples = [make_examples(micro, model.config.mtp_depth) for micro in pair]
    tokens = tuple(example.tokens for example in examples)
    xs = tuple(model.before(tokens_of_one, recipe) for tokens_of_one in tokens)
    xs, stats = model.between(xs, tokens, recipe)
    ends = [
        training_loss(model, example, weights, recipe, x_BTD)
        for example, x_BTD in zip(examples, xs, strict=True)
    ]
    total, parts = jax.tree.map(jnp.add, *ends)
    layers = jax.tree.map(jnp.add, *stats)
    if layers is not None:
        total += weights.balance * layers.balance.sum() / weights.num_sequences
    return total, merge_parts(parts, layers, weights.num_sequences)


def make_pipeline_schedule(layout: Layout, num_micro: int) -> Schedule:
    """The layout's schedule for a step of `num_micro` micro batches.

    Raises ValueError where the schedule cannot take that number.
    """
    config = layout.config
    return make_schedule(config.schedule, pipeline_ranks(layout), num_micro, config.pipe_chunks)


def check_micro_batches(config: ModelConfig, layout: Layout, num_micro: int) -> None:
    """Raise ValueError unless the model and `num_micro` micro batches fit the layout."""
    if layout.config.overlap and (num_micro % 2 or pipeline_ranks(layout) > 1):
        raise ValueError(
            f"mesh.overlap computes micro batches in pairs, outside of a pipeline; there are "
            f"{num_micro} of them and pipe={pipeline_ranks(layout)}. Make their number even by "
            "train.micro_batch_size and set pipe to 1, or leave overlap off"
        )
    if pipeline_ranks(layout) > 1:
        schedule = make_pipeline_schedule(layout, num_micro)
        place_layers(schedule, config.stack_size, *stage_costs(config))
        check_vocabulary(layout, config.vocab_size)


def pipelined_gradients(
    config: ModelConfig,
    recipe: Recipe,
    layout: Layout,
    params: Tree,
    router_bias: Tree,
    batch: Batch,
    weights: LossWeights,
    change: Callable[[Table], Table] | None = None,
    every_slot: bool = False,
) -> tuple[jax.Array, LossParts, Tree]:
    """The same, with the layers cut over `pipe` and micro batches in flight at the same time.

    `change` of the table, and `every_slot` computed though it be empty, are for programs that are
    only read (`programs/plan.py`).
    """
    shared = weights.num_targets, weights.num_sequences, weights.mtp
    stages = pipeline_stages(config, recipe, weights.balance)
    inputs = params, router_bias, stages, batch, shared
    result = run_pipeline(config, recipe, layout, *inputs, change, every_slot)
    parts = merge_parts(result.parts, result.stats, weights.num_sequences)
    return result.objective, parts, join_weights(config, result.gradients)


def run_pipeline(
    config: ModelConfig,
    recipe: Recipe,
    layout: Layout,
    params: Tree,
    router_bias: Tree,
    stages: Stages,
    batch: Batch,
    shared: Any,
    change: Callable[[Table], Table] | None = None,
    every_slot: bool = False,
) -> Result:
    """The stages of a model over a batch [micro batches, ..]; `shared` is the same for all."""
    schedule = make_pipeline_schedule(layout, batch["tokens"].shape[0])
    placement = place_layers(schedule, config.stack_size, *stage_costs(config))
    plan = blueprint(config)
    params_axes = stored_axes(layout, plan.params, plan.params_axes)
    held, held_axes = hold_all(params, params_axes, recipe)
    axes: Any = split_weights(config, held_axes, plan.router_bias_axes)
    table = tick_table(schedule)
    if change is not None:
        table = change(table)
    weights = split_weights(config, held, router_bias)
    return run(table, placement, stages, weights, axes, batch, shared, layout, every_slot)
