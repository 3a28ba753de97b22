"""Sizes and semantics of Janus-Pro: a language model, an encoder that reads images, a tokenizer
that makes them; and what a stage of training learns.

Sources: Janus-Pro report (arXiv 2501.17811), Janus report (arXiv 2410.13848), LlamaGen for the
image tokenizer (arXiv 2406.06525).
"""

import dataclasses
import math
from typing import Any, Literal

from model.config import ModelConfig

NORM_GROUPS = 32
"""Groups of every GroupNorm of the image tokenizer; its widths are multiples of it."""


def _positive(config: Any, name: str, zero: tuple[str, ...] = ()) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            ok = 0 <= value < math.inf and (value > 0 or field.name in zero)
            _require(ok, f"{name}.{field.name} is {value}; it must be positive")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(f"model config: {message}")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """SigLIP's vision tower (arXiv 2303.15343): patches, pre-norm Transformer, no class token."""

    width: int = 1024
    """Channels of a patch."""
    num_layers: int = 24
    """Transformer layers."""
    num_heads: int = 16
    """Attention heads."""
    ffn_size: int = 4096
    """Inner width of the MLP."""
    image_size: int = 384
    """Height and width of an image, in pixels."""
    patch_size: int = 16
    """Height and width of a patch, in pixels."""
    norm_eps: float = 1e-6
    """Epsilon of the LayerNorms."""
    attention_bias: bool = True
    """Whether queries, keys and values have biases."""

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Tokens that one image becomes."""
        return self.grid**2

    def __post_init__(self):
        _positive(self, "encoder")
        _require(
            self.width % self.num_heads == 0,
            f"encoder.width={self.width} does not split into num_heads={self.num_heads}",
        )
        _require(
            self.image_size >= self.patch_size,
            f"encoder.image_size={self.image_size} is below patch_size={self.patch_size}",
        )


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The VQ image tokenizer (LlamaGen's VQ-16): an image as a grid of codes, and back."""

    num_codes: int = 16384
    """Entries of the codebook."""
    code_width: int = 8
    """Channels of an entry."""
    latent_width: int = 256
    """Channels between encoder or decoder and the projection to codes."""
    base_width: int = 128
    """Channels at the first resolution."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each resolution, in `base_width`s; every further one halves height and width."""
    num_blocks: int = 2
    """Residual blocks per resolution of the encoder; the decoder has one more."""
    normalize_encoding: bool = True
    """Compare directions when an image becomes codes, as the published code does. transformers
    compares lengths too (its decoder compares directions like ours); False gives its ids."""
    codebook_weight: float = 1.0
    """Factor of the loss that moves codes towards encodings (LlamaGen: 1; transformers: 0.25)."""
    commitment_weight: float = 0.25
    """Factor of the loss that moves encodings towards codes (LlamaGen: 0.25; transformers: 1, since
    its beta stands at the other term)."""

    @property
    def scale(self) -> int:
        """Pixels along one side of a code's square."""
        return 2 ** (len(self.multipliers) - 1)

    def __post_init__(self):
        _positive(self, "tokenizer", zero=("codebook_weight", "commitment_weight"))
        _require(bool(self.multipliers), "tokenizer.multipliers is empty; give one per resolution")
        for factor in self.multipliers:
            width = factor * self.base_width
            _require(
                width > 0 and width % NORM_GROUPS == 0,
                f"tokenizer: {factor} x base_width={self.base_width} channels do not split into "
                f"{NORM_GROUPS} groups",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class JanusConfig(ModelConfig):
    """A language model that reads images and draws them. The inherited fields are the language
    model's."""

    encoder: EncoderConfig = EncoderConfig()
    """The understanding encoder."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer of drawn images."""
    aligner_depth: int = 2
    """Linear layers of the understanding adaptor."""
    drawing_depth: int = 2
    """Linear layers of the generation adaptor."""
    drawn_tokens: int = 576
    """Codes of one drawn image, row by row; a square of them is decoded."""
    image_token_id: int = 100581
    """Token that stands, once per patch, where an image is read."""

    @property
    def first_parts(self) -> tuple[str, ...]:
        """As of a language model, and what puts images in place."""
        return (*super().first_parts, "encoder", "aligner", "drawing")

    def module(self) -> Any:
        """The class that is built from this configuration."""
        from vision.janus import Janus  # needs JAX, which configurations do without

        return Janus

    @property
    def drawn_grid(self) -> int:
        """Codes along one side of a drawn image; ValueError unless they form a square."""
        side = math.isqrt(self.drawn_tokens)
        _require(
            side * side == self.drawn_tokens,
            f"drawn_tokens is {self.drawn_tokens}; an image is drawn as a square of codes",
        )
        return side

    def __post_init__(self):
        super().__post_init__()
        for name in ("aligner_depth", "drawing_depth", "drawn_tokens"):
            value = getattr(self, name)
            _require(value > 0, f"{name} is {value}; it must be positive")
        _require(
            0 <= self.image_token_id < self.vocab_size,
            f"image_token_id={self.image_token_id} is outside the vocabulary of {self.vocab_size}",
        )
        _require(
            self.mtp_depth == 0,
            f"mtp_depth is {self.mtp_depth}; there is no multi-token prediction over images",
        )


Learned = Literal["tokenizer", "adaptors", "language", "reading"]
"""What a stage of training changes: the image tokenizer alone; both adaptors and the generation
head (stage I of the report); all but the two encoders (II); all but the image tokenizer (III)."""


@dataclasses.dataclass(frozen=True)
class ImageTraining:
    """A stage of training with images: what is learned, from which examples."""

    learned: Learned = "language"
    """What changes; the rest is frozen and has no optimizer state."""
    records: tuple[str, ...] = ()
    """JSON Lines of conversations, captions and texts with paths of images, or folders of images
    and texts. Empty: drawn scenes."""
    read: float = 1.0
    """Examples of understanding, relative to the others."""
    text: float = 0.0
    """Examples of text alone."""
    draw: float = 1.0
    """Examples of generation."""
    condition_dropout: float = 0.1
    """Share of generation examples that lose their words, for guidance. Unverified: no report says
    it, 10% is what is said of the training of others."""
    images_per_row: int = 4
    """Images that a packed row reads at most; shorter rows read as many black ones."""
    answers: int = 120
    """Scenes of either direction that the end of a run on drawn scenes is judged by."""

    def __post_init__(self):
        for name in ("read", "text", "draw"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"images.{name} is {value}; it must be 0 or more")
        if not self.read + self.text + self.draw:
            raise ValueError("images.read, images.text and images.draw are all 0; learn something")
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(
                f"images.condition_dropout is {self.condition_dropout}; it is a share, 0 to 1"
            )
        if self.images_per_row < 1 or self.answers < 1:
            raise ValueError("images.images_per_row and images.answers must be 1 or more")
