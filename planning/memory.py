"""Memory of a step in closed form: what it carries, exactly, and its workspace, by learned terms.

Carried is what lives through the step: the state, what a pipeline holds besides (weights of its
stages, sums of gradients, stashes), or without one the sums of gradients and what layers keep for
the backward pass. Shapes are asked of the code that makes them: placements of the state
(`training/step.py`), weights of stages and slots (`sharding/pipeline/`), what a layer keeps
(`model/kept.py`), rows of the exchange (`sharding/experts/dispatch.py`).

Every rank runs one program with arrays of one shape, so each holds as much as the most loaded one.
"""

import functools
import math
from typing import Any, NamedTuple

import jax

from model.blueprint import blueprint
from model.config import ModelConfig
from model.held import hold_all, shape_of_held
from model.recipe import Recipe
from model.stages import split_weights
from planning.case import Case
from planning.workspace import Terms, Workspace, workspace_of
from sharding.experts.sizes import Rows
from sharding.partition import Layout, pipeline_ranks, use_layout
from sharding.pipeline.rank import stash_shapes
from sharding.pipeline.stage_weights import Weights, held_shapes
from sharding.sizes import activation_shards, copied_bytes, device_bytes, rank_bytes

GIB = 2**30


class Memory(NamedTuple):
    """Bytes of a GPU."""

    weights: float
    """Parameters and biases as they are stored, and those that stages of a pipeline hold."""
    gradients: float
    optimizer: float
    """Moments, and the moving average where one is kept."""
    stash: float
    """What waits for the backward pass."""
    exchange: float
    """Rows on their way to experts and back, sorted rows included."""
    workspace: float
    """All else that is alive where most is: weights in use, activations, products."""
    limit: float
    explained: tuple[str, ...]
    """Where the rest of the GPU's memory goes."""
    error: Workspace
    """How far compiled programs were from this form."""

    @property
    def carried(self) -> float:
        """Bytes through the step: without exchange and workspace."""
        return self.weights + self.gradients + self.optimizer + self.stash

    @property
    def total(self) -> float:
        """All bytes of the step."""
        return self.carried + self.exchange + self.workspace

    @property
    def fits(self) -> bool:
        """Whether the GPU has them."""
        return self.total <= self.limit

    def parts(self) -> dict[str, float]:
        """Bytes by part."""
        names = ("weights", "gradients", "optimizer", "stash", "exchange", "workspace")
        return {name: getattr(self, name) for name in names}


def memory_of(case: Case) -> Memory:
    """Memory of a step."""
    carried = carried_by(case)
    found = workspace_of(terms_of(case), case)
    limit, explained = case.hardware.limit(groups_of(case))
    return Memory(
        **carried,
        exchange=found.exchange,
        workspace=found.rest,
        limit=limit,
        explained=tuple(explained),
        error=found,
    )


def carried_by(case: Case) -> dict[str, float]:
    """Bytes of weights, gradients, optimizer and stash."""
    state = case.state
    weights = device_bytes([state["params"], state["router_bias"]])
    optimizer = device_bytes([state["opt"], state.get("ema", {})])
    if pipeline_ranks(case.layout) > 1:
        held, sums = rank_bytes(stage_weights(case), case.placement, case.layout)
        return {
            "weights": weights + held,
            "gradients": sums,
            "optimizer": optimizer,
            "stash": pipeline_stash(case),
        }
    plan = blueprint(case.model)
    copies, sums = copied_bytes(held_weights(case)[0], plan.params_axes, case.layout)
    return {
        "weights": weights + copies,
        "gradients": sums,
        "optimizer": optimizer,
        "stash": layer_stash(case),
    }


def stage_weights(case: Case) -> Weights:
    """What the ranks of a pipeline hold to compute with."""
    plan, (weights, names) = blueprint(case.model), held_weights(case)
    held = split_weights(case.model, weights, plan.router_bias)
    axes: Any = split_weights(case.model, names, plan.router_bias_axes)
    return held_shapes(held, axes, case.placement, case.layout)


def held_weights(case: Case) -> tuple[Any, Any]:
    """Shapes of all weights, in the types in which a step holds them, and their logical axes."""
    return _held_weights(case.model, case.recipe, case.layout)


@functools.cache
def _held_weights(model: ModelConfig, recipe: Recipe, layout: Layout) -> tuple[Any, Any]:
    plan = blueprint(model)
    with use_layout(layout):
        return hold_all(plan.params, plan.params_axes, recipe, how=shape_of_held)


