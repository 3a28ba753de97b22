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
    """Codes of drawn images as the language model's input."""

    def __init__(self, rngs: nnx.Rngs, config: JanusConfig):
        size, codes = config.hidden_size, config.tokenizer.num_codes
        width = config.tokenizer.code_width
        self.table = weight(rngs, (codes, width), ("codes", "code"), 1.0)
        self.adaptor = Adaptor(rngs, width, size, config.drawing_depth, "code")

    def embed(self, codes: jax.Array, recipe: Recipe) -> jax.Array:
        """Input vectors [.., D] of codes."""
        return self.adaptor(self.table[...].astype(recipe.activation_dtype)[codes])


class Brush(nnx.Module):
    """The generation head: what code comes next."""

    def __init__(self, rngs: nnx.Rngs, config: JanusConfig):
        size, std = config.hidden_size, _std(config.hidden_size)
        self.inner = Linear(rngs, size, size, ("embed", "embed_out"), std)
        self.head = Linear(rngs, size, config.tokenizer.num_codes, ("embed", "codes"), std)

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
        self.drawing, self.brush = Drawing(rngs, config), Brush(rngs, config)
        self.tokenizer = ImageTokenizer(rngs, config.tokenizer)

    def see(self, pixels_NHWC: jax.Array, recipe: Recipe) -> jax.Array:
        """Input vectors [N, P, D] of prepared images."""
        return self.aligner(self.encoder(pixels_NHWC, recipe))

    def inputs(self, tokens: Tokens, recipe: Recipe) -> jax.Array:
        """Vectors of text, of patches that are read and of codes that are drawn, each in place."""
        x_BTD = self.embed(text_ids(tokens), recipe)
        parts = self.encoder, self.aligner, self.drawing
        return with_images(x_BTD, tokens.beside, *parts, recipe)


def text_ids(tokens: Tokens) -> jax.Array:
    """Ids to look up [B, T]: 0 where a code stands."""
    sight = tokens.beside
    if sight is None or sight.codes_BT is None:
        return tokens.ids_BT
    return jnp.where(sight.codes_BT >= 0, 0, tokens.ids_BT)


def with_images(
    x_BTD: jax.Array,
    sight: Sight | None,
    encoder: Encoder,
    aligner: Adaptor,
    drawing: Drawing,
    recipe: Recipe,
) -> jax.Array:
    """Embedded text with patches and codes in their places [B, T, D]."""
    if sight is None:
        return x_BTD
    if sight.pixels_BMHWC is not None:
        B, M = sight.pixels_BMHWC.shape[:2]
        pixels_NHWC = sight.pixels_BMHWC.reshape(B * M, *sight.pixels_BMHWC.shape[2:])
        seen_BPD = aligner(encoder(pixels_NHWC, recipe)).reshape(B, -1, x_BTD.shape[-1])
        # Rows read their own images: nothing crosses devices, whatever XLA would make of it.
        names = ("batch", None, None), ("batch", "seq"), ("batch", "seq", None)
        put = on_shards(_put_in_place, names, (names[2],))
        x_BTD = put(seen_BPD, sight.patches_BT, x_BTD)[0]
    if sight.codes_BT is not None:
        drawn_BTD = drawing.embed(jnp.maximum(sight.codes_BT, 0), recipe)
        x_BTD = jnp.where(sight.codes_BT[..., None] >= 0, drawn_BTD, x_BTD)
    return constrain(x_BTD, "batch", "stream", "embed")


def _put_in_place(seen_BPD: jax.Array, patches_BT: jax.Array, x_BTD: jax.Array) -> tuple[jax.Array]:
    """x with the patch of the row's images at each place that has one."""
    seen_BTD = jnp.take_along_axis(seen_BPD, jnp.maximum(patches_BT, 0)[..., None], 1)
    return (jnp.where(patches_BT[..., None] >= 0, seen_BTD, x_BTD),)
