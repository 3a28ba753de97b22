"""Mixed batches: examples of reading, text and drawing, packed into rows of one length.

A batch is a function of the seed and of which rows are asked for, so a run resumes anywhere. Every
array begins with rows:

  tokens [B, T+1]    ids; 0 where a code stands
  codes [B, T+1]     code of a drawn image that stands there, or -1
  patches [B, T+1]   patch of the row's images that stands there, counted over them, or -1
  learned [B, T+1]   1.0 where the token or code is to be predicted
  segments [B, T+1]  number of the example in its row, from 1; 0 for padding
  pixels [B, M, H, W, 3]  images that the row reads, in order; the rest black

Letters: B rows, T places, M images of a row, H W pixels.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from vision.config import ImageTraining, JanusConfig
from vision.prompts import Conversations

KINDS = ("read", "text", "draw")
"""Kinds of examples, in the order of a mixture's shares: understanding, text, generation."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One example, before it is part of a row."""

    ids: np.ndarray
    """Tokens, int32 [n]; 0 where a code stands."""
    codes: np.ndarray
    """Codes, int32 [n]; -1 elsewhere."""
    learned: np.ndarray
    """What is to be predicted, bool [n]."""
    images: tuple[np.ndarray, ...] = ()
    """Images that it reads, in order, prepared float32 [3, H, W]."""


def shares_of(images: ImageTraining) -> tuple[float, float, float]:
    """Examples of each of KINDS, relative to each other."""
    return images.read, images.text, images.draw


class Source(Protocol):
    """Where examples come from."""

    def draw(self, kind: str, rng: np.random.Generator) -> Example:
        """A random example of one of KINDS."""
        ...


def read_example(
    talk: Conversations,
    messages: Sequence[Mapping[str, str]],
    images: tuple[np.ndarray, ...],
    system: str | None = None,
) -> Example:
    """A conversation about images; its answers are learned."""
    ids, learned = talk.conversation(messages, len(images), system)
    return Example(ids, np.full(len(ids), -1, np.int32), learned, images)


def text_example(ids: np.ndarray) -> Example:
    """Plain text; all of it is learned."""
    return Example(ids, np.full(len(ids), -1, np.int32), np.ones(len(ids), bool))


def draw_example(talk: Conversations, caption: str, codes_P: np.ndarray, blank: bool) -> Example:
    """An image to draw; its codes are learned. `blank`: without the words, as guidance needs it."""
    asked, tokens = talk.caption(caption), talk.drawing
    if blank:
        kept = (asked == tokens.bos) | (asked == tokens.begin)
        asked = np.where(kept, asked, tokens.pad).astype(np.int32)
    ids = np.concatenate([asked, np.zeros(len(codes_P), np.int32)])
    codes = np.concatenate([np.full(len(asked), -1, np.int32), codes_P.astype(np.int32)])
    return Example(ids, codes, codes >= 0)


@dataclasses.dataclass(frozen=True)
class MixedRows:
    """A loader of mixed rows (the protocol of training/run.py:Loader)."""

    source: Source
    config: JanusConfig
    shares: tuple[float, float, float]
    """Examples of each of KINDS."""
    seq_len: int
    images_per_row: int
    """Images that a row reads at most."""
    micro_batch: int
    rows: range
    """Rows of every micro batch that this process makes."""
    seed: int

    def batches(
        self, span: Callable[[int], tuple[int, int]], start: int, stop: int
    ) -> Iterator[Mapping[str, np.ndarray]]:
        """Batches of steps start .. stop; span(step): its first row of the run, and its rows."""
        return _batches(self.row, self.rows, self.micro_batch, span, start, stop)

    def row(self, number: int) -> dict[str, np.ndarray]:
        """Row `number` of the run: examples drawn by the shares until one does not fit.

        ValueError for a first example that is longer than a row.
        """
        rng = np.random.default_rng([self.seed, number])
        T, side, patches = self.seq_len, self.config.encoder.image_size, self._patches
        row = {
            "tokens": np.zeros(T + 1, np.int32),
            "codes": np.full(T + 1, -1, np.int32),
            "patches": np.full(T + 1, -1, np.int32),
            "learned": np.zeros(T + 1, np.float32),
            "segments": np.zeros(T + 1, np.int32),
            "pixels": np.zeros((self.images_per_row, side, side, 3), np.float32),
        }
        shares = np.array(self.shares, np.float64)
        at = images = segment = 0
        while True:
            kind = KINDS[rng.choice(len(KINDS), p=shares / shares.sum())]
            example = self.source.draw(kind, rng)
            count = len(example.ids)
            seen = len(example.images)
            if at + count > T + 1 or images + seen > self.images_per_row:
                if at:
                    return row
                raise ValueError(
                    f"an example of kind {kind} has {count} tokens and {seen} images; a row has "
                    f"{T + 1} and {self.images_per_row}. Raise train.seq_len"
                )
            here, segment = slice(at, at + count), segment + 1
            row["tokens"][here], row["codes"][here] = example.ids, example.codes
            row["learned"][here], row["segments"][here] = example.learned, segment
            place = (example.ids == self.config.image_token_id) & (example.codes < 0)
            first = images * patches
            row["patches"][here][place] = np.arange(first, first + seen * patches)
            for image_CHW in example.images:
                row["pixels"][images] = np.moveaxis(image_CHW, 0, -1)
                images += 1
            at += count

    @property
    def _patches(self) -> int:
        return self.config.encoder.num_patches


@dataclasses.dataclass(frozen=True)
class PictureRows:
    """A loader of images alone, for the image tokenizer: `paint` [micro batches, B, H, W, 3]."""

    draw: Callable[[np.random.Generator], np.ndarray]
    """A random prepared image, float32 [3, H, W]."""
    micro_batch: int
    rows: range
    seed: int

    def batches(
        self, span: Callable[[int], tuple[int, int]], start: int, stop: int
    ) -> Iterator[Mapping[str, np.ndarray]]:
        """As `MixedRows.batches`."""

        def row(number: int) -> dict[str, np.ndarray]:
            return {"paint": self._row(number)}

        return _batches(row, self.rows, self.micro_batch, span, start, stop)

    def _row(self, number: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, number, 1])
        return np.moveaxis(self.draw(rng), 0, -1)


def _batches(
    row: Callable[[int], Mapping[str, np.ndarray]],
    rows: range,
    micro_batch: int,
    span: Callable[[int], tuple[int, int]],
    start: int,
    stop: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches [micro batches, rows, ...] of steps start .. stop, by rows of the run."""
    for step in range(start, stop):
        first, count = span(step)
        micros = [[row(first + micro + n) for n in rows] for micro in range(0, count, micro_batch)]
        yield {
            name: np.stack([np.stack([one[name] for one in micro]) for micro in micros])
            for name in micros[0][0]
        }
