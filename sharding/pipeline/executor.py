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

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from sharding.partition import Layout, along_axis
from sharding.pipeline.entries import add_entries, add_entry, entry, put_entry, zeros_like_shapes
from sharding.pipeline.schedule import Kind
from sharding.pipeline.stage_weights import (
    AXIS,
    Placement,
    Weights,
    by_layer,
    fetch,
    gather_outer,
    send_back,
    sum_outer,
)
from sharding.pipeline.ticks import CODES, Table

Tree = Any


class Stages(NamedTuple):
    """The model as a pipeline sees it. `micro` is one micro batch, a tree of arrays.

    Objectives are terms of the loss, scalars; what else is returned is added up over micro batches.
    """

    first: Callable[[Tree, Tree, Tree], jax.Array]
    """Input of the first layer: x = first(outer, constants, micro)."""
    layer: Callable[[Tree, Tree, jax.Array, Tree], tuple[tuple[jax.Array, jax.Array], Tree]]
    """One layer: (x, objective), stats = layer(weights, constants, x, micro)."""
    last: Callable[[Tree, Tree, jax.Array, Tree], tuple[jax.Array, Tree]]
    """What follows the layers: objective, parts = last(outer, constants, x, micro)."""
    place: Callable[[jax.Array], jax.Array]
    """x, laid out over the other axes as activations between layers are."""


class Result(NamedTuple):
    """Sums over all micro batches; gradients lie as the weights are stored."""

    objective: jax.Array
    parts: Tree
    stats: Tree
    """Constants of every layer, [L, ...]."""
    d_outer: Tree
    d_layers: Tree


def run(
    table: Table, placement: Placement, stages: Stages, weights: Weights, axes: Weights,
    batch: Tree, shared: Tree, layout: Layout,
) -> Result:  # fmt: skip
    """Gradients of the sum of all objectives over the micro batches of `batch` [N, ...].

    `axes` holds the logical axes of every weight; constants outside the layers are whole.
    `shared` is a tree that all micro batches see; a stage function's `micro` is (batch[n], shared).
    """
    held = Weights(
        gather_outer(weights.outer, axes.outer, layout),
        fetch(weights.layers, axes.layers, placement, layout),
        weights.outer_constants,
        fetch(weights.layer_constants, axes.layer_constants, placement, layout),
    )
    full = bool((placement.layer_of >= 0).all())

    def on_rank(held, batch, shared, columns, slots, is_first, is_last):
        active = slots.reshape(-1) >= 0
        ends = is_first[0], is_last[0]
        rank = _Rank(table, stages, held, batch, shared, active, *ends, slots.shape[-1], full)
        total = rank.run(jax.tree.map(lambda column: column[:, 0], columns))
        objective, parts = lax.psum((total.objective, total.parts), AXIS)
        d_outer = jax.tree.map(lambda g: g[None], total.d_outer)
        return Result(objective, parts, total.stats, d_outer, total.d_layers)

    whole: Any = PartitionSpec()
    ranks: Any = PartitionSpec(AXIS)
    ticks = PartitionSpec(None, AXIS)
    run_on_ranks = along_axis(
        on_rank,
        AXIS,
        (Weights(whole, ranks, whole, ranks), whole, whole, ticks, ranks, ranks, ranks),
        Result(whole, whole, ranks, ranks, ranks),
    )
    columns = {name: jnp.asarray(column) for name, column in table.columns().items()}
    arrays = (jnp.asarray(x) for x in placement)
    result = run_on_ranks(held, batch, shared, columns, *arrays)
    return result._replace(
        stats=jax.tree.map(lambda x: by_layer(x, placement), result.stats),
        d_outer=sum_outer(result.d_outer, axes.outer, layout),
        d_layers=send_back(result.d_layers, axes.layers, placement, layout),
    )


def stash_shapes(table: Table, slots: int, x: Any, saved: Tree) -> dict[str, Tree]:
    """Shapes of a rank's stashes, of those of a layer's input `x` and of what it saves: all that is
    carried from tick to tick besides weights and their gradients."""

    def many(count: int, *inner: int) -> Callable[[Any], jax.ShapeDtypeStruct]:
        return lambda s: jax.ShapeDtypeStruct((count + 1, *inner, *s.shape), s.dtype)

    found = {
        "x": many(table.num_x)(x),
        "dy": many(table.num_dy)(x),
        "saved": jax.tree.map(many(table.num_saved, slots), saved),
    }
    if CODES["I"] in table.codes:
        found["cotangents"] = many(table.num_saved, slots)(x)
    return found


class _Total(NamedTuple):
    """Sums of a rank over the ticks."""

    objective: jax.Array
    parts: Tree
    stats: Tree
    d_outer: Tree
    d_layers: Tree


class _Layer(NamedTuple):
    """What a layer's forward pass leaves behind besides its output."""

    objective: jax.Array
    stats: Tree
    saved: Tree