def pipeline_stash(case: Case) -> float:
    """Slots of a rank for what its layers keep, and for messages."""
    x, saved = _local_input(case), [_local(kept, case) for kept in case.kept()]
    slots = case.placement.layer_of.shape[-1]
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.shape)
        for leaf in jax.tree.leaves(stash_shapes(case.table, slots, x, saved))
    )


def _local_input(case: Case) -> jax.ShapeDtypeStruct:
    """A layer's input on one device."""
    tokens = case.rows * case.train.seq_len // activation_shards(case.layout, "stream")
    return jax.ShapeDtypeStruct((tokens, case.model.hidden_size), case.recipe.activation_dtype)


def _local(kept: Any, case: Case) -> jax.ShapeDtypeStruct:
    size = kept.device_bytes(case.layout, case.rows) // kept.dtype.itemsize
    return jax.ShapeDtypeStruct((size,), kept.dtype)


def layer_stash(case: Case) -> float:
    """What all layers keep for the backward pass of a micro batch.

    A stack of one layer is no loop in the program, and what it keeps counts as workspace.
    """
    found = 0
    for stack, count in stacks(case):
        if count > 1:
            kept = case.kept(stack)
            found += count * sum(k.device_bytes(case.layout, case.rows) for k in kept)
    return found


def stacks(case: Case) -> tuple[tuple[str, int], ...]:
    """Stacks of layers and how many there are of each."""
    model = case.model
    return ("dense_layers", model.num_dense_layers), ("moe_layers", model.num_moe_layers)


def alone(case: Case) -> int:
    """Bytes that stacks of one layer keep, without a pipeline."""
    if case.mesh.pipe > 1:
        return 0
    single = [stack for stack, count in stacks(case) if count == 1]
    return sum(k.device_bytes(case.layout, case.rows) for stack in single for k in case.kept(stack))


def groups_of(case: Case) -> int:
    """Groups of devices that a step has collectives on: axes larger than one, and all together."""
    mesh = case.mesh
    sizes = (mesh.pipe, mesh.data, mesh.fsdp, mesh.expert, mesh.context, mesh.tensor)
    used = sum(size > 1 for size in sizes) + (mesh.expert_nodes > 1)
    return used + 2 * (used > 1)


def terms_of(case: Case) -> Terms:
    """Sizes that a step's workspace is made of, in bytes."""
    model, mesh, rows = case.model, case.mesh, case.exchange
    item = case.recipe.activation_dtype.itemsize
    tokens, d, f = case.tokens, model.hidden_size, model.expert_ffn_size // mesh.tensor
    heads = model.num_heads // mesh.tensor
    layer = _layer_parameters(case)
    vocab = model.vocab_size // mesh.tensor * d
    square = case.train.seq_len**2 // mesh.context * heads * case.rows
    portable = case.recipe.kernels.attention == "portable"
    return Terms(
        sorted_in=rows.sorted * d * item,
        sorted_hidden=rows.sorted * f * item,
        received=rows.received * d * item * (mesh.expert > 1),
        across=rows.across * d * item,
        stream=tokens * d * item,
        heads=tokens * heads * (model.qk_head_dim + model.v_head_dim) * item,
        layer=layer * item,
        dense=3 * d * model.dense_ffn_size // mesh.tensor * item * (model.num_dense_layers > 0),
        hidden=tokens * model.dense_ffn_size // mesh.tensor * item * (model.num_dense_layers > 0),
        vocabulary=vocab * 4,
        attention=square * 4 * portable * 17 // 32,
        kept=sum(k.device_bytes(case.layout, case.rows) for k in case.kept(_stack(case))),
        gradients=device_bytes(case.state["params"]),
        experts=model.num_experts * tokens * 4,
        alone=alone(case),
    )


def _stack(case: Case) -> str:
    return "moe_layers" if case.model.num_moe_layers else "dense_layers"


def _layer_parameters(case: Case) -> int:
    """Parameters of a MoE layer that a device computes with."""
    model, mesh = case.model, case.mesh
    d, f = model.hidden_size, model.expert_ffn_size
    of_layer = blueprint(model).params.get("moe_layers", {})
    if not of_layer:
        return 0
    total = sum(math.prod(x.shape[1:]) for x in jax.tree.leaves(of_layer))
    routed = model.num_experts * 3 * d * f
    return (total - routed) // mesh.tensor + routed // (mesh.expert * mesh.tensor)


__all__ = ["Memory", "Rows", "carried_by", "memory_of", "terms_of"]
