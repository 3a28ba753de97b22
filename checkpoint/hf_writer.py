"""Hugging Face folders, written one tensor at a time.

Main memory: about three times the largest tensor (the embedding), whatever the model's size.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from checkpoint import fp8, safetensors
from checkpoint.hf_config import from_hf_config, to_hf_config
from checkpoint.hf_names import ROUTER_BIAS, Entry, shared_copies, table
from checkpoint.hf_reader import INDEX, HuggingFaceFolder
from checkpoint.partial import new_folder
from checkpoint.weights import Weights
from model.config import ModelConfig

DTYPES = {"fp32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
_TORCH = {"fp32": "float32", "bf16": "bfloat16"}
_FLOAT32 = np.dtype(np.float32)
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [fp8.BLOCK, fp8.BLOCK],
}
"""config.json of released FP8 checkpoints."""

Specs = dict[str, tuple[np.dtype, tuple[int, ...]]]
Source = tuple[Entry, tuple[int, ...]]


def is_quantized(name: str) -> bool:
    """Whether releases keep this tensor in FP8: the matrices of attention, MLPs and experts."""
    return name.endswith("_proj.weight") and not name.endswith("eh_proj.weight")


def layout(config: ModelConfig, dtype: str, fp8_blocks: bool) -> tuple[Specs, dict[str, Source]]:
    """Every tensor to write with its type and shape, and where its values come from.

    The router's bias stays fp32: it only ranks, and its steps are smaller than bf16 resolves.
    """
    specs: Specs = {}
    sources: dict[str, Source] = {}
    for entry in table(config):
        kept = _FLOAT32 if entry.tree == ROUTER_BIAS else DTYPES[dtype]
        for place in np.ndindex(entry.names.shape):
            name = str(entry.names[place])
            sources[name] = (entry, place)
            specs[name] = (kept, entry.stored_shape)
            if fp8_blocks and is_quantized(name):
                rows, columns = entry.stored_shape
                specs[name] = (fp8.E4M3, (rows, columns))
                specs[f"{name}_scale_inv"] = (_FLOAT32, fp8.scale_shape((rows, columns)))
    copies = {} if config.tie_embeddings else shared_copies(config)
    for copy, original in copies.items():
        specs[copy], sources[copy] = specs[original], sources[original]
    return specs, sources


def export(
    weights: Weights,
    dst: Path,
    *,
    dtype: Literal["bf16", "fp32"] = "bf16",
    fp8_blocks: bool = False,
    shard_bytes: int = 5_000_000_000,
    say: Callable[[str], None] = print,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `weights` as a folder that transformers loads; MTP modules and their copies included.

    `fp8_blocks` stores matrices as released: FP8 with factors per block. `progress` is told (bytes
    written, bytes in all) after each tensor. Raises ValueError for an existing `dst`, a disk
    without room, weights that are not finite (FP8), and a model without a Hugging Face type.
    """
    if isinstance(weights, HuggingFaceFolder):
        weights.compare_copies()
    specs, sources = layout(weights.config, dtype, fp8_blocks)
    total = sum(map(_bytes, specs.values()))
    config = _config_json(weights, dtype, fp8_blocks)
    carried = [file for file in weights.carried if file.name != "config.json"]
    written = 0

    def arrays(shard: Specs) -> Iterator[tuple[str, np.ndarray]]:
        nonlocal written
        for name in shard:
            if name not in sources:
                continue  # factors come with their weight
            for part, array in _tensors(weights, name, sources[name], specs[name][0]):
                yield part, array
                written += array.nbytes
            if progress is not None:
                progress(written, total)

    needed = total + 200 * len(specs) + sum(file.stat().st_size for file in carried)
    with new_folder(dst, needed, say) as work:
        shards = _shards(specs, shard_bytes)
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            safetensors.write(work / file, shard, arrays(shard))
            weight_map |= dict.fromkeys(shard, file)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (work / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        for file in carried:
            shutil.copyfile(file, work / file.name)
        names = {file.name for file in carried}
        if "tokenizer.json" in names and "tokenizer_config.json" not in names:
            # Without it transformers does not know which tokens begin, end and pad a text.
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", **_special_tokens(weights)[0]}
            (work / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), "utf-8")
        # Last: without it a folder is not one of Hugging Face's.
        (work / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _bytes(spec: tuple[np.dtype, tuple[int, ...]]) -> int:
    dtype, shape = spec
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))


