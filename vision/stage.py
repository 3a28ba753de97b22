"""Stage images from a configuration: the image tokenizer alone, or a model that reads and draws.

Runs the loop and the checkpoints of pre-training over mixed rows. A run on drawn scenes is judged
at its end by scenes that were held out, its drawings by rules on their pixels.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoint.hf_reader import tokenizer_file
from configs.schema import RunConfig
from data.tokenizer import Tokenizer, tokenizer_of, train_tokenizer
from model.recipe import Recipe
from runtime.agreement import agree
from runtime.processes import connect
from runtime.start import is_first_process
from sharding.partition import Layout
from training.loop import Loop
from training.plots import plot_run
from training.run import Session, newest_meta, open_loop, to_end, train_on, write_settings
from training.step import Trainer
from vision.batches import MixedRows, PictureRows, shares_of
from vision.config import JanusConfig
from vision.exam import judge_drawing, judge_reading, judge_tokenizer
from vision.images import Findings, to_bytes
from vision.prompts import TOKENS, Conversations, image_tokens, with_image_tokens
from vision.records import FileSource, read_records
from vision.scene_source import SceneSource
from vision.scenes import all_scenes
from vision.sheet import contact_sheet, write_png
from vision.trainer import PARTS, ImageTrainer

Say = Callable[[str], None]


def make_trainer(run: RunConfig, recipe: Recipe, layout: Layout) -> Trainer:
    """The trainer of stage images. ValueError for a model that has no eyes."""
    return ImageTrainer(run.model, run.train, recipe, layout, run.images)


def describe(run: RunConfig) -> list[str]:
    """What is learned, and from what, one line each."""
    images = run.images
    lines = [f"learned      {', '.join(PARTS[images.learned])}; the rest is frozen"]
    if images.learned != "tokenizer":
        shares = " : ".join(f"{share:g}" for share in shares_of(images))
        lines.append(f"mixture      understanding : text : generation {shares}")
        lines.append(f"guidance     {images.condition_dropout:.0%} of captions are left out")
    places = images.records or ("drawn scenes, one combination in 6 held out",)
    return [*lines, *(f"examples     {place}" for place in places)]


def run_stage(run: RunConfig, trainer: Trainer, session: Session) -> int:
    """The stage to its end, or to a signal; the status that a process exits with."""
    assert isinstance(trainer, ImageTrainer)
    assert isinstance(run.model, JanusConfig)
    talk = conversations(run, session.init_from, session.say)
    agree("data", lambda: {"tokenizer": talk.tokenizer.sha256})
    connect(trainer.layout.mesh)
    loop = open_loop(run, trainer, session, None)
    write_settings(run, talk.tokenizer.files)
    findings = Findings()
    source = make_source(run, trainer, talk, loop, findings, session.say)

    def train() -> str:
        def loader(micro: int, rows: range) -> Any:
            if run.images.learned == "tokenizer":
                return PictureRows(source.image, micro, rows, run.seed)
            images = run.images
            more = images.images_per_row, micro, rows, run.seed
            return MixedRows(source, trainer.model, shares_of(images), run.train.seq_len, *more)  # pyright: ignore[reportArgumentType]

        return train_on(loop, loader)

    def finish() -> None:
        for line in findings.report():
            session.say(f"images: {line}")
        if isinstance(source, SceneSource):
            judge(run, trainer, loop, source, session.say)
        if is_first_process():
            plot_run(loop.run_dir)
        session.say(f"run folder: {loop.run_dir}")

    return to_end(loop, run, session.say, train, finish)


def conversations(run: RunConfig, init_from: str, say: Say) -> Conversations:
    """How text is laid out: by the tokenizer of the weights, or one learned from scenes' words."""
    config = run.model
    assert isinstance(config, JanusConfig)
    folder = run.run_dir if newest_meta(run) else init_from
    own = tokenizer_file(Path(folder)) if folder else None
    tokenizer = tokenizer_of(run.data.tokenizer, own)
    if tokenizer is None:
        tokenizer = _trained(config.vocab_size)
        say(f"tokenizer: learned from the words of scenes, {tokenizer.vocab_size} ids")
    settings = json.loads(tokenizer.files["tokenizer_config.json"])
    talk = Conversations(tokenizer, image_tokens(settings), config.encoder.num_patches)
    found = tokenizer.token_id(talk.names.place)
    if found != config.image_token_id or tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids and {talk.names.place} is {found}; the "
            f"model has {config.vocab_size} and image_token_id {config.image_token_id}"
        )
    return talk


