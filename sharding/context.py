"""Sequences cut over devices: who holds which tokens, and how they see each other's.

Causal attention gives later tokens more work. With n shards a sequence is therefore cut into 2n
chunks, and shard i holds chunks i and 2n-1-i: its two chunks of queries see 2n+1 chunks of keys
together, whatever i is. `balance` puts the tokens of a batch into that order before the model reads
them, `restore` takes results back; with one shard both are the identity.

`over_sources` is the walk of attention over all shards, in both of its forms. What a device makes
available to the others is a tree of arrays; what they give back is summed for it.

Letters: n shards; x[B, T_cp] is cut over the shards of the sequence.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sharding.partition import (
    Layout,
    gather,
    num_shards,
    options,
    rotate,
    scatter_sum,
    shard_index,
    vary,
)

SEQUENCE = "seq"
"""Logical axis of tokens."""


def sequence_shards() -> int:
    """Into how many parts the active layout cuts a sequence."""
    return num_shards(SEQUENCE)


def balance(x: jax.Array, axis: int = 1) -> jax.Array:
    """Tokens along `axis` from the order of the text into the order that shards hold them.

    Chunks 0, 2n-1, 1, 2n-2, ...: those of the first half, and between them the others from the end.
    """
    shards = sequence_shards()
    if shards == 1:
        return x
    first, second = jnp.split(_cut(x, axis, 2 * shards), 2, axis)
    return jnp.stack([first, jnp.flip(second, axis)], axis + 1).reshape(x.shape)


def restore(x: jax.Array, axis: int = 1) -> jax.Array:
    """The opposite of `balance`."""
    shards = sequence_shards()
    if shards == 1:
        return x
    pairs = _cut(_cut(x, axis, 2 * shards), axis, shards)
    first, second = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    return jnp.concatenate([first, jnp.flip(second, axis)], axis).reshape(x.shape)


def _cut(x: jax.Array, axis: int, parts: int) -> jax.Array:
    """A dimension as two: which part, and where in it."""
    return x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])


def check_sequence(layout: Layout, seq_len: int) -> None:
    """Raise ValueError unless sequences split over the axes that cut them."""
    context, tensor = layout.mesh.shape["context"], layout.mesh.shape["tensor"]
    if context > 1 and seq_len % (2 * context):
        raise ValueError(
            f"sequences of {seq_len} tokens do not split over context={context}: each shard holds "
            f"two chunks, so the length must be a multiple of {2 * context}; change seq_len or "
            "context"
        )
    if layout.config.sequence and seq_len % (context * tensor):
        raise ValueError(
            f"sequences of {seq_len} tokens do not split over context={context} x "
            f"tensor={tensor}, as sequence parallelism asks; make the length a multiple of "
            f"{context * tensor}, or leave `sequence` off"
        )


def whole_sequences(layout: Layout) -> Layout:
    """The layout for passes over few tokens, such as generation: no sequence is cut.

    Devices that differ in `context` then compute the same.
    """
    whole = {**layout.computed, SEQUENCE: (), "stream": ()}
    return dataclasses.replace(layout, computed=whole)


def over_sources(
    first: Callable[[Any], tuple[Any, Any]],
    other: Callable[[Any, jax.Array, Any], tuple[Any, Any]],
    local: Any,
) -> tuple[Any, Any]:
    """Walk over what every shard of the sequence holds, the own part first; inside a region.

    `state, given = first(local)` begins, `state, given = other(state, source, arrays)` goes on with
    the arrays of shard `source`. `given` is what this device owes to the owner of the arrays, a
    gradient say, or an empty tree. Returns the last state, and the sum over all shards of what they
    gave for `local`.
    """
    if sequence_shards() == 1:
        return first(local)
    walk = {"ring": _ring, "gather": _gathered}[options().context_exchange]
    return walk(first, other, local)


def _ring(first, other, local):
    """a[T_cp] -> CollectivePermute, n-1 times; gifts follow one step behind, n times.

    A step's transfers do not wait for its computation. Shard i begins with its own arrays and then
    sees those of i-1, i-2, ...; what it adds to the gift for shard j travels on to j.
    """
    shards = sequence_shards()
    index = shard_index(SEQUENCE)
    pass_on = lambda tree: jax.tree.map(lambda x: rotate(x, SEQUENCE), tree)  # noqa: E731
    here = pass_on(local)
    state, given = first(local)

    def visit(state, here, given, step):
        arrived = pass_on(given)
        state, more = other(state, (index - step) % shards, here)
        return state, jax.tree.map(jnp.add, arrived, more)

    def body(carry, step):
        state, here, given = carry
        following = pass_on(here)
        state, given = visit(state, here, given, step)
        return (state, following, given), None

    if shards > 2:
        steps = jnp.arange(1, shards - 1)
        (state, here, given), _ = jax.lax.scan(body, (state, here, given), steps)
    state, given = visit(state, here, given, shards - 1)
    return state, pass_on(given)


def _gathered(first, other, local):
    """a[T_cp] -> AllGather_cp -> a[T]; gifts g[T]{U_cp} -> ReduceScatter_cp -> g[T_cp]."""
    shards = sequence_shards()
    index = shard_index(SEQUENCE)
    everything = jax.tree.map(lambda x: gather(x[None], SEQUENCE), local)
    state, given = first(local)

    def put(gifts, given, source):
        place = lambda all, x: jax.lax.dynamic_update_index_in_dim(all, x, source, 0)  # noqa: E731
        return jax.tree.map(place, gifts, given)

    gifts = jax.tree.map(lambda g: vary(jnp.zeros((shards, *g.shape), g.dtype)), given)

    def body(carry, step):
        state, gifts = carry
        source = (index - step) % shards
        pick = lambda x: jax.lax.dynamic_index_in_dim(x, source, 0, keepdims=False)  # noqa: E731
        state, given = other(state, source, jax.tree.map(pick, everything))
        return (state, put(gifts, given, source)), None

    start = (state, put(gifts, given, index))
    (state, gifts), _ = jax.lax.scan(body, start, jnp.arange(1, shards))
    return state, jax.tree.map(lambda g: scatter_sum(g, SEQUENCE)[0], gifts)
