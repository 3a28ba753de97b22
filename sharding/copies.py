"""Weights of which several devices hold a copy: made for a step, and their gradients added up once.

A weight that the batch axes do not cut is needed whole on each of their devices. Stored in shards
(ZeRO), it is gathered at the start of a step. Each device then adds up the gradient of its own
tokens over all micro batches, in fp32, and the sums of all devices meet once, at the end, in a
reduce-scatter to where the moments are: what is sent does not grow with the micro batches.

    w[D_ep] -> AllGather_ep -> w[D];  dw[D]{U_dp,ep} -> ReduceScatter_ep, ReduceScatter_dp

`fsdp` is left out: its shards are gathered where they are used, and reduced there.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sharding.held import values_of
from sharding.partition import Layout, Names, along_axes, moment_spec, stored_spec
from sharding.rules import axes_of, spec

Tree = Any


def copying_axes(layout: Layout) -> tuple[str, ...]:
    """Axes along which devices have tokens of their own, and the same weights but for experts."""
    batch = layout.computed["batch"]
    return tuple(a for a in batch if a != "fsdp" and layout.mesh.shape[a] > 1)


def reduces_once(layout: Layout) -> bool:
    """Whether gradients are added up over the devices once a step, and there is something to."""
    return layout.config.reduce == "step" and bool(copying_axes(layout))


def held_spec(layout: Layout, names: Names) -> PartitionSpec:
    """Placement of a weight during a step: by the table, but whole over `pipe`."""
    rules = {name: tuple(a for a in axes if a != "pipe") for name, axes in layout.stored.items()}
    return spec(names, rules)


def cutting_axes(layout: Layout, names: Names) -> tuple[str, ...]:
    """Axes that cut a weight during a step."""
    return tuple(itertools.chain(*map(axes_of, held_spec(layout, names))))


def gather(x: jax.Array, names: Names, layout: Layout) -> jax.Array:
    """A stored weight as a step holds it: w[D_ep,pipe] -> AllGather -> w[D]."""
    return lax.with_sharding_constraint(x, NamedSharding(layout.mesh, held_spec(layout, names)))


def is_gathered(x: jax.Array, names: Names, layout: Layout) -> bool:
    """Whether a step makes copies of a stored weight: devices hold less than they compute with."""
    stored = itertools.chain(*map(axes_of, stored_spec(layout, x.shape, names)))
    cut = {axis for axis in stored if layout.mesh.shape[axis] > 1}
    return not cut <= set(cutting_axes(layout, names))


def gather_copies(x: jax.Array, stored: PartitionSpec, cutting: tuple[str, ...]) -> jax.Array:
    """A weight without the shards over axes that shall copy it, `pipe` aside; inside of a region.

    `cutting` are the axes that it stays cut over.
    """
    for dim, entry in enumerate(stored):
        axes = tuple(a for a in axes_of(entry) if a != "pipe" and a not in cutting)
        if axes:
            x = lax.all_gather(x, axes, axis=dim, tiled=True)
    return x


def only(partition: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """A spec with nothing but these axes in it."""
    kept = (tuple(a for a in axes_of(entry) if a in axes) for entry in partition)
    return PartitionSpec(*(entry or None for entry in kept))


def summed_axes(layout: Layout, names: Names, among: tuple[str, ...]) -> tuple[str, ...]:
    """Axes of `among` over which the gradient of a weight is a sum of its devices' parts."""
    cut = cutting_axes(layout, names)
    return tuple(axis for axis in among if axis not in cut)


def add_up(g: jax.Array, names: Names, layout: Layout, among: tuple[str, ...]) -> jax.Array:
    """Sum of a gradient's parts [parts, ...], a part per device of the axes that copy the weight.

    dw[D]{U_axes} -> ReduceScatter -> dw[D_axes], to the placement of the moments; what they do not
    cut is an AllReduce.
    """
    axes, cutting = summed_axes(layout, names, among), cutting_axes(layout, names)
    target = moment_spec(layout, g.shape[1:], names)

    def body(g: jax.Array) -> jax.Array:
        return reduce_to(g[0], target, axes, keep=cutting)

    parts = PartitionSpec(axes or None, *held_spec(layout, names))
    run = jax.shard_map(body, mesh=layout.mesh, in_specs=parts, out_specs=target, check_vma=False)
    return run(g)


def reduce_to(
    g: jax.Array, target: PartitionSpec, axes: tuple[str, ...], keep: tuple[str, ...]
) -> jax.Array:
    """This device's part, laid out by `target`, of a sum over `axes`; inside of a region.

    `keep` are axes of the target for which nothing is to do. Over others than these and `axes` the
    sum is there, and cut.
    """
    left = set(axes)
    kind = lambda axis: "sum" if axis in left else "keep" if axis in keep else "cut"  # noqa: E731
    for dim, entry in enumerate(target):
        # In the order in which the axes nest in a dimension, neighbours together.
        for what, group in itertools.groupby(axes_of(entry), kind):
            over = tuple(group)
            if what == "sum":
                g = lax.psum_scatter(g, over, scatter_dimension=dim, tiled=True)
                left -= set(over)
            if what == "cut":
                size = g.shape[dim] // lax.axis_size(over)
                g = lax.dynamic_slice_in_dim(g, lax.axis_index(over) * size, size, dim)
    return lax.psum(g, tuple(axis for axis in axes if axis in left)) if left else g


def sum_of_shards(
    fn: Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree]],
    layout: Layout,
    weights: tuple[Tree, Tree],
    constants: tuple[Tree, Tree],
    batch: Tree,
    shared: Tree,
) -> tuple[Tree, Tree]:
    """`sums, gradients = fn(weights, constants, batch, shared)` of every device's rows, added up.

    Args:
        fn: run once per device of `copying_axes`, on its rows of the batch; sums of any structure.
            What it adds up over the batch are terms of the result, not whole sums.
        weights: stored weights, which may be copies (`sharding/held.py`), and their logical axes,
            scales included; `fn` gives the gradient of each weight alone.
        constants: the same of weights that have no gradient.
        batch: arrays [micro batches, sequences, ...].
        shared: whole on every device.

    Returns:
        Sums over all devices, and gradients where the moments are.
    """
    axes = copying_axes(layout)
    rows: Any = PartitionSpec(None, axes)
    whole: Any = PartitionSpec()

    def place(names: Names) -> PartitionSpec:
        return only(held_spec(layout, names), axes)

    def part(names: Names) -> PartitionSpec:
        return PartitionSpec(summed_axes(layout, names, axes) or None, *place(names))

    def names_of(tree: Tree, names: Tree, to_spec: Callable) -> Tree:
        return jax.tree.map(lambda _, names: to_spec(names), tree, names)

    held = [
        jax.tree.map(lambda x, names: gather(x, names, layout), *pair)
        for pair in (weights, constants)
    ]
    specs = [names_of(*pair, place) for pair in (weights, constants)]

    def on_shard(weights: Tree, constants: Tree, batch: Tree, shared: Tree):
        sums, gradients = fn(weights, constants, batch, shared)
        return lax.psum(sums, axes), jax.tree.map(lambda g: g.astype(jnp.float32)[None], gradients)

    plain = values_of(weights[0]), values_of(weights[1])
    outs = whole, names_of(*plain, part)
    sums, gradients = along_axes(on_shard, axes, (*specs, rows, whole), outs)(*held, batch, shared)
    return sums, jax.tree.map(lambda g, n: add_up(g, n, layout, axes), gradients, plain[1])
