"""Weights of a pipeline: which layer lies where, and the way between storage and stages.

Weights are stored in the model's order, cut over `pipe` along their width. At the start of a step
each rank fetches whole layers of its stages by an all-to-all, and at the end sends the gradients
back by another. So any placement of layers on ranks, uneven counts and the second copy of DualPipe
need nothing else, and a checkpoint does not know of stages. Letters: L layers, W slots for layers
on a rank, D the dimension that is stored in shards.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from sharding.partition import Layout
from sharding.rules import axes_of, spec
from sharding.schedule import Schedule

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
    """Which layer lies where: numpy arrays."""

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
            f"but the model has {num_layers} MoE layers; lower pipe to at most "
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


def cut(names: tuple[str | None, ...], layout: Layout) -> int:
    """Dimension that is stored in shards over `pipe`; -1 for none."""
    cut = [AXIS in axes_of(entry) for entry in spec(names, layout.stored)]
    return cut.index(True) if any(cut) else -1


def manual_spec(dim: int) -> PartitionSpec:
    """Placement over `pipe` alone of an array that is cut along `dim` (-1: not at all)."""
    return PartitionSpec(*([None] * dim), AXIS) if dim >= 0 else PartitionSpec()


def gather_outer(x: jax.Array, dim: int) -> jax.Array:
    """w[D_pipe] -> AllGather_pipe -> w[D]."""
    return lax.all_gather(x, AXIS, axis=dim, tiled=True) if dim >= 0 else x


def sum_outer(g: jax.Array, dim: int) -> jax.Array:
    """dw[D]{U_pipe} -> ReduceScatter_pipe -> dw[D_pipe]."""
    if dim < 0:
        return lax.psum(g, AXIS)
    return lax.psum_scatter(g, AXIS, scatter_dimension=dim, tiled=True)


def fetch(x: jax.Array, dim: int, slots_W: jax.Array, placement: Placement) -> jax.Array:
    """Whole layers of this rank's slots, w[L, D_pipe] -> AllToAll_pipe -> w[W, D]."""
    if dim < 0:
        return x[jnp.maximum(slots_W, 0)]
    everywhere = np.maximum(placement.layer_of, 0).reshape(-1)
    return lax.all_to_all(x[everywhere], AXIS, split_axis=0, concat_axis=dim, tiled=True)


def send_back(g: jax.Array, dim: int, slots_W: jax.Array, placement: Placement) -> jax.Array:
    """The transpose of `fetch`: dw[W, D] -> AllToAll_pipe -> dw[L, D_pipe], copies added up."""
    num_layers = placement.layer_of.max() + 1
    if dim < 0:
        return lax.psum(by_layer(g, slots_W, num_layers), AXIS)
    g = lax.all_to_all(g, AXIS, split_axis=dim, concat_axis=0, tiled=True)
    return by_layer(g, placement.layer_of.reshape(-1), num_layers)


def by_layer(x: jax.Array, layer_of: Any, num_layers: int) -> jax.Array:
    """Rows of slots added up by the layer they hold: [slots, ...] -> [L, ...]; empty ones count
    nothing."""
    index = jnp.where(layer_of < 0, num_layers, layer_of)
    return jnp.zeros((num_layers, *x.shape[1:]), x.dtype).at[index].add(x, mode="drop")
