"""Fill-in-the-middle at document level, before packing, in PSM order (V3 report, section 4.1).

    fim_begin + prefix + fim_hole + suffix + fim_end + middle + eos

The rearrangement is done when a row is read, not when the store is built, so that every epoch draws
other documents and other cuts and the store does not depend on the rate. Random access stays exact
and cheap for two reasons. Each epoch rearranges the same *number* of documents, round(rate * n),
and each grows by three tokens, so every epoch has the same length. And a rearranged document is a
list of ranges of the stored one, so reading a slice of it reads only that slice.

Cuts fall between tokens, uniformly over all pairs of positions; prefix, suffix or middle may be
empty.
"""

from collections.abc import Iterator

import numpy as np

from data.randomness import FIM_CHOICE, FIM_CUTS, random_permutation, random_words
from data.tokenizer import FimTokens

EXTRA = 3
"""Tokens that the rearrangement adds to a document."""

Piece = tuple[int, int] | int
"""A range of the stored document, or a token id that stands by itself."""


def fim_count(documents: int, rate: float) -> int:
    """Documents that are rearranged in each epoch."""
    return round(rate * documents)


def fim_documents(seed: int, epoch: int, documents: int, rate: float) -> np.ndarray:
    """bool [documents]: which documents this epoch rearranges."""
    chosen = np.zeros(documents, bool)
    order = random_permutation(seed, FIM_CHOICE, epoch, documents)
    chosen[order[: fim_count(documents, rate)]] = True
    return chosen


def fim_cuts(seed: int, epoch: int, document: int, length: int) -> tuple[int, int]:
    """Start and end of the middle in a document of `length` tokens (eos not counted)."""
    a, b = sorted(
        int(word % (length + 1)) for word in random_words(seed, FIM_CUTS, epoch, document, 2)
    )
    return a, b


def fim_pieces(length: int, start: int, stop: int, tokens: FimTokens) -> list[Piece]:
    """A document of `length` tokens plus eos, with middle [start, stop), in PSM order."""
    eos = (length, length + 1)
    prefix, middle, suffix = (0, start), (start, stop), (stop, length)
    return [tokens.begin, prefix, tokens.hole, suffix, tokens.end, middle, eos]


def cut_pieces(pieces: list[Piece], low: int, high: int) -> Iterator[Piece]:
    """The part [low, high) of a rearranged document, counted in its own tokens."""
    at = 0
    for piece in pieces:
        start, stop = (0, 1) if isinstance(piece, int) else piece
        first, last = max(low - at, 0), min(high - at, stop - start)
        if first < last:
            yield piece if isinstance(piece, int) else (start + first, start + last)
        at += stop - start
