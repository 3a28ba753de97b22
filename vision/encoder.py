"""The understanding encoder: SigLIP's vision tower, the normed states of its last layer.

Letters: N images, H W pixels, C colours, P patches, D width, A attention heads, K channels of a
head, F inner width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from model.layers import scan_layers, stack, weight
from model.recipe import Recipe
from sharding.partition import constrain
from vision.config import EncoderConfig
from vision.layers import LayerNorm, Linear, constant

COLOURS = 3


class PatchEmbedding(nnx.Module):
    """A linear map of every patch, and a learned vector for its place."""

    def __init__(self, rngs: nnx.Rngs, config: EncoderConfig, std: float):
        size = config.patch_size
        axes = ("embed", "channels", "window", "window")
        self.kernel = weight(rngs, (config.width, COLOURS, size, size), axes, std)
        self.bias = constant(0.0, (config.width,), "norm")
        places = (config.num_patches, config.width)
        self.positions = weight(rngs, places, ("patches", "embed"), std)

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        """Patches [N, P, D], row by row."""
        N, size = x_NHWC.shape[0], self.kernel.shape[-1]
        grid = x_NHWC.shape[1] // size
        x = x_NHWC[:, : grid * size, : grid * size].reshape(N, grid, size, grid, size, COLOURS)
        kernel = self.kernel[...].astype(x.dtype)
        x_NPD = jnp.einsum("nyhxwc,dchw->nyxd", x, kernel).reshape(N, grid * grid, -1)
        return x_NPD + (self.bias[...] + self.positions[...]).astype(x.dtype)


class EncoderLayer(nnx.Module):
    """Pre-norm layer: attention among all patches of an image, then an MLP with exact GELU."""

    def __init__(self, rngs: nnx.Rngs, config: EncoderConfig, std: float):
        width, bias = config.width, config.attention_bias
        into, back = ("embed", "heads"), ("heads", "embed")
        self.attn_norm = LayerNorm(width, config.norm_eps)
        self.q = Linear(rngs, width, width, into, std, bias)
        self.k = Linear(rngs, width, width, into, std, bias)
        self.v = Linear(rngs, width, width, into, std, bias)
        self.out = Linear(rngs, width, width, back, std)
        self.ffn_norm = LayerNorm(width, config.norm_eps)
        self.up = Linear(rngs, width, config.ffn_size, ("embed", "ffn"), std)
        self.down = Linear(rngs, config.ffn_size, width, ("ffn", "embed"), std)
        self.num_heads = config.num_heads

    def __call__(self, x_NPD: jax.Array) -> jax.Array:
        """The next states [N, P, D]."""
        x_NPD = x_NPD + self.attend(self.attn_norm(x_NPD))
        h_NPF = self.up(self.ffn_norm(x_NPD))
        h_NPF = constrain(jax.nn.gelu(h_NPF, approximate=False), "batch", None, "ffn")
        return constrain(x_NPD + self.down(h_NPF), "batch", None, None)

    def attend(self, x_NPD: jax.Array) -> jax.Array:
        """Softmax attention, in fp32, of every patch to every patch."""
        N, P, D = x_NPD.shape

        def heads(linear: Linear) -> jax.Array:
            y = linear(x_NPD).reshape(N, P, self.num_heads, -1)
            return constrain(y, "batch", None, "heads", None)

        q_NPAK, k_NPAK, v_NPAK = heads(self.q), heads(self.k), heads(self.v)
        scores = jnp.einsum("npak,nmak->napm", q_NPAK, k_NPAK, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * q_NPAK.shape[-1] ** -0.5, -1).astype(x_NPD.dtype)
        return self.out(jnp.einsum("napm,nmak->npak", weights, v_NPAK).reshape(N, P, D))


class Encoder(nnx.Module):
    """Patches, layers, and a last norm."""

    def __init__(self, rngs: nnx.Rngs, config: EncoderConfig, std: float):
        self.patches = PatchEmbedding(rngs, config, std)
        self.layers = stack(lambda r: EncoderLayer(r, config, std), config.num_layers, rngs)
        self.final_norm = LayerNorm(config.width, config.norm_eps)

    def __call__(self, pixels_NHWC: jax.Array, recipe: Recipe) -> jax.Array:
        """Features [N, P, D] of prepared images, in the recipe's type."""
        x_NPD = self.patches(pixels_NHWC.astype(recipe.activation_dtype))
        x_NPD = constrain(x_NPD, "batch", None, None)

        @recipe.rematerialize
        def apply(layer: EncoderLayer, x_NPD: jax.Array):
            return layer(x_NPD), None

        assert self.layers is not None
        return self.final_norm(scan_layers(self.layers, x_NPD, apply, unroll=recipe.unroll)[0])
