"""Images for generate.py: from its options to what the programs read, and back to files.

Letters: B rows, T places, N images, C colours, H W pixels.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.weights import Weights
from data.tokenizer import Tokenizer
from generation.config import Sampling
from generation.engine import Generator
from generation.prompts import parse_ids
from model.blueprint import Tree
from model.config import ModelConfig
from vision.config import JanusConfig
from vision.drawing import Brush
from vision.images import Findings, prepare_to_read, read_image
from vision.options import ImageOptions
from vision.prompts import Conversations, folder_tokens, image_tokens
from vision.reading import given_vectors, images_of_rows, load_pixels, sight_of_rows
from vision.studio import check_places, draw_images

Say = Callable[[str], None]


def janus_config(config: ModelConfig) -> JanusConfig:
    """The same; ValueError for a model without eyes."""
    if not isinstance(config, JanusConfig):
        raise ValueError("the model neither reads nor draws images; Janus-Pro does")
    return config


def conversations(source: Weights, tokenizer: Tokenizer) -> Conversations:
    """How conversations with images are laid out for these weights; ValueError where the
    tokenizer's image token is not the model's."""
    config = janus_config(source.config)
    names = image_tokens(_json(source, "tokenizer_config.json"))
    talk = Conversations(tokenizer, names, config.encoder.num_patches)
    found = tokenizer.token_id(names.place)
    if found != config.image_token_id:
        raise ValueError(
            f"the tokenizer's {names.place} is id {found}, the model's image_token_id is "
            f"{config.image_token_id}"
        )
    return talk


def _json(source: Weights, name: str) -> dict[str, Any]:
    """A file beside the weights; {} without it."""
    files = [file for file in source.carried if file.name == name]
    found = json.loads(files[0].read_text("utf-8")) if files else {}
    return found if isinstance(found, dict) else {}


def pixels_to_score(
    path: Path, config: ModelConfig, ids_BT: np.ndarray
) -> Callable[[int, int], Any]:
    """From first row and number of rows to what these read beside their ids."""
    known = janus_config(config)
    pixels_NCHW = load_pixels(path, known)
    rows = images_of_rows(ids_BT, len(pixels_NCHW), known)

    def sight(first: int, count: int) -> Any:
        here = slice(first, first + count)
        return sight_of_rows(ids_BT[here], pixels_NCHW, rows[here], known)

    return sight


def read_images(
    paths: Sequence[Path], model: ModelConfig, prompts: Sequence[np.ndarray], say: Say
) -> np.ndarray:
    """The images as the encoder reads them, float32 [N, 3, H, W].

    ValueError for a file that cannot be used and for prompts with other numbers of places.
    """
    config, findings = janus_config(model), Findings()
    side = config.encoder.image_size
    pictures = [prepare_to_read(read_image(path, findings), side) for path in paths]
    for line in findings.report():
        say(f"images: {line}")
    for prompt in prompts:
        images_of_rows(prompt[None], len(pictures), config)
    return np.stack(pictures)


def seen_by_all(
    generator: Generator, weights: Tree, prompts: Sequence[np.ndarray], pixels_NCHW: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What every prompt reads in its image places: all the images, the same for each."""
    once = given_vectors(generator, weights, prompts[:1], pixels_NCHW)
    assert once is not None
    ((_, vectors_ND),) = once
    image_token = janus_config(generator.config).image_token_id
    places = [np.flatnonzero(prompt == image_token) for prompt in prompts]
    return [(at, vectors_ND) for at in places]


def draw_command(
    options: ImageOptions,
    sampling: Sampling,
    source: Weights,
    generator: Generator,
    tokenizer: Tokenizer | None,
    say: Say,
    write: bool,
) -> None:
    """Draw what the options ask for."""
    config = janus_config(generator.config)
    if sampling.top_k or sampling.top_p < 1:
        raise ValueError("codes are drawn from all; leave out --top-k and --top-p")
    talk = None
    if tokenizer is not None and (options.draw or not options.draw_ids):
        talk = conversations(source, tokenizer)
    if options.draw and talk is None:
        raise ValueError(f"{source.path} has no tokenizer.json; give --draw-ids")
    tokens = folder_tokens(_json(source, "generation_config.json"), talk)
    prompts = [talk.caption(text) for text in options.draw] if talk else []
    if options.draw_ids:
        prompts = [parse_ids(options.draw_ids)]
    captions = list(options.draw) or [options.draw_ids]
    temperature = 0.0 if options.greedy else sampling.temperature
    brush = Brush(options.guidance, temperature, sampling.seed)
    generator.check(prompts, config.drawn_tokens, False)
    if options.out or options.pixels_out:
        _ = config.drawn_grid  # codes that are no square cannot be decoded
    check_places(options)
    weights = generator.prepare(source.load(generator.abstract_weights), consume=True)
    draw_images(options, generator, weights, captions, prompts, tokens, brush, say, write)
