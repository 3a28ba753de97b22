"""One level of the expert exchange: rows go to the shards that hold their experts, sums come back.

A row goes once to each shard that holds at least one of its experts. The expert side applies the
router's weights, so the way back is a plain sum, and each way is the other's derivative (V3 report,
section 3.2.2). No rows are scattered: a slot knows its row, and a row its slots.

Shape letters: R rows of this device, K choices per row, D width, S shards of the level, J = min(K,
S) copies of a row at most, C slots per shard, P slots of the send buffer, Q = S*C slots received.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sharding.config import MeshConfig
from sharding.experts.quantize import dequantize, quantize
from sharding.experts.rounds import Count, Span, in_rounds
from sharding.partition import all_to_all, bound, max_over, num_shards, ragged_all_to_all, vary

Rows = Callable[[Any, Array, Array, Array], tuple[Array, Count]]
"""(params, x_RD, ids_RK, weights_RK) to weighted sums of the experts [R, D] and what was counted.
Ids are global; -1 is no choice, and a row without choices may hold anything."""


class Routing(NamedTuple):
    """Shards that the rows go to, int32."""

    shard_RJ: Array
    """Shard of each copy of a row; -1: no copy."""
    turn_RJ: Array
    """Earlier rows that go to the same shard."""
    counts_S: Array
    """Rows that go to each shard."""


class Slots(NamedTuple):
    """Places of the copies in a send buffer, int32; copy j of row r has number r*J + j."""

    copy_P: Array
    """Copy in each slot; R*J: none."""
    slot_RJ: Array
    """Slot of each copy; P: none."""


class Way(NamedTuple):
    """Blocks of a ragged exchange, int32, one per shard; a dense one needs no numbers."""

    start_S: Array
    """First row of what goes there, in the buffer here."""
    size_S: Array
    far_start_S: Array
    """Place of that row in the buffer there."""
    far_size_S: Array
    """Rows that come from there."""


class Level(NamedTuple):
    """Static facts of a level: the logical axis of its shards, their number and experts."""

    name: str
    shards: int
    experts: int
    config: MeshConfig

    def shard_of(self, ids: Array) -> Array:
        """Shard that holds each expert; -1 for no choice."""
        return jnp.where(ids < 0, -1, ids // self.experts % self.shards)


def level(name: str, agree: str, experts: int, slots: int, config: MeshConfig, inner: Rows) -> Rows:
    """`inner` run where the experts are: on the shards of logical axis `name`.

    Args:
        name: logical axis of the shards.
        agree: logical axis of all devices that exchange here or inside of `inner`.
        experts: experts of a shard, whether it holds them or cuts them further.
        slots: room for the rows that go from one device to one shard; more go in further rounds.
        config: type on the wire, padded or ragged buffers.
        inner: what a shard does with the rows it receives.
    """
    S = num_shards(name)
    if S == 1:
        return inner

    def shared(params, x_RD: Array, ids_RK: Array, weights_RK: Array) -> tuple[Array, Count]:
        R = x_RD.shape[0]
        this = Level(name, S, experts, config)
        routing = route(this.shard_of(ids_RK), S)
        one_round = partial(_one_round, this, inner)
        floats, ints = (params, x_RD, weights_RK), (ids_RK, routing)
        if slots >= R:
            y_RD, count = one_round(Span(0, R), floats, ints)
            return y_RD.astype(x_RD.dtype), count
        most = max_over(jnp.max(routing.counts_S), agree)
        like = jax.ShapeDtypeStruct(x_RD.shape, x_RD.dtype)
        return in_rounds(one_round, floats, ints, most, slots, like)

    return shared


def route(shard_RK: Array, num_shards: int) -> Routing:
    """One copy of a row for each distinct shard (none is -1) of its choices; turns follow rows."""
    K, index_S = shard_RK.shape[1], jnp.arange(num_shards, dtype=jnp.int32)
    needs_RS = jnp.any(shard_RK[:, :, None] == index_S, axis=1)
    turn_RS = jnp.cumsum(needs_RS, axis=0, dtype=jnp.int32) - needs_RS
    counts_S = jnp.sum(needs_RS, axis=0, dtype=jnp.int32)
    if num_shards <= K:
        return Routing(jnp.where(needs_RS, index_S, -1), turn_RS, counts_S)
    same_RKK = shard_RK[:, :, None] == shard_RK[:, None, :]
    repeated_RK = jnp.any(same_RKK & jnp.tri(K, k=-1, dtype=jnp.bool), axis=2)
    shard_RJ = jnp.where(repeated_RK, -1, shard_RK).astype(jnp.int32)
    turn_RJ = jnp.take_along_axis(turn_RS, jnp.maximum(shard_RJ, 0), axis=1)
    return Routing(shard_RJ, turn_RJ, counts_S)


def assign_slots(
    routing: Routing, turn: Array | int, per_shard: int, start_S: Array, num_slots: int
) -> Slots:
    """Slots of the copies whose turns are `turn` and the `per_shard` - 1 after it.

    `start_S` is the first slot of each shard, of `num_slots` in all.
    """
    shard_RJ, turn_RJ, _ = routing
    served_RJ = (shard_RJ >= 0) & (turn_RJ >= turn) & (turn_RJ < turn + per_shard)
    slot_RJ = _take(start_S, jnp.maximum(shard_RJ, 0)) + turn_RJ - turn
    slot_RJ = jnp.where(served_RJ, slot_RJ, num_slots)
    index = jnp.arange(slot_RJ.size, dtype=jnp.int32)
    copy_P = jnp.full(num_slots, slot_RJ.size, jnp.int32)
    return Slots(copy_P.at[slot_RJ.reshape(-1)].set(index, mode="drop"), slot_RJ)


def _one_round(this: Level, inner: Rows, span: Span, floats, ints) -> tuple[Array, Count]:
    """Rows whose turns are of the span sent, computed, and their sums [R, D] in fp32."""
    (params, x_RD, weights_RK), (ids_RK, routing) = floats, ints
    S, C, dtype = this.shards, span.rows, this.config.exchange_dtype
    R, J = routing.shard_RJ.shape
    if this.config.exchange == "ragged":
        P = min(S * C, R * J)
        size_S = jnp.clip(routing.counts_S - span.start, 0, C)
        start_S = jnp.cumsum(size_S) - size_S
        there, back = _ways(this, start_S, size_S)
    else:
        P, there, back = S * C, None, None
        start_S = jnp.arange(S, dtype=jnp.int32) * C
    slots = assign_slots(routing, span.start, C, start_S, P)
    shard_P = _copies(routing.shard_RJ.reshape(R * J, 1), slots, 1, -1)
    ids_PK = _copies(ids_RK, slots, J, -1)
    ids_PK = jnp.where(this.shard_of(ids_PK) == shard_P, ids_PK, -1)

    def mover(rows: int, dtype: str) -> Callable:
        return bound(partial(_move, this, rows, dtype))

    send, send_exact, give_back = mover(S * C, dtype), mover(S * C, ""), mover(P, "")
    ids_QK = send_exact(ids_PK + 1, there) - 1
    weights_QK = _carry(send_exact, give_back, spread(weights_RK, slots), there, back)
    x_QD = _carry(send, give_back, spread(x_RD, slots), there, back)
    y_QD, count = inner(params, x_QD, ids_QK, weights_QK)
    return collect(_carry(give_back, send, y_QD, back, there), slots), count


def _ways(this: Level, start_S: Array, size_S: Array) -> tuple[Way, Way]:
    """Blocks on the way to the shards, received one after the other, and on the way back."""
    arriving_S = all_to_all(size_S, this.name)
    arrival_S = jnp.cumsum(arriving_S) - arriving_S
    return (
        Way(start_S, size_S, all_to_all(arrival_S, this.name), arriving_S),
        Way(arrival_S, arriving_S, all_to_all(start_S, this.name), size_S),
    )


def _move(this: Level, num_rows: int, dtype: str, x: Array, way: Way | None) -> Array:
    """Rows to the other shards, a buffer of `num_rows` received; in 8 bits if `dtype` says so."""
    if dtype:
        q, scale = (_move(this, num_rows, "", a, way) for a in quantize(x, jnp.dtype(dtype)))
        return dequantize(q, scale, x.dtype)
    if way is None:
        return all_to_all(x, this.name)
    out = vary(jnp.zeros((num_rows, *x.shape[1:]), x.dtype))
    return _ragged_all_to_all(x, out, this.name, *way)


def _ragged_all_to_all(x: Array, out: Array, name: str, *blocks: Array) -> Array:
    """The one use of the primitive, which XLA has on GPUs only."""
    return ragged_all_to_all(x, out, name, *blocks)


def _carried(go: Callable, come: Callable, x: Array, way, way_back) -> Array:
    """`go(x, way)`, differentiated as `come(dy, way_back)`: rounding on the way counts as none."""
    return go(x, way)


_carry = jax.custom_vjp(_carried, nondiff_argnums=(0, 1))


def _carry_fwd(go: Callable, come: Callable, x: Array, way, way_back):
    return go(x, way), way_back


def _carry_bwd(go: Callable, come: Callable, way_back, dy: Array):
    return come(dy, way_back), None, None


_carry.defvjp(_carry_fwd, _carry_bwd)


def _take(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="promise_in_bounds")


def _copies(x: Array, slots: Slots, copies: int, empty: int) -> Array:
    """Row of x that fills each slot, [P, ...]; `copies` is the number of copies per row."""
    row_P = jnp.minimum(slots.copy_P // copies, x.shape[0] - 1)
    filled_P = slots.copy_P < slots.slot_RJ.size
    return jnp.where(filled_P[:, None], _take(x, row_P), empty)


@jax.custom_vjp
def spread(x_RD: Array, slots: Slots) -> Array:
    """Row of each slot [P, D], zeros in empty ones. Its transpose is `collect`."""
    return _copies(x_RD, slots, slots.slot_RJ.shape[1], 0)


def _spread_fwd(x_RD: Array, slots: Slots):
    return spread(x_RD, slots), slots


def _spread_bwd(slots: Slots, dx_PD: Array):
    return collect(dx_PD, slots).astype(dx_PD.dtype), None


spread.defvjp(_spread_fwd, _spread_bwd)


def collect(y_PD: Array, slots: Slots) -> Array:
    """Sum of each row's slots, fp32 [R, D]. Its transpose is `spread`."""
    return _collect(y_PD.dtype, y_PD, slots)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _collect(dtype, y_PD: Array, slots: Slots) -> Array:
    P, (R, J) = y_PD.shape[0], slots.slot_RJ.shape
    total_RD = jnp.zeros((R, y_PD.shape[1]), jnp.float32)
    for j in range(J):  # one gather each, added as they come: no [R, J, D]
        slot_R = slots.slot_RJ[:, j]
        y_RD = _take(y_PD, jnp.minimum(slot_R, P - 1)).astype(jnp.float32)
        total_RD += jnp.where((slot_R < P)[:, None], y_RD, 0)
    return total_RD


def _collect_fwd(dtype, y_PD: Array, slots: Slots):
    return _collect(dtype, y_PD, slots), slots


def _collect_bwd(dtype, slots: Slots, dy_RD: Array):
    return spread(dy_RD, slots).astype(dtype), None


_collect.defvjp(_collect_fwd, _collect_bwd)
