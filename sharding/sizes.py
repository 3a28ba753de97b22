"""Bytes that a device holds of arrays that are laid out, counted without an array."""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sharding.partition import Layout, Names
from sharding.rules import axes_of, spec


def device_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of ShapeDtypeStructs that carry their shardings."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )


def placed(shapes: Any, specs: Any, layout: Layout) -> Any:
    """ShapeDtypeStructs with the placement of a tree of partition specs."""

    def place(leaf: Any, partition: PartitionSpec) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(layout.mesh, partition)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, specs)


def activation_shards(layout: Layout, *names: str) -> int:
    """Into how many parts activations are cut along these logical axes together."""
    return math.prod(layout.mesh.shape[axis] for name in names for axis in layout.computed[name])


def axis_size(layout: Layout, axis: str) -> int:
    """Devices along an axis as a person names it: `expert` is all of its nodes."""
    if axis == "expert":
        return layout.mesh.shape["expert_nodes"] * layout.mesh.shape["expert"]
    return layout.mesh.shape[axis]


def stored_axes(names: Names, layout: Layout) -> tuple[str, ...]:
    """Mesh axes of more than one device that cut a stored parameter with these logical axes."""
    entries = spec(names, layout.stored)
    return tuple(a for entry in entries for a in axes_of(entry) if layout.mesh.shape[a] > 1)
