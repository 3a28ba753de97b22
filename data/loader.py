"""Batches as a pure function of (seed, global sequence index), for any number of processes.

Training reads one endless sequence of rows, mixed from all sources by weight. A batch is rows
[first, first + count) of it, so resuming needs one integer, and neither the batch size, its ramp
nor the number of processes changes what row i holds. Each process reads only its own rows.
"""

import itertools
from collections.abc import Callable, Iterator

import grain
import numpy as np

from data.packing import PackedRows, Row
from data.prepare import Prepared

Batch = dict[str, np.ndarray]
"""Arrays int32 [n_micro, rows of this process, ...]; see Loader.batch_at."""


class Loader:
    """Training batches. Make one with `train_loader`."""

    def __init__(self, rows: grain.MapDataset, micro_batch_size: int, local: range):
        self._rows, self.micro_batch_size, self.local = rows, micro_batch_size, local

    def batch_at(self, first_sequence: int, count: int) -> Batch:
        """This process's part of rows [first_sequence, first_sequence + count).

        Returns {"tokens": int32 [n_micro, rows, T+1]} and, in segment mode, "segments" of the same
        shape. Micro batch m is rows first + m * micro_batch_size onwards, and this process holds
        `local` of each. ValueError if count is no multiple of micro_batch_size.
        """
        micro = self.micro_batch_size
        if count <= 0 or count % micro:
            raise ValueError(f"a batch of {count} rows is no multiple of micro_batch_size={micro}")
        starts = range(first_sequence, first_sequence + count, micro)
        rows = [self._row(start + row) for start, row in itertools.product(starts, self.local)]
        shape = (count // micro, len(self.local), -1)
        return {key: np.stack([row[key] for row in rows]).reshape(shape) for key in rows[0]}

    def _row(self, index: int) -> Row:
        row = self._rows[index]
        assert row is not None  # grain's filters give None; there are none here
        return row

    def batches(
        self, span: Callable[[int], tuple[int, int]], start: int, stop: int, threads: int = 2
    ) -> Iterator[Batch]:
        """Batches of steps start..stop-1, read ahead by `threads` threads.

        span: step -> (first_sequence, count), the schedule of batch sizes.
        """
        steps = grain.MapDataset.range(start, stop)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        return iter(steps.map(lambda step: self.batch_at(*span(step))).to_iter_dataset(options))


def train_loader(
    prepared: Prepared, batch_size: int, micro_batch_size: int = 0, local: range | None = None
) -> Loader:
    """Loader over the training splits, mixed by weight (grain keeps the ratios to about 1%).

    batch_size: largest number of rows of a step, over all processes. micro_batch_size: rows of a
    forward pass over all processes; 0 is the whole batch. local: rows of each micro batch that this
    process reads; None reads all. Raises ValueError if the corpus does not fill
    one batch.
    """
    config, seq_len = prepared.config, prepared.seq_len
    sources = [
        # Each source has its own seed: equal sources must not be shuffled alike.
        PackedRows(
            store.train,
            seq_len,
            prepared.seed + (number << 32),
            config.fim_rate,
            prepared.tokenizer.fim,
            config.segment_mask,
        )
        for number, store in enumerate(prepared.stores)
    ]
    available, needed = sum(s.tokens_per_epoch for s in sources), batch_size * seq_len + 1
    if available < needed:
        raise ValueError(
            f"the corpus is too small for one batch: {available} training tokens, but "
            f"--train.batch-size {batch_size} rows of --train.seq-len {seq_len} need {needed}. Add "
            "text, or lower either."
        )
    micro_batch_size = micro_batch_size or batch_size
    local = range(micro_batch_size) if local is None else local
    if local.start < 0 or local.stop > micro_batch_size or not local:
        raise ValueError(f"rows {local} lie outside a micro batch of {micro_batch_size} rows")
    weights = [source.weight for source in config.sources]
    mixed = grain.MapDataset.mix([grain.MapDataset.source(rows) for rows in sources], weights)
    return Loader(mixed, micro_batch_size, local)
