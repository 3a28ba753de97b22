"""Names of a Hugging Face `JanusForConditionalGeneration` checkpoint and our parameters, both ways.

The language model keeps its own names (`hf_names.py`) below LANGUAGE. Kernels of
convolutions and tables lie here as they do there.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from checkpoint.entries import PARAMS, Entry
from vision.config import EncoderConfig, JanusConfig, TokenizerConfig

COLOURS = 3
LANGUAGE = "model.language_model."
"""What names of the language model begin with here, and with "model." alone elsewhere."""


def table(config: JanusConfig, language: list[Entry]) -> list[Entry]:
    """Every array of ours with the tensors it holds; `language` are those of a language model."""
    below = np.frompyfunc(
        lambda name: LANGUAGE + name.removeprefix("model.") if name.startswith("model.") else name,
        1,
        1,
    )
    d, e, t = config.hidden_size, config.encoder, config.tokenizer
    entries = [
        dataclasses.replace(entry, names=np.asarray(below(entry.names), object))
        for entry in language
    ]
    entries += _encoder("model.vision_model", e)
    entries += _adaptor("aligner", "model.aligner", e.width, d, config.aligner_depth)
    entries += _tokenizer("model.vqmodel", t)
    shape = (t.num_codes, t.code_width)
    entries += [_kept("drawing/table", "model.generation_embeddings.weight", shape)]
    places = ("drawing/adaptor", "model.generation_aligner")
    entries += _adaptor(*places, t.code_width, d, config.drawing_depth)
    entries += _linear("brush/inner", "model.generation_head.proj_out", d, d)
    entries += _linear("brush/head", "model.generation_head.vision_head", d, t.num_codes)
    return entries


def _kept(path: str, name: str, shape: tuple[int, ...]) -> Entry:
    """A tensor that is used as stored."""
    return Entry(PARAMS, path, np.array(name, object), shape, None)


def _linear(path: str, name: str, size: int, out: int, bias: bool = True) -> Iterator[Entry]:
    yield Entry(PARAMS, f"{path}/kernel", np.array(f"{name}.weight", object), (out,), (size,))
    if bias:
        yield _kept(f"{path}/bias", f"{name}.bias", (out,))


def _norm(path: str, name: str, size: int) -> Iterator[Entry]:
    yield _kept(f"{path}/scale", f"{name}.weight", (size,))
    yield _kept(f"{path}/bias", f"{name}.bias", (size,))


def _conv(path: str, name: str, width: int, out: int, window: int) -> Iterator[Entry]:
    yield _kept(f"{path}/kernel", f"{name}.weight", (out, width, window, window))
    yield _kept(f"{path}/bias", f"{name}.bias", (out,))


def _adaptor(path: str, name: str, size: int, out: int, depth: int) -> Iterator[Entry]:
    yield from _linear(f"{path}/first", f"{name}.fc1", size, out)
    for number in range(depth - 1):
        yield from _linear(f"{path}/hidden_{number}", f"{name}.hidden_layers.{number}", out, out)


def _encoder(name: str, e: EncoderConfig) -> Iterator[Entry]:
    size = (COLOURS, e.patch_size, e.patch_size)
    places, patches = f"{name}.embeddings.position_embedding", f"{name}.embeddings.patch_embedding"
    yield _kept("encoder/patches/kernel", f"{patches}.weight", (e.width, *size))
    yield _kept("encoder/patches/bias", f"{patches}.bias", (e.width,))
    yield _kept("encoder/patches/positions", f"{places}.weight", (e.num_patches, e.width))
    for entry in _encoder_layer(e):
        layers = [f"{name}.encoder.layers.{layer}." for layer in range(e.num_layers)]
        names = np.array([layer + entry.names.item() for layer in layers], object)
        yield dataclasses.replace(entry, path=f"encoder/layers/{entry.path}", names=names)
    yield from _norm("encoder/final_norm", f"{name}.post_layernorm", e.width)


def _encoder_layer(e: EncoderConfig) -> Iterator[Entry]:
    width, bias = e.width, e.attention_bias
    yield from _norm("attn_norm", "layer_norm1", width)
    yield from _norm("ffn_norm", "layer_norm2", width)
    for part in ("q", "k", "v"):
        yield from _linear(part, f"self_attn.{part}_proj", width, width, bias)
    yield from _linear("out", "self_attn.projection_layer", width, width)
    yield from _linear("up", "mlp.fc1", width, e.ffn_size)
    yield from _linear("down", "mlp.fc2", e.ffn_size, width)


def _tokenizer(name: str, t: TokenizerConfig) -> Iterator[Entry]:
    widths, base, last = [m * t.base_width for m in t.multipliers], t.base_width, t.multipliers[-1]
    top, path = last * base, "tokenizer"
    yield _kept(
        f"{path}/codebook", f"{name}.quantize.embedding.weight", (t.num_codes, t.code_width)
    )
    yield from _conv(f"{path}/into_codes", f"{name}.quant_conv", t.latent_width, t.code_width, 1)
    out = (t.code_width, t.latent_width, 1)
    yield from _conv(f"{path}/from_codes", f"{name}.post_quant_conv", *out)

    here, there = f"{path}/encoder", f"{name}.encoder"
    yield from _conv(f"{here}/first", f"{there}.conv_in", COLOURS, base, 3)
    for i, pair in enumerate(zip([base, *widths[:-1]], widths, strict=True)):
        attention = i == len(widths) - 1
        step = "" if attention else "downsample"
        places = (f"{here}/level_{i}", f"{there}.down.{i}")
        yield from _level(*places, pair, t.num_blocks, attention, step)
    yield from _middle(f"{here}/middle", f"{there}.mid", top)
    yield from _norm(f"{here}/norm", f"{there}.norm_out", top)
    yield from _conv(f"{here}/last", f"{there}.conv_out", top, t.latent_width, 3)

    here, there, widths = f"{path}/decoder", f"{name}.decoder", widths[::-1]
    yield from _conv(f"{here}/first", f"{there}.conv_in", t.latent_width, top, 3)
    yield from _middle(f"{here}/middle", f"{there}.mid", top)
    for i, pair in enumerate(zip([top, *widths[:-1]], widths, strict=True)):
        step = "" if i == len(widths) - 1 else "upsample"
        places = (f"{here}/level_{i}", f"{there}.up.{i}")
        yield from _level(*places, pair, t.num_blocks + 1, i == 0, step)
    yield from _norm(f"{here}/norm", f"{there}.norm_out", widths[-1])
    yield from _conv(f"{here}/last", f"{there}.conv_out", widths[-1], COLOURS, 3)


def _level(
    path: str, name: str, widths: tuple[int, int], blocks: int, attention: bool, step: str
) -> Iterator[Entry]:
    width, out = widths
    for number in range(blocks):
        yield from _block(f"{path}/block_{number}", f"{name}.block.{number}", width, out)
        if attention:
            yield from _attention(f"{path}/attn_{number}", f"{name}.attn.{number}", out)
        width = out
    if step:
        yield from _conv(f"{path}/resample", f"{name}.{step}.conv", out, out, 3)


def _middle(path: str, name: str, width: int) -> Iterator[Entry]:
    yield from _block(f"{path}/block1", f"{name}.block_1", width, width)
    yield from _attention(f"{path}/attn", f"{name}.attn_1", width)
    yield from _block(f"{path}/block2", f"{name}.block_2", width, width)


def _block(path: str, name: str, width: int, out: int) -> Iterator[Entry]:
    yield from _norm(f"{path}/norm1", f"{name}.norm1", width)
    yield from _conv(f"{path}/conv1", f"{name}.conv1", width, out, 3)
    yield from _norm(f"{path}/norm2", f"{name}.norm2", out)
    yield from _conv(f"{path}/conv2", f"{name}.conv2", out, out, 3)
    if width != out:
        yield from _conv(f"{path}/shortcut", f"{name}.nin_shortcut", width, out, 1)


def _attention(path: str, name: str, width: int) -> Iterator[Entry]:
    yield from _norm(f"{path}/norm", f"{name}.norm", width)
    for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "proj_out")):
        yield from _conv(f"{path}/{ours}", f"{name}.{theirs}", width, width, 1)
