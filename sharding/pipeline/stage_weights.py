"""Weights of a pipeline: which layer lies where, and the way between storage and stages.

Weights are stored in the model's order, cut along their width over `pipe` and over the batch axes
that would copy them. At the start of a step each rank fetches whole layers of its stages by an
all-to-all and an all-gather, and at the end sends the gradients back by their transposes. So any
placement of layers on ranks, uneven counts and the second copy of DualPipe need nothing else, and a
checkpoint does not know of stages.

All of it runs on whole devices, not in the region that is manual over `pipe` alone: there XLA would
make a collective's operand whole over all other axes first. Letters: L layers, W slots for layers
on a rank, P ranks, D the dimension that is stored in shards.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sharding.copies import cutting_axes, gather_copies, held_spec, reduce_to, summed_axes
from sharding.partition import Layout, Names, moment_spec, stored_spec
from sharding.pipeline.schedule import Schedule
from sharding.rules import COPIED, axes_of, check_divides, spec

Tree = Any
AXIS = "pipe"
VOCAB = "vocab"


class Weights(NamedTuple):
    """Trees of arrays of a pipeline; `layers` and `layer_constants` have a leading axis L."""

    vocab: Tree
    """Embedding and head, of which every rank has a part."""
    first: Tree
    """What else the first stage computes before the layers, and the last one after them."""
    last: Tree
    layers: Tree
    end_constants: Tree
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


def fetch(tree: Tree, axes: Tree, placement: Placement, layout: Layout) -> Tree:
    """Whole layers of every rank's slots: w[L, D_ep,pipe] -> AllToAll_pipe, AllGather_ep ->
    w[(P W)_pipe, D]."""
    everywhere = np.maximum(placement.layer_of, 0).reshape(-1)

    def fetch_one(x: jax.Array, names: Names) -> jax.Array:
        stored, dim = stored_spec(layout, x.shape, names), _cut(names, layout)

        def body(x: jax.Array) -> jax.Array:
            x = x[everywhere]
            if dim < 0:
                slots = len(everywhere) // lax.axis_size(AXIS)
                x = lax.dynamic_slice_in_dim(x, lax.axis_index(AXIS) * slots, slots)
            else:
                x = lax.all_to_all(x, AXIS, split_axis=0, concat_axis=dim, tiled=True)
            return gather_copies(x, stored, cutting_axes(layout, names))

        slots = PartitionSpec(AXIS, *held_spec(layout, names)[1:])
        return _on_devices(body, layout, stored, slots)(x)

    return jax.tree.map(fetch_one, tree, axes)


def send_back(
    tree: Tree, axes: Tree, placement: Placement, layout: Layout, among: tuple[str, ...]
) -> Tree:
    """The transpose of `fetch`, to where the moments are, the parts of devices and copies of layers
    added up: dw[(P W)_pipe, D]{U_dp,ep} -> ReduceScatter_ep, AllToAll_pipe, ReduceScatter_dp.

    Every array has its parts, of the axes of `among` that copy the weight, as its first dimension.
    """
    num_layers = int(placement.layer_of.max()) + 1

    def send_one(g: jax.Array, names: Names) -> jax.Array:
        dim, copies = _cut(names, layout), summed_axes(layout, names, among)
        target = moment_spec(layout, (num_layers, *g.shape[2:]), names)
        first, last, keep = _in_turn(target, copies, cutting_axes(layout, names))

        def body(g: jax.Array) -> jax.Array:
            g = reduce_to(g[0], target, first, (*keep, *last))
            if dim < 0:
                g = lax.all_gather(g, AXIS, tiled=True)
            else:
                g = lax.all_to_all(g, AXIS, split_axis=dim, concat_axis=0, tiled=True)
            return reduce_to(by_layer(g, placement), target, last, (*keep, *first))

        parts = PartitionSpec(copies or None, AXIS, *held_spec(layout, names)[1:])
        return _on_devices(body, layout, parts, target)(g)

    return jax.tree.map(send_one, tree, axes)


def held_shapes(weights: Weights, axes: Weights, placement: Placement, layout: Layout) -> Weights:
    """ShapeDtypeStructs, with their placements, of what a step fetches and gathers."""

    def placed(x: Any, shape: tuple[int, ...], partition: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(layout.mesh, partition))

    def slots(x: Any, names: Names) -> jax.ShapeDtypeStruct:
        partition = PartitionSpec(AXIS, *held_spec(layout, names)[1:])
        return placed(x, (placement.layer_of.size, *x.shape[1:]), partition)

    def part(x: Any, names: Names) -> jax.ShapeDtypeStruct:
        return placed(x, x.shape, vocabulary_spec(layout, names))

    def whole(x: Any, names: Names) -> jax.ShapeDtypeStruct:
        return placed(x, x.shape, held_spec(layout, names))

    return Weights(
        jax.tree.map(part, weights.vocab, axes.vocab),
        jax.tree.map(whole, weights.first, axes.first),
        jax.tree.map(whole, weights.last, axes.last),
        jax.tree.map(slots, weights.layers, axes.layers),
        jax.tree.map(whole, weights.end_constants, axes.end_constants),
        jax.tree.map(slots, weights.layer_constants, axes.layer_constants),
    )


def fetch_vocabulary(tree: Tree, axes: Tree, layout: Layout) -> Tree:
    """Every rank's part of what is as long as the vocabulary: w[V, D_ep,pipe] -> AllToAll_pipe,
    AllGather_ep -> w[V_pipe, D]."""

    def fetch_one(x: jax.Array, names: Names) -> jax.Array:
        stored, dim, vocab = stored_spec(layout, x.shape, names), _cut(names, layout), _vocab(names)

        def body(x: jax.Array) -> jax.Array:
            x = lax.all_to_all(x, AXIS, split_axis=vocab, concat_axis=dim, tiled=True)
            return gather_copies(x, stored, cutting_axes(layout, names))

        return _on_devices(body, layout, stored, vocabulary_spec(layout, names))(x)

    return jax.tree.map(fetch_one, tree, axes)


def send_vocabulary(tree: Tree, axes: Tree, layout: Layout, among: tuple[str, ...]) -> Tree:
    """The transpose of `fetch_vocabulary`, to where the moments are; parts as for `send_back`."""

    def send_one(g: jax.Array, names: Names) -> jax.Array:
        dim, vocab, copies = _cut(names, layout), _vocab(names), summed_axes(layout, names, among)
        target = moment_spec(layout, g.shape[1:], names)
        first, last, keep = _in_turn(target, copies, cutting_axes(layout, names))

        def body(g: jax.Array) -> jax.Array:
            g = reduce_to(g[0], target, first, (*keep, *last))
            g = lax.all_to_all(g, AXIS, split_axis=dim, concat_axis=vocab, tiled=True)
            return reduce_to(g, target, last, (*keep, *first))

        parts = PartitionSpec(copies or None, *vocabulary_spec(layout, names))
        return _on_devices(body, layout, parts, target)(g)

    return jax.tree.map(send_one, tree, axes)


def vocabulary_spec(layout: Layout, names: Names) -> PartitionSpec:
    """Placement, during a step, of what is cut over the ranks along the vocabulary."""
    held = held_spec(layout, names)
    cut = (axes_of(e) + (AXIS,) * (n == VOCAB) for n, e in zip(names, held, strict=True))
    return PartitionSpec(*(entry or None for entry in cut))


def with_vocabulary_on_ranks(layout: Layout) -> Layout:
    """The layout inside of a pipeline, whose ranks have a part of the vocabulary each.

    What cuts it further cuts a rank's part.
    """
    computed = {**layout.computed, VOCAB: (AXIS, *layout.computed[VOCAB])}
    return dataclasses.replace(layout, computed=computed)


def check_vocabulary(layout: Layout, size: int) -> None:
    """Raise ValueError unless a vocabulary splits over the ranks, each of which has a part."""
    check_divides(
        "vocabulary (every rank of a pipeline has a part of it)",
        (size,),
        (VOCAB,),
        layout.mesh,
        with_vocabulary_on_ranks(layout).computed,
    )


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


def _in_turn(
    target: PartitionSpec, copies: tuple[str, ...], cutting: tuple[str, ...]
) -> tuple[tuple[str, ...], ...]:
    """Axes to sum before what goes over `pipe`, after it, and those to leave alone.

    `data` comes last, of fewer bytes, unless it shares a dimension with the others.
    """
    shared = any("data" in axes_of(entry) and set(COPIED) & set(axes_of(entry)) for entry in target)
    last = tuple(axis for axis in copies if axis == "data" and not shared)
    return tuple(axis for axis in copies if axis not in last), last, (*cutting, AXIS)


def _vocab(names: Names) -> int:
    return names.index(VOCAB)


def _on_devices(body: Callable, layout: Layout, in_spec: Any, out_spec: Any) -> Callable:
    return jax.shard_map(
        body, mesh=layout.mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False
    )
