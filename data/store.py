"""Token store: the documents of one source as token ids, split into train and held-out.

    meta.json                       written last: a place without it is no store
    train/tokens, held_out/tokens   zarr3 [tokens], uint16 or uint32; eos ends every document
    train/offsets, held_out/offsets zarr3 int64 [documents + 1], where each document starts
    held_out_text/00000.txt ...     the held-out documents' UTF-8 text, end to end

Tokens lie in shards of 16M ids, written one at a time (bounded memory, few files), and are read in
chunks of 32K ids (random access reads 64 or 128 KiB). Offsets are held in memory: 8 bytes a
document.
"""

import dataclasses
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from data import storage
from data.sources import Document
from data.split import HoldOut
from data.tokenizer import Tokenizer

FORMAT = 2
META = "meta.json"
SPLITS = ("train", "held_out")
SHARD, CHUNK = 1 << 24, 1 << 15
"""Tokens per file, and per range that is read at once."""
TEXT_PART = 64 << 20
"""Bytes after which the held-out text continues in another file."""
BATCH_BYTES, BATCH_DOCUMENTS = 4 << 20, 1024
"""Text that is encoded at once, over all cores."""


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a store, for reading. Thread-safe."""

    documents: int
    tokens: int
    """eos included."""
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    offsets: np.ndarray
    """int64 [documents + 1]: document i is tokens offsets[i]..offsets[i + 1], eos last."""
    array: Any
    """tensorstore array of ids [tokens]."""

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Token ids [stop - start] of each range (start, stop); the reads run concurrently."""
        reads = [self.array[start:stop].read() for start, stop in ranges]
        return [_whole(read) for read in reads]


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """A whole store, for reading."""

    place: str
    """Folder or URL."""
    meta: dict
    """Contents of meta.json."""
    train: Split
    held_out: Split

    def held_out_text(self) -> Iterator[bytes]:
        """The held-out documents' UTF-8 text, part by part."""
        left, parts = self.held_out.text_bytes, self.meta["held_out_text_parts"]
        for part in range(parts):
            content = storage.read_bytes(self.place, _text_name(part)) or b""
            left -= len(content)
            if not content or (part + 1 == parts and left):
                raise ValueError(
                    f"store {self.place}: {_text_name(part)} is gone or cut; delete the store"
                )
            yield content


def find_store(place: str) -> TokenStore | None:
    """Opens a store; None if there is none, or only a half-built one."""
    content = storage.read_bytes(place, META)
    if content is None:
        return None
    try:
        meta = json.loads(content)
        counts = [meta["splits"][name] for name in SPLITS]
        splits = (_open_split(place, *named) for named in zip(SPLITS, counts, strict=True))
        return TokenStore(place, meta, *splits)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"store {place} is damaged: {error}. Delete it to build it anew") from None


def build_store(
    place: str,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    hold_out: HoldOut,
    meta: dict,
) -> dict:
    """Tokenizes documents into a store, but does not seal it: `seal_store` does, when all is well.

    Files of a broken-off build are removed first. hold_out: which text is held out.
    meta: entries to keep in meta.json. Returns all entries, with the counts of each split.
    """
    storage.delete(place)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    writers = {name: _SplitWriter(storage.join(place, name), dtype) for name in SPLITS}
    text = _TextWriter(place)
    byte_exact = tokenizer.byte_lengths is not None
    for batch in _batches(documents):
        sided = [side for document in batch for side in hold_out.sides(document)]
        encoded = tokenizer.encode_batch([document.text for document, _ in sided])
        for (document, out), ids in zip(sided, encoded, strict=True):
            if out:
                text.add(document.text)
                if tokenizer.byte_lengths is not None:
                    byte_exact &= int(tokenizer.byte_lengths[ids].sum()) == document.text_bytes
            writers["held_out" if out else "train"].add(ids, tokenizer.eos_id, document.text_bytes)
    return {
        **meta,
        "format": FORMAT,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "byte_exact": byte_exact,
        "held_out_text_parts": text.finish(),
        "splits": {name: writer.finish() for name, writer in writers.items()},
    }


def seal_store(place: str, meta: dict) -> None:
    """Declares a store whole."""
    storage.write_bytes(place, META, json.dumps(meta, indent=1).encode())