def _shards(specs: Specs, limit: int) -> list[Specs]:
    """Files of at most `limit` bytes (or one tensor); a weight and its factors stay together."""
    shards: list[Specs] = [{}]
    size = 0
    for name, spec in specs.items():
        grows = _bytes(spec)
        if shards[-1] and size + grows > limit and not name.endswith("_scale_inv"):
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += grows
    return shards


def _tensors(
    weights: Weights, name: str, source: Source, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """A tensor as it is stored, followed by its factors if it is FP8."""
    entry, place = source
    index = tuple(slice(i, i + 1) for i in place)
    read = _FLOAT32 if dtype == fp8.E4M3 else dtype
    array = weights.read(entry.tree, entry.path, index, read)[(0,) * len(place)]
    if dtype != fp8.E4M3:
        yield name, entry.store(array)
        return
    matrix = entry.store(array)
    narrow = matrix.astype(DTYPES["bf16"])
    if np.array_equal(narrow.astype(np.float32), matrix):
        # Kept in bf16 since it came from FP8: compared with its old blocks at that precision.
        matrix = narrow
    try:
        q, scale_inv = fp8.quantize(matrix, weights.scale_inv(name))
    except ValueError as error:
        raise ValueError(f"{weights.path}: {name} {error}") from None
    yield name, q
    yield f"{name}_scale_inv", scale_inv


_SPECIAL = {
    "bos_token": "<｜begin▁of▁sentence｜>",
    "eos_token": "<｜end▁of▁sentence｜>",
    "pad_token": "<｜▁pad▁｜>",
}
"""DeepSeek's names."""


def _special_tokens(weights: Weights) -> tuple[dict[str, str], dict[str, int]]:
    """Names {"eos_token": ..} and ids {"eos_token_id": ..} of those that the tokenizer has; other
    names than DeepSeek's are those of tokenizer_config.json."""
    files = {file.name: file for file in weights.carried if file.suffix == ".json"}
    texts = {name: json.loads(file.read_text("utf-8")) for name, file in files.items()}
    added = texts.get("tokenizer.json", {}).get("added_tokens", ())
    ids = {token["content"]: token["id"] for token in added}
    given = {key: texts.get("tokenizer_config.json", {}).get(key) for key in _SPECIAL}
    given = {key: x["content"] if isinstance(x, dict) else x for key, x in given.items()}
    names = {key: given[key] or name for key, name in _SPECIAL.items()}
    found = {key: name for key, name in names.items() if name in ids}
    return found, {f"{key}_id": ids[name] for key, name in found.items()}


def _config_json(weights: Weights, dtype: str, fp8_blocks: bool) -> dict[str, Any]:
    """The release's own config.json where it still describes the model; else one of ours."""
    found = [file for file in weights.carried if file.name == "config.json"]
    theirs = json.loads(found[0].read_text(encoding="utf-8")) if found else {}
    if theirs and from_hf_config(theirs) == weights.config:
        config = dict(theirs)
    else:
        ids = {f"{name}_id": None for name in _SPECIAL} | _special_tokens(weights)[1]
        config = to_hf_config(weights.config) | {k: theirs.get(k, i) for k, i in ids.items()}
    old = config.pop("quantization_config", {})
    config.pop("dtype", None)
    config["torch_dtype"] = _TORCH[dtype]
    if fp8_blocks:
        config["quantization_config"] = old or QUANTIZATION
    return config
