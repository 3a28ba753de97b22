"""Weights as a step holds them: in the type of its products, with a stand-in for their gradients.

A gradient has the type of what it is of, so that of a copy in bf16 or FP8 would be rounded before
micro batches and devices are added up. A copy therefore has none: an array of fp32 zeros that no
forward pass reads stands for the weight, and products say what its gradient is. XLA never makes the
zeros.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


@partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Held:
    """A copy of a weight; also its logical axes, its gradient, and whatever else belongs to it."""

    value: Any
    """In bf16, or E4M3 with `scale`."""
    scale: Any = None
    """fp32, one per block of 128 x 128 of what a device computes with."""
    stand_in: Any = None
    """fp32 zeros where derivatives are taken."""


def is_held(x: Any) -> bool:
    """Whether a node of a tree is a copy."""
    return isinstance(x, Held)


def with_stand_ins(weights: Tree) -> Tree:
    """The weights, to be differentiated."""

    def add(x: Any) -> Any:
        if not is_held(x):
            return x
        return Held(x.value, x.scale, jnp.zeros(x.value.shape, jnp.float32))

    return jax.tree.map(add, weights, is_leaf=is_held)


def gradients_of(cotangents: Tree) -> Tree:
    """Gradients of weights, of those of `with_stand_ins`: a copy's in the place of its value."""
    return jax.tree.map(
        lambda x: Held(x.stand_in) if is_held(x) else x, cotangents, is_leaf=is_held
    )


def values_of(tree: Tree) -> Tree:
    """What belongs to every weight alone: a copy's value, without its scales."""
    return jax.tree.map(lambda x: x.value if is_held(x) else x, tree, is_leaf=is_held)


def without_scales(tree: Tree) -> Tree:
    """The same structure as gradients have."""
    return jax.tree.map(lambda x: Held(x.value) if is_held(x) else x, tree, is_leaf=is_held)


def master(w: Any) -> jax.Array:
    """A weight in fp32, and its gradient too; XLA joins the cast with what casts it back."""
    if not is_held(w):
        return w
    return w.value.astype(jnp.float32) if w.stand_in is None else _master(w.value, w.stand_in)


@jax.custom_vjp
def _master(value: jax.Array, stand_in: jax.Array) -> jax.Array:
    return value.astype(stand_in.dtype)


_master.defvjp(lambda value, stand_in: (_master(value, stand_in), None), lambda _, dw: (None, dw))
