"""Weights as a step holds them: converted once, before they travel to where they are used.

A matrix is converted where it is used, so it may as well be before: half the bytes with BF16, a
quarter with FP8, and the same numbers. Not converted are gains, biases and the router.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from model.recipe import Recipe
from pallas_kernels.fp8 import E4M3, TILE, block_scale, with_block_scale
from sharding.blocks import in_blocks, scale_names, scale_shape
from sharding.context import sequence_shards
from sharding.held import Held, is_held
from sharding.partition import Names, active_layout

Tree = Any
PARTS = ("embed", "head", "dense_layers", "moe_layers", "mtp")
"""Parts of a model that read copies; what reads images does not."""
BIASES = (("heads", "head_dim"), ("kv_heads", "head_dim"))
"""Axes of what is added to the heads of queries, keys and values."""


def hold(w: jax.Array, names: Names, recipe: Recipe) -> Any:
    """A weight as a step holds it, under the active layout: itself, or a copy of smaller type."""
    dtype = held_type(w, names, recipe)
    if is_quantized(w, names, recipe):
        return Held(*in_blocks(block_scale, with_block_scale, w, names, active_layout(), TILE))
    return w if dtype == w.dtype else Held(w.astype(dtype))


def shape_of_held(w: Any, names: Names, recipe: Recipe) -> Any:
    """ShapeDtypeStructs of what `hold` gives."""
    dtype = held_type(w, names, recipe)
    if dtype == w.dtype:
        return w
    value, scale = jax.ShapeDtypeStruct(w.shape, dtype), None
    if is_quantized(w, names, recipe):
        shape = scale_shape(w.shape, names, active_layout(), TILE)
        scale = jax.ShapeDtypeStruct(shape, jnp.float32)
    return Held(value, scale)


def held_type(w: Any, names: Names, recipe: Recipe) -> Any:
    """The type in which a step holds a weight.

    Embedding and head are in no FP8 product. Ring attention multiplies by W_UKV itself, in BF16;
    what has the axes of that stays as it is then, and is quantised where it is used.
    """
    own = tuple(name for name in names if name != "layers")
    if len(own) < 2 or "router" in own or own in BIASES:
        return w.dtype
    if not recipe.fp8 or "vocab" in own:
        return recipe.activation_dtype
    return w.dtype if "latent" in own and sequence_shards() > 1 else jnp.dtype(E4M3)


def is_quantized(w: Any, names: Names, recipe: Recipe) -> bool:
    """Whether a step holds a weight in FP8."""
    return held_type(w, names, recipe) == E4M3


def hold_all(
    params: Tree,
    axes: Tree,
    recipe: Recipe,
    is_copied: Callable[[Any, Names], bool] = lambda *_: True,
    how: Callable[[Any, Names, Recipe], Any] = hold,
) -> tuple[Tree, Tree]:
    """All weights as a step holds them, and the logical axes of what that is.

    `is_copied(w, names)` says of which weights there is to be a copy; `how` may be `shape_of_held`.
    """

    def one(w: Any, names: Names) -> Any:
        return how(w, names, recipe) if is_copied(w, names) else w

    def part(name: str) -> Tree:
        reads_copies = name in PARTS
        return jax.tree.map(one, params[name], axes[name]) if reads_copies else params[name]

    held = {name: part(name) for name in params}
    return held, axes_of_held(held, axes)


def axes_of_held(held: Tree, axes: Tree) -> Tree:
    """Logical axes of held weights, scales included, of those of the weights."""

    def name(x: Any, names: Names) -> Any:
        if not is_held(x):
            return names
        return Held(names, None if x.scale is None else scale_names(names, active_layout()))

    return jax.tree.map(name, held, axes, is_leaf=is_held)
