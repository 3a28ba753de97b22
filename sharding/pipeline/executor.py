"""Pipeline parallelism: one executor for any table of forward and backward passes.

The layers are cut into stages; a schedule (`sharding/pipeline/schedule.py`) says in which order
each rank of `pipe` runs the forward and backward passes of its stages for which micro batch, and a
table (`sharding/pipeline/ticks.py`) lays that out in ticks. Here a table runs inside one jitted
step: a scan over ticks, in each a scan over the layers of a chunk, for every layer a switch over
what the tick asks of it, then the messages to the neighbours. What comes before and after the
layers stands once in the program, around the scan over layers. The program does not grow with
layers, micro batches or ticks.

A forward pass keeps what its backward pass needs (what that is decides the layer's own
recomputation), so a tick costs what the schedule says. Where forward and backward of different
micro batches share a tick, a step of the scan over layers holds a layer forward and a layer
backward that do not depend on each other.

Letters: L layers, N micro batches.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from sharding.copies import (
    add_up,
    copying_axes,
    gather,
    held_spec,
    only,
    summed_axes,
)
from sharding.held import values_of
from sharding.partition import Layout, Names, along_axes, use_layout
from sharding.pipeline.arena import Arena
from sharding.pipeline.rank import Rank
from sharding.pipeline.stage_weights import (
    AXIS,
    Placement,
    Weights,
    by_layer,
    fetch,
    fetch_vocabulary,
    send_back,
    send_vocabulary,
    vocabulary_spec,
    with_vocabulary_on_ranks,
)
from sharding.pipeline.stages import Stages, ends_of
from sharding.pipeline.ticks import Table

Tree = Any


class Result(NamedTuple):
    """Sums over all micro batches; gradients lie as the moments are stored."""

    objective: jax.Array
    parts: Tree
    stats: Tree
    """Constants of every layer, [L, ...]."""
    gradients: Weights
    """Of the weights; the constants have none."""


def run(
    table: Table, placement: Placement, stages: Stages, weights: Weights, axes: Weights,
    batch: Tree, shared: Tree, layout: Layout, every_slot: bool = False,
) -> Result:  # fmt: skip
    """Gradients of the sum of all objectives over the micro batches of `batch` [N, B, ...].

    Weights may be held as copies (`sharding/held.py`). `axes` holds the logical axes of every
    weight, and of its scales; constants outside the layers are whole.
    `shared` is a tree that all micro batches see; a stage function's `micro` is (micro, shared)
    with an entry of what `stages.prepare` returns. Each device of the batch axes runs on its own
    rows, and adds its gradients up by itself until the end. With `every_slot` empty slots are
    computed like full ones, which only a program that is not run may do.
    """
    copies = copying_axes(layout)
    held = Weights(
        fetch_vocabulary(weights.vocab, axes.vocab, layout),
        jax.tree.map(lambda x, n: gather(x, n, layout), weights.first, axes.first),
        jax.tree.map(lambda x, n: gather(x, n, layout), weights.last, axes.last),
        fetch(weights.layers, axes.layers, placement, layout),
        weights.end_constants,
        fetch(weights.layer_constants, axes.layer_constants, placement, layout),
    )
    full = every_slot or bool((placement.layer_of >= 0).all())
    first, last = ends_of(table, placement.is_first), ends_of(table, placement.is_last)
    inside = with_vocabulary_on_ranks(layout)
    is_first, is_last = (at.any(1) for at in placement[1:])
    places = placement.layer_of.reshape(len(is_first), -1), is_first, is_last
    is_whole = all(layout.mesh.shape[axis] == 1 for axis in ("fsdp", "tensor"))

    def on_rank(held, batch, shared, columns, ends, slots, is_first, is_last):
        active = slots.reshape(-1) >= 0
        with use_layout(inside):
            chunks = active, slots.shape[-1], is_first[0], is_last[0]
            micros = stages.prepare(batch)
            arena = Arena(held.layers, held.first, held.last, *places, whole=is_whole)
            rank = Rank(table, stages, held, arena, micros, shared, *chunks, full, (first, last))
            total, gradients = rank.run(jax.tree.map(lambda column: column[:, 0], columns), ends)
        on_ranks = lax.psum((total.objective, total.parts), AXIS)
        objective, parts = jax.tree.map(jnp.add, on_ranks, (total.loss, total.loss_parts))
        stats, gradients = total.stats, jax.tree.map(lambda g: g[None], gradients)
        if copies:
            objective, parts, stats = lax.psum((objective, parts, stats), copies)
        return Result(objective, parts, stats, gradients)

    def specs(tree: Tree, names: Tree, *lead: Any) -> Tree:
        """Placement of weights over the region's axes, after entries for their first dimensions."""

        def place(_, names: Names) -> PartitionSpec:
            own = only(held_spec(layout, names), copies)
            return PartitionSpec(*lead, *own[len(lead) :]) if lead else own

        return jax.tree.map(place, tree, names)

    def vocabulary(_, names: Names) -> PartitionSpec:
        return only(vocabulary_spec(layout, names), (AXIS, *copies))

    def parts_of(tree: Tree, names: Tree, placed: Tree, *among: str) -> Tree:
        """The same of their gradients, a part per device of the axes that copy them."""

        def place(_, names: Names, placed: PartitionSpec) -> PartitionSpec:
            return PartitionSpec(summed_axes(layout, names, (*among, *copies)) or None, *placed)

        return jax.tree.map(place, tree, names, placed)

    plain, plain_axes = values_of(weights), values_of(axes)
    whole: Any = PartitionSpec()
    ranks: Any = PartitionSpec(AXIS)
    ticks = PartitionSpec(None, AXIS)
    placed: Any = Weights(
        jax.tree.map(vocabulary, weights.vocab, axes.vocab),
        specs(weights.first, axes.first),
        specs(weights.last, axes.last),
        specs(weights.layers, axes.layers, AXIS),
        whole,
        ranks,
    )
    gradients: Any = Weights(
        parts_of(plain.vocab, plain_axes.vocab, values_of(placed.vocab)),
        parts_of(plain.first, plain_axes.first, values_of(placed.first), AXIS),
        parts_of(plain.last, plain_axes.last, values_of(placed.last), AXIS),
        parts_of(plain.layers, plain_axes.layers, values_of(placed.layers)),
        whole,
        whole,
    )
    columns = {name: jnp.asarray(column) for name, column in table.columns().items()}
    passes = jax.tree.map(jnp.asarray, tuple(end._replace(ranks=()) for end in (first, last)))
    rows: Any = PartitionSpec(None, copies) if copies else whole
    run_on_ranks = along_axes(
        on_rank,
        (AXIS, *copies),
        (placed, rows, whole, ticks, whole, ranks, ranks, ranks),
        Result(whole, whole, ranks, gradients),
    )
    arrays = (jnp.asarray(x) for x in placement)
    result = run_on_ranks(held, batch, shared, columns, passes, *arrays)
    g = result.gradients

    def at_end(g: jax.Array, names: Names) -> jax.Array:
        return add_up(g, names, layout, (AXIS, *copies))

    return result._replace(
        stats=jax.tree.map(lambda x: by_layer(x, placement), result.stats),
        gradients=Weights(
            send_vocabulary(g.vocab, plain_axes.vocab, layout, copies),
            jax.tree.map(at_end, g.first, plain_axes.first),
            jax.tree.map(at_end, g.last, plain_axes.last),
            send_back(g.layers, plain_axes.layers, placement, layout, copies),
            (),
            (),
        ),
    )
