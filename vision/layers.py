"""Building blocks of images: linear layers and norms with biases, convolutions, adaptors.

Letters: N images, H W height and width, C channels, I O channels in and out, G groups.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from model.layers import as_computed, weight
from sharding.partition import constrain
from vision.config import NORM_GROUPS

GROUP_EPS = 1e-6
"""Epsilon of the image tokenizer's GroupNorms."""


def constant(value: float, shape: tuple[int, ...], *axes: str) -> nnx.Param:
    """A weight that starts at one value: biases and gains."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), out_sharding=axes, eager_sharding=False)


class Linear(nnx.Module):
    """x W + b over the last dimension."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        size: int,
        out: int,
        axes: tuple[str, str],
        std: float,
        bias: bool = True,
    ):
        self.kernel = weight(rngs, (size, out), axes, std)
        self.bias = constant(0.0, (out,), axes[1]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[.., size] -> [.., out], in the activation's type."""
        y = jnp.einsum("...i,io->...o", x, as_computed(self.kernel).astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm over the last dimension with gain and bias; statistics in fp32."""

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.scale = constant(1.0, (size,), "norm")
        self.bias = constant(0.0, (size,), "norm")

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (centred * inverse * self.scale[...] + self.bias[...]).astype(x.dtype)


class GroupNorm(nnx.Module):
    """GroupNorm of an image over pixels and the channels of a group; statistics in fp32."""

    def __init__(self, width: int):
        self.scale = constant(1.0, (width,), "norm")
        self.bias = constant(0.0, (width,), "norm")

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        shape = x_NHWC.shape
        x = x_NHWC.astype(jnp.float32).reshape(*shape[:-1], NORM_GROUPS, -1)
        centred = x - x.mean((1, 2, 4), keepdims=True)
        variance = jnp.square(centred).mean((1, 2, 4), keepdims=True)
        normed = (centred * jax.lax.rsqrt(variance + GROUP_EPS)).reshape(shape)
        return (normed * self.scale[...] + self.bias[...]).astype(x_NHWC.dtype)


class Conv(nnx.Module):
    """Convolution with a square window and a bias; the kernel lies as stored, OIHW."""

    def __init__(self, rngs: nnx.Rngs, width: int, out: int, window: int, stride: int = 1):
        std = 1 / math.sqrt(3 * width * window * window)
        axes = ("channels_out", "channels", "window", "window")
        self.kernel = weight(rngs, (out, width, window, window), axes, std)
        self.bias = constant(0.0, (out,), "channels_out")
        self.stride = stride

    def __call__(self, x_NHWC: jax.Array, padding: tuple[int, int] | None = None) -> jax.Array:
        """The image, as large as before for stride 1; `padding` is (before, after) both sides."""
        window = self.kernel.shape[-1]
        sides = (window // 2, window // 2) if padding is None else padding
        y_NHWC = jax.lax.conv_general_dilated(
            x_NHWC,
            self.kernel[...].astype(x_NHWC.dtype),
            (self.stride, self.stride),
            (sides, sides),
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
        )
        return constrain(y_NHWC + self.bias[...].astype(x_NHWC.dtype), "batch", None, None, None)


class Adaptor(nnx.Module):
    """Linear layers with GELU in between: from another width into the language model's."""

    def __init__(self, rngs: nnx.Rngs, size: int, out: int, depth: int, inner: str):
        self.first = Linear(rngs, size, out, (inner, "ffn"), (3 * size) ** -0.5)
        std = (3 * out) ** -0.5  # PyTorch's default for linear layers, as published
        for number in range(depth - 1):
            setattr(self, f"hidden_{number}", Linear(rngs, out, out, ("ffn", "embed"), std))
        self.depth = depth

    def __call__(self, x: jax.Array) -> jax.Array:
        """[.., size] -> [.., out]."""
        x = self.first(x)
        for number in range(self.depth - 1):
            x = getattr(self, f"hidden_{number}")(jax.nn.gelu(x, approximate=False))
        return x
