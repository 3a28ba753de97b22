"""Examples packed whole into rows of seq_len + 1 tokens, every row computable on its own.

Nothing is cut: an example that does not fit into a row is an error, or is left out by name. Rows
are filled by best-fit decreasing: longest examples first, each into the row with the least room
that still takes it. What fits where depends on lengths alone, so every epoch has the same number of
rows, and row i belongs to epoch i // rows_per_epoch. Which of the examples of one length takes a
place, and the order of the rows, are drawn anew in every epoch from (seed, epoch).

The examples of a row do not see each other (segments), and the mask says of every target whether it
is learned: never the first token of an example, never padding, never the prompt. That is what
`model/loss.py:inputs_and_targets` asks of "mask", which takes the place of its own weights.

Memory: 16 bytes per example and epoch in use, two epochs at most.
"""

import bisect
import sys
import threading
from collections.abc import Sequence
from typing import Literal

import grain
import numpy as np

from data.loader import Loader
from data.packing import Row
from data.randomness import DOCUMENT_ORDER, ROW_ORDER, random_permutation
from rl.examples.conversations import Examples

MAX_SHOWN = 10
"""Examples that an error names; it counts the others."""


def best_fit(lengths: Sequence[int] | np.ndarray, room: int) -> list[list[int]]:
    """Rows of numbers of examples: best-fit decreasing, ties in the order given.

    lengths: tokens of each example, 1..room. room: tokens of a row. Uses at most 11/9 of the fewest
    rows possible, plus one.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # room left -> rows that have it
    rooms: list[int] = []  # the keys, ascending
    for number in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        length = int(lengths[number])
        assert 0 < length <= room, (length, room)
        found = bisect.bisect_left(rooms, length)
        if found == len(rooms):
            left, row = room, len(rows)
            rows.append([])
        else:
            left = rooms[found]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del open_rows[left], rooms[found]
        rows[row].append(number)
        left -= length
        if left:
            if left not in open_rows:
                bisect.insort(rooms, left)
                open_rows[left] = []
            open_rows[left].append(row)
    return rows


class PackedExamples:
    """Random-access source of an endless sequence of rows.

    A row is {"tokens": int32 [seq_len + 1], "segments": int32 [seq_len + 1], the row's examples
    numbered from 1, 0 for padding, "mask": int32 [seq_len], 1 where the target at that position,
    token t + 1, is learned}.

    Attributes: rows_per_epoch; lengths (tokens of each example); left_out (names of the examples
    too long for a row); fill (share of the rows' tokens that are no padding).

    Raises ValueError without examples, and for examples longer than seq_len + 1 tokens, unless
    too_long is "leave_out".
    """

    def __init__(
        self,
        examples: Examples,
        seq_len: int,
        seed: int,
        pad_id: int,
        too_long: Literal["error", "leave_out"] = "error",
    ):
        self.seq_len, self.seed, self._pad_id, self._examples = seq_len, seed, pad_id, examples
        fits = examples.lengths <= seq_len + 1
        self.left_out = [examples.name(int(i)) for i in np.flatnonzero(~fits)]
        if self.left_out and too_long == "error":
            raise ValueError(self._too_long(int(examples.lengths.max())))
        self.lengths = examples.lengths
        self._numbers = np.flatnonzero(fits)
        if not len(self._numbers):
            why = f": all {len(self.left_out)} are longer than a row" if self.left_out else ""
            raise ValueError(f"there is no example to learn from{why}")
        self._lengths = examples.lengths[self._numbers]
        longest_first = np.sort(self._lengths)[::-1]
        rows = best_fit(longest_first, seq_len + 1)
        self._places = np.concatenate([np.array(row, np.int64) for row in rows])
        self._starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
        self.rows_per_epoch = len(rows)
        self.fill = float(longest_first.sum()) / (len(rows) * (seq_len + 1))
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Row:
        longest_first, order = self._epoch(index // self.rows_per_epoch)
        row = order[index % self.rows_per_epoch]
        places = self._places[self._starts[row] : self._starts[row + 1]]
        return self._pack(longest_first[places])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the examples, longest first, equal ones shuffled; and the order of rows."""
        with self._lock:  # prefetching threads reach a new epoch together
            if epoch not in self._epochs:
                drawn = random_permutation(self.seed, DOCUMENT_ORDER, epoch, len(self._numbers))
                drawn = drawn[np.argsort(-self._lengths[drawn], kind="stable")]
                order = random_permutation(self.seed, ROW_ORDER, epoch, self.rows_per_epoch)
                self._epochs[epoch] = self._numbers[drawn], order
                while len(self._epochs) > 2:
                    self._epochs.pop(next(iter(self._epochs)))
            return self._epochs[epoch]

    def _pack(self, numbers: np.ndarray) -> Row:
        row: Row = {
            "tokens": np.full(self.seq_len + 1, self._pad_id, np.int32),
            "segments": np.zeros(self.seq_len + 1, np.int32),
            "mask": np.zeros(self.seq_len, np.int32),
        }
        at = 0
        for segment, number in enumerate(numbers.tolist(), 1):
            example = self._examples[number]
            end = at + len(example.ids)
            row["tokens"][at:end] = example.ids
            row["segments"][at:end] = segment
            row["mask"][at : end - 1] = example.learned[1:]
            at = end
        return row

    def _too_long(self, longest: int) -> str:
        more = len(self.left_out) - MAX_SHOWN
        names = ", ".join(self.left_out[:MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")
        return (
            f"{len(self.left_out)} of {len(self._examples.lengths)} examples have more than the "
            f"{self.seq_len + 1} tokens of a row, the longest {longest}: {names}. Raise "
            f"train.seq_len to {longest - 1}, or leave them out"
        )


def sft_batches(rows: PackedExamples, micro_batch_size: int, local: range | None = None) -> Loader:
    """The rows as a loader of batches, with the interface of the pre-training loader.

    A batch is {"tokens": int32 [micro batches, rows, T+1], "segments": the same shape, "mask":
    int32 [micro batches, rows, T]}, a function of (seed, step); see `data/loader.py:Loader`.
    micro_batch_size: rows of a forward pass over all processes. local: rows of each micro batch
    that this process reads; None reads all. ValueError if they lie outside of it.
    """
    local = range(micro_batch_size) if local is None else local
    if local.start < 0 or local.stop > micro_batch_size or not local:
        raise ValueError(f"rows {local} lie outside a micro batch of {micro_batch_size} rows")
    return Loader(grain.MapDataset.source(rows), micro_batch_size, local)
