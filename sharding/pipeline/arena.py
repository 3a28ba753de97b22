"""One array per rank for the matrices of its stages, and of what lies around the layers.

Ranks run one program, so each reserves the same memory. A pipeline's ends hold fewer layers than
the others, since they also compute what comes before and after; kept in arrays of its own, that
would be reserved by every rank, beside layers that the ends do not have. Here a layer is a slot of
rows in one flat array, and at the ends matrices of `first` and `last` lie in the slots that are
empty there; what finds no room there lies behind the slots. An array of fp32 like it holds the
gradients.

Small arrays (gains, the router, scales of blocks) stay by themselves, and so do all where mesh axes
inside of a rank cut the weights. Letters: W slots of a rank, R rows of a slot, C columns.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding.pipeline.entries import add_entry, entry

Tree = Any
COLUMNS = 1024


class Stored(NamedTuple):
    """Weights of a rank, or their gradients, as they are kept."""

    rows: jax.Array
    """The flat array [rows, C]."""
    layers: Tree
    """What is not in it, None for what is: of the layers [W, ...] and of both ends."""
    first: Tree
    last: Tree


class _Place(NamedTuple):
    """Rows of a matrix."""

    shape: tuple[int, ...]
    start: Any
    """Of a layer's matrix, from the slot's first row; of another per rank: int [P]."""
    rows: int


class Arena:
    """Where every matrix lies: static, but for the rank.

    Args:
        layers: shapes and types of the layers' weights on a rank [W, ...].
        first, last: those of the weights around them.
        layer_of: the layer in each slot, -1 for none: int [ranks, W].
        at_first, at_last: whether a rank is at that end: bool [ranks].
        whole: whether a rank's devices hold whole weights; if not, nothing is laid together.
    """

    def __init__(
        self,
        layers: Tree,
        first: Tree,
        last: Tree,
        layer_of: np.ndarray,
        at_first: np.ndarray,
        at_last: np.ndarray,
        whole: bool,
    ):
        self.slots = layer_of.shape[1]
        leaves = jax.tree.leaves((layers, first, last))
        self.dtype = max(leaves, key=lambda leaf: math.prod(leaf.shape)).dtype
        self.whole = whole
        self.layers, self.rows_of_slot = self._slot(layers)
        runs = [_free(held, self.rows_of_slot) for held in layer_of]
        ends = jax.tree.leaves((first, last))
        here = [at_first] * len(jax.tree.leaves(first)) + [at_last] * len(jax.tree.leaves(last))
        places: list[_Place | None] = [None] * len(ends)
        behind = [self.slots * self.rows_of_slot] * len(runs)
        for i in sorted(range(len(ends)), key=lambda i: -math.prod(ends[i].shape)):
            if not self._is_packed(ends[i].shape, ends[i].dtype):
                continue
            count = _rows(ends[i].shape)
            starts = [
                _take(runs[rank], behind, rank, count) if here[i][rank] else 0
                for rank in range(len(runs))
            ]
            places[i] = _Place(ends[i].shape, np.array(starts, np.int32), count)
        num_first = len(jax.tree.leaves(first))
        structures = jax.tree.structure(first), jax.tree.structure(last)
        self.first = structures[0].unflatten(places[:num_first])
        self.last = structures[1].unflatten(places[num_first:])
        self.rows = max(behind)

    def _is_packed(self, shape: Sequence[int], dtype: Any) -> bool:
        return self.whole and len(shape) > 2 and dtype == self.dtype

    def _slot(self, layers: Tree) -> tuple[Tree, int]:
        end = 0

        def place(leaf: Any) -> _Place | None:
            nonlocal end
            if not self._is_packed(leaf.shape, leaf.dtype):
                return None
            found = _Place(leaf.shape[1:], end, _rows(leaf.shape[1:]))
            end += found.rows
            return found

        return jax.tree.map(place, layers), end

    def pack(self, layers: Tree, first: Tree, last: Tree, rank: jax.Array, ends: Any) -> Stored:
        """Weights laid together. `ends` says whether this rank is at the first and the last end."""
        rows = jnp.zeros((self.rows, COLUMNS), self.dtype)
        for place, x in _pairs(self.layers, layers):
            for slot in range(self.slots):
                start = slot * self.rows_of_slot + place.start
                rows = lax.dynamic_update_slice(rows, _flat(x[slot]), (start, 0))
        for places, tree, here in zip((self.first, self.last), (first, last), ends, strict=True):
            for place, x in _pairs(places, tree):
                start = jnp.array(place.start)[rank]

                def put(rows, x=x, start=start):
                    return lax.dynamic_update_slice(rows, _flat(x), (start, 0))

                rows = lax.cond(here, put, lambda rows: rows, rows)
        rest = (
            _rest(*pair) for pair in ((self.layers, layers), (self.first, first), (self.last, last))
        )
        return Stored(rows, *rest)

    def shapes(self, layers: Tree, first: Tree, last: Tree) -> Stored:
        """Shapes and types of what `pack` gives, of those of its weights."""
        rows: Any = jax.ShapeDtypeStruct((self.rows, COLUMNS), self.dtype)
        pairs = (self.layers, layers), (self.first, first), (self.last, last)
        return Stored(rows, *(_rest(*pair) for pair in pairs))

    def layer(self, stored: Stored, slot: jax.Array) -> Tree:
        """Weights of the layer in a slot."""
        base = slot * self.rows_of_slot
        return self._joined(
            self.layers, entry(stored.layers, slot), stored.rows, lambda p: base + p.start
        )

    def end(self, name: str, stored: Stored, rank: jax.Array) -> Tree:
        """Weights of `first` or `last`, on a rank that is there."""
        rest, start_of = getattr(stored, name), lambda p: jnp.array(p.start)[rank]
        return self._joined(getattr(self, name), rest, stored.rows, start_of)

    def _joined(self, places: Tree, rest: Tree, rows: jax.Array, start_of: Any) -> Tree:
        def read(place: _Place | None, x: Any) -> Any:
            return x if place is None else _read(rows, place, start_of(place))

        return _map(read, places, rest)

    def add_layer(self, sums: Stored, new: Tree, slot: jax.Array) -> Stored:
        """The sums with a layer's gradient added."""
        base = slot * self.rows_of_slot
        rows = self._added(sums.rows, self.layers, new, lambda p: base + p.start)
        return sums._replace(
            rows=rows, layers=add_entry(sums.layers, _rest(self.layers, new), slot)
        )

    def add_end(self, name: str, sums: Stored, new: Tree, rank: jax.Array) -> Stored:
        """The sums with a gradient of `first` or `last` added, on a rank that is there."""
        places = getattr(self, name)
        rows = self._added(sums.rows, places, new, lambda p: jnp.array(p.start)[rank])
        rest = jax.tree.map(jnp.add, getattr(sums, name), _rest(places, new))
        return sums._replace(rows=rows, **{name: rest})

    def _added(self, rows: jax.Array, places: Tree, new: Tree, start_of: Any) -> jax.Array:
        for place, x in _pairs(places, new):
            start = start_of(place)
            old = lax.dynamic_slice(rows, (start, 0), (place.rows, COLUMNS))
            rows = lax.dynamic_update_slice(rows, old + _flat(x), (start, 0))
        return rows

    def unpack(self, sums: Stored, rank: jax.Array, ends: Any) -> tuple[Tree, Tree, Tree]:
        """Gradients of the layers [W, ...] and of both ends, zeros where a rank is not there."""
        slots = sums.rows[: self.slots * self.rows_of_slot]
        slots = slots.reshape(self.slots, self.rows_of_slot, COLUMNS)

        def layer(place: _Place | None, x: Any) -> Any:
            if place is None:
                return x
            part = slots[:, place.start : place.start + place.rows].reshape(self.slots, -1)
            return part[:, : math.prod(place.shape)].reshape(self.slots, *place.shape)

        def end(here: jax.Array):
            def read(place: _Place | None, x: Any) -> Any:
                if place is None:
                    return x
                found = _read(sums.rows, place, jnp.array(place.start)[rank])
                return jnp.where(here, found, 0)

            return read

        return (
            _map(layer, self.layers, sums.layers),
            _map(end(ends[0]), self.first, sums.first),
            _map(end(ends[1]), self.last, sums.last),
        )


