"""The program of one rank of a pipeline: a scan over ticks.

In each tick the ranks at the model's ends compute what surrounds the layers, every rank its layers,
and all ranks together what is as long as the vocabulary: they look up embeddings and compute the
head's loss for whichever ranks are at an end, each with its part of the vocabulary (arXiv
2411.05288).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sharding.held import gradients_of, values_of, with_stand_ins, without_scales
from sharding.partition import reduced
from sharding.pipeline.arena import Arena, Stored
from sharding.pipeline.entries import add_entries, entry, put_entry, zeros_like_shapes
from sharding.pipeline.schedule import Kind
from sharding.pipeline.stage_weights import AXIS, Weights
from sharding.pipeline.stages import Ends, Stages
from sharding.pipeline.ticks import CODES, Table

Tree = Any


class Total(NamedTuple):
    """Sums of a rank over the ticks."""

    objective: jax.Array
    parts: Tree
    loss: jax.Array
    """Of `Stages.loss`, and its parts: the same on all ranks."""
    loss_parts: Tree
    stats: Tree
    vocab: Tree
    """Gradients of the vocabulary's weights, and below of the others."""
    gradients: Stored


class _Layer(NamedTuple):
    """What a layer's forward pass leaves behind besides its output."""

    objective: jax.Array
    stats: Tree
    saved: Tree


class _End(NamedTuple):
    """What follows the layers, and what its gradient needs besides weights and inputs."""

    hidden: jax.Array
    objective: jax.Array
    parts: Tree
    saved: Tree


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
        found["cotangents"] = many(table.num_cotangents, slots)(x)
    return found


