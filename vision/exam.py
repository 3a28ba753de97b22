"""How well held-out scenes are read and drawn: answers word by word, drawings by their pixels.

Letters: N images, C colours, H W pixels.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from generation.config import Sampling
from generation.engine import Generator
from model.blueprint import Tree
from vision.drawing import Brush, Painter, decode_images
from vision.images import to_bytes
from vision.reading import given_vectors
from vision.scene_source import SceneSource
from vision.scenes import Scene, read_scene, shows
from vision.trainer import ImageTrainer

LONGEST = 12
"""Tokens of an answer, at most."""


def _generator(trainer: ImageTrainer) -> Generator:
    return Generator(trainer.model, trainer.recipe, trainer.layout)


def judge_reading(
    trainer: ImageTrainer, weights: Tree, scenes: Sequence[Scene], source: SceneSource
) -> tuple[float, list[str]]:
    """Share of questions answered word by word, and the wrong answers in words. Greedy."""
    generator, talk = _generator(trainer), source.talk
    prepared = generator.prepare(weights)
    scenes = [dataclasses.replace(scene, lane=i % 2) for i, scene in enumerate(scenes)]
    prompts = [talk.question(scene.question, 1, system="") for scene in scenes]
    images = np.stack([source.to_read(scene) for scene in scenes])
    given = given_vectors(generator, prepared, prompts, images)
    ends = (talk.tokenizer.end_id,)
    sampling = Sampling(temperature=0)
    session = generator.start(prepared, prompts, sampling, LONGEST, ends, given=given)
    said: list[list[int]] = [[] for _ in scenes]
    while not session.done:
        for row, ids in zip(said, session.advance(), strict=True):
            row += ids.tolist()
    wrong = []
    for scene, ids in zip(scenes, said, strict=True):
        answer = talk.tokenizer.decode([i for i in ids if i not in ends]).strip()
        if answer != scene.answer:
            wrong.append(f"{scene.caption}: {scene.question} {answer!r}")
    return 1 - len(wrong) / len(scenes), wrong


def judge_drawing(
    trainer: ImageTrainer, weights: Tree, scenes: Sequence[Scene], source: SceneSource, seed: int
) -> tuple[list[bool], np.ndarray]:
    """Which captions were drawn right by vision/scenes.py, and the pixels [N, 3, H, W].

    Drawn greedily and without guidance. A caption of a scene leaves next to nothing open, and the
    published guidance of 5 then takes codes that are likely neither with the caption nor without.
    """
    generator, talk = _generator(trainer), source.talk
    prepared = generator.prepare(weights)
    painter = Painter(generator, Brush(guidance=1.0, temperature=0.0, seed=seed))
    prompts = [talk.caption(scene.caption) for scene in scenes]
    *_, codes_NP = painter.draw(prepared, prompts, talk.drawing)
    pixels_NCHW = decode_images(generator, prepared, codes_NP)
    pairs = zip(pixels_NCHW, scenes, strict=True)
    return [shows(to_bytes(pixels), scene) for pixels, scene in pairs], pixels_NCHW


def judge_tokenizer(
    trainer: ImageTrainer, weights: Tree, scenes: Sequence[Scene], source: SceneSource
) -> tuple[float, tuple[list[np.ndarray], list[str]]]:
    """Share of scenes that are still told from the pixels after they were codes; some pairs of
    pictures before and after, with captions."""
    generator = _generator(trainer)
    params = weights["params"]["tokenizer"]
    images = jnp.stack([jnp.asarray(source.to_draw(scene)) for scene in scenes])
    codes: Any = trainer.codes(params, images)
    pixels_NCHW = decode_images(generator, {"params": {"tokenizer": params}}, np.asarray(codes))
    after = [to_bytes(pixels) for pixels in pixels_NCHW]
    right = [
        read_scene(picture) == scene.cells for picture, scene in zip(after, scenes, strict=True)
    ]
    before = [to_bytes(np.asarray(image)) for image in images]
    pictures = [picture for pair in zip(before[:8], after[:8], strict=True) for picture in pair]
    return float(np.mean(right)), (pictures, ["before", "after"] * (len(pictures) // 2))
