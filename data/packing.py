"""Documents packed into rows of seq_len + 1 tokens, every row computable on its own.

An epoch is one stream: all documents in a random order, each ended by eos, some rearranged for
fill-in-the-middle. Row r is tokens [r * T, r * T + T + 1) of it, T = seq_len: neighbours share one
token, so each token is a target once. Documents are cut where a row ends; nothing is padded.

Two seeded permutations make an epoch. Documents are permuted, so that every epoch packs other
neighbours and cuts documents elsewhere. Rows are permuted too: otherwise the rows of one long
document would follow each other into one batch. Both are functions of (seed, epoch), and all epochs
have the same length (see data/fim.py), so row i belongs to epoch i // rows_per_epoch, and a read
needs no state. The last tokens of the stream, fewer than T + 1, fill no row; each epoch leaves out
other documents' ends.

Memory: 17 bytes per document and epoch in use, two epochs at most.
"""

import dataclasses
import sys
import threading

import numpy as np
from grain.experimental import index_shuffle

from data.fim import EXTRA, Piece, cut_pieces, fim_count, fim_cuts, fim_documents, fim_pieces
from data.randomness import DOCUMENT_ORDER, ROW_ORDER, random_permutation, random_words
from data.store import Split
from data.tokenizer import FimTokens

Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The order of one epoch's documents."""

    index: int
    order: np.ndarray
    """int64 [documents]: stored index of the n-th document of the stream."""
    starts: np.ndarray
    """int64 [documents + 1]: where the n-th document starts in the stream."""
    rearranged: np.ndarray
    """bool [documents], by stored index: rearranged for fill-in-the-middle."""
    row_seed: int
    """32-bit seed of the order of rows."""


class PackedRows:
    """Random-access source of an endless sequence of rows: {"tokens": int32 [seq_len + 1]}.

    With segments=True a row also has "segments": int32 [seq_len + 1], the row's documents numbered
    from 1. Raises ValueError if the split does not fill one row, or on a rate outside 0..1.
    """

    def __init__(
        self,
        split: Split,
        seq_len: int,
        seed: int,
        fim_rate: float = 0.0,
        fim: FimTokens | None = None,
        segments: bool = False,
    ):
        if not 0 <= fim_rate <= 1:
            raise ValueError(f"--data.fim-rate {fim_rate} is outside 0..1")
        if fim_rate > 0 and fim is None:
            raise ValueError(
                f"--data.fim-rate {fim_rate}, but the tokenizer has no FIM tokens; set it to 0"
            )
        self.split, self.seq_len, self.seed = split, seq_len, seed
        self.fim_rate, self.fim, self.segments = fim_rate, fim, segments
        self.tokens_per_epoch = split.tokens + EXTRA * fim_count(split.documents, fim_rate)
        self.rows_per_epoch = (self.tokens_per_epoch - 1) // seq_len
        if self.rows_per_epoch < 1:
            raise ValueError(
                f"{self.tokens_per_epoch} training tokens do not fill one row: --train.seq-len "
                f"{seq_len} needs {seq_len + 1}. Add text or lower it."
            )
        self._epochs: dict[int, Epoch] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Row:
        epoch = self._epoch(index // self.rows_per_epoch)
        row = index_shuffle(index % self.rows_per_epoch, self.rows_per_epoch - 1, epoch.row_seed, 4)
        return self._read(epoch, row * self.seq_len, row * self.seq_len + self.seq_len + 1)

    def _epoch(self, index: int) -> Epoch:
        with self._lock:  # prefetching threads reach a new epoch together
            if index not in self._epochs:
                self._epochs[index] = self._make_epoch(index)
                while len(self._epochs) > 2:
                    self._epochs.pop(next(iter(self._epochs)))
            return self._epochs[index]

    def _make_epoch(self, index: int) -> Epoch:
        n = self.split.documents
        order = random_permutation(self.seed, DOCUMENT_ORDER, index, n)
        rearranged = fim_documents(self.seed, index, n, self.fim_rate)
        lengths = np.diff(self.split.offsets) + EXTRA * rearranged
        starts = np.concatenate([[0], np.cumsum(lengths[order])])
        assert starts[-1] == self.tokens_per_epoch
        row_seed = int(random_words(self.seed, ROW_ORDER, index, 0, 1)[0]) & 0xFFFFFFFF
        return Epoch(index, order, starts, rearranged, row_seed)

    def _read(self, epoch: Epoch, low: int, high: int) -> Row:
        """Tokens [low, high) of the epoch's stream."""
        first = int(np.searchsorted(epoch.starts, low, side="right")) - 1
        last = int(np.searchsorted(epoch.starts, high, side="left"))
        pieces: list[Piece] = []
        for n in range(first, last):
            start, stop = epoch.starts[n], epoch.starts[n + 1]
            part = max(low, start) - start, min(high, stop) - start
            pieces += self._document_pieces(epoch, int(epoch.order[n]), *map(int, part))
        row: Row = {"tokens": self._gather(pieces)}
        if self.segments:
            borders = np.clip(epoch.starts[first : last + 1], low, high)
            numbers = np.arange(1, last - first + 1, dtype=np.int32)
            row["segments"] = np.repeat(numbers, np.diff(borders))
        return row

    def _document_pieces(self, epoch: Epoch, document: int, low: int, high: int) -> list[Piece]:
        """Tokens [low, high) of one document, as ranges of the store and lone token ids."""
        offset = int(self.split.offsets[document])
        if not epoch.rearranged[document]:
            return [(offset + low, offset + high)]
        assert self.fim is not None
        length = int(self.split.offsets[document + 1]) - offset - 1  # without eos
        cuts = fim_cuts(self.seed, epoch.index, document, length)
        pieces = cut_pieces(fim_pieces(length, *cuts, self.fim), low, high)
        return [p if isinstance(p, int) else (offset + p[0], offset + p[1]) for p in pieces]

    def _gather(self, pieces: list[Piece]) -> np.ndarray:
        stored = iter(self.split.read([piece for piece in pieces if not isinstance(piece, int)]))
        parts = [[piece] if isinstance(piece, int) else next(stored) for piece in pieces]
        return np.concatenate(parts).astype(np.int32)
