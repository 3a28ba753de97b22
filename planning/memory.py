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
from model.held import hold_all, is_quantized, shape_of_held
from model.recipe import Recipe
from model.stages import split_weights
from planning.case import Case
from planning.workspace import Workspace, stacks, workspace_of
from sharding.copies import is_gathered
from sharding.partition import Layout, Names, pipeline_ranks, use_layout
from sharding.pipeline.rank import stash_shapes
from sharding.pipeline.stage_weights import Weights, held_shapes
from sharding.rules import axes_of
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
    found = workspace_of(case)
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
        "weights": weights + copies + turned_bytes(case),
        "gradients": sums,
        "optimizer": optimizer,
        "stash": layer_stash(case),
    }


def turned_bytes(case: Case) -> int:
    """Weights that `fsdp` cuts along another dimension than their first, and that micro batches
    gather: XLA keeps their shards once more through the loop, that dimension first."""
    if case.mesh.fsdp == 1 or case.micro_batches == 1:
        return 0
    axes, layout = blueprint(case.model).params_axes, case.layout

    def one(weight: Any, names: Names) -> int:
        with use_layout(layout):
            if is_quantized(weight, names, case.recipe):  # the loop has those in FP8
                return 0
        cut = [dim for dim, at in enumerate(weight.sharding.spec) if "fsdp" in axes_of(at)]
        if not cut or cut[0] == (names[0] == "layers") or is_gathered(weight, names, layout):
            return 0
        return device_bytes(weight)

    return sum(jax.tree.leaves(jax.tree.map(one, case.state["params"], axes)))


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
    found, rows = 0, case.rows * (1 + case.mesh.overlap)
    for stack, count in stacks(case):
        if count > 1:
            found += count * sum(k.device_bytes(case.layout, rows) for k in case.kept(stack))
    return found


def groups_of(case: Case) -> int:
    """Groups of devices that a step has collectives on: axes larger than one, and all together."""
    mesh = case.mesh
    sizes = (mesh.pipe, mesh.data, mesh.fsdp, mesh.expert, mesh.context, mesh.tensor)
    used = sum(size > 1 for size in sizes) + (mesh.expert_nodes > 1)
    return used + 2 * (used > 1)
