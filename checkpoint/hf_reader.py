"""A Hugging Face folder as arrays of ours: any slice of any array, read by byte ranges.

Everything that can be wrong is found from the small parts (config.json, the index, the headers)
when the folder is opened; values are read when asked for, one tensor at a time. Nothing is mapped
and nothing is unpickled.
"""

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoint import fp8, hf_names, janus_config, safetensors
from checkpoint.hf_config import from_hf_config
from checkpoint.safetensors import TensorInfo
from model.config import ModelConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CARRIED = ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer*",
           "chat_template*", "added_tokens.json", "vocab.json", "merges.txt",
           "preprocessor_config.json", "processor_config.json")  # fmt: skip
"""Files next to the weights that an export copies."""
_FLOATS = tuple(safetensors.DTYPES[name] for name in ("F32", "BF16", "F16", "F64"))
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_COPY_SAMPLES = 16
"""Rows of an MTP layer's copy of embedding or head that are compared when a folder is opened."""
READERS = 8
"""Tensors that are read and converted side by side, a band of rows of each at a time."""
BAND = 1 << 19
"""Elements of a band: each reader holds about 16 bytes for every one of them."""
_COPY_BLOCK = 64 << 20
"""Bytes compared at a time when a conversion compares all of them."""


def carried_files(folder: Path) -> list[Path]:
    """Files of a folder that an export copies."""
    return sorted({file for pattern in CARRIED for file in folder.glob(pattern)})


def own_files(run_dir: Path) -> list[Path]:
    """Files of a run folder of ours that belong to its weights: those that came with an import,
    else what the run keeps of its tokenizer; config.json is the run's own."""
    imported = carried_files(run_dir / "hf")
    return imported or [file for file in carried_files(run_dir) if file.name != "config.json"]


def tokenizer_file(folder: Path) -> Path | None:
    """tokenizer.json of the weights in a folder, a release's or a run's; None without one."""
    found = [file for file in own_files(folder) if file.name == "tokenizer.json"]
    return found[0] if found else None


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One matrix or vector of the names table inside a stored tensor."""

    info: TensorInfo
    lead: tuple[int, ...] = ()
    """Index of the expert in a fused tensor."""
    row: int = 0
    """First row there: `up` follows `gate`."""
    scale: TensorInfo | None = None


def is_hf_folder(path: Path) -> bool:
    """Whether `path` holds a config.json in Hugging Face's format."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "model_type" in config


