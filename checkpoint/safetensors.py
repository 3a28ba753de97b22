"""Safetensors files, by byte ranges: headers read with suspicion, slices read without the rest.

The safetensors library maps whole files, and mapped pages count as memory of the process for as
long as the file is open. A host that needs an eighth of every tensor reads that eighth here, into
memory of its own. Format: 8 bytes of header length (little-endian), a JSON header, the tensors.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

MAX_HEADER = 100_000_000
"""Bytes; the library refuses more, and so do we: a header is parsed before anything is known."""

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Place of one tensor in its file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    path: Path
    start: int
    """Offset of its first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """All tensors of a file, by name.

    Raises ValueError naming the file, and the tensor where it is one's fault, unless the header is
    a JSON object of known types whose byte ranges fit shapes and fill the file exactly.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(
                f"{path}: no safetensors file: a header of {length:,} bytes in a file of {size:,} "
                f"(at most {MAX_HEADER:,}); it is cut, or something else"
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the safetensors header is not readable ({error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the safetensors header is a {type(header).__name__}, no object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, 8 + length, name, entry) for name, entry in header.items()}
    end = 8 + length
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.nbytes)):
        if info.start != end:
            raise ValueError(
                f"{path}: {info.name} starts at byte {info.start:,}, the tensor before it ends at "
                f"{end:,}; ranges must neither overlap nor leave holes"
            )
        end += info.nbytes
    if end != size:
        raise ValueError(
            f"{path}: its tensors end at byte {end:,}, the file at {size:,}; "
            + ("it is cut, fetch it again" if end > size else "it has bytes that belong to nothing")
        )
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _tensor(path: Path, base: int, name: str, entry: Any) -> TensorInfo:
    """One entry of a header, checked."""
    count = lambda x: type(x) is int and 0 <= x < 2**63  # noqa: E731
    fine = (
        isinstance(entry, dict)
        and entry.keys() == {"dtype", "shape", "data_offsets"}
        and isinstance(entry["shape"], list)
        and all(map(count, entry["shape"]))
        and isinstance(entry["data_offsets"], list)
        and len(entry["data_offsets"]) == 2
        and all(map(count, entry["data_offsets"]))
    )
    if not fine:
        raise ValueError(f"{path}: {name}: its header entry {str(entry)[:200]} is malformed")
    if entry["dtype"] not in DTYPES:
        raise ValueError(
            f"{path}: {name}: type {str(entry['dtype'])[:40]!r}; known are {', '.join(DTYPES)}"
        )
    low, high = entry["data_offsets"]
    info = TensorInfo(name, DTYPES[entry["dtype"]], tuple(entry["shape"]), path, base + low)
    if high - low != info.nbytes:
        raise ValueError(
            f"{path}: {name}: {entry['dtype']}{list(info.shape)} takes {info.nbytes:,} bytes, its "
            f"range has {high - low:,}"
        )
    return info


def read(info: TensorInfo, index: tuple[slice | int, ...] = ()) -> np.ndarray:
    """`tensor[index]` for slices of step 1 and integers, reading no other rows.

    The bytes between the first and the last row asked for are read; where a part of every row is
    asked for and rows are long, each part is read by itself. Raises ValueError for a short read.
    """
    index = (*index, *(slice(None),) * (len(info.shape) - len(index)))
    bounds = []
    for size, item in zip(info.shape, index, strict=True):
        item = slice(item, item + 1) if isinstance(item, int) else item
        low, high, step = item.indices(size)
        assert step == 1, "only slices of step 1"
        bounds.append((low, max(low, high)))
    result = np.empty([high - low for low, high in bounds], info.dtype)
    with info.path.open("rb", buffering=0) as file:
        _fill(file.fileno(), info, bounds, result, info.start)
    return result.reshape([n for n, item in zip(result.shape, index, strict=True)
                           if not isinstance(item, int)])  # fmt: skip


PIECE = 512
"""Bytes of a row worth a read of their own; shorter ones are read with what lies between.

A read of cached bytes takes one or two microseconds, about as long as copying the whole row of a
wide matrix: devices that share a matrix by columns would otherwise each read all of it.
"""


def _fill(file: int, info: TensorInfo, bounds, out: np.ndarray, start: int, dim: int = 0) -> None:
    """Read dimensions `dim` and on into `out`, from the block that begins at byte `start`."""
    if out.size == 0:
        return
    if dim == len(bounds):
        _pread(file, info, out.reshape(-1).view(np.uint8), start)
        return
    inner = info.shape[dim + 1 :]
    stride = math.prod(inner) * info.dtype.itemsize
    low, high = bounds[dim]
    whole = all((a, b) == (0, n) for (a, b), n in zip(bounds[dim + 1 :], inner, strict=True))
    if whole:
        _pread(file, info, out.reshape(-1).view(np.uint8), start + low * stride)
    elif dim == len(bounds) - 2 and out.strides[0] >= PIECE:
        start += bounds[dim + 1][0] * info.dtype.itemsize
        for i, row in enumerate(out.view(np.uint8), low):
            _pread(file, info, row, start + i * stride)
    elif dim == len(bounds) - 2:
        rows = max(1, (1 << 24) // stride)  # 16 MiB at a time
        for first in range(low, high, rows):
            last = min(first + rows, high)
            band = np.empty((last - first, *inner), info.dtype)
            _pread(file, info, band.reshape(-1).view(np.uint8), start + first * stride)
            out[first - low : last - low] = band[:, slice(*bounds[dim + 1])]
    else:
        for i in range(low, high):
            _fill(file, info, bounds, out[i - low], start + i * stride, dim + 1)


def _pread(file: int, info: TensorInfo, into: np.ndarray, offset: int) -> None:
    view, done = memoryview(into), 0
    while done < len(view):
        got = os.preadv(file, [view[done : done + (1 << 30)]], offset + done)
        if got == 0:
            raise ValueError(
                f"{info.path}: {info.name}: the file ends {len(view) - done:,} bytes early"
            )
        done += got


def header_bytes(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    """Header of a file of these tensors, padded so that the tensors are aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        entry = {"dtype": _NAMES[dtype], "shape": list(shape)}
        header[name] = entry | {"data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(
    path: Path,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    arrays: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Write a file whose `arrays` come one at a time, in the order that `tensors` describes."""
    expected = iter(tensors.items())
    with path.open("wb") as file:
        file.write(header_bytes(tensors))
        for name, array in arrays:
            assert next(expected) == (name, (array.dtype, array.shape)), name
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        assert next(expected, None) is None, "arrays are missing"
        file.flush()
        os.fsync(file.fileno())
