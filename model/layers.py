"""Building blocks: weight declaration, RMSNorm, SwiGLU, and stacks of equal layers.

Letters: B batch, T sequence, D hidden width, F inner width of an MLP, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.recipe import Recipe
from pallas_kernels.fp8 import Prepared, Quantized, fp8_linears
from pallas_kernels.mosaic import Backend
from sharding.blocks import scale_names
from sharding.held import is_held, values_of
from sharding.partition import Names, active_layout, as_cut, constrain, on_shards, sum_over

LATENT_EPS = 1e-6
"""Epsilon of the two latent norms in the released code, whatever the model's `norm_eps` says."""


class RouterBias(nnx.Variable):
    """Per-expert selection bias: no gradient, no optimizer, no decay (V3 report, section 2.1.2)."""


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
    """One weight: shape, logical axes, N(0, std). Master copies are fp32."""
    assert len(shape) == len(axes)
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def router_bias(num_experts: int) -> RouterBias:
    """Selection biases of one router, starting at 0; fp32."""
    return RouterBias(jnp.zeros(num_experts), out_sharding=("router",), eager_sharding=False)


@partial(jax.checkpoint, prevent_cse=False)
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last dimension, statistics in fp32, result in x's type."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm with a gain per channel."""

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size), out_sharding=("norm",), eager_sharding=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)


def project(
    equation: str, x: jax.Array, w: nnx.Param, recipe: Recipe, tokens: str = "seq"
) -> jax.Array:
    """Einsum of an activation [B, T, ..] with a weight, in the activation's type.

    The last axes of `x` meet the first of `w`. With FP8 the products are `fp8_linears`'s; `tokens`
    is the logical name of T then.
    """
    return project_all(x, ((equation, w),), recipe, tokens)[0]


def project_all(
    x: jax.Array,
    products: Sequence[tuple[str, nnx.Param]],
    recipe: Recipe,
    tokens: str = "seq",
) -> tuple[jax.Array, ...]:
    """`project` of one activation with several weights; FP8 quantises it once for all."""
    if recipe.fp8:
        x_axes, w_axes = products[0][0].split("->")[0].split(",")
        contracted = len(set(x_axes) & set(w_axes))
        weights = [w for _, w in products]
        return _fp8_on_shards(x, weights, contracted, tokens, recipe.kernels.linear)
    return tuple(_project(equation, x, *_in_type(w, x.dtype)) for equation, w in products)


