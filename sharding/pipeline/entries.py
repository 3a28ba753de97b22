"""One entry of every array of a tree: read, written or added to at an index known at run time."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Tree = Any


def entry(tree: Tree, index: jax.Array) -> Tree:
    """x[index] of every array, without its first axis."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def put_entry(x: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    """x with x[index] = new."""
    return lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), index, 0)


def add_entry(tree: Tree, new: Tree, index: jax.Array) -> Tree:
    """Every x with x[index] += new."""
    return jax.tree.map(lambda x, n: put_entry(x, entry(x, index) + n, index), tree, new)


def add_entries(x: jax.Array, new: jax.Array, first: jax.Array) -> jax.Array:
    """x with x[first : first + len(new)] += new."""
    old = lax.dynamic_slice_in_dim(x, first, new.shape[0])
    return lax.dynamic_update_slice_in_dim(x, old + new, first, 0)


def zeros_like_shapes(shapes: Tree) -> Tree:
    """Arrays of zeros for a tree of shapes and types."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
