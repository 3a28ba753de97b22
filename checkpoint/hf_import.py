"""A run folder from a Hugging Face folder, one block of one array at a time.

The arrays go where Orbax would put them (zarr arrays in an OCDBT store, which `CheckpointManager`
reads), but in blocks of BLOCK bytes, so that no array is ever whole in main memory. Main memory:
blocks that are being written (BATCH bytes) and a few copies of one block.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorstore

from checkpoint import safetensors
from checkpoint.checksum import part_checksum
from checkpoint.folder import FORMAT
from checkpoint.hf_names import ROUTER_BIAS, Entry, table
from checkpoint.hf_reader import HuggingFaceFolder
from checkpoint.hf_writer import DTYPES
from checkpoint.partial import new_folder
from checkpoint.weights import SCALES, array_spec

BLOCK = 64 << 20
"""Bytes of a block, at most (or one row of one tensor)."""
BATCH = 256 << 20
"""Bytes written together: every commit rewrites a part of the store's index."""


def import_folder(
    source: HuggingFaceFolder,
    dst: Path,
    *,
    dtype: Literal["fp32", "bf16"] = "fp32",
    say: Callable[[str], None] = print,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `source` as a run folder: checkpoints/step_00000000, config.json, tokenizer, hf/.

    `hf/` holds the release's small files and, of FP8 releases, the factors of all blocks, so that
    an export gives the same bytes. The router's bias stays fp32. `progress` is told (bytes written,
    bytes in all). Raises ValueError for an existing `dst`, a disk without room, bad tensors.
    """
    source.compare_copies()
    entries = table(source.config)
    scales = source.scales()
    total = sum(_kept(e, dtype).itemsize * int(np.prod(e.our_shape)) for e in entries)
    needed = total + sum(i.nbytes for i in scales.values())
    needed += sum(file.stat().st_size for file in source.carried)
    written = 0
    with new_folder(dst, needed, say) as work:
        step = work / "checkpoints" / "step_00000000"
        (step / "state").mkdir(parents=True)
        checksums = {}
        for entry in entries:
            name, checksum = f"{entry.tree}/{entry.path}", 0
            for start, block in _write_array(step, source, entry, _kept(entry, dtype)):
                checksum += part_checksum(block, start)
                written += block.nbytes
                if progress is not None:
                    progress(written, total)
            checksums[name] = checksum % 2**32
        _write_metadata(step, entries, checksums, source)
        _carry(source, work, scales)
        # Last: without it a folder is no run folder.
        settings = {"model": dataclasses.asdict(source.config)}
        (work / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _kept(entry: Entry, dtype: str) -> np.dtype:
    return np.dtype(np.float32) if entry.tree == ROUTER_BIAS else DTYPES[dtype]


def _cut(entry: Entry, itemsize: int) -> tuple[int, int]:
    """(axis, length) of a block within one tensor: whole rows of the stored matrix."""
    rows = entry.out_dims[0]
    row_bytes = itemsize * int(np.prod(entry.stored_shape)) // rows
    axis = entry.names.ndim + len(entry.in_dims or ())
    return axis, max(1, min(rows, BLOCK // max(row_bytes, 1)))


def _write_array(
    step: Path, source: HuggingFaceFolder, entry: Entry, dtype: np.dtype
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Write one array of ours; yields (index of its first element, block) of each block."""
    axis, length = _cut(entry, dtype.itemsize)
    shape, stacked = entry.our_shape, entry.names.ndim
    chunks = [1] * stacked + list(shape[stacked:])
    chunks[axis] = length
    spec = array_spec(step, f"{entry.tree}/{entry.path}") | {
        "metadata": {
            "shape": list(shape),
            "chunks": chunks,
            "dtype": "bfloat16" if dtype.itemsize == 2 else "<f4",
            "compressor": {"id": "zstd", "level": 1},
        },
        "create": True,
    }
    store = tensorstore.open(spec).result()
    batch, held = tensorstore.Transaction(), 0
    for place in np.ndindex(entry.names.shape):
        for low in range(0, shape[axis], length):
            start = [*place, *(0,) * (len(shape) - stacked)]
            start[axis] = low
            index = tuple(
                slice(a, min(a + c, n)) for a, c, n in zip(start, chunks, shape, strict=True)
            )
            block = source.read(entry.tree, entry.path, index, dtype)
            store.with_transaction(batch)[index].write(block).result()
            held += block.nbytes
            if held >= BATCH:
                batch.commit_sync()
                batch, held = tensorstore.Transaction(), 0
            yield tuple(start), block
    batch.commit_sync()


def _write_metadata(
    step: Path, entries: list[Entry], checksums: dict[str, int], source: HuggingFaceFolder
) -> None:
    """The small files of a checkpoint: Orbax's own, and our meta."""
    tree: dict[str, Any] = {}
    for entry in entries:
        name = f"{entry.tree}/{entry.path}"
        tree[str((name,))] = {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(entry.our_shape),
            },
        }
    orbax = {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    meta = {
        "format": FORMAT,
        "step": 0,
        "config": {"model": dataclasses.asdict(source.config)},
        "mesh": {},
        "metrics": {},
        "checksums": checksums,
    }
    handlers = "orbax.checkpoint._src.handlers."
    whole = {
        "item_handlers": {
            "meta": f"{handlers}json_checkpoint_handler.JsonCheckpointHandler",
            "state": f"{handlers}pytree_checkpoint_handler.PyTreeCheckpointHandler",
        },
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": time.time_ns(),
        "commit_timestamp_nsecs": time.time_ns(),
        "custom_metadata": {},
    }
    (step / "meta").mkdir()
    (step / "state" / "_METADATA").write_text(json.dumps(orbax))
    (step / "meta" / "metadata").write_text(json.dumps(meta))
    (step / "_CHECKPOINT_METADATA").write_text(json.dumps(whole))


def _carry(source: HuggingFaceFolder, work: Path, scales: dict[str, safetensors.TensorInfo]):
    """Tokenizer, configuration and FP8 factors, next to the checkpoint."""
    (work / "hf").mkdir()
    for file in source.carried:
        shutil.copyfile(file, work / "hf" / file.name)
        if file.name == "tokenizer.json":
            shutil.copyfile(file, work / file.name)
    if scales:
        kinds = {name: (np.dtype(np.float32), info.shape) for name, info in scales.items()}
        factors = ((name, safetensors.read(i).astype(np.float32)) for name, i in scales.items())
        safetensors.write(work / "hf" / SCALES, kinds, factors)
