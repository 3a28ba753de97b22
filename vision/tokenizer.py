"""The VQ image tokenizer (LlamaGen's VQ-16): pixels to a grid of codes, and codes to pixels.

Letters: N images, H W height and width (of pixels or of a grid), C channels, P places of a grid,
S codes of the codebook, E channels of a code.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from model.layers import weight
from vision.config import TokenizerConfig
from vision.layers import Conv, GroupNorm

COLOURS = 3


class ResBlock(nnx.Module):
    """Two convolutions around a shortcut, which is 1 x 1 where the width changes."""

    def __init__(self, rngs: nnx.Rngs, width: int, out: int):
        self.norm1, self.conv1 = GroupNorm(width), Conv(rngs, width, out, 3)
        self.norm2, self.conv2 = GroupNorm(out), Conv(rngs, out, out, 3)
        self.shortcut = Conv(rngs, width, out, 1) if width != out else None

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        h_NHWC = self.conv1(jax.nn.silu(self.norm1(x_NHWC)))
        h_NHWC = self.conv2(jax.nn.silu(self.norm2(h_NHWC)))
        return h_NHWC + (x_NHWC if self.shortcut is None else self.shortcut(x_NHWC))


class SpatialAttention(nnx.Module):
    """One head of attention among all places of a grid, channels as wide as the grid's."""

    def __init__(self, rngs: nnx.Rngs, width: int):
        self.norm = GroupNorm(width)
        self.q, self.k = Conv(rngs, width, width, 1), Conv(rngs, width, width, 1)
        self.v, self.out = Conv(rngs, width, width, 1), Conv(rngs, width, width, 1)

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        N, H, W, C = x_NHWC.shape
        normed = self.norm(x_NHWC)
        q_NPC, k_NPC, v_NPC = (
            conv(normed).reshape(N, H * W, C) for conv in (self.q, self.k, self.v)
        )
        scores = jnp.einsum("npc,nmc->npm", q_NPC, k_NPC, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * C**-0.5, -1).astype(x_NHWC.dtype)
        y_NPC = jnp.einsum("npm,nmc->npc", weights, v_NPC)
        return x_NHWC + self.out(y_NPC.reshape(N, H, W, C))


class Middle(nnx.Module):
    """The blocks at the lowest resolution, between the two ways."""

    def __init__(self, rngs: nnx.Rngs, width: int):
        self.block1, self.attn = ResBlock(rngs, width, width), SpatialAttention(rngs, width)
        self.block2 = ResBlock(rngs, width, width)

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        return self.block2(self.attn(self.block1(x_NHWC)))


class Level(nnx.Module):
    """Residual blocks of one resolution, attention after each if asked for, then a step on."""

    def __init__(
        self, rngs: nnx.Rngs, widths: tuple[int, int], blocks: int, attention: bool, step: str
    ):
        width, out = widths
        self.num_blocks, self.attention, self.step = blocks, attention, step
        for number in range(blocks):
            setattr(self, f"block_{number}", ResBlock(rngs, width, out))
            if attention:
                setattr(self, f"attn_{number}", SpatialAttention(rngs, out))
            width = out
        self.resample = Conv(rngs, out, out, 3, 2 if step == "down" else 1) if step else None

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        for number in range(self.num_blocks):
            x_NHWC = getattr(self, f"block_{number}")(x_NHWC)
            if self.attention:
                x_NHWC = getattr(self, f"attn_{number}")(x_NHWC)
        if self.resample is None:
            return x_NHWC
        if self.step == "down":  # a row and a column of zeros at the far sides
            return self.resample(x_NHWC, (0, 1))
        return self.resample(jnp.repeat(jnp.repeat(x_NHWC, 2, 1), 2, 2))


class Downward(nnx.Module):
    """From pixels to latents, halving height and width between resolutions."""

    def __init__(self, rngs: nnx.Rngs, config: TokenizerConfig):
        widths = [factor * config.base_width for factor in config.multipliers]
        self.first = Conv(rngs, COLOURS, config.base_width, 3)
        last = len(widths) - 1
        for i, (width, out) in enumerate(
            zip([config.base_width, *widths[:-1]], widths, strict=True)
        ):
            step = "" if i == last else "down"
            level = Level(rngs, (width, out), config.num_blocks, i == last, step)
            setattr(self, f"level_{i}", level)
        self.middle = Middle(rngs, widths[-1])
        self.norm, self.last = GroupNorm(widths[-1]), Conv(rngs, widths[-1], config.latent_width, 3)
        self.num_levels = len(widths)

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        x_NHWC = self.first(x_NHWC)
        for i in range(self.num_levels):
            x_NHWC = getattr(self, f"level_{i}")(x_NHWC)
        return self.last(jax.nn.silu(self.norm(self.middle(x_NHWC))))


class Upward(nnx.Module):
    """From latents to pixels; level 0 is the lowest resolution."""

    def __init__(self, rngs: nnx.Rngs, config: TokenizerConfig):
        widths = [factor * config.base_width for factor in reversed(config.multipliers)]
        self.first = Conv(rngs, config.latent_width, widths[0], 3)
        self.middle = Middle(rngs, widths[0])
        last = len(widths) - 1
        for i, (width, out) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True)):
            step = "" if i == last else "up"
            level = Level(rngs, (width, out), config.num_blocks + 1, i == 0, step)
            setattr(self, f"level_{i}", level)
        self.norm, self.last = GroupNorm(widths[-1]), Conv(rngs, widths[-1], COLOURS, 3)
        self.num_levels = len(widths)

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        x_NHWC = self.middle(self.first(x_NHWC))
        for i in range(self.num_levels):
            x_NHWC = getattr(self, f"level_{i}")(x_NHWC)
        return self.last(jax.nn.silu(self.norm(x_NHWC)))


