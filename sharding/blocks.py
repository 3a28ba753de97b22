"""Matrices in few bits with a scale per block, made where they are stored.

A block is a square of what a device computes with, laid out as a matrix [K, N]. Stored, it may lie
in shards on several devices: they find its largest magnitude together, and each converts its own
shard. What then travels to where it is used has a byte an entry, and is what a device that holds
all of the block would make of it, bit by bit.

Letters: K rows and N columns of the matrix on a device, k and n its blocks along them.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from sharding.partition import Layout, Names, stored_spec
from sharding.rules import axes_of, spec


class Cut(NamedTuple):
    """A group of dimensions that are one side of the matrix."""

    dims: tuple[int, ...]
    shards: tuple[tuple[str, ...], ...]
    """Mesh axes that cut each of them where it is stored and not where it is computed with."""


def sides(names: Names) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Dimensions that a product contracts, and those that it gives; others come first.

    A weight that gives the residual stream, `embed`, contracts all else.
    """
    own = [dim for dim, name in enumerate(names) if name not in ("layers", "experts")]
    at = len(own) - 1 if names[-1] == "embed" else 1
    return tuple(own[:at]), tuple(own[at:])


def scale_names(names: Names, layout: Layout | None) -> Names:
    """Logical axes of the scales [.., k, n] of a matrix."""
    groups = sides(names)
    lead = names[: min(groups[0])]
    return *lead, *(_cutting(names, group, layout) for group in groups)


def scale_shape(
    shape: tuple[int, ...], names: Names, layout: Layout | None, block: int
) -> tuple[int, ...]:
    """Shape of those scales."""
    groups, found = sides(names), list(shape[: min(sides(names)[0])])
    for group, name in zip(groups, scale_names(names, layout)[-2:], strict=True):
        size = math.prod(shape[dim] for dim in group)
        axes = () if layout is None else axes_of(spec((name,), layout.computed)[0])
        ways = math.prod(layout.mesh.shape[axis] for axis in axes) if layout else 1
        found.append(ways * -(-(size // ways) // block))
    return tuple(found)


def _cutting(names: Names, group: tuple[int, ...], layout: Layout | None) -> str:
    if layout is None:
        return "blocks"
    computed = _computed(names, layout)
    return next((name for dim in group if (name := names[dim]) and computed[dim]), "blocks")


def _computed(names: Names, layout: Layout) -> list[tuple[str, ...]]:
    sizes = layout.mesh.shape
    found = spec(names, layout.computed)
    return [tuple(a for a in axes_of(entry) if sizes[a] > 1) for entry in found]


def in_blocks(
    scale_of: Callable[[Array], Array],
    convert: Callable[[Array, Array, Callable[[Array], Array]], Array],
    x: Array,
    names: Names,
    layout: Layout | None,
    block: int,
) -> tuple[Array, Array]:
    """Values like x, and scales [.., k, n] of its blocks.

    Args:
        scale_of: scales of the largest magnitudes [.., k, n].
        convert: convert(x, scales, spread) gives the values of a shard of matrices [.., K, N];
            spread(s) has s[.., k, n] at every entry of a block.
        x: a stored weight with these logical axes.
        layout: where it lies; None on one device.
        block: rows and columns of a block.
    """
    groups = sides(names)
    lead = min(groups[0])
    if layout is None or layout.mesh.size == 1:
        whole = tuple(Cut(group, ((),) * len(group)) for group in groups)
        return _convert(scale_of, convert, x, lead, whole, block)
    stored, computed = stored_spec(layout, x.shape, names), _computed(names, layout)
    sizes = layout.mesh.shape
    shards = [
        tuple(a for a in axes_of(entry) if sizes[a] > 1 and a not in computed[dim])
        for dim, entry in enumerate(stored)
    ]
    cuts = tuple(Cut(group, tuple(shards[dim] for dim in group)) for group in groups)

    def body(x: Array) -> tuple[Array, Array]:
        return _convert(scale_of, convert, x, lead, cuts, block)

    scales = PartitionSpec(
        *stored[:lead], *spec(scale_names(names, layout)[lead:], layout.computed)
    )
    run = jax.shard_map(
        body, mesh=layout.mesh, in_specs=stored, out_specs=(stored, scales), check_vma=False
    )
    return run(x)


def _convert(scale_of, convert, x: Array, lead: int, cuts: Sequence[Cut], block: int):
    """The same of this device's shard."""
    x_KN = x.reshape(*x.shape[:lead], *(_size(x, cut) for cut in cuts))
    largest, spreads = jnp.abs(x_KN.astype(jnp.float32)), []
    for axis, cut in zip((-2, -1), cuts, strict=True):
        largest, index = _largest(largest, axis, x, cut, block)
        spreads.append((index, axis))
    over = tuple(axis for cut in cuts for axes in cut.shards for axis in axes)
    scales = scale_of(lax.pmax(largest, over) if over else largest)

    def spread(s: Array) -> Array:
        for index, axis in spreads:
            s = jnp.take(s, index, axis=axis, mode="clip")
        return s

    return convert(x_KN, scales, spread).reshape(x.shape), scales


def _size(x: Array, cut: Cut) -> int:
    return math.prod(x.shape[dim] for dim in cut.dims)


def _largest(x: Array, axis: int, shard: Array, cut: Cut, block: int) -> tuple[Array, Array]:
    """Largest entries of every block along an axis, of those that are here; and the block of each
    entry. Blocks that are elsewhere have 0."""
    position, whole = jnp.zeros((), jnp.int32), 1
    for dim, axes in reversed(list(zip(cut.dims, cut.shards, strict=True))):
        ways = math.prod(lax.axis_size(a) for a in axes)
        here = jnp.arange(shard.shape[dim], dtype=jnp.int32)
        if axes:
            here += lax.axis_index(axes) * shard.shape[dim]
        position = (here[:, None] * whole + position.reshape(1, -1)).reshape(-1)
        whole *= shard.shape[dim] * ways
    index, count = position // block, -(-whole // block)
    if not any(cut.shards):
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, -whole % block)
        at = x.ndim + axis
        parts = jnp.pad(x, pad).reshape(*x.shape[:at], count, block, *x.shape[at + 1 :])
        return parts.max(axis=at + 1), index
    found = jax.ops.segment_max(jnp.moveaxis(x, axis, 0), index, count)
    return jnp.moveaxis(jnp.maximum(found, 0), 0, axis), index