class _SplitWriter:
    """Appends documents to one split, a whole shard at a time."""

    def __init__(self, place: str, dtype: str):
        self.place = place
        self.buffer = np.empty(SHARD, dtype)
        self.filled = self.tokens = self.text_bytes = 0
        self.offsets = array("q", [0])
        self.array = _create_array(storage.join(place, "tokens"), dtype)

    def add(self, ids: np.ndarray, eos: int, text_bytes: int) -> None:
        self._append(ids)
        self._append(np.array([eos]))
        self.offsets.append(self.tokens)
        self.text_bytes += text_bytes

    def _append(self, ids: np.ndarray) -> None:
        self.tokens += len(ids)
        while len(ids):
            part = ids[: SHARD - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            ids = ids[len(part) :]
            if self.filled == SHARD:
                self._flush()

    def _flush(self) -> None:
        start = self.array.shape[0]
        self.array = self.array.resize(exclusive_max=[start + self.filled]).result()
        self.array[start:].write(self.buffer[: self.filled]).result()
        self.filled = 0

    def finish(self) -> dict:
        if self.filled:
            self._flush()
        offsets = _create_array(storage.join(self.place, "offsets"), "int64")
        offsets = offsets.resize(exclusive_max=[len(self.offsets)]).result()
        offsets.write(np.frombuffer(self.offsets, np.int64)).result()
        return {
            "documents": len(self.offsets) - 1,
            "tokens": self.tokens,
            "bytes": self.text_bytes,
        }


class _TextWriter:
    """Keeps the held-out text in parts of bounded size, cut between documents."""

    def __init__(self, place: str):
        self.place, self.parts, self.pending = place, 0, bytearray()

    def add(self, text: str) -> None:
        self.pending += text.encode("utf-8")
        if len(self.pending) >= TEXT_PART:
            self._flush()

    def _flush(self) -> None:
        storage.write_bytes(self.place, _text_name(self.parts), bytes(self.pending))
        self.parts += 1
        self.pending.clear()

    def finish(self) -> int:
        if self.pending:
            self._flush()
        return self.parts


def _text_name(part: int) -> str:
    return f"held_out_text/{part:05d}.txt"


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.text_bytes
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _create_array(place: str, dtype: str):
    """An empty zarr3 array [0] that grows by `resize`; ids are stored as they are, not
    compressed."""
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [CHUNK],
        "codecs": [little_endian, {"name": "crc32c"}],
        "index_codecs": [little_endian, {"name": "crc32c"}],
    }
    metadata = {
        "shape": [0],
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    spec = {**_array_spec(place), "metadata": metadata}
    return ts.open(spec, create=True, context=storage.CONTEXT).result()


def _open_split(place: str, name: str, counts: dict) -> Split:
    tokens = _open_array(storage.join(place, name, "tokens"), counts["tokens"])
    starts = np.zeros(1, np.int64)
    if counts["documents"]:
        offsets = _open_array(storage.join(place, name, "offsets"), counts["documents"] + 1)
        starts = np.asarray(_whole(offsets.read()))
    if starts[-1] != counts["tokens"]:
        raise ValueError(f"{name}: documents end at {starts[-1]} of {counts['tokens']} tokens")
    return Split(counts["documents"], counts["tokens"], counts["bytes"], starts, tokens)


def _open_array(place: str, length: int) -> Any:
    """An array [length] for reading, all of whose files are there."""
    array = _whole(ts.open(_array_spec(place), read=True, context=storage.CONTEXT))
    if array.shape != (length,):
        raise ValueError(f"{place} holds {array.shape[0]} entries, {META} says {length}")
    there, shard = storage.names(place), array.chunk_layout.write_chunk.shape[0]
    for number in range(-(-length // shard)):
        if f"c/{number}" not in there:
            raise ValueError(f"{place}/c/{number} is gone")
    return array


def _whole(pending: Any) -> Any:
    """Result of a read; ValueError with tensorstore's reason, which names the file."""
    try:
        return pending.result()
    except ValueError as error:
        reason = re.sub(r" \[[a-z_]+=.*", "", str(error), flags=re.DOTALL)
        raise ValueError(f"{reason} (missing or altered data; delete the store)") from None


def _array_spec(place: str) -> dict:
    """Missing data is an error, as zeros would be tokens; so zeros are written like all else."""
    strict = {"fill_missing_data_reads": False, "store_data_equal_to_fill_value": True}
    return {"driver": "zarr3", "kvstore": storage.open_place(place).spec().to_json(), **strict}
