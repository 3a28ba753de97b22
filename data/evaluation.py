"""Held-out batches that score every token exactly once, and the bytes that they score.

The held-out documents of all sources, in store order, form one stream that starts with an eos, so
that the first token too is a target with something before it. Rows do not overlap in their targets;
the last row and the last batch are padded, and the mask says which targets count. No fill-in-the-
middle, no shuffling. With these bytes, bits/byte = sum of nats / ln 2 / bytes is exact: eos is
scored, as the model must say where a text ends, and stands for no byte.
"""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from data.prepare import Prepared
from data.store import TokenStore
from data.tokenizer import Tokenizer

GZIPPED = 64 << 20
"""Bytes that gzip packs in a few seconds."""


class HeldOut:
    """Evaluation batches; iterate as often as wanted. Make one with `held_out_reader`.

    Attributes: rows (scored), batches, targets (tokens scored), eval_bytes (UTF-8 bytes of exactly
    the text scored). All are totals over all processes.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        tokenizer: Tokenizer,
        seq_len: int,
        batch_size: int,
        max_batches: int = 0,
        local: range | None = None,
        segments: bool = False,
    ):
        self._stores, self._tokenizer = stores, tokenizer
        self.seq_len, self.batch_size, self.segments = seq_len, batch_size, segments
        self.local = range(batch_size) if local is None else local
        if self.local.start < 0 or self.local.stop > batch_size or not self.local:
            raise ValueError(f"rows {self.local} lie outside a batch of {batch_size} rows")
        # Stream position of each store's first token; position 0 is the leading eos.
        counts = [store.held_out.tokens for store in stores]
        self._starts = np.concatenate([[1], 1 + np.cumsum(counts)]).astype(np.int64)
        documents = [
            s.held_out.offsets[1:] + start
            for s, start in zip(stores, self._starts[:-1], strict=True)
        ]
        self._ends = np.concatenate(documents)
        total = sum(counts)
        if total == 0:
            raise ValueError("there is no held-out text; give --data.held-out above 0")
        every = -(-total // seq_len)
        self.rows = min(every, max_batches * batch_size) if max_batches else every
        self.batches = -(-self.rows // batch_size)
        # A partial evaluation takes evenly spaced rows, to see all of the held-out text's kinds.
        self._chosen = [row * every // self.rows for row in range(self.rows)]
        spans = [self._span(row) for row in self._chosen]
        self.targets = sum(high - low - 1 for low, high in spans)
        self.eval_bytes = self._count_bytes(spans, total)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields int32 {"tokens": [1, rows, T+1], "mask": [1, rows, T]} and, in segment mode,
        "segments": [1, rows, T+1]; rows are this process's, mask is 1 where the target counts."""
        for batch in range(self.batches):
            rows = [self._row(batch * self.batch_size + row) for row in self.local]
            yield {key: np.stack([row[key] for row in rows])[None] for key in rows[0]}

    def _span(self, row: int) -> tuple[int, int]:
        """Stream range [low, high) of a row; targets are low + 1 .. high - 1."""
        low = row * self.seq_len
        return low, min(low + self.seq_len, int(self._starts[-1]) - 1) + 1

    def _row(self, number: int) -> dict[str, np.ndarray]:
        length = self.seq_len + 1
        row = {
            "tokens": np.full(length, self._tokenizer.pad_id, np.int32),
            "mask": np.zeros(self.seq_len, np.int32),
        }
        if self.segments:
            row["segments"] = np.zeros(length, np.int32)
        if number < self.rows:
            low, high = self._span(self._chosen[number])
            row["tokens"][: high - low] = self._read(low, high)
            row["mask"][: high - low - 1] = 1
            if self.segments:
                # The leading eos counts as the end of a document before the first.
                before = np.searchsorted(self._ends, np.arange(low, high), side="right")
                before += np.arange(low, high) > 0
                row["segments"][: high - low] = before - before[0] + 1
        return row

    def _read(self, low: int, high: int) -> np.ndarray:
        """Stream tokens [low, high)."""
        parts = [np.array([self._tokenizer.eos_id])] if low == 0 else []
        borders = zip(self._stores, self._starts[:-1], self._starts[1:], strict=True)
        for store, start, stop in borders:
            first, last = max(low, int(start)), min(high, int(stop))
            if first < last:
                parts += store.held_out.read([(first - int(start), last - int(start))])
        return np.concatenate(parts).astype(np.int32)

    def _count_bytes(self, spans: list[tuple[int, int]], total: int) -> int:
        if self.targets == total:
            return sum(store.held_out.text_bytes for store in self._stores)
        lengths = self._tokenizer.byte_lengths
        if lengths is None or not all(store.meta["byte_exact"] for store in self._stores):
            raise ValueError(
                "this tokenizer's tokens are not strings of bytes, so bits per byte is exact only "
                f"over the whole held-out text ({-(-total // self.seq_len)} rows of {self.seq_len} "
                "tokens). Give --train.eval-batches 0."
            )
        return sum(int(lengths[self._read(low + 1, high)].sum()) for low, high in spans)


def held_out_reader(
    prepared: Prepared, batch_size: int, max_batches: int = 0, local: range | None = None
) -> HeldOut:
    """Held-out batches of all sources. batch_size: rows over all processes; max_batches: 0 takes
    the whole text, otherwise evenly spaced rows; local: rows of each batch that this process reads.

    ValueError if nothing is held out, or if the bytes of a part cannot be counted exactly.
    """
    return HeldOut(
        prepared.stores,
        prepared.tokenizer,
        prepared.seq_len,
        batch_size,
        max_batches,
        local,
        prepared.config.segment_mask,
    )


def gzip_bits_per_byte(stores: Sequence[TokenStore]) -> float:
    """Bits per byte of `gzip -9` on the same held-out text, the first GZIPPED bytes of it at most:
    the yardstick a model must beat."""
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits=31)
    read = packed = 0
    for part in (part for store in stores for part in store.held_out_text()):
        part = part[: GZIPPED - read]
        read += len(part)
        packed += len(packer.compress(part))
        if read == GZIPPED:
            break
    packed += len(packer.flush())
    if read == 0:
        raise ValueError("there is no held-out text; give --data.held-out above 0")
    return 8 * packed / read