class HuggingFaceFolder:
    """An opened folder.

    Attributes: path; config (ModelConfig; with mtp_depth 0, and a warning, where config.json
    promises MTP layers that the files do not have); quantized (some tensors are FP8); bytes (size
    of all tensors).

    Raises ValueError that names the file or tensor for anything missing, unknown, misshapen or
    malformed, for paths that leave the folder, and for pickled weights.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = _read_config(path)
        infos = _read_headers(path)
        self.bytes = sum(info.nbytes for info in infos.values())
        _check_sizes(self.config, infos)
        first_mtp = self.config.num_layers
        if self.config.mtp_depth and not any(_layer(name) >= first_mtp for name in infos):
            warnings.warn(
                f"{path}: config.json names {self.config.mtp_depth} MTP layers, the files hold "
                "none; the model is read without them",
                stacklevel=2,
            )
            self.config = dataclasses.replace(self.config, mtp_depth=0)
        self._entries = {(e.tree, e.path): e for e in hf_names.table(self.config)}
        self._pieces = _match(path, infos, list(self._entries.values()), self.config)
        self.quantized = any(piece.scale for piece in self._pieces.values())
        self._copies = [
            (infos[copy], infos[original])
            for copy, original in hf_names.shared_copies(self.config).items()
            if copy in infos
        ]
        self.compare_copies(_COPY_SAMPLES)

    @property
    def carried(self) -> list[Path]:
        """Configuration, tokenizer and generation files."""
        return carried_files(self.path)

    def compare_copies(self, samples: int | None = None) -> None:
        """Raise ValueError unless MTP layers repeat embedding and head exactly.

        All rows are read, or `samples` of them spread over each tensor.
        """
        for copy, original in self._copies:
            _compare(copy, original, samples)

    def scale_inv(self, name: str) -> np.ndarray | None:
        """FP8 factors of a tensor; None when it is not FP8."""
        scale = self._pieces[name].scale
        return None if scale is None else safetensors.read(scale).astype(np.float32)

    def scales(self) -> dict[str, TensorInfo]:
        """Name of every FP8 weight -> its factors."""
        return {name: piece.scale for name, piece in self._pieces.items() if piece.scale}

    def read(self, tree: str, path: str, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """`array[index]` of one of our arrays ("params" or "router_bias", path), as `dtype`.

        Reads the byte ranges of that slice only, READERS tensors at a time.
        """
        entry = self._entries[tree, path]
        index = (*index, *(slice(None),) * (len(entry.our_shape) - len(index)))
        stacked = entry.names.ndim
        ranges = [range(n)[s] for n, s in zip(entry.our_shape, index, strict=True)]
        result = np.empty([len(r) for r in ranges], dtype)

        axis = stacked + len(entry.in_dims or ())  # rows of the stored matrix
        bands = _bands(ranges[axis], math.prod(map(len, ranges[stacked:])))

        def fill(place: tuple[int, ...]) -> None:
            name = str(entry.names[tuple(r[i] for r, i in zip(ranges, place, strict=False))])
            into = np.moveaxis(result[place], axis - stacked, 0)
            for low, high in bands:
                rows = slice(ranges[axis][low], ranges[axis][high - 1] + 1)
                part = self._tensor(name, entry, (*index[stacked:axis], rows, *index[axis + 1 :]))
                # Converted as it lies and then transposed: the other way takes twice as long.
                part = part.astype(dtype, copy=False)
                into[low:high] = np.moveaxis(part, axis - stacked, 0)

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(fill, np.ndindex(result.shape[:stacked])))
        return result

    def _tensor(self, name: str, entry: hf_names.Entry, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of one tensor, in our layout, fp32 or as stored."""
        piece = self._pieces[name]
        if entry.in_dims is None:
            return safetensors.read(piece.info, index)
        if not entry.in_dims:
            rows, inner = _flat(entry.out_dims, index)
            vector = safetensors.read(piece.info, (rows,))
            return vector.reshape(-1, *entry.out_dims[1:])[(slice(None), *inner)]
        inputs, outputs = index[: len(entry.in_dims)], index[len(entry.in_dims) :]
        columns, inner_in = _flat(entry.in_dims, inputs)
        rows, inner_out = _flat(entry.out_dims, outputs)
        at = slice(rows.start + piece.row, rows.stop + piece.row)
        matrix = safetensors.read(piece.info, (*piece.lead, at, columns))
        if piece.scale is not None:
            blocks = tuple(slice(s.start // fp8.BLOCK, -(-s.stop // fp8.BLOCK))
                           for s in (rows, columns))  # fmt: skip
            factors = safetensors.read(piece.scale, blocks).astype(np.float32)
            if not np.isfinite(factors).all():
                raise ValueError(f"{piece.scale.path}: {piece.scale.name} holds NaN or infinity")
            matrix = fp8.dequantize(matrix, factors, rows.start, columns.start)
            if np.isnan(matrix).any():
                raise ValueError(f"{piece.info.path}: {name} holds FP8 NaN")
        array = matrix.T.reshape(-1, *entry.in_dims[1:], matrix.shape[0])
        array = array[(slice(None), *inner_in)]
        array = array.reshape(*array.shape[:-1], -1, *entry.out_dims[1:])
        return array[(..., *(slice(None),), *inner_out)]

    def load(self, abstract: Any, progress: Callable[[int], None] | None = None) -> Any:
        """{"params": tree, "router_bias": tree} of arrays as `abstract` (ShapeDtypeStructs with
        shardings) asks for; it may leave out the MTP modules.

        Main memory, besides the arrays: one device's shard of one array and READERS bands. Every
        process reads its own devices' shards. `progress` is told the bytes of each finished shard.
        """

        def array(path, wanted: jax.ShapeDtypeStruct) -> jax.Array:
            tree, *keys = (key.key for key in path)
            name = "/".join(keys)
            if (tree, name) not in self._entries:
                raise ValueError(f"{self.path} has no {tree} {name}; use its own configuration")
            ours = self._entries[tree, name].our_shape
            if ours != wanted.shape:
                raise ValueError(f"{self.path}: {name} is {ours}, {wanted.shape} was asked for")
            assert wanted.sharding is not None
            holders: dict[Any, list[Any]] = {}
            for device, index in wanted.sharding.addressable_devices_indices_map(ours).items():
                assert index is not None
                bounds = tuple(s.indices(n)[:2] for s, n in zip(index, ours, strict=True))
                holders.setdefault(bounds, []).append(device)
            placed = []
            for bounds, devices in holders.items():
                index = tuple(slice(*pair) for pair in bounds)
                shard = self.read(tree, name, index, wanted.dtype)
                # Waited for, so that one shard is gone from main memory before the next is read.
                placed += jax.block_until_ready([jax.device_put(shard, d) for d in devices])
                if progress is not None:
                    progress(shard.nbytes)
            return jax.make_array_from_single_device_arrays(ours, wanted.sharding, placed)

        return jax.tree_util.tree_map_with_path(array, abstract)


def _bands(rows: range, elements: int) -> list[tuple[int, int]]:
    """Cuts of `rows`, (first, one past the last) counted from its start, of about BAND elements."""
    count = max(1, len(rows) * BAND // max(elements, 1))
    return [(low, min(low + count, len(rows))) for low in range(0, len(rows), count)]


def _flat(dims: tuple[int, ...], index: tuple[slice, ...]) -> tuple[slice, tuple[slice, ...]]:
    """Rows (or columns) that hold dims[index], and what is left to cut from the inner dims."""
    low, high, _ = index[0].indices(dims[0])
    inner = int(np.prod(dims[1:]))
    return slice(low * inner, high * inner), index[1:]


def _layer(name: str) -> int:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _read_config(path: Path) -> ModelConfig:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except FileNotFoundError:
        raise ValueError(f"{path} is no Hugging Face folder: it has no config.json") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON that can be read ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, not an object")
    return from_hf_config(config)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a key that is there twice, of which a reader takes either."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice; leave the one that is meant")
    return found


def _check_sizes(config: ModelConfig, infos: dict[str, TensorInfo]) -> None:
    """Raise ValueError for more layers or experts than the files can hold, before any is listed."""
    most = max((size for info in infos.values() for size in info.shape), default=0)
    for name, value, limit in (
        ("num_hidden_layers with MTP layers", config.num_layers + config.mtp_depth, len(infos)),
        ("n_routed_experts", config.num_experts if config.num_moe_layers else 0, most),
        *((key, count, len(infos)) for key, count in janus_config.depths(config).items()),
    ):
        if value > limit:
            raise ValueError(
                f"config.json: {name} is {value}; the files hold {len(infos)} tensors of at most "
                f"{most} rows, which is not enough"
            )


def _read_headers(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the folder, by name."""
    index, single = path / INDEX, path / SINGLE
    if not index.exists():
        if single.exists():
            return safetensors.read_header(single)
        pickled = sorted(p.name for p in [*path.glob("*.bin"), *path.glob("*.pt*")])
        why = (
            f"only {', '.join(pickled[:3])}, which are pickles and never read: a pickle runs code "
            "when it is loaded. Fetch the safetensors release"
            if pickled
            else f"neither {INDEX} nor {SINGLE}"
        )
        raise ValueError(f"{path} has no weights to read: {why}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} has no usable weight_map ({error!r})") from None
    infos: dict[str, TensorInfo] = {}
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or file[:1] in ("", "."):
            raise ValueError(f"{index} names {file!r}; shards must be plain names in {path}")
        if not (path / file).is_file():
            count = sum(value == file for value in weight_map.values())
            raise ValueError(f"{path / file} is missing; the index places {count} tensors there")
        for name, info in safetensors.read_header(path / file).items():
            if weight_map.get(name) != file:
                raise ValueError(
                    f"{path / file} holds {name}, which the index places in "
                    f"{weight_map.get(name)!r}"
                )
            infos[name] = info
    if absent := sorted(weight_map.keys() - infos.keys()):
        shown = ", ".join(f"{name} ({weight_map[name]})" for name in absent[:5])
        raise ValueError(f"{index}: {len(absent)} tensors are not where it says: {shown}")
    return infos


def _match(
    path: Path, infos: Mapping[str, TensorInfo], entries: list[hf_names.Entry], config: ModelConfig
) -> dict[str, _Piece]:
    """Place of each tensor of the names table; ValueError lists all that does not fit."""
    pieces, problems, used = {}, [], set()
    for entry in entries:
        for name in entry.names.flat:
            piece = _find(name, infos, entry.stored_shape[0])
            if piece is None:
                problems.append(f"{name}: expected {list(entry.stored_shape)}, found nothing")
                continue
            used.add(piece.info.name)
            shape = entry.stored_shape
            if piece.lead:
                rows = shape[0] * (2 if piece.info.name.endswith("gate_up_proj") else 1)
                shape = (config.num_experts, rows, shape[1])
            if piece.info.shape != shape:
                problems.append(
                    f"{piece.info.name}: expected {list(shape)}, found {list(piece.info.shape)}"
                )
            elif piece.info.dtype == fp8.E4M3:
                scale = infos.get(f"{name}_scale_inv")
                used.add(f"{name}_scale_inv")
                wanted = fp8.scale_shape(shape) if len(shape) == 2 else None
                if wanted is None or scale is None or scale.shape != wanted:
                    found = "nothing" if scale is None else list(scale.shape)
                    problems.append(f"{name}_scale_inv: expected {wanted}, found {found}")
                    continue
                piece = dataclasses.replace(piece, scale=scale)
            elif piece.info.dtype not in _FLOATS:
                problems.append(f"{name}: type {piece.info.dtype} holds no weights")
            pieces[name] = piece
    known = used | hf_names.shared_copies(config).keys()
    for name in sorted(infos.keys() - known):
        if not hf_names.DERIVED.fullmatch(name):
            problems.append(f"{name}: found {list(infos[name].shape)}, expected nothing")
    if problems:
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"{path}: {len(problems)} tensors do not fit config.json:\n  "
            + "\n  ".join(problems[:8]) + more
            + "\nCheck that config.json and weights are of the same model"
        )  # fmt: skip
    return pieces


def _find(name: str, infos: Mapping[str, TensorInfo], rows: int) -> _Piece | None:
    """The tensor of that name, or its part of a tensor that fuses all experts."""
    if name in infos:
        return _Piece(infos[name])
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    kind = "down_proj" if match[3] == "down" else "gate_up_proj"
    info = infos.get(f"{match[1]}.{kind}")
    if info is None:
        return None
    return _Piece(info, (int(match[2]),), rows if match[3] == "up" else 0)


def _compare(copy: TensorInfo, original: TensorInfo, samples: int | None) -> None:
    rows = original.shape[0]
    if samples is None:
        block = max(1, _COPY_BLOCK * rows // max(original.nbytes, 1))
        parts = [slice(low, low + block) for low in range(0, rows, block)]
    else:
        parts = [slice(r, r + 1) for r in np.linspace(0, rows - 1, min(samples, rows)).astype(int)]
    same = copy.shape == original.shape and all(
        np.array_equal(safetensors.read(copy, (part,)), safetensors.read(original, (part,)))
        for part in parts
    )
    if not same:
        raise ValueError(
            f"{copy.path}: {copy.name} differs from {original.name}; the model has one of both "
            "(tied, or shared with MTP modules), so the two must be equal"
        )
