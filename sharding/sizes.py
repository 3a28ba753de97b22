"""Bytes that a device holds of arrays that are laid out, counted without an array."""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding

from sharding.copies import held_spec, is_gathered, reduces_once
from sharding.held import is_held, values_of, without_scales
from sharding.partition import Layout, Names, moment_spec
from sharding.pipeline.arena import Arena
from sharding.pipeline.stage_weights import Placement, Weights


def device_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of ShapeDtypeStructs that carry their shardings."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )


def rank_bytes(held: Weights, placement: Placement, layout: Layout) -> tuple[int, int]:
    """Bytes on one device of the weights that a rank of a pipeline computes with, as it keeps them
    (`sharding/pipeline/arena.py`), and of the fp32 sums of their gradients.

    `held` is what `held_shapes` gives.
    """
    is_whole = all(layout.mesh.shape[axis] == 1 for axis in ("fsdp", "tensor"))
    layers, first, last = jax.tree.map(_on_device, (held.layers, held.first, held.last))
    at_first, at_last = placement.is_first.any(1), placement.is_last.any(1)
    layer_of = placement.layer_of.reshape(len(placement.layer_of), -1)
    arena = Arena(layers, first, last, layer_of, at_first, at_last, whole=is_whole)
    stored = arena.shapes(layers, first, last), jax.tree.map(_on_device, held.vocab)
    constants = jax.tree.leaves((held.end_constants, held.layer_constants))
    weights = sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(stored))
    sums = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(without_scales(stored)))
    return weights + device_bytes(constants), sums


def _on_device(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)


def copied_bytes(shapes: Any, axes: Any, layout: Layout) -> tuple[int, int]:
    """Bytes on one device of what a step outside of a pipeline holds besides its state: weights of
    which it makes copies (of the types of `shapes`), and their fp32 sums of gradients, which lie as
    a step holds them. `axes` are those of the weights, scales of FP8 copies aside.

    Where gradients are reduced in every backward pass, sums lie as the moments are stored.
    """
    once, weights, sums = reduces_once(layout), 0, 0

    def add(x: Any, names: Names) -> None:
        nonlocal weights, sums
        quantized, x = is_held(x) and x.scale is not None, values_of(x)
        held = NamedSharding(layout.mesh, held_spec(layout, names))
        size = math.prod(held.shard_shape(x.shape))
        if quantized or (is_gathered(x, names, layout) and once):
            weights += size * x.dtype.itemsize
        moments = NamedSharding(layout.mesh, moment_spec(layout, x.shape, names))
        sums += 4 * (size if once else math.prod(moments.shard_shape(x.shape)))

    jax.tree.map(add, shapes, axes, is_leaf=is_held)
    return weights, sums


def activation_shards(layout: Layout, *names: str) -> int:
    """Into how many parts activations are cut along these logical axes together."""
    return math.prod(layout.mesh.shape[axis] for name in names for axis in layout.computed[name])


def axis_size(layout: Layout, axis: str) -> int:
    """Devices along an axis as a person names it: `expert` is all of its nodes."""
    if axis == "expert":
        return layout.mesh.shape["expert_nodes"] * layout.mesh.shape["expert"]
    return layout.mesh.shape[axis]