def _in_type(w: nnx.Param, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """A weight as products read it, and the weight that their gradient in fp32 is of.

    A gradient has the type of what it is of: that of a copy in bf16 would be rounded to bf16 before
    micro batches and devices are added up. So the copy has none, and the master weight, which
    forward passes do not read, stands for it; or a stand-in, where a step holds copies.
    """
    held: Any = w.get_value()
    if is_held(held):
        names = _axes(w, held.value)
        value = jax.lax.stop_gradient(held.value)
        return constrain(value, *names), constrain(held.stand_in, *names)
    master = as_computed(w)
    if master.dtype == dtype:
        return jax.lax.stop_gradient(master), master
    value = jax.lax.stop_gradient(w[...]).astype(dtype)
    return constrain(value, *_axes(w, value)), master


def as_computed(w: nnx.Param) -> jax.Array:
    """A weight's value, laid out as it is computed with.

    Left to itself, XLA cuts the gradients of weights that are whole over `tensor` along it, and
    moves them twice more between devices.
    """
    value = w[...]
    return constrain(value, *_axes(w, value))


def _axes(w: nnx.Param, value: jax.Array) -> Names:
    """Logical axes of a weight's value, which may be one layer's part of a stack."""
    names = w.get_metadata("out_sharding")
    return as_cut(names[len(names) - value.ndim :], value.shape)


def _fp8_on_shards(
    x: jax.Array, weights: Sequence[nnx.Param], contracted: int, tokens: str, backend: Backend
) -> tuple[jax.Array, ...]:
    """x w over `contracted` axes in FP8; a device quantises its own part of x, w and dy.

    A scale spans 128 entries of what the device holds. Where a part is no multiple of 128 (widths
    cut by `tensor`, tokens by the batch axes), scales, not sums, differ from those of one device.
    """
    values: list[Any] = [w.get_value() for w in weights]
    names = [_axes(w, values_of(value)) for w, value in zip(weights, values, strict=True)]
    lead, inner = ("batch", tokens), names[0][:contracted]
    parts = [fp8_parts(*pair) for pair in zip(values, names, strict=True)]
    arrays, structure = jax.tree.flatten([arrays for arrays, _ in parts])

    def on_shard(x, *arrays):
        B, T = x.shape[:2]
        x_MK = x.reshape(B * T, -1)
        ws = [fp8_weight(part) for part in jax.tree.unflatten(structure, arrays)]
        shapes = [part[-1].shape[contracted:] for part in jax.tree.unflatten(structure, arrays)]
        flat = jax.tree.map(lambda w: w if w.ndim == 2 else w.reshape(x_MK.shape[1], -1), ws)
        ys = fp8_linears(x_MK, flat, backend=backend)
        cut = tuple(name for name in inner if name)
        return tuple(
            sum_over(y_MN.reshape(B, T, *shape), *cut)
            for y_MN, shape in zip(ys, shapes, strict=True)
        )

    outs = tuple((*lead, *axes[contracted:]) for axes in names)
    ins = (axes for _, of_weight in parts for axes in of_weight)
    return on_shards(on_shard, ((*lead, *inner), *ins), outs)(x, *arrays)


def fp8_parts(value: Any, names: Names) -> tuple[tuple[jax.Array, ...], tuple[Names, ...]]:
    """Arrays of a weight for FP8 products, and their axes; the last is what its gradient is of."""
    if not is_held(value):
        return (value,), (names,)
    stopped = map(jax.lax.stop_gradient, (value.value, value.scale))
    return (*stopped, value.stand_in), (names, scale_names(names, active_layout()), names)


def fp8_weight(parts: Sequence[jax.Array]) -> Any:
    """The weight that products take, of a device's parts of `fp8_parts`."""
    if len(parts) == 1:
        return parts[0]
    q, scale, stand_in = parts
    return Prepared(Quantized(q, scale), stand_in)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(equation: str, x: jax.Array, w: jax.Array, master: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, w)


def _project_fwd(equation: str, x: jax.Array, w: jax.Array, master: jax.Array):
    return _project(equation, x, w, master), (x, w, jnp.zeros(0, master.dtype))


def _project_bwd(equation: str, saved, dy: jax.Array):
    """The usual gradients, with x as the left operand of the weight's, of the master's type.

    One operand of that product is transposed first (its tokens must come last). Derived by JAX it
    is dy, and XLA:CPU merges the transposition with whatever computes dy, an activation function
    say, into one slow strided pass. x is at hand, and projections of the same x share the copy.
    """
    x, w, empty = saved
    inputs, out = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    dx = jnp.einsum(f"{out},{w_axes}->{x_axes}", dy, w)
    dw = jnp.einsum(f"{x_axes},{out}->{w_axes}", x, dy, preferred_element_type=jnp.float32)
    return dx, None, dw.astype(empty.dtype)


_project.defvjp(_project_fwd, _project_bwd)


@partial(jax.checkpoint, prevent_cse=False)
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up; the backward pass keeps the two and nothing in between."""
    return jax.nn.silu(gate) * up


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), without biases. Serves dense layers and shared experts."""

    def __init__(self, rngs: nnx.Rngs, size: int, inner: int, std: float):
        self.w_gate = weight(rngs, (size, inner), ("embed", "ffn"), std)
        self.w_up = weight(rngs, (size, inner), ("embed", "ffn"), std)
        self.w_down = weight(rngs, (inner, size), ("ffn", "embed"), std)

    def __call__(self, x_BTD: jax.Array, recipe: Recipe) -> jax.Array:
        x_BTD = from_stream(x_BTD)
        gate_and_up = (("BTD,DF->BTF", self.w_gate), ("BTD,DF->BTF", self.w_up))
        gate_BTF, up_BTF = project_all(x_BTD, gate_and_up, recipe)
        h_BTF = constrain(_gated(gate_BTF, up_BTF), "batch", "seq", "ffn")
        return to_stream(project("BTF,FD->BTD", h_BTF, self.w_down, recipe))


def from_stream(x_BTD: jax.Array) -> jax.Array:
    """What a projection to shards of heads or widths reads: all tokens of the sequence's part.

    With sequence parallelism x[B, T_tp, D] -> AllGather_tp -> x[B, T, D], else nothing. Backward
    dx[B, T, D]{U_tp} -> ReduceScatter_tp, else AllReduce_tp.
    """
    return constrain(x_BTD, "batch", "seq", None)


def to_stream(y_BTD: jax.Array) -> jax.Array:
    """What a projection from shards of heads or widths adds to the residual stream.

    y[B, T, D]{U_tp} -> AllReduce_tp -> y[B, T, D], with sequence parallelism ReduceScatter_tp ->
    y[B, T_tp, D]. Backward an AllGather_tp with it, else nothing. Without the first constraint XLA
    gathers the projection's weights in the backward pass instead.
    """
    return constrain(constrain(y_BTD, "batch", "seq", None), "batch", "stream", None)


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module | None:
    """`count` modules as one whose weights have a leading `layers` axis, each with its own key.

    None for a count of 0.
    """
    if count == 0:
        return None

    @nnx.split_rngs(splits=count)
    @nnx.vmap(axis_size=count, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return build(rngs)


def scan_layers(
    layers: nnx.Module, x: Any, apply: Callable[..., tuple[Any, Any]], *inputs: Any, unroll: int
) -> tuple[Any, Any]:
    """Run `x, stats = apply(layer, x)` over a stack; stats come back stacked by layer.

    With `inputs`, stacked by layer too, it is `apply(layer, x, *inputs of the layer)`.
    One compiled body of `unroll` layers serves all, so compile time does not grow with depth.
    """
    graph, weights = nnx.split(layers)

    def body(x, of_layer):
        layer_weights, *layer_inputs = of_layer
        return apply(nnx.merge(graph, layer_weights), x, *layer_inputs)

    return jax.lax.scan(body, x, (weights, *inputs), unroll=unroll)
