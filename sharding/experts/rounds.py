"""A sum over as many rounds as it takes: a run-time number, each round of bounded size.

Buffers have room for what usually comes; what does not fit takes another round, so that nothing is
lost and memory does not grow with the worst case. The first round, nearly always the only one, is
plain: it can overlap other work, and the backward pass finds what it kept. Further rounds are in a
loop, and keep nothing: the backward pass computes each again.

Inside a further round, other sums in rounds are loops from their first round on. So the program
holds the body once per level and once more, not twice for each.
"""

import contextvars
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from sharding.partition import bound, vary

Round = Callable[[Array | int, Any, Any], tuple[Array, "Count"]]
"""(number of the round, floats, ints) to its part of the sum and what it counted. `floats` and
`ints` are trees; derivatives are those of `floats`."""


class Count(NamedTuple):
    """What a device reports of its share of the experts' work, int32."""

    computed: Array
    """Choices computed."""
    further: Array
    """Rounds beyond the first."""


_repeated: contextvars.ContextVar[bool] = contextvars.ContextVar("repeated", default=False)


def in_rounds(
    one_round: Round, floats: Any, ints: Any, rounds: Array, shape: tuple[int, ...]
) -> tuple[Array, Count]:
    """Sum of this shape over `rounds` rounds, at least one; and its gradient. Both are fp32 sums,
    in the type of a round's if there is but one.

    Rounds that talk to other devices need the same number on each of them.
    """
    static = Static(_varying(one_round), shape, _repeated.get(), bound(lambda fn, *args: fn(*args)))
    y, count = _in_rounds(static, floats, ints, rounds)
    return y, count._replace(further=count.further + vary(rounds) - 1)


def _varying(one_round: Round) -> Round:
    """The same, with results that count as different on all devices."""

    def call(i, floats, ints):
        y, count = one_round(i, floats, ints)
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


def _loop(fn: Callable[[Array], Any], start: int, rounds: Array, total: Any) -> Any:
    """`total`, of fp32 and int32, plus fn(i) for i from `start` on."""

    def step(carry):
        i, total = carry
        return i + 1, jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, fn(i))

    return lax.while_loop(lambda carry: carry[0] < rounds, step, (jnp.int32(start), total))[1]


def _and_further(fn: Callable[[Array], Any], rounds: Array, first: Any) -> Any:
    """`first`, of round 0, plus fn(i) for the rounds that follow. Nothing is converted for one."""

    def add(first):
        total = _loop(fn, 1, rounds, jax.tree.map(_in_fp32, first))
        return jax.tree.map(lambda a, b: a.astype(b.dtype), total, first)

    return lax.cond(rounds > 1, add, lambda first: first, first)


def _in_fp32(x: Array) -> Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


class Static(NamedTuple):
    """What does not change from run to run."""

    one_round: Round
    shape: tuple[int, ...]
    """Of the sum."""
    whole: bool
    """Whether the first round is in the loop, too."""
    within: Callable[..., Any]
    """within(fn, *args): fn in the layout and region of the call; derivatives are traced later."""


def _sum(static: Static, floats, ints, rounds: Array) -> tuple[Array, Count]:
    first = None if static.whole else static.one_round(0, floats, ints)
    return _further(static, floats, ints, rounds, first)


def _further(static: Static, floats, ints, rounds: Array, first) -> tuple[Array, Count]:
    """The sum of the rounds that follow the first, and of that, unless it is None."""

    def again(i):
        return _again(static.one_round)(i, floats, ints)

    if first is not None:
        return _and_further(again, rounds, first)
    zero = vary(jnp.int32(0))
    return _loop(again, 0, rounds, (vary(jnp.zeros(static.shape, jnp.float32)), Count(zero, zero)))


def _kept_sum(static: Static, floats, ints, rounds: Array):
    """The sum, and what its gradient wants of the first round."""
    if static.whole:
        return _sum(static, floats, ints, rounds), None
    y, vjp, count = jax.vjp(lambda x: static.one_round(0, x, ints), floats, has_aux=True)
    return _further(static, floats, ints, rounds, (y, count)), vjp


def _gradient(static: Static, vjp, floats, ints, rounds: Array, dy: Array):
    """Of `floats`; the first round's by `vjp`, unless it is None."""

    def again(i):
        def gradient(floats):
            y, vjp = jax.vjp(lambda x: static.one_round(i, x, ints)[0], floats)
            return jax.tree.map(vary, vjp(dy.astype(y.dtype))[0])

        return _again(gradient)(floats)

    if vjp is not None:
        return _and_further(again, rounds, jax.tree.map(vary, vjp(dy)[0]))
    zeros = jax.tree.map(lambda x: vary(jnp.zeros(x.shape, jnp.float32)), floats)
    total = _loop(again, 0, rounds, zeros)
    return jax.tree.map(lambda g, x: g.astype(x.dtype), total, floats)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_rounds(static: Static, floats, ints, rounds: Array):
    return static.within(_sum, static, floats, ints, rounds)


def _in_rounds_fwd(static: Static, floats, ints, rounds: Array):
    total, vjp = static.within(_kept_sum, static, floats, ints, rounds)
    return total, (vjp, floats, ints, rounds)


def _in_rounds_bwd(static: Static, saved, cotangents):
    return static.within(_gradient, static, *saved, cotangents[0]), None, None


_in_rounds.defvjp(_in_rounds_fwd, _in_rounds_bwd)
