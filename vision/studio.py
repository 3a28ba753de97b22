"""Descriptions to files: what `generate.py --draw` does.

Letters: N images, P codes, C colours, H W pixels.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from generation.engine import Generator
from model.blueprint import Tree
from vision.drawing import Brush, DrawingTokens, Painter, decode_images
from vision.images import to_bytes
from vision.options import ImageOptions
from vision.sheet import contact_sheet, write_png

SHEET = "sheet.png"


def check_places(options: ImageOptions) -> None:
    """Raise ValueError, before weights are read, for places that cannot be written."""
    for path in (options.ids_out, options.pixels_out):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path.parent} is no folder; make it first")
    if options.out is not None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out {options.out}: {error.strerror}") from None


def draw_images(
    options: ImageOptions,
    generator: Generator,
    weights: Tree,
    captions: Sequence[str],
    prompts: Sequence[np.ndarray],
    tokens: DrawingTokens,
    brush: Brush,
    say: Callable[[str], None],
    write: bool,
) -> None:
    """Draw `options.images` of every prompt, and write what is asked for if `write`."""
    painter = Painter(generator, brush)
    asked = [prompt for prompt in prompts for _ in range(options.images)]
    named = [caption for caption in captions for _ in range(options.images)]
    codes_NP = np.zeros((len(asked), 0), np.int32)
    with progress_bar(len(asked) * painter.config.drawn_tokens, say) as report:
        for codes_NP in painter.draw(weights, asked, tokens):
            report(codes_NP.size)
    rate = len(asked) / max(painter.seconds, 1e-9)
    say(
        f"drew {len(asked)} images of {codes_NP.shape[1]} codes in {painter.seconds:.1f} s, "
        f"{rate:.3f} images/s; compiled in {painter.compile_seconds:.1f} s"
    )
    if write and options.ids_out:
        np.save(options.ids_out, codes_NP)
        say(f"wrote {options.ids_out}: int32 {list(codes_NP.shape)}")
    if not (options.out or options.pixels_out):
        return
    began = time.perf_counter()
    pixels_NCHW = decode_images(generator, weights, codes_NP)
    say(f"decoded in {time.perf_counter() - began:.1f} s")
    if write and options.pixels_out:
        np.save(options.pixels_out, pixels_NCHW)
        say(f"wrote {options.pixels_out}: float32 {list(pixels_NCHW.shape)}")
    if write and options.out:
        write_images(options.out, pixels_NCHW, named, say)


def write_images(
    folder: Path, pixels_NCHW: np.ndarray, captions: Sequence[str], say: Callable[[str], None]
) -> None:
    """One PNG per image, and all of them on a contact sheet."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [to_bytes(pixels_CHW) for pixels_CHW in pixels_NCHW]
    for number, picture in enumerate(pictures):
        write_png(folder / f"{number:04}.png", picture)
    write_png(folder / SHEET, contact_sheet(pictures, captions))
    say(f"wrote {len(pictures)} images and {SHEET} in {folder}")


def progress_bar(total: int, say: Callable[[str], None]) -> Any:
    """`with progress_bar(codes) as report: report(codes drawn)`; lines without a terminal."""
    return _Bar(total, say)


class _Bar:
    def __init__(self, total: int, say: Callable[[str], None]):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        console = Console(stderr=True)
        self._total, self._say, self._tenth = total, say, 0
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console) if console.is_terminal else None

    def __enter__(self) -> Callable[[int], None]:
        if self._bar is None:
            return self._line
        self._bar.start()
        task, bar = self._bar.add_task("", total=self._total), self._bar
        return lambda done: bar.update(task, completed=done)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self, done: int) -> None:
        tenth = 10 * done // self._total
        if tenth > self._tenth:
            self._tenth = tenth
            self._say(f"{done:,} of {self._total:,} codes")