class _Rank:
    """The program of one rank; its methods are traced."""

    def __init__(
        self, table: Table, stages: Stages, held: Weights, batch: Tree, shared: Tree,
        active: jax.Array, is_first: jax.Array, is_last: jax.Array, slots: int, full: bool,
    ):  # fmt: skip
        self.table, self.stages = table, stages
        self.outer, self.layers, self.outer_constants, self.layer_constants = held
        self.batch, self.shared = batch, shared
        self.active, self.is_first, self.is_last = active, is_first, is_last
        self.slots, self.full = slots, full
        micro = self._micro(jnp.int32(0))
        self.x = jax.eval_shape(lambda: self._first(self.outer, micro))
        self.parts = jax.eval_shape(lambda x: self._last(self.outer, x, micro)[1], self.x)
        self.one = jax.eval_shape(lambda x: self._run_layer(jnp.int32(0), x, micro)[1], self.x)

    def run(self, columns: dict[str, jax.Array]) -> _Total:
        """All ticks; the sums of this rank."""
        stash = zeros_like_shapes(stash_shapes(self.table, self.slots, self.x, self.one.saved))
        (_, total), _ = lax.scan(self._tick, (stash, self._zero_total()), columns)
        return total

    def _asks(self, *kinds: Kind) -> bool:
        """Whether the table has a tick of one of these kinds."""
        return any(CODES[kind] in self.table.codes for kind in kinds)

    def _tick(self, carry, row):
        stash, total = carry
        now = {kind: row["code"] == code for kind, code in CODES.items()}
        forward, backward = now["F"] | now["FB"], now["B"] | now["FB"] | now["I"]
        micro = self._micro(row["f_micro"])
        x = lax.cond(
            forward & self.is_first[row["f_chunk"]],
            lambda: self._first(self.outer, micro),
            lambda: self._stashed(stash["x"], row["f_x"]),
        )
        dy, total = self._output_gradient(stash, row, backward, total)
        done: Any = self._layers(stash, row, x, dy, total.d_layers)
        y, dx, d_layers, layers, cotangents = done
        first_row = row["f_chunk"] * self.slots
        total = total._replace(
            d_layers=d_layers,
            objective=total.objective + layers.objective.sum(),
            stats=jax.tree.map(
                lambda a, s: add_entries(a, s, first_row), total.stats, layers.stats
            ),
        )
        total = self._input_gradient(row, backward, dx, total)
        stash = stash | {
            "x": self._deliver(stash["x"], y, row, "x"),
            "dy": self._deliver(stash["dy"], dx, row, "dy"),
            "saved": jax.tree.map(
                lambda s, new: put_entry(s, new, row["f_saved"]), stash["saved"], layers.saved
            ),
        }
        # The last stage's output waits where other stages' gradients do, for the loss.
        stash["dy"] = put_entry(stash["dy"], y, row["y_kept"])
        if "cotangents" in stash:
            stash["cotangents"] = put_entry(stash["cotangents"], cotangents, row["i_saved"])
        return (stash, total), None

    def _deliver(self, slots: jax.Array, message: jax.Array, row, kind: str) -> jax.Array:
        """Send a tick's message to the neighbours that want it, and store what they sent."""
        P = self.table.code.shape[1]
        for way, step in (("up", 1), ("down", -1), ("same", 0)):
            name = f"{kind}_{way}"
            if getattr(self.table.channels, name):
                pairs = [(rank, (rank + step) % P) for rank in range(P)]
                arrived = lax.ppermute(message, AXIS, pairs) if step else message
                slots = put_entry(slots, arrived, row[name])
        return slots

    def _first(self, outer: Tree, micro: Tree) -> jax.Array:
        return self.stages.place(self.stages.first(outer, self.outer_constants, micro))

    def _last(self, outer: Tree, x: jax.Array, micro: Tree):
        return self.stages.last(outer, self.outer_constants, x, micro)

    def _stashed(self, stash: jax.Array, slot: jax.Array) -> jax.Array:
        return self.stages.place(entry(stash, slot))

    def _micro(self, index: jax.Array) -> Tree:
        return entry(self.batch, index), self.shared

    def _zero_total(self) -> _Total:
        rows = self.active.shape[0]
        return _Total(
            jnp.zeros((), jnp.float32),
            zeros_like_shapes(self.parts),
            jax.tree.map(lambda s: jnp.zeros((rows, *s.shape), s.dtype), self.one.stats),
            zeros_like_shapes(self.outer),
            zeros_like_shapes(self.layers),
        )

    # -- layers

    def _run_layer(self, row: jax.Array, x: jax.Array, micro: Tree) -> tuple[jax.Array, _Layer]:
        """One layer forward, and what its backward pass needs besides the weights."""
        weights, constants = entry(self.layers, row), entry(self.layer_constants, row)

        def layer(weights, x):
            return self.stages.layer(weights, constants, x, micro)

        saveable = (False, True)
        pulled: Any = jax.vjp(layer, weights, x, has_aux=True, saveable_args=saveable)
        (y, objective), pull, stats = pulled
        saved, self._pull_tree = jax.tree.flatten(
            (pull.opaque_residuals, pull.structured_residuals)
        )
        self._pull = pull
        return y, _Layer(objective, stats, (x, saved))

    def _pull_back(self, row: jax.Array, saved, dy: jax.Array) -> tuple[Tree, jax.Array]:
        """Gradients of one layer's weights and input."""
        x, leaves = saved
        opaque, structured = jax.tree.unflatten(self._pull_tree, leaves)
        pull = self._pull.replace(
            args_res=[entry(self.layers, row), x],
            opaque_residuals=opaque,
            structured_residuals=structured,
        )
        return pull((dy, jnp.float32(1.0)))

    def _layers(self, stash, row, x: jax.Array, dy: jax.Array, d_layers: Tree):
        """All layers of the chunks that a tick names: forward in their order, backward against it.

        Returns the output of the last layer, the gradient of the input of the first, the sums of
        weight gradients, every layer's `_Layer`, and the gradient of every layer's output [slots,
        ...], which a deferred weight gradient needs.
        """
        micro = self._micro(row["f_micro"])
        defers = self._asks("I")

        def step(carry, i):
            j = self.slots - 1 - i
            f, b = row["f_chunk"] * self.slots + i, row["b_chunk"] * self.slots + j
            x, dy, d_layers = carry

            def run(forward: bool, backward: bool, defer: bool = False):
                out = x, zeros_like_shapes(self.one)
                if forward:
                    out = self._run_layer(f, x, micro)
                if not backward:
                    return *out, dy, d_layers
                d_weights, dx = self._pull_back(b, self._saved(stash, row, j), dy)
                return *out, dx, d_layers if defer else add_entry(d_layers, d_weights, b)

            def deferred():
                at = row["b_saved"]
                gradient = self.stages.place(entry(entry(stash["cotangents"], at), j))
                d_weights, _ = self._pull_back(b, self._saved(stash, row, j), gradient)
                return x, zeros_like_shapes(self.one), dy, add_entry(d_layers, d_weights, b)

            cases: dict[Kind, Callable] = {
                "F": lambda: run(True, False),
                "B": lambda: run(False, True),
                "FB": lambda: run(True, True),
                "I": lambda: run(False, True, defer=True),
                "W": deferred,
            }
            y, layer, dx, d_layers = self._switch(
                cases, row["code"], f, b, lambda: run(False, False)
            )
            return (y, dx, d_layers), (layer, dy if defers else None)

        outputs: Any
        carry, outputs = lax.scan(step, (x, dy, d_layers), jnp.arange(self.slots))
        layers, cotangents = outputs
        return *carry, layers, cotangents[::-1] if defers else None

    def _switch(self, cases: dict[Kind, Callable], code: jax.Array, f, b, nothing: Callable):
        """The case of a tick's code for the layers in rows `f` and `b`.

        A slot may be empty; then of FB its other half is left.
        """
        here_f, here_b = (True, True) if self.full else (self.active[f], self.active[b])
        is_now = {kind: code == number for kind, number in CODES.items()}
        forward = (is_now["F"] | is_now["FB"]) & here_f
        backward = (is_now["B"] | is_now["FB"]) & here_b
        asked: dict[Kind, jax.Array] = {
            "F": forward & ~backward,
            "B": backward & ~forward,
            "FB": forward & backward,
            "I": is_now["I"] & here_b,
            "W": is_now["W"] & here_b,
        }
        halves: tuple[Kind, ...] = ("F", "B") if self._asks("FB") and not self.full else ()
        used: list[Kind] = [kind for kind in cases if self._asks(kind) or kind in halves]
        index = sum(number * asked[kind] for number, kind in enumerate(used, 1))
        return lax.switch(index, [nothing, *(cases[kind] for kind in used)])

    def _saved(self, stash, row, slot: jax.Array) -> Tree:
        """What a layer's forward pass kept, read where it lies."""
        return jax.tree.map(lambda x: entry(entry(x, row["b_saved"]), slot), stash["saved"])

    # -- around the layers

    def _output_gradient(
        self, stash, row, backward: jax.Array, total: _Total
    ) -> tuple[jax.Array, _Total]:
        """Gradient of the chunk's output: received, or on the last stage that of the loss."""
        here = self._stashed(stash["dy"], row["b_dy"])
        micro = self._micro(row["b_micro"])

        def last():
            objective, pull, parts = jax.vjp(
                lambda outer, y: self._last(outer, y, micro), self.outer, here, has_aux=True
            )  # fmt: skip
            d_outer, dy = pull(jnp.ones_like(objective))
            return self.stages.place(dy), total._replace(
                objective=total.objective + objective,
                parts=jax.tree.map(jnp.add, total.parts, parts),
                d_outer=jax.tree.map(jnp.add, total.d_outer, d_outer),
            )

        return lax.cond(backward & self.is_last[row["b_chunk"]], last, lambda: (here, total))

    def _input_gradient(self, row, backward: jax.Array, dx: jax.Array, total: _Total) -> _Total:
        """On the first stage, the gradient of what comes before the layers."""
        micro = self._micro(row["b_micro"])

        def first():
            _, pull = jax.vjp(lambda outer: self._first(outer, micro), self.outer)
            return total._replace(d_outer=jax.tree.map(jnp.add, total.d_outer, pull(dx)[0]))

        return lax.cond(backward & self.is_first[row["b_chunk"]], first, lambda: total)
