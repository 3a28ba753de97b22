"""Causal attention over sequences that are cut over devices (sharding/context.py).

What a device sends to the others is what a cache would hold: of latent attention one latent and one
rotary key per token, never the keys and values of its heads, which are expanded where they are
read; of grouped attention the keys and values that a group of heads shares. Per visited shard a
device computes two blocks of one chunk of queries against one chunk of keys, and three for its own:
nothing of the other half of the square is computed, and all devices do the same work.

Blocks are combined by online softmax (Milakov and Gimelshein 2018); the backward pass recomputes
the probabilities of each block from the log-sum-exp (FlashAttention 2, algorithm 2), walking over
the shards a second time (Ring Attention, Liu et al. 2023).

Letters: B batch, T tokens of this device, P = 2 chunks of this device (earlier, later), Q query and
S key positions of a chunk, N heads, H query/key channels, V value channels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from model.recipe import KEPT, keep
from pallas_kernels.attention import Stash, through
from sharding.context import over_sources, sequence_shards
from sharding.partition import Names, on_shards, shard_index, sum_over, vary

QUERY_ROWS = 256
"""Most queries of a block whose logits exist at a time."""
OWN_BLOCKS = ((0, 0, True), (1, 1, True), (1, 0, False))
"""Blocks of the own keys: chunk of queries, chunk of keys, whether it lies on the diagonal."""

_TOKENS = ("batch", "seq")
_HEADS, _STATISTIC = ("batch", "seq", "heads", "head_dim"), ("batch", "seq", "heads")

Arrays = tuple[jax.Array, ...]


class Form(Protocol):
    """A kind of attention; hashable. `sent` is what travels, `weights` what expands it."""

    @property
    def scale(self) -> float:
        """Factor on the logits."""
        ...

    @property
    def stash(self) -> Stash:
        """Type that outputs are held in for the backward pass."""
        ...

    @property
    def sent_names(self) -> tuple[Names, ...]:
        """Logical axes of what travels."""
        ...

    @property
    def weight_names(self) -> tuple[Names, ...]:
        """Logical axes of the weights."""
        ...

    def width(self, sent: Arrays, weights: Arrays) -> int:
        """Channels of a value."""
        ...

    def expand(self, here: int, sent: Arrays, weights: Arrays) -> tuple[jax.Array, jax.Array]:
        """Keys [B, S, N, H] and values [B, S, N, V] of a device's `here` heads."""
        ...

    def pull(
        self, here: int, sent: Arrays, weights: Arrays, dk: jax.Array, dv: jax.Array, /
    ) -> tuple[Arrays, Arrays]:
        """fp32 gradients of `expand` for `sent` and `weights`, of those of keys and values.

        What is added up afterwards, over heads, tokens and devices, is not rounded before.
        """
        ...

    def summed(self, gradient: jax.Array, /) -> jax.Array:
        """Gradient of what travels, over the devices that hold it for other heads too."""
        ...


class Queries(NamedTuple):
    """A device's queries and what belongs to each of them, [B, P, Q, ...] or a part of them."""

    q: jax.Array
    """[..., N, H]."""
    segments: jax.Array | None
    """Document of each."""
    rest: Any
    """Forward: output, maximum and sum so far. Backward: do, log-sum-exp, sum(do * o)."""