def _rows(shape: Sequence[int]) -> int:
    return -(-math.prod(shape) // COLUMNS)


def _flat(x: jax.Array) -> jax.Array:
    x = x.reshape(-1)
    return jnp.pad(x, (0, -x.size % COLUMNS)).reshape(-1, COLUMNS)


def _read(rows: jax.Array, place: _Place, start: Any) -> jax.Array:
    found = lax.dynamic_slice(rows, (start, 0), (place.rows, COLUMNS))
    return found.reshape(-1)[: math.prod(place.shape)].reshape(place.shape)


def _free(held: np.ndarray, rows: int) -> list[list[int]]:
    """Runs of rows [start, end] in the empty slots of a rank."""
    runs: list[list[int]] = []
    for slot in np.flatnonzero(held < 0):
        if runs and runs[-1][1] == slot * rows:
            runs[-1][1] += rows
        else:
            runs.append([int(slot) * rows, int(slot + 1) * rows])
    return runs


def _take(runs: list[list[int]], behind: list[int], rank: int, count: int) -> int:
    """First row of `count` in the first run that has them, or behind the slots."""
    for run in runs:
        if run[1] - run[0] >= count:
            run[0] += count
            return run[0] - count
    behind[rank] += count
    return behind[rank] - count


def _is_place(node: Any) -> bool:
    return node is None or isinstance(node, _Place)


def _map(fn: Any, places: Tree, tree: Tree) -> Tree:
    """fn(place or None, leaf or None) over the weights of a tree."""
    found, structure = jax.tree.flatten(places, is_leaf=_is_place)
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)
    return structure.unflatten(fn(*pair) for pair in zip(found, leaves, strict=True))


def _pairs(places: Tree, tree: Tree) -> list[tuple[_Place, jax.Array]]:
    """Matrices that are laid together, with their places."""
    found = jax.tree.leaves(places, is_leaf=_is_place)
    pairs = zip(found, jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None), strict=True)
    return [(place, x) for place, x in pairs if place is not None]


def _rest(places: Tree, tree: Tree) -> Tree:
    """The others, None for what is laid together."""
    return _map(lambda place, x: x if place is None else None, places, tree)
