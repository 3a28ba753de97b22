"""The model as pure data: shapes, logical axes, initial values, and binding weights to code.

NNX lives at this edge. Everything downstream (optimizer, checkpoints, shardings, the train step)
works on nested dicts of arrays, whose paths are the modules' attribute names.
"""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from model.config import ModelConfig
from model.layers import RouterBias
from model.transformer import DeepSeekV3

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """Everything about a model except its numbers."""

    graph: nnx.GraphDef
    """Structure and configuration of the modules."""
    params: Tree
    """ShapeDtypeStruct of every learned weight."""
    params_axes: Tree
    """Logical axes of every learned weight."""
    router_bias: Tree
    """ShapeDtypeStruct of every router bias."""
    router_bias_axes: Tree
    """Logical axes of every router bias."""


def _split(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    graph, params, bias = nnx.split(model, nnx.Param, RouterBias)
    return graph, params, bias


@functools.cache
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    return _split(nnx.eval_shape(lambda: config.module()(config, nnx.Rngs(0))))


def _axes(state: nnx.State) -> Tree:
    def axes(variable: nnx.Variable):
        return variable.replace(variable.get_metadata()["out_sharding"])

    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return nnx.to_pure_dict(jax.tree.map(axes, state, is_leaf=is_variable))


@functools.cache
def blueprint(config: ModelConfig) -> Blueprint:
    """Shapes and axes of a model without allocating it; 671B take a fraction of a second."""
    graph, params, bias = _abstract(config)
    return Blueprint(
        graph, nnx.to_pure_dict(params), _axes(params), nnx.to_pure_dict(bias), _axes(bias)
    )


def initialize(config: ModelConfig, key: jax.Array) -> tuple[Tree, Tree]:
    """Fresh parameters and router biases as nested dicts; jit it with shardings to place them."""
    _, params, bias = _split(config.module()(config, nnx.Rngs(params=key)))
    return nnx.to_pure_dict(params), nnx.to_pure_dict(bias)


def bind(config: ModelConfig, params: Tree, router_bias: Tree) -> DeepSeekV3:
    """The model with these weights: a callable module."""
    graph, params_state, bias_state = _abstract(config)
    return nnx.merge(graph, _fill(params_state, params), _fill(bias_state, router_bias))


def bind_around(config: ModelConfig, params: Tree, router_bias: Tree) -> DeepSeekV3:
    """The model around its stack, for `dense` and `after` with what each of them needs."""
    graph, params_state, bias_state = _abstract_around(config)
    return nnx.merge(graph, _fill(params_state, params), _fill(bias_state, router_bias))


@functools.cache
def _abstract_around(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    return _split(nnx.eval_shape(lambda: config.module()(config, nnx.Rngs(0), layers=False)))


def bind_part(config: ModelConfig, name: str, params: Tree, router_bias: Tree) -> nnx.Module:
    """One attribute of the model with these weights.

    For `dense_layers`, `moe_layers` and `mtp`, the weights of a single layer, without the leading
    axis, give a single layer.
    """
    graph, params_state, bias_state = _abstract_part(config, name)
    return nnx.merge(graph, _fill(params_state, params), _fill(bias_state, router_bias))


def prepare_parts(config: ModelConfig, *more: str) -> None:
    """Make what `bind_around`, and `bind_part` of stack, embedding and `more` parts need, ahead of
    a region.

    Inside of one, flax would look for the logical axes on the region's mesh.
    """
    _abstract_around(config)
    for name in (config.stack, "embed", *more):
        _abstract_part(config, name)


@functools.cache
def _abstract_part(config: ModelConfig, name: str):
    return _split(getattr(nnx.merge(*_abstract(config)), name))


def _fill(state: nnx.State, values: Tree) -> nnx.State:
    filled = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(filled, values)
    return filled
