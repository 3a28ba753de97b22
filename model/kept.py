"""What a MoE layer's forward pass leaves for its backward pass, by shape and logical axes.

Read from a trace of the layer with its derivative, on shapes alone. So whatever `recipe.remat`, a
kernel or a `keep` decides is counted, and nothing of it is written down twice. The experts are
traced where all of them are on one device: with recomputation their exchange leaves nothing.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.blueprint import bind_part, blueprint
from model.config import ModelConfig
from model.recipe import Recipe
from model.transformer import Tokens
from pallas_kernels.mosaic import Backend
from sharding.devices import num_devices
from sharding.partition import Layout, use_layout
from sharding.sizes import activation_shards

STACK = "moe_layers"
STAND_INS: dict[Backend, Backend] = {"cudnn": "portable", "library": "mosaic"}
"""Attention that is traced in place of one that needs a GPU or an extra package, and keeps as
much: cuDNN's the output alone, the library's sums of its rows too, two where ours has one."""


class Kept(NamedTuple):
    """One array, of one sequence."""

    shape: tuple[int, ...]
    """Without the batch."""
    dtype: np.dtype
    axes: tuple[str, ...]
    """Logical axes that cut it: `stream` or `seq`, and `heads`. None: it is one device's part."""

    def device_bytes(self, layout: Layout, rows: int) -> int:
        """Bytes on a device that holds its part of `rows` sequences."""
        size = rows * math.prod(self.shape) * self.dtype.itemsize
        return -(-size // activation_shards(layout, *self.axes))


def kept_by_layer(
    config: ModelConfig, recipe: Recipe, seq_len: int, layout: Layout, stack: str = STACK
) -> tuple[Kept, ...]:
    """Arrays that one layer of a stack (`dense_layers` or `moe_layers`) keeps for each sequence:
    its input, and what the recipe does not recompute. Weights are not counted.

    `layout` is the smallest one that takes the same ways: a mesh of two replicas, with `context`
    where sequences are cut; without recomputation one with the experts where they are.
    """
    stand_in = STAND_INS.get(recipe.kernels.attention)
    if stand_in is not None:
        kernels = recipe.kernels._replace(attention=stand_in)
        recipe = dataclasses.replace(recipe, kernels=kernels)
    return _traced(config, recipe, seq_len, layout, stack)


@functools.cache
def _traced(config: ModelConfig, recipe: Recipe, seq_len: int, layout: Layout, stack: str):
    plan, rows = blueprint(config), activation_shards(layout, "batch")
    one = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    weights, bias = one(plan.params[stack]), one(plan.router_bias.get(stack, {}))
    ids = jax.ShapeDtypeStruct((rows, seq_len), jnp.int32)
    x = jax.ShapeDtypeStruct((rows, seq_len, config.hidden_size), recipe.activation_dtype)

    def residuals(weights, bias, x_BTD, ids_BT, positions_BT):
        def block(weights, x_BTD):
            module: Any = bind_part(config, stack, weights, bias)
            return module(x_BTD, Tokens(ids_BT, positions_BT, None), recipe)

        return jax.vjp(recipe.rematerialize(block), weights, x_BTD, has_aux=True)[1]

    bind_part(config, stack, weights, bias)  # flax asks for axes outside of any layout
    with use_layout(layout):
        jaxpr = jax.make_jaxpr(residuals)(weights, bias, x, ids, ids).jaxpr
    left = jaxpr.outvars
    shapes: Any = {id(var): var.aval for var in left if hasattr(var, "aval")}.values()
    of_rows = (a for a in shapes if a.ndim > 1 and a.shape[0] == rows and seq_len in a.shape[1:])
    found = [Kept(a.shape[1:], a.dtype, _axes(a, config, seq_len)) for a in of_rows]
    if recipe.remat == "none":
        found += _of_regions(jaxpr, rows, seq_len, layout)
    own_input = Kept(x.shape[1:], np.dtype(x.dtype), ("stream",))
    return tuple(found if own_input in found else [own_input, *found])


def _of_regions(jaxpr: Any, rows: int, seq_len: int, layout: Layout) -> list[Kept]:
    """What a layer without recomputation keeps besides arrays of tokens: rows of the exchange, and
    weights converted for it; a device has its part of each."""
    given = {id(var) for var in jaxpr.invars}
    parts = num_devices(layout)
    found = {id(v): v.aval for v in jaxpr.outvars if hasattr(v, "aval") and id(v) not in given}
    return [
        Kept((math.prod(a.shape) // parts,), a.dtype, ())
        for a in found.values()
        if a.ndim > 1 and not (a.shape[0] == rows and seq_len in a.shape[1:])
    ]


def _axes(array: Any, config: ModelConfig, seq_len: int) -> tuple[str, ...]:
    """Logical axes of a residual [B, ...], by its sizes: tokens, and heads beside them."""
    sizes = array.shape[1:]
    others = sizes[: sizes.index(seq_len)] + sizes[sizes.index(seq_len) + 1 :]
    if config.num_heads in others[:-1] or (len(others) == 1 and others[0] == config.num_heads):
        return ("seq", "heads")
    is_stream = len(sizes) == 2 and jnp.issubdtype(array.dtype, jnp.floating)
    return ("stream",) if is_stream and array.dtype != jnp.float32 else ("seq",)
