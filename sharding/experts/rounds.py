"""A sum over rows, so many at a time as there is room for, in as many rounds as it takes.

Buffers have room for what usually comes; what does not fit takes further rounds, a run-time number,
so that nothing is lost and memory does not grow with the worst case. The first round, nearly always
the only one, is plain: it can overlap other work, and the backward pass finds what it kept. Further
rounds have half the room, since most of them have little to do. They are in a loop, and keep
nothing: the backward pass computes each again.

Inside a further round, other sums in rounds are loops from their first round on, of half the room,
too. So the program holds the body once per level and once more, not twice for each, and what a
further round needs besides the sums so far is half of what the first one needed.
"""

import contextvars
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from sharding.experts.room import MULTIPLE
from sharding.partition import bound, vary


class Span(NamedTuple):
    """Rows of a round, by their number: `rows` of them from `start` on."""

    start: Array | int
    rows: int


Round = Callable[[Span, Any, Any], tuple[Array, "Count"]]
"""(span, floats, ints) to its part of the sum and what was counted. `floats` and `ints` are trees,
derivatives those of `floats`."""


class Count(NamedTuple):
    """What a device reports of its share of the experts' work, int32."""

    computed: Array
    """Choices computed."""
    further: Array
    """Rounds beyond the first."""


_repeated: contextvars.ContextVar[bool] = contextvars.ContextVar("repeated", default=False)


class Static(NamedTuple):
    """Static facts of the rounds."""

    one_round: Round
    room: int
    like: jax.ShapeDtypeStruct
    """The sum."""
    whole: bool
    """Whether all rounds are in the loop."""
    within: Callable[..., Any]
    """within(fn, *args): fn in the layout and region of the call; derivatives are traced later."""

    @property
    def further(self) -> int:
        """Room of a round in the loop."""
        return min(self.room, -(-self.room // (2 * MULTIPLE)) * MULTIPLE)

    def span(self, i: Array) -> Span:
        """Rows of round i of the loop; those of the first are before, unless `whole`."""
        before = 0 if self.whole else self.room
        return Span(before + i * self.further, self.further)

    def rounds(self, needed: Array) -> Array:
        """Rounds of the loop for so many rows."""
        before = 0 if self.whole else self.room
        return (jnp.maximum(needed - before, 0) + self.further - 1) // self.further


def in_rounds(
    one_round: Round, floats: Any, ints: Any, needed: Array, room: int, like: jax.ShapeDtypeStruct
) -> tuple[Array, Count]:
    """Sum over `needed` rows with room for `room` at a time, and its gradient.

    Where there is more than one round, sums over them are fp32, whatever the types of the sum and
    of `floats`. Rounds that talk to other devices need the same number of rows on each of them.
    """
    within = bound(lambda fn, *args: fn(*args))
    static = Static(_varying(one_round), room, like, _repeated.get(), within)
    rounds = static.rounds(needed)
    total: Any = _in_rounds(static, floats, ints, rounds)
    y, count = total
    return y, count._replace(further=count.further + vary(rounds))


def _varying(one_round: Round) -> Round:
    """The same, with results that count as different on all devices."""

    def call(span, floats, ints):
        y, count = one_round(span, floats, ints)
        return vary(y), jax.tree.map(lambda n: vary(jnp.int32(n)), count)

    return call


def _again(fn: Callable) -> Callable:
    """`fn` inside of a loop over rounds."""

    def call(*args):
        token = _repeated.set(True)
        try:
            return fn(*args)
        finally:
            _repeated.reset(token)

    return call


def _loop(fn: Callable[[Array], Any], rounds: Array, total: Any) -> Any:
    """`total`, of fp32 and int32, plus fn(i) for all rounds i of the loop."""

    def step(carry):
        i, total = carry
        return i + 1, jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, fn(i))

    return lax.while_loop(lambda carry: carry[0] < rounds, step, (jnp.int32(0), total))[1]


def _and_further(fn: Callable[[Array], Any], rounds: Array, first: Any, like: Any) -> Any:
    """`first` plus fn(i) for the rounds of the loop, in the types of `like`.

    Where there are none, nothing is converted.
    """

    def typed(total):
        return jax.tree.map(lambda a, b: a.astype(b.dtype), total, like)

    def add(first):
        return typed(_loop(fn, rounds, jax.tree.map(_in_fp32, first)))

    return lax.cond(rounds > 0, add, typed, first)


def _in_fp32(x: Array) -> Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _zeros(like: Any) -> Any:
    return jax.tree.map(lambda x: vary(jnp.zeros(x.shape, jnp.float32)), like)


def _sum(static: Static, floats, ints, rounds: Array) -> tuple[Array, Count]:
    first = None if static.whole else static.one_round(Span(0, static.room), floats, ints)
    return _further(static, floats, ints, rounds, first)


def _further(static: Static, floats, ints, rounds: Array, first) -> tuple[Array, Count]:
    """The sum of the rounds in the loop, and of the first, unless it is None."""

    def again(i):
        return _again(static.one_round)(static.span(i), floats, ints)

    zero = vary(jnp.int32(0))
    if first is not None:
        return _and_further(again, rounds, first, (static.like, Count(zero, zero)))
    y, count = _loop(again, rounds, (_zeros(static.like), Count(zero, zero)))
    return y.astype(static.like.dtype), count


def _kept_sum(static: Static, floats, ints, rounds: Array):
    """The sum, and what its gradient wants of the first round."""
    if static.whole:
        return _sum(static, floats, ints, rounds), None

    def first(floats):
        return static.one_round(Span(0, static.room), floats, ints)

    y, vjp, count = jax.vjp(first, floats, has_aux=True)
    return _further(static, floats, ints, rounds, (y, count)), (jnp.zeros((), y.dtype), vjp)


def _gradient(static: Static, kept, floats, ints, rounds: Array, dy: Array):
    """Of `floats`; the first round's by what was kept of it, unless that is None."""

    def again(i):
        def gradient(floats):
            y, vjp = jax.vjp(lambda x: static.one_round(static.span(i), x, ints)[0], floats)
            return jax.tree.map(vary, vjp(dy.astype(y.dtype))[0])

        return _again(gradient)(floats)

    if kept is not None:
        typed, vjp = kept
        first = jax.tree.map(vary, vjp(dy.astype(typed.dtype))[0])
        return _and_further(again, rounds, first, floats)
    total = _loop(again, rounds, _zeros(floats))
    return jax.tree.map(lambda g, x: g.astype(x.dtype), total, floats)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_rounds(static: Static, floats, ints, rounds: Array):
    return static.within(_sum, static, floats, ints, rounds)


def _in_rounds_fwd(static: Static, floats, ints, rounds: Array):
    total, kept = static.within(_kept_sum, static, floats, ints, rounds)
    return total, (kept, floats, ints, rounds)


def _in_rounds_bwd(static: Static, saved, cotangents):
    return static.within(_gradient, static, *saved, cotangents[0]), None, None


_in_rounds.defvjp(_in_rounds_fwd, _in_rounds_bwd)
