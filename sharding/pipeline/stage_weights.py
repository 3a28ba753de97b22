"""Weights of a pipeline: which layer lies where, and the way between storage and stages.

Weights are stored in the model's order, cut over `pipe` along their width. At the start of a step
each rank fetches whole layers of its stages by an all-to-all, and at the end sends the gradients
back by another. So any placement of layers on ranks, uneven counts and the second copy of DualPipe
need nothing else, and a checkpoint does not know of stages.

All of it runs on whole devices, not in the region that is manual over `pipe` alone: there XLA would
make a collective's operand whole over all other axes first. Letters: L layers, W slots for layers
on a rank, P ranks, D the dimension that is stored in shards.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sharding.partition import Layout, Names
from sharding.pipeline.schedule import Schedule
from sharding.rules import axes_of, spec

Tree = Any
AXIS = "pipe"


class Weights(NamedTuple):
    """Trees of arrays of a pipeline; `layers` and `layer_constants` have a leading axis L."""

    outer: Tree
    layers: Tree
    outer_constants: Tree
    """Not differentiated, like `layer_constants`."""
    layer_constants: Tree


class Placement(NamedTuple):
    """Places of the layers: numpy arrays."""

    layer_of: np.ndarray
    """Layer in each slot, -1 where it is empty: int [ranks, chunks, slots]."""
    is_first: np.ndarray
    """Whether a chunk begins the model: bool [ranks, chunks]."""
    is_last: np.ndarray


def place_layers(
    schedule: Schedule, num_layers: int, before: float = 0.0, after: float = 0.0
) -> Placement:
    """Consecutive layers for every stage, as even as the cost of the first and last stage allows.

    `before` and `after` is what the model computes around its layers, in layers. No stage stays
    without a layer. Raises ValueError when there are fewer layers than stages.
    """
    stages = schedule.num_stages
    if num_layers < stages:
        raise ValueError(
            f"mesh.pipe={schedule.ranks} with the schedule {schedule.name} makes {stages} stages, "
            f"but the model has {num_layers} layers to cut; lower pipe to at most "
            f"{num_layers * schedule.ranks // stages}, or choose a schedule with fewer chunks"
        )
    counts = [1] * stages
    load = [1.0] * stages
    load[0] += before
    load[-1] += after
    for _ in range(num_layers - stages):
        # The least loaded stage; among equals the last, since the first ones hold most activations.
        stage = min(reversed(range(stages)), key=lambda stage: load[stage])
        counts[stage] += 1
        load[stage] += 1
    starts = np.concatenate([[0], np.cumsum(counts)])
    slots = max(counts)
    layer_of = np.full((schedule.ranks, schedule.chunks, slots), -1)
    is_first = np.zeros((schedule.ranks, schedule.chunks), bool)
    is_last = np.zeros((schedule.ranks, schedule.chunks), bool)
    for rank, held in enumerate(schedule.stage_of):
        for chunk, stage in enumerate(held):
            layers = np.arange(starts[stage], starts[stage + 1])
            layer_of[rank, chunk, : len(layers)] = layers
            is_first[rank, chunk] = stage == 0
            is_last[rank, chunk] = stage == stages - 1
    return Placement(layer_of, is_first, is_last)


def gather_outer(tree: Tree, axes: Tree, layout: Layout) -> Tree:
    """Weights outside the layers, whole over `pipe`: w[D_pipe] -> AllGather_pipe -> w[D]."""

    def gather(x: jax.Array, names: Names) -> jax.Array:
        return lax.with_sharding_constraint(x, NamedSharding(layout.mesh, _held(names, layout)))

    return jax.tree.map(gather, tree, axes)


def sum_outer(tree: Tree, axes: Tree, layout: Layout) -> Tree:
    """Their gradients, one part per rank: dw[P_pipe, D]{U_pipe} -> ReduceScatter -> dw[D_pipe]."""

    def add(g: jax.Array, names: Names) -> jax.Array:
        dim = _cut(names, layout)
        if dim < 0:
            return g.sum(0)

        def body(g):
            return lax.psum_scatter(g[0], AXIS, scatter_dimension=dim, tiled=True)

        held = PartitionSpec(AXIS, *_held(names, layout))
        return _on_devices(body, layout, held, spec(names, layout.stored))(g)

    return jax.tree.map(add, tree, axes)


def fetch(tree: Tree, axes: Tree, placement: Placement, layout: Layout) -> Tree:
    """Whole layers of every rank's slots: w[L, D_pipe] -> AllToAll_pipe -> w[(P W)_pipe, D]."""
    everywhere = np.maximum(placement.layer_of, 0).reshape(-1)

    def fetch_one(x: jax.Array, names: Names) -> jax.Array:
        dim, held = _cut(names, layout), _held(names, layout)
        slots = PartitionSpec(AXIS, *held[1:])
        if dim < 0:
            return lax.with_sharding_constraint(x[everywhere], NamedSharding(layout.mesh, slots))

        def body(x):
            return lax.all_to_all(x[everywhere], AXIS, split_axis=0, concat_axis=dim, tiled=True)

        return _on_devices(body, layout, spec(names, layout.stored), slots)(x)

    return jax.tree.map(fetch_one, tree, axes)


def send_back(tree: Tree, axes: Tree, placement: Placement, layout: Layout) -> Tree:
    """The transpose of `fetch`: dw[(P W)_pipe, D] -> AllToAll_pipe -> dw[L, D_pipe], copies added
    up."""

    def send_one(g: jax.Array, names: Names) -> jax.Array:
        dim = _cut(names, layout)
        if dim < 0:
            return by_layer(g, placement)

        def body(g):
            g = lax.all_to_all(g, AXIS, split_axis=dim, concat_axis=0, tiled=True)
            return by_layer(g, placement)

        slots = PartitionSpec(AXIS, *_held(names, layout)[1:])
        return _on_devices(body, layout, slots, spec(names, layout.stored))(g)

    return jax.tree.map(send_one, tree, axes)


def by_layer(x: jax.Array, placement: Placement) -> jax.Array:
    """Rows of all slots added up by the layer they hold: [P W, ...] -> [L, ...]."""
    layer_of = placement.layer_of.reshape(-1)
    num_layers = int(layer_of.max()) + 1
    # Every layer lies in one slot, or in two with DualPipe; a slot that is missing reads zeros.
    copies = np.full((2, num_layers), len(layer_of))
    for slot in np.flatnonzero(layer_of >= 0):
        layer = layer_of[slot]
        copies[int(copies[0, layer] < len(layer_of)), layer] = slot
    first = x[copies[0]]
    if (copies[1] == len(layer_of)).all():
        return first
    there = (copies[1] < len(layer_of)).reshape(-1, *(1,) * (x.ndim - 1))
    return first + jnp.where(there, x[np.minimum(copies[1], len(layer_of) - 1)], 0)


def _cut(names: Names, layout: Layout) -> int:
    """Dimension that is stored in shards over `pipe`; -1 for none."""
    cut = [AXIS in axes_of(entry) for entry in spec(names, layout.stored)]
    return cut.index(True) if any(cut) else -1


def _held(names: Names, layout: Layout) -> PartitionSpec:
    """Placement of a weight as stored, but whole over `pipe`."""
    rules = {n: tuple(a for a in axes if a != AXIS) for n, axes in layout.stored.items()}
    return spec(names, rules)


def _on_devices(body: Callable, layout: Layout, in_spec: Any, out_spec: Any) -> Callable:
    return jax.shard_map(body, mesh=layout.mesh, in_specs=in_spec, out_specs=out_spec)
