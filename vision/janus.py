"""Janus-Pro: a language model whose input may be images, read or drawn, beside text.

Understanding: the encoder's features, through an adaptor, stand where the image token stands.
Generation: the codes of an image are tokens of their own, with their own table, adaptor and head;
neither table nor head is tied to the image tokenizer's codebook.

Letters: B rows, T places, D hidden width, V vocabulary, M images of a row, P patches of an image,
H W pixels, C colours, S codes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from model.layers import weight
from model.recipe import Recipe
from model.transformer import DeepSeekV3, Tokens
from sharding.partition import constrain, on_shards
from vision.config import JanusConfig
from vision.encoder import Encoder
from vision.layers import Adaptor, Linear
from vision.tokenizer import ImageTokenizer

LANGUAGE = ("embed", "dense_layers", "moe_layers", "final_norm", "head", "mtp")
"""Parts of the parameters that are the language model's."""


class Sight(NamedTuple):
    """What of a batch is not text. None: there is no such thing in the batch."""

    pixels_BMHWC: jax.Array | None
    """Prepared images of every row, in the order of their places."""
    patches_BT: jax.Array | None
    """Patch that stands at a place, int32, counted over the row's images; -1: none."""
    codes_BT: jax.Array | None
    """Which code of a drawn image stands at a place, int32; -1: none."""


class Drawing(nnx.Module):
    """Codes of drawn images as the language model's input and output."""

    def __init__(self, rngs: nnx.Rngs, config: JanusConfig):
        size, codes = config.hidden_size, config.tokenizer.num_codes
        width, std = config.tokenizer.code_width, _std(config.hidden_size)
        self.table = weight(rngs, (codes, width), ("codes", "code"), 1.0)
        self.adaptor = Adaptor(rngs, width, size, config.drawing_depth, "code")
        self.inner = Linear(rngs, size, size, ("embed", "embed_out"), std)
        self.head = Linear(rngs, size, codes, ("embed", "vocab"), std)

    def embed(self, codes: jax.Array, recipe: Recipe) -> jax.Array:
        """Input vectors [.., D] of codes."""
        return self.adaptor(self.table[...].astype(recipe.activation_dtype)[codes])

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Scores [.., S] of the next code, fp32."""
        return self.head(self.before_head(hidden).astype(jnp.float32))

    def before_head(self, hidden: jax.Array) -> jax.Array:
        """What the last layer of the head reads [.., D]."""
        return jax.nn.gelu(self.inner(hidden), approximate=False)


def _std(size: int) -> float:
    """Published adaptors and heads start from PyTorch's default for linear layers."""
    return (3 * size) ** -0.5


class Janus(DeepSeekV3):
    """The language model with eyes and a brush."""

    def __init__(self, config: JanusConfig, rngs: nnx.Rngs, layers: bool = True):
        super().__init__(config, rngs, layers)
        width, size = config.encoder.width, config.hidden_size
        self.encoder = Encoder(rngs, config.encoder, config.init_std)
        self.aligner = Adaptor(rngs, width, size, config.aligner_depth, "embed")
        self.drawing = Drawing(rngs, config)
        self.tokenizer = ImageTokenizer(rngs, config.tokenizer)

    def see(self, pixels_NHWC: jax.Array, recipe: Recipe) -> jax.Array:
        """Input vectors [N, P, D] of prepared images."""
        return self.aligner(self.encoder(pixels_NHWC, recipe))

    def inputs(self, tokens: Tokens, recipe: Recipe) -> jax.Array:
        """Vectors of text, of patches that are read and of codes that are drawn, each in place."""
        sight = tokens.beside
        if sight is None:
            return self.embed(tokens.ids_BT, recipe)
        ids_BT = tokens.ids_BT
        if sight.codes_BT is not None:
            ids_BT = jnp.where(sight.codes_BT >= 0, 0, ids_BT)
        x_BTD = self.embed(ids_BT, recipe)
        if sight.pixels_BMHWC is not None:
            B, M = sight.pixels_BMHWC.shape[:2]
            pixels_NHWC = sight.pixels_BMHWC.reshape(B * M, *sight.pixels_BMHWC.shape[2:])
            seen_BPD = self.see(pixels_NHWC, recipe).reshape(B, -1, x_BTD.shape[-1])
            # Rows read their own images: nothing crosses devices, whatever XLA would make of it.
            names = ("batch", None, None), ("batch", "seq"), ("batch", "seq", None)
            put = on_shards(_put_in_place, names, (names[2],))
            x_BTD = put(seen_BPD, sight.patches_BT, x_BTD)[0]
        if sight.codes_BT is not None:
            drawn_BTD = self.drawing.embed(jnp.maximum(sight.codes_BT, 0), recipe)
            x_BTD = jnp.where(sight.codes_BT[..., None] >= 0, drawn_BTD, x_BTD)
        return constrain(x_BTD, "batch", "stream", "embed")


def _put_in_place(
    seen_BPD: jax.Array, patches_BT: jax.Array, x_BTD: jax.Array
) -> tuple[jax.Array]:
    """x with the patch of the row's images at each place that has one."""
    seen_BTD = jnp.take_along_axis(seen_BPD, jnp.maximum(patches_BT, 0)[..., None], 1)
    return (jnp.where(patches_BT[..., None] >= 0, seen_BTD, x_BTD),)
