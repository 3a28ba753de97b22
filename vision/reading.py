"""Prepared images in their places: for scoring given tokens, and for prompts that read images.

Letters: B rows, T places, M images of a row, P patches of an image, D hidden width, H W pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from generation.engine import Generator
from model.blueprint import Tree, bind_part
from sharding.partition import replicated, use_layout
from vision.config import JanusConfig
from vision.janus import Sight


def load_pixels(path: Path, config: JanusConfig) -> np.ndarray:
    """A .npy file of prepared images, float32 [images, 3, H, W]; ValueError for anything else."""
    if not path.is_file():
        raise ValueError(f"--pixels {path}: no such file; give a .npy of float32 [images, 3, H, W]")
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy file of numbers ({error})") from None
    side = config.encoder.image_size
    wanted = (3, side, side)
    if not isinstance(found, np.ndarray) or found.dtype.kind != "f" or found.shape[1:] != wanted:
        shape = getattr(found, "shape", "several arrays")
        raise ValueError(
            f"{path} holds {shape}; the model reads float32 [images, 3, {side}, {side}]"
        )
    if not np.isfinite(found).all():
        raise ValueError(f"{path} holds NaN or infinity")
    return found.astype(np.float32)


def images_of_rows(ids_BT: np.ndarray, images: int, config: JanusConfig) -> list[range]:
    """Which of the images every row reads, by its image tokens, in order.

    ValueError unless every row has a whole number of images and all of them are used.
    """
    patches, found, first = config.encoder.num_patches, [], 0
    for row, ids_T in enumerate(ids_BT):
        count = int((ids_T == config.image_token_id).sum())
        if count % patches:
            raise ValueError(
                f"row {row} has {count} image tokens (id {config.image_token_id}); an image takes "
                f"{patches} of them"
            )
        found.append(range(first, first + count // patches))
        first = found[-1].stop
    if first != images:
        raise ValueError(f"the tokens have places for {first} images, and {images} are given")
    return found


def sight_of_rows(
    ids_BT: np.ndarray, pixels_NCHW: np.ndarray, rows: Sequence[range], config: JanusConfig
) -> Sight | None:
    """What the model reads beside the ids; None if no row has an image."""
    most = max((len(images) for images in rows), default=0)
    if not most:
        return None
    B, side = len(ids_BT), config.encoder.image_size
    pixels_BMHWC = np.zeros((B, most, side, side, 3), np.float32)
    patches_BT = np.full(ids_BT.shape, -1, np.int32)
    for row, images in enumerate(rows):
        pixels_BMHWC[row, : len(images)] = np.moveaxis(pixels_NCHW[list(images)], 1, -1)
        places = np.flatnonzero(ids_BT[row] == config.image_token_id)
        patches_BT[row, places] = np.arange(len(places))
    # None of a drawn image: there are no codes among given tokens.
    return Sight(pixels_BMHWC, patches_BT, None)  # pyright: ignore[reportArgumentType]


def given_vectors(
    generator: Generator, weights: Tree, prompts: Sequence[np.ndarray], pixels_NCHW: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """For every prompt its image places, and the vectors that are read there (`Generator.start`).

    `weights` as `generator.prepare` gives them; images one after the other. None without images.
    """
    config = generator.config
    assert isinstance(config, JanusConfig)
    if not len(pixels_NCHW):
        return None
    names = ("encoder", "aligner")

    @jax.jit
    def see(params: Tree, image_1HWC: jax.Array) -> jax.Array:
        with use_layout(None):  # one image is not cut
            encoder, aligner = (bind_part(config, name, params[name], {}) for name in names)
            run: Any = (encoder, aligner)
            return run[1](run[0](image_1HWC, generator.recipe))

    whole = replicated(generator.layout)
    params = {name: jax.device_put(weights["params"][name], whole) for name in names}
    seen_NPD = np.concatenate(
        [
            np.asarray(see(params, jax.device_put(image[None], whole)), np.float32)
            for image in np.moveaxis(pixels_NCHW, 1, -1)
        ]
    )
    given, first = [], 0
    for prompt in prompts:
        places = np.flatnonzero(prompt == config.image_token_id)
        count = len(places) // config.encoder.num_patches
        vectors_ND = seen_NPD[first : first + count].reshape(-1, seen_NPD.shape[-1])
        given.append((places, vectors_ND))
        first += count
    return given