class Keys(NamedTuple):
    """Keys and values of one shard's tokens [B, P, S, N, H] and [B, P, S, N, V]."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array | None


def context_attention(
    q_BTNH: jax.Array,
    sent: Arrays,
    weights: Arrays,
    segments_BT: jax.Array | None,
    form: Form,
) -> jax.Array:
    """softmax(q k^T * scale) v [B, T, N, V] of tokens in balanced order, T cut over devices.

    `form` makes k and v of `sent` [B, T, ...] and `weights`. Keys of other segments are not seen.
    fp32 softmax. Weights may be fp32: products read them in the type of `q`, their gradient is
    fp32. The gradient must be taken under the same layout.
    """
    return _attention(q_BTNH, sent, weights, segments_BT, form, sequence_shards())


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q_BTNH, sent, weights, segments_BT, form: Form, shards: int) -> jax.Array:
    return _forward(q_BTNH, sent, weights, segments_BT, form, shards)[0]


def _with_segments(arrays: tuple, names: tuple, segments_BT: jax.Array | None):
    """Arrays of a region with their logical axes; segments last, if there are any."""
    if segments_BT is None:
        return arrays, names
    return (*arrays, segments_BT), (*names, _TOKENS)


def _forward(q_BTNH, sent, weights, segments_BT, form: Form, shards: int):
    assert shards == sequence_shards()
    region = partial(_forward_on_shard, form=form, parts=(len(sent), len(weights)))
    types = tuple(jnp.zeros(0, w.dtype) for w in weights)
    weights = tuple(w.astype(q_BTNH.dtype) for w in weights)
    arrays, names = (q_BTNH, *sent, *weights), (_HEADS, *form.sent_names, *form.weight_names)
    arrays, names = _with_segments(arrays, names, segments_BT)
    o_BTNV, lse_BTN = on_shards(region, names, (_HEADS, _STATISTIC))(*arrays)
    # With selective recomputation the walk over the shards is not repeated for these two.
    o_BTNV, lse_BTN = through(o_BTNV, form.stash, KEPT), keep(lse_BTN)
    return o_BTNV, (q_BTNH, sent, weights, segments_BT, o_BTNV, lse_BTN, types)


def _backward(form: Form, shards: int, saved, do_BTNV):
    assert shards == sequence_shards(), "differentiate inside of `use_layout`"
    q_BTNH, sent, weights, segments_BT, o_BTNV, lse_BTN, types = saved
    region = partial(_backward_on_shard, form=form, parts=(len(sent), len(weights)))
    arrays = (q_BTNH, o_BTNV, lse_BTN, do_BTNV, *sent, *weights)
    made = (*form.sent_names, *form.weight_names)
    names = (_HEADS, _HEADS, _STATISTIC, _HEADS, *made)
    arrays, names = _with_segments(arrays, names, segments_BT)
    dq_BTNH, *rest = on_shards(region, names, (_HEADS, *made))(*arrays)
    dweights = zip(rest[len(sent) :], types, strict=True)
    dweights = tuple(dw.astype(empty.dtype) for dw, empty in dweights)
    return dq_BTNH, tuple(rest[: len(sent)]), dweights, None


_attention.defvjp(_forward, _backward)


def _parted(arrays: Arrays, parts: tuple[int, int]) -> tuple[Arrays, Arrays, jax.Array | None]:
    """What travels, the weights, and the segments, if there are any."""
    sent, rest = arrays[: parts[0]], arrays[parts[0] :]
    return sent, rest[: parts[1]], rest[parts[1]] if len(rest) > parts[1] else None


def _forward_on_shard(q_BTNH, *arrays, form: Form, parts: tuple[int, int]):
    """Output [B, T, N, V] and log-sum-exp of the logits [B, T, N] of one device's queries."""
    sent, weights, segments_BT = _parted(arrays, parts)
    B, T, N, _ = q_BTNH.shape
    zeros_BTN = vary(jnp.zeros((B, T, N), jnp.float32))
    o_BTNV = vary(jnp.zeros((B, T, N, form.width(sent, weights)), jnp.float32))
    rest = (o_BTNV, zeros_BTN - jnp.inf, zeros_BTN)
    queries = jax.tree.map(_chunks, Queries(q_BTNH, segments_BT, rest))

    def read(running, blocks, there):
        sent, segments_BS = there
        keys = jax.tree.map(_chunks, Keys(*form.expand(N, sent, weights), segments_BS))
        for a, b, diagonal in blocks:
            mine, part = queries._replace(rest=running), _chunk(keys, b)
            rows = partial(_attend, keys=part, diagonal=diagonal, scale=form.scale)
            _, new = _by_rows(lambda start, x, _, f=rows: ((), f(start, x)), (), _chunk(mine, a))
            running = _put_chunk(running, new, a)
        return running, ()

    running, _ = over_sources(
        lambda own: read(queries.rest, OWN_BLOCKS, own),
        lambda running, source, there: read(running, _blocks_of(source), there),
        (sent, segments_BT),
    )
    o_BPQNV, max_BPQN, sum_BPQN = running
    o_BTNV = (o_BPQNV / sum_BPQN[..., None]).reshape(o_BTNV.shape).astype(q_BTNH.dtype)
    return o_BTNV, (max_BPQN + jnp.log(sum_BPQN)).reshape(B, T, N)