class Rank:
    """The program of one rank; its methods are traced."""

    def __init__(
        self,
        table: Table,
        stages: Stages,
        held: Weights,
        arena: Arena,
        batch: Tree,
        shared: Tree,
        active: jax.Array,
        slots: int,
        is_first: jax.Array,
        is_last: jax.Array,
        full: bool,
        ends: tuple[Ends, Ends],
    ):
        self.table, self.stages, self.vocab = table, stages, held.vocab
        self.end_constants, self.layer_constants = held.end_constants, held.layer_constants
        self.rank = lax.axis_index(AXIS)
        self.at_ends = is_first.any(), is_last.any()
        self.arena = arena
        self.stored = arena.pack(held.layers, held.first, held.last, self.rank, self.at_ends)
        self.batch, self.shared = batch, shared
        self.active, self.is_first, self.is_last = active, is_first, is_last
        self.slots, self.full = slots, full
        self.first_ranks, self.last_ranks = (end.ranks for end in ends)
        micro = self._micro(jnp.int32(0))
        ids, more = jax.eval_shape(self.stages.ids, micro)
        self.num_more = more.shape[0]
        self.embedded = jax.eval_shape(self._embed, held.vocab, ids)
        more = jax.ShapeDtypeStruct((self.num_more, *self.embedded.shape), self.embedded.dtype)
        self.x = jax.eval_shape(
            lambda e: self._first(self._weights("first"), e, micro), self.embedded
        )
        self.one = jax.eval_shape(lambda x: self._run_layer(jnp.int32(0), x, micro)[1], self.x)
        self.end = jax.eval_shape(lambda x, e: self._run_last(x, e, micro), self.x, more)
        hidden = jax.ShapeDtypeStruct(self.end.hidden.shape[1:], self.end.hidden.dtype)
        self.loss_parts = jax.eval_shape(
            lambda h: stages.loss(held.vocab, h, micro, jnp.int32(0))[1], hidden
        )

    def run(self, columns: dict[str, jax.Array], ends: tuple[Ends, Ends]) -> tuple[Total, Weights]:
        """All ticks; the sums of this rank, and its gradients as weights are.

        `ends` are the passes at both ends, of all ranks.
        """
        stash = zeros_like_shapes(stash_shapes(self.table, self.slots, self.x, self.one.saved))
        (_, total), _ = lax.scan(self._tick, (stash, self._zero_total()), (columns, ends))
        layers, first, last = self.arena.unpack(total.gradients, self.rank, self.at_ends)
        return total, values_of(Weights(total.vocab, first, last, layers, (), ()))

    def _weights(self, end: str) -> Tree:
        """Weights of `first` or `last`, on a rank that is there, as derivatives are taken of."""
        return with_stand_ins(self.arena.end(end, self.stored, self.rank))

    def _layer_weights(self, row: jax.Array) -> Tree:
        """Those of the layer in a slot."""
        return with_stand_ins(self.arena.layer(self.stored, row))

    def _asks(self, *kinds: Kind) -> bool:
        """Whether the table has a tick of one of these kinds."""
        return any(CODES[kind] in self.table.codes for kind in kinds)

    def _tick(self, carry, now):
        stash, total = carry
        row, ends = now
        is_now = {kind: row["code"] == code for kind, code in CODES.items()}
        forward = is_now["F"] | is_now["FB"]
        backward = is_now["B"] | is_now["FB"] | is_now["I"]
        embedded, more, again = self._look_up(ends)
        micro = self._micro(row["f_micro"])
        x = lax.cond(
            forward & self.is_first[row["f_chunk"]],
            lambda: self._first(self._weights("first"), embedded, micro),
            lambda: self._stashed(stash["x"], row["f_x"]),
        )
        at_end = backward & self.is_last[row["b_chunk"]]
        dy, d_more, total = self._output_gradient(stash, row, at_end, more, ends, total)
        done: Any = self._layers(stash, row, x, dy, total.gradients)
        y, dx, d_layers, layers, cotangents = done
        first_row = row["f_chunk"] * self.slots
        total = total._replace(
            gradients=d_layers,
            objective=total.objective + layers.objective.sum(),
            stats=jax.tree.map(
                lambda a, s: add_entries(a, s, first_row), total.stats, layers.stats
            ),
        )
        total = self._input_gradient(row, backward, again, dx, d_more, ends, total)
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
            stash["cotangents"] = put_entry(stash["cotangents"], cotangents, row["i_cotangents"])
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

    def _embed(self, vocab: Tree, ids: jax.Array) -> jax.Array:
        return self.stages.embed(vocab, ids)

    def _first(self, weights: Tree, embedded: jax.Array, micro: Tree) -> jax.Array:
        return self.stages.place(self.stages.first(weights, embedded, micro))

    def _stashed(self, stash: jax.Array, slot: jax.Array) -> jax.Array:
        return self.stages.place(entry(stash, slot))

    def _micro(self, index: jax.Array) -> Tree:
        return entry(self.batch, index), self.shared

    def _zero_total(self) -> Total:
        rows = self.active.shape[0]
        zero = jnp.zeros((), jnp.float32)
        sums = lambda tree: jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), tree)  # noqa: E731
        return Total(
            zero,
            zeros_like_shapes(self.end.parts),
            zero,
            zeros_like_shapes(self.loss_parts),
            jax.tree.map(lambda s: jnp.zeros((rows, *s.shape), s.dtype), self.one.stats),
            sums(without_scales(self.vocab)),
            sums(without_scales(self.stored)),
        )

    # -- layers

    def _run_layer(self, row: jax.Array, x: jax.Array, micro: Tree) -> tuple[jax.Array, _Layer]:
        """One layer forward, and what its backward pass needs besides the weights."""
        weights, constants = self._layer_weights(row), entry(self.layer_constants, row)

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
            args_res=[self._layer_weights(row), x],
            opaque_residuals=opaque,
            structured_residuals=structured,
        )
        d_weights, dx = pull((dy, jnp.float32(1.0)))
        return gradients_of(d_weights), dx

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
                return *out, dx, d_layers if defer else self.arena.add_layer(d_layers, d_weights, b)

            def deferred():
                at = row["b_cotangents"]
                gradient = self.stages.place(entry(entry(stash["cotangents"], at), j))
                d_weights, _ = self._pull_back(b, self._saved(stash, row, j), gradient)
                return (
                    x,
                    zeros_like_shapes(self.one),
                    dy,
                    self.arena.add_layer(d_layers, d_weights, b),
                )

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

    # -- around the layers: what a rank at an end does alone, and what all ranks do for it

    def _needs(self, ends: tuple[Ends, Ends], backward: bool = False) -> list[tuple]:
        """Lookups of a tick, or their gradients: (whether, ids [B, T], rank, place among its own).

        Place 0 is the input of `first`, the others those of `last`.
        """
        first, last = ends
        needs = []
        for e, rank in enumerate(self.first_ranks):
            active = first.is_backward[e] if backward else first.is_forward[e]
            micro = (first.b_micro if backward else first.f_micro)[e]
            needs.append((active, self.stages.ids(self._micro(micro))[0], rank, 0))
        for e, rank in enumerate(self.last_ranks):
            more = self.stages.ids(self._micro(last.b_micro[e]))[1]
            needs += [(last.is_backward[e], more[k], rank, k + 1) for k in range(self.num_more)]
        return needs

    def _stacked(self, needs: list[tuple]) -> tuple[jax.Array, ...]:
        whether, ids, ranks, places = zip(*needs, strict=True)
        return jnp.stack(whether), jnp.stack(ids), jnp.array(ranks), jnp.array(places)

    def _look_up(self, ends: tuple[Ends, Ends]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Embeddings that this rank needs: of `first` [B, T, D], of `last` [K, B, T, D], and of the
        `first` whose gradient is due."""
        zeros = jnp.zeros((2 + self.num_more, *self.embedded.shape), self.embedded.dtype)
        rank = self.rank
        again = self._needs(ends, backward=True)[: len(self.first_ranks)]
        needs = self._needs(ends) + [(*need[:3], 1 + self.num_more) for need in again]

        def look_up(found, need):
            active, ids, at, place = need

            def add(found):
                new = self._embed(self.vocab, ids)
                return jnp.where(at == rank, put_entry(found, new, place), found)

            return lax.cond(active, add, lambda found: found, found), None

        found, _ = lax.scan(look_up, zeros, self._stacked(needs))
        place = self.stages.place
        return place(found[0]), found[1:-1], place(found[-1])

    def _output_gradient(
        self, stash, row, at_end: jax.Array, more: jax.Array, ends: tuple[Ends, Ends], total: Total
    ) -> tuple[jax.Array, jax.Array, Total]:
        """Gradient of the chunk's output: received, or on the last stage that of the loss.

        And, on the last stage, those of its own embeddings.
        """
        here = self._stashed(stash["dy"], row["b_dy"])
        micro = self._micro(row["b_micro"])
        end = lax.cond(
            at_end, lambda: self._run_last(here, more, micro), lambda: zeros_like_shapes(self.end)
        )
        total = total._replace(
            objective=total.objective + end.objective,
            parts=jax.tree.map(jnp.add, total.parts, end.parts),
        )
        d_hidden, total = self._loss(end.hidden, ends[1], total)

        def pull_back():
            d_last, dy, d_more = self._pull_last(here, more, end.saved, d_hidden)
            gradients = self.arena.add_end("last", total.gradients, d_last, self.rank)
            return self.stages.place(dy), d_more, total._replace(gradients=gradients)

        return lax.cond(at_end, pull_back, lambda: (here, jnp.zeros_like(more), total))

    def _run_last(self, x: jax.Array, more: jax.Array, micro: Tree) -> _End:
        """What follows the layers, and what its gradient needs besides weights and inputs."""
        constants = self.end_constants

        def last(weights, x, more):
            return self.stages.last(weights, constants, x, more, micro)

        saveable = (False, True, True)
        pulled: Any = jax.vjp(
            last, self._weights("last"), x, more, has_aux=True, saveable_args=saveable
        )
        (hidden, objective), pull, parts = pulled
        saved, self._last_tree = jax.tree.flatten(
            (pull.opaque_residuals, pull.structured_residuals)
        )
        self._last = pull
        return _End(hidden, objective, parts, saved)

    def _pull_last(self, x: jax.Array, more: jax.Array, saved, d_hidden: jax.Array):
        """Gradients of the weights, of x and of the embeddings."""
        opaque, structured = jax.tree.unflatten(self._last_tree, saved)
        pull = self._last.replace(
            args_res=[self._weights("last"), x, more],
            opaque_residuals=opaque,
            structured_residuals=structured,
        )
        d_weights, dx, d_more = pull((d_hidden, jnp.float32(1.0)))
        return gradients_of(d_weights), dx, d_more

    def _loss(self, hidden: jax.Array, last: Ends, total: Total) -> tuple[jax.Array, Total]:
        """The head's part of the loss of all ends, one hidden state after the other, by all ranks
        together; and the gradient of this rank's own hidden states [K+1, B, T, D]."""
        rank, count = self.rank, 1 + self.num_more
        which = [(e, k) for e in range(len(self.last_ranks)) for k in range(count)]
        ends, ks = (jnp.array(column) for column in zip(*which, strict=True))
        needs = last.is_backward[ends], last.b_micro[ends], jnp.array(self.last_ranks)[ends], ks

        def one(carry, need):
            active, index, at, k = need

            def add(carry):
                d_hidden, total = carry
                micro = self._micro(index)
                # h[B, T, D] of rank `at` -> Broadcast_pipe
                mine = jnp.where(at == rank, entry(hidden, k), 0)
                h = self.stages.place(reduced(lambda h: lax.psum(h, AXIS), mine))
                objective, pull, parts = jax.vjp(
                    lambda vocab, h: self.stages.loss(vocab, h, micro, k),
                    with_stand_ins(self.vocab),
                    h,
                    has_aux=True,
                )
                d_vocab, dh = pull(jnp.ones_like(objective))
                d_hidden = jnp.where(at == rank, put_entry(d_hidden, dh, k), d_hidden)
                total = total._replace(
                    loss=total.loss + objective,
                    loss_parts=jax.tree.map(jnp.add, total.loss_parts, parts),
                )
                return d_hidden, self._add_vocab(total, d_vocab)

            return lax.cond(active, add, lambda carry: carry, carry), None

        (d_hidden, total), _ = lax.scan(one, (jnp.zeros_like(hidden), total), needs)
        return d_hidden, total

    def _input_gradient(
        self,
        row,
        backward: jax.Array,
        embedded: jax.Array,
        dx: jax.Array,
        d_more: jax.Array,
        ends: tuple[Ends, Ends],
        total: Total,
    ) -> Total:
        """Gradient of what comes before the layers on the first stage, and of all embeddings."""
        micro = self._micro(row["b_micro"])
        needs = self._needs(ends, backward=True)
        rank = self.rank

        def first():
            _, pull = jax.vjp(
                lambda w, e: self._first(w, e, micro), self._weights("first"), embedded
            )
            d_first, d_embedded = pull(dx)
            new = gradients_of(d_first)
            gradients = self.arena.add_end("first", total.gradients, new, self.rank)
            return self.stages.place(d_embedded), total._replace(gradients=gradients)

        def none():  # placed like the other, or XLA refuses the two as branches
            return self.stages.place(jnp.zeros_like(dx)), total

        d_embedded, total = lax.cond(backward & self.is_first[row["b_chunk"]], first, none)
        d_all = jnp.concatenate([d_embedded[None], d_more])

        def one(total: Total, need):
            active, ids, at, place = need

            def add(total: Total):
                # The derivative of the sum over ranks is a sum over ranks: one has a gradient.
                mine = jnp.where(at == rank, entry(d_all, place), 0)
                _, pull = jax.vjp(lambda v: self._embed(v, ids), with_stand_ins(self.vocab))
                return self._add_vocab(total, pull(mine)[0])

            return lax.cond(active, add, lambda total: total, total), None

        return lax.scan(one, total, self._stacked(needs))[0]

    def _add_vocab(self, total: Total, d_vocab: Tree) -> Total:
        """With what is of `with_stand_ins` added."""
        new = gradients_of(d_vocab)
        return total._replace(vocab=jax.tree.map(jnp.add, total.vocab, new))