def _trained(vocab_size: int) -> Tokenizer:
    texts = [f"{s.caption} {s.question} {s.answer}" for s in all_scenes()]
    return with_image_tokens(train_tokenizer(texts, vocab_size - len(TOKENS)))


def make_source(
    run: RunConfig,
    trainer: ImageTrainer,
    talk: Conversations,
    loop: Loop,
    findings: Findings,
    say: Say,
) -> SceneSource | FileSource:
    """Examples of files, or of drawn scenes; codes by the run's image tokenizer as it stands."""
    config, images = trainer.model, run.images
    assert isinstance(config, JanusConfig)
    params = jax.tree.map(np.asarray, loop.state["params"]["tokenizer"])

    def encode(pixels_NCHW: np.ndarray) -> np.ndarray:
        return np.asarray(trainer.codes(params, pixels_NCHW))

    if not images.records:
        return SceneSource(run.seed, config, talk, encode, images.condition_dropout)
    records = [r for place in images.records for r in read_records(Path(place), findings)]
    source = FileSource(
        records,
        config,
        talk,
        lambda pixels: encode(pixels[None])[0],
        images.condition_dropout,
        findings,
    )
    counts = source.counts()
    say("records: " + ", ".join(f"{count} of kind {kind}" for kind, count in counts.items()))
    wanted = dict(zip(counts, shares_of(images), strict=True))
    if images.learned != "tokenizer":
        empty = [kind for kind, share in wanted.items() if share and not counts[kind]]
        if empty:
            raise ValueError(
                f"the mixture has examples of kind {', '.join(empty)}, of which there is no record;"
                f" set --images.{empty[0]} 0, or give records"
            )
    return source


def judge(run: RunConfig, trainer: ImageTrainer, loop: Loop, source: SceneSource, say: Say) -> None:
    """Figures on held-out scenes, and a contact sheet, into the run's folder."""
    rng = np.random.default_rng([run.seed, 11])
    scenes = [source.held_out[i] for i in rng.permutation(len(source.held_out))]
    scenes = [scenes[i % len(scenes)] for i in range(run.images.answers)]
    weights = {tree: loop.state[tree] for tree in ("params", "router_bias")}
    if run.images.learned == "tokenizer":
        share, pairs = judge_tokenizer(trainer, weights, scenes, source)
        figures = {"tokenizer": share}
        say(f"held-out scenes through their codes, told from the pixels: {share:.1%}")
        pictures, captions = pairs
    else:
        reading, wrong = judge_reading(trainer, weights, scenes, source)
        drawing, pixels_NCHW = judge_drawing(trainer, weights, scenes, source, run.seed)
        figures = {"understanding": reading, "drawing": float(np.mean(drawing))}
        for line in wrong[:3]:
            say(f"wrong: {line}")
        say(
            f"held-out scenes: questions {reading:.1%} right, drawings "
            f"{figures['drawing']:.1%} right of {len(scenes)}"
        )
        pictures = [to_bytes(pixels) for pixels in pixels_NCHW[:16]]
        captions = [
            f"{scene.caption}{'' if right else ' (wrong)'}"
            for scene, right in zip(scenes[:16], drawing, strict=False)
        ]
    if is_first_process():
        (loop.run_dir / "exam.json").write_text(json.dumps(figures, indent=1))
        write_png(loop.run_dir / "sheet.png", contact_sheet(pictures, captions, side=128))
        say(f"contact sheet: {loop.run_dir / 'sheet.png'}")