def _backward_on_shard(
    q_BTNH, o_BTNV, lse_BTN, do_BTNV, *arrays, form: Form, parts: tuple[int, int]
):
    """Gradients with respect to q, what travels and weights, the last summed over devices."""
    sent, weights, segments_BT = _parted(arrays, parts)
    N = q_BTNH.shape[2]
    delta_BTN = jnp.einsum("BTNV,BTNV->BTN", do_BTNV, o_BTNV, preferred_element_type=jnp.float32)
    rest = (do_BTNV, lse_BTN, delta_BTN)
    queries = jax.tree.map(_chunks, Queries(q_BTNH, segments_BT, rest))

    def read(state, blocks, there):
        dq_BPQNH, dweights = state
        sent, segments_BS = there

        keys = jax.tree.map(_chunks, Keys(*form.expand(N, sent, weights), segments_BS))
        dkv = jax.tree.map(lambda x: vary(jnp.zeros(x.shape, jnp.float32)), (keys.k, keys.v))
        for a, b, diagonal in blocks:
            part = _chunk(keys, b)
            rows = partial(_differentiate, keys=part, diagonal=diagonal, scale=form.scale)
            dkv_b, dq = _by_rows(rows, _chunk(dkv, b), _chunk(queries, a))
            dkv = _put_chunk(dkv, dkv_b, b)
            dq_BPQNH = _put_chunk(dq_BPQNH, _chunk(dq_BPQNH, a) + dq, a)
        dsent, dw = form.pull(N, sent, weights, *(_joined(g) for g in dkv))
        return (dq_BPQNH, jax.tree.map(jnp.add, dweights, dw)), dsent

    zero = lambda x: vary(jnp.zeros(x.shape, jnp.float32))  # noqa: E731
    (dq_BPQNH, dweights), dsent = over_sources(
        lambda own: read((zero(queries.q), jax.tree.map(zero, weights)), OWN_BLOCKS, own),
        lambda state, source, there: read(state, _blocks_of(source), there),
        (sent, segments_BT),
    )
    # dc[B, T_cp, L]{U_tp} -> AllReduce_tp ; dw[C, N_tp, H]{U_batch,cp} -> AllReduce
    dsent = [form.summed(g.astype(x.dtype)) for g, x in zip(dsent, sent, strict=True)]
    dweights = [sum_over(g, "batch", "seq") for g in dweights]
    return dq_BPQNH.reshape(q_BTNH.shape).astype(q_BTNH.dtype), *dsent, *dweights


def _blocks_of(source: jax.Array):
    """Blocks of another shard's keys, as in OWN_BLOCKS; the same number whichever shard it is.

    This device's later chunk sees the earlier chunk of every other shard. Besides, of a shard
    before it, its earlier chunk sees the earlier one; of a shard behind, its later chunk the later.
    """
    behind = (source > shard_index("seq")).astype(jnp.int32)
    return ((1, 0, False), (behind, behind, False))


def _logits(start, mine: Queries, keys: Keys, diagonal: bool, scale: float) -> jax.Array:
    """Scaled logits [B, N, Q, S], fp32, -inf where nothing is seen; query 0 is number `start`."""
    logits_BNQS = scale * jnp.einsum(
        "BQNH,BSNH->BNQS", mine.q, keys.k, preferred_element_type=jnp.float32
    )
    if diagonal:
        Q, S = logits_BNQS.shape[-2:]
        seen_QS = start + jnp.arange(Q)[:, None] >= jnp.arange(S)
        logits_BNQS = jnp.where(seen_QS, logits_BNQS, -jnp.inf)
    if mine.segments is not None and keys.segments is not None:
        same_BQS = mine.segments[:, :, None] == keys.segments[:, None]
        logits_BNQS = jnp.where(same_BQS[:, None], logits_BNQS, -jnp.inf)
    return logits_BNQS