def unit(x: jax.Array) -> jax.Array:
    """Directions along the last dimension, fp32; zero stays zero."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.sqrt(jnp.square(x).sum(-1, keepdims=True)), 1e-12)


class Reconstruction(NamedTuple):
    """What the tokenizer makes of an image, and how far off it is."""

    pixels_NHWC: jax.Array
    """The decoded image."""
    codes_NP: jax.Array
    """Codes, int32, row by row."""
    codebook: jax.Array
    """Mean squared distance that moves codes alone."""
    commitment: jax.Array
    """The same distance; it moves encodings alone."""


class ImageTokenizer(nnx.Module):
    """Encoder, codebook and decoder."""

    def __init__(self, rngs: nnx.Rngs, config: TokenizerConfig):
        self.encoder, self.decoder = Downward(rngs, config), Upward(rngs, config)
        shape = (config.num_codes, config.code_width)
        # Directions of about unit length, as LlamaGen's: longer ones would turn more slowly.
        self.codebook = weight(rngs, shape, ("codes", "code"), config.code_width**-0.5)
        self.into_codes = Conv(rngs, config.latent_width, config.code_width, 1)
        self.from_codes = Conv(rngs, config.code_width, config.latent_width, 1)
        self.config = config

    def encode(self, pixels_NHWC: jax.Array) -> jax.Array:
        """Codes [N, P] of images whose values are in -1 .. 1, int32, row by row."""
        return self.nearest(self.encodings(pixels_NHWC))

    def decode(self, codes_NP: jax.Array, grid: int) -> jax.Array:
        """Images [N, H, W, 3], about -1 .. 1, of `grid` x `grid` codes each."""
        codes_NPE = unit(self.codebook[...])[codes_NP]
        return self.paint(codes_NPE.reshape(len(codes_NP), grid, grid, -1))

    def encodings(self, pixels_NHWC: jax.Array) -> jax.Array:
        """What is compared with the codebook [N, H, W, E]."""
        latent_NHWC = self.encoder(pixels_NHWC)
        encoded_NHWE = self.into_codes(latent_NHWC)
        return unit(encoded_NHWE) if _compares_directions(self.config) else encoded_NHWE

    def entries(self) -> jax.Array:
        """What encodings are compared with [S, E]."""
        codebook_SE = self.codebook[...]
        return unit(codebook_SE) if _compares_directions(self.config) else codebook_SE

    def nearest(self, encoded_NHWE: jax.Array) -> jax.Array:
        """Codes at the smallest squared distance [N, P]; of equals the first."""
        entries_SE = self.entries()
        flat_NPE = encoded_NHWE.reshape(len(encoded_NHWE), -1, encoded_NHWE.shape[-1])
        distance_NPS = (
            jnp.square(flat_NPE).sum(-1, keepdims=True)
            + jnp.square(entries_SE).sum(-1)
            - 2 * jnp.einsum("npe,se->nps", flat_NPE, entries_SE)
        )
        return jnp.argmin(distance_NPS, -1).astype(jnp.int32)

    def paint(self, codes_NHWE: jax.Array) -> jax.Array:
        """Images of codes' vectors."""
        return self.decoder(self.from_codes(codes_NHWE))

    def reconstruct(self, pixels_NHWC: jax.Array) -> Reconstruction:
        """An image through its codes, with gradients: straight through the choice of codes.

        Losses of VQ-VAE (arXiv 1711.00937, eq. 3); LlamaGen adds 0.25 of the commitment.
        """
        encoded_NHWE = self.encodings(pixels_NHWC)
        codes_NP = self.nearest(encoded_NHWE)
        chosen_NHWE = self.entries()[codes_NP].reshape(encoded_NHWE.shape)
        stop = jax.lax.stop_gradient
        codebook = jnp.square(chosen_NHWE - stop(encoded_NHWE)).mean()
        commitment = jnp.square(stop(chosen_NHWE) - encoded_NHWE).mean()
        through_NHWE = encoded_NHWE + stop(chosen_NHWE - encoded_NHWE)
        return Reconstruction(self.paint(through_NHWE), codes_NP, codebook, commitment)


def _compares_directions(config: TokenizerConfig) -> bool:
    return config.normalize_encoding


def tokenizer_loss(
    tokenizer: ImageTokenizer, pixels_NHWC: jax.Array
) -> tuple[jax.Array, Reconstruction]:
    """Mean squared error of the pixels, plus the weighted losses of the codebook.

    LlamaGen adds a perceptual and an adversarial loss, which need networks that are not part of it.
    """
    found = tokenizer.reconstruct(pixels_NHWC)
    error = jnp.square(found.pixels_NHWC - pixels_NHWC).mean()
    return error + codebook_loss(tokenizer.config, found), found


def codebook_loss(config: TokenizerConfig, found: Reconstruction) -> jax.Array:
    """Codebook and commitment, weighted."""
    return config.codebook_weight * found.codebook + config.commitment_weight * found.commitment