def _attend(start, mine: Queries, *, keys: Keys, diagonal: bool, scale: float):
    """Output, maximum and sum of rows of queries after they saw one more chunk of keys.

    The diagonal comes first: it shows every query itself, so that no maximum stays at -inf.
    """
    o_BQNV, max_BQN, sum_BQN = mine.rest
    logits_BNQS = _logits(start, mine, keys, diagonal, scale)
    new_BQN = jnp.maximum(max_BQN, logits_BNQS.max(-1).swapaxes(1, 2))
    p_BNQS = jnp.exp(logits_BNQS - new_BQN.swapaxes(1, 2)[..., None])
    kept_BQN = jnp.exp(max_BQN - new_BQN)
    more_BQNV = jnp.einsum(
        "BNQS,BSNV->BQNV", p_BNQS.astype(keys.v.dtype), keys.v, preferred_element_type=jnp.float32
    )
    sum_BQN = sum_BQN * kept_BQN + p_BNQS.sum(-1).swapaxes(1, 2)
    return o_BQNV * kept_BQN[..., None] + more_BQNV, new_BQN, sum_BQN


def _differentiate(start, mine: Queries, dkv, *, keys: Keys, diagonal: bool, scale: float):
    """(dk, dv) with what rows of queries add to them, and these rows' dq; fp32."""
    do_BQNV, lse_BQN, delta_BQN = mine.rest
    dk_BSNH, dv_BSNV = dkv
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits_BNQS = _logits(start, mine, keys, diagonal, scale)
    p_BNQS = jnp.exp(logits_BNQS - lse_BQN.swapaxes(1, 2)[..., None])
    dp_BNQS = product("BQNV,BSNV->BNQS", do_BQNV, keys.v)
    ds_BNQS = scale * p_BNQS * (dp_BNQS - delta_BQN.swapaxes(1, 2)[..., None])
    p_BNQS, ds_BNQS = p_BNQS.astype(keys.v.dtype), ds_BNQS.astype(keys.k.dtype)
    dk_BSNH = dk_BSNH + product("BNQS,BQNH->BSNH", ds_BNQS, mine.q)
    dv_BSNV = dv_BSNV + product("BNQS,BQNV->BSNV", p_BNQS, do_BQNV)
    return (dk_BSNH, dv_BSNV), product("BNQS,BSNH->BQNH", ds_BNQS, keys.k)


def _chunks(x: jax.Array) -> jax.Array:
    """[B, T, ...] -> [B, P, Q, ...]."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:])


def _joined(x: jax.Array) -> jax.Array:
    """[B, P, Q, ...] -> [B, T, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _chunk(tree: Any, which: jax.Array | int) -> Any:
    """[B, P, Q, ...] -> [B, Q, ...] of one chunk."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, which, 1, keepdims=False), tree)


def _put_chunk(tree: Any, new: Any, which: jax.Array | int) -> Any:
    """[B, P, Q, ...] with one chunk replaced."""
    put = lambda x, n: jax.lax.dynamic_update_index_in_dim(x, n, which, 1)  # noqa: E731
    return jax.tree.map(put, tree, new)


def _by_rows(fn: Callable, carry: Any, arrays: Any) -> tuple[Any, Any]:
    """`carry, out = fn(first row, rows of the arrays, carry)`, some rows of [B, Q, ...] at a time.

    The outputs come back as [B, Q, ...].
    """
    B, Q = jax.tree.leaves(arrays)[0].shape[:2]
    rows = max(n for n in range(1, min(Q, QUERY_ROWS) + 1) if Q % n == 0)
    if rows == Q:
        return fn(0, arrays, carry)
    cut = lambda x: x.reshape(B, Q // rows, rows, *x.shape[2:]).swapaxes(0, 1)  # noqa: E731
    join = lambda x: x.swapaxes(0, 1).reshape(B, Q, *x.shape[3:])  # noqa: E731

    def body(carry, x):
        return fn(*x, carry)

    xs = (jnp.arange(Q // rows) * rows, jax.tree.map(cut, arrays))
    carry, out = jax.lax.scan(body, carry, xs)
    return carry, jax.tree.map(join, out)
