"""Weights from wherever they are: a Hugging Face folder, or a run folder of ours.

Both give the same three things: the model's configuration, whole arrays on any mesh (`load`), and
single slices in main memory (`read`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorstore

from checkpoint import safetensors
from checkpoint.config import CheckpointConfig
from checkpoint.folder import find_steps, unreadable_reason
from checkpoint.hf_reader import HuggingFaceFolder, is_hf_folder, own_files
from checkpoint.manager import CheckpointManager
from model.config import BandsConfig, ModelConfig, YarnConfig
from vision.config import EncoderConfig, JanusConfig, TokenizerConfig

SCALES = "scales.safetensors"
"""In a run folder's `hf/`: the FP8 factors that its weights were imported with."""

_PIECE = 1 << 20
"""Bytes of the start and of the end of a file that `weights_version` reads: headers and some
weights, of files that may have terabytes."""


class Weights(Protocol):
    """Weights that can be read."""

    path: Path
    config: ModelConfig

    @property
    def carried(self) -> list[Path]:
        """Files of a Hugging Face release that belong to the weights."""
        ...

    def scale_inv(self, name: str) -> np.ndarray | None:
        """FP8 factors that the tensor of this name was released with; None when there are none."""
        ...

    def read(self, tree: str, path: str, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """`array[index]` of "params" or "router_bias", as `dtype`."""
        ...

    def load(self, abstract: Any, progress: Callable[[int], None] | None = None) -> Any:
        """Arrays as the tree of ShapeDtypeStructs with shardings asks for."""
        ...


def open_weights(path: Path) -> Weights:
    """Open a Hugging Face folder, or a folder of `train.py` or of `convert.py import`.

    Raises ValueError that says what was looked for when it is neither, or what is wrong with it.
    """
    if is_hf_folder(path):
        return HuggingFaceFolder(path)
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        return RunFolder(path)
    what = "does not exist" if not path.exists() else "is neither"
    raise ValueError(
        f"{path} {what}: give a Hugging Face folder (config.json with model_type, safetensors), or "
        "a run folder (config.json and checkpoints/, as train.py and convert.py import write)"
    )


class RunFolder:
    """The newest good checkpoint of a run folder."""

    def __init__(self, path: Path):
        self.path = path
        self.config = _model_config(path / "config.json")
        good = [p for _, p in find_steps(path / "checkpoints") if unreadable_reason(p) is None]
        if not good:
            raise ValueError(f"{path / 'checkpoints'} holds no checkpoint that can be read")
        self.step_folder = good[-1]
        scales = path / "hf" / SCALES
        self._scales = safetensors.read_header(scales) if scales.exists() else {}
        self._open: tuple[str, Any] | None = None

    @property
    def carried(self) -> list[Path]:
        """Files that came with an import, or what the run keeps of its tokenizer."""
        return own_files(self.path)

    def scale_inv(self, name: str) -> np.ndarray | None:
        """As `Weights.scale_inv`."""
        return safetensors.read(self._scales[name]) if name in self._scales else None

    def load(self, abstract: Any, progress: Callable[[int], None] | None = None) -> Any:
        """As `Weights.load`; checked against the checksums of the checkpoint, cast where needed."""
        import jax

        saved = jax.tree.map(self._as_saved, self._named(abstract), abstract)
        with CheckpointManager(
            self.path / "checkpoints", CheckpointConfig(), read_only=True
        ) as manager:
            state = manager.restore(saved, partial=True)
        if progress is not None:
            progress(sum(x.nbytes for x in jax.tree.leaves(state)))
        return jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), state, abstract)

    def read(self, tree: str, path: str, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """As `Weights.read`."""
        name = f"{tree}/{path}"
        if self._open is None or self._open[0] != name:
            self._open = name, self._store(name)
        return self._result(name, self._open[1][index].read()).astype(dtype)

    def _store(self, name: str) -> Any:
        spec = array_spec(self.step_folder, name)
        return self._result(name, tensorstore.open(spec, read=True))

    def _result(self, name: str, pending: Any) -> Any:
        try:
            return pending.result()
        except ValueError as error:
            raise ValueError(f"{self.step_folder}: {name} cannot be read ({error})") from None

    def _named(self, abstract: Any) -> Any:
        import jax

        return jax.tree_util.tree_map_with_path(
            lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), abstract
        )

    def _as_saved(self, name: str, wanted: Any) -> Any:
        import jax

        dtype = self._store(name).dtype.numpy_dtype
        return jax.ShapeDtypeStruct(wanted.shape, dtype, sharding=wanted.sharding)


def weights_version(weights: Weights) -> str:
    """Digest that tells the weights from others that have been or will be in the same folder.

    Of a run folder it covers the checksums of all arrays, of a Hugging Face folder config.json and
    every safetensors file's size, start and end.
    """
    if isinstance(weights, RunFolder):
        meta = weights.step_folder / "meta" / "metadata"
        return hashlib.sha256(meta.read_bytes()).hexdigest()[:16]
    digest = hashlib.sha256((weights.path / "config.json").read_bytes())
    for file in sorted(weights.path.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            digest.update(content.read(_PIECE))
            content.seek(max(0, size - _PIECE))
            digest.update(content.read(_PIECE))
    return digest.hexdigest()[:16]


def version_of(place: str) -> str:
    """`weights_version` of a folder; "none" where there are no weights (whoever reads them says
    why)."""
    try:
        return weights_version(open_weights(Path(place))) if place else "none"
    except (ValueError, OSError):
        return "none"


def array_spec(step_folder: Path, name: str) -> dict[str, Any]:
    """Place of the array `name` in Orbax's checkpoint, as a tensorstore spec (zarr in OCDBT).

    Missing data is an error, not zeros, which are therefore written like all else.
    """
    base = f"file://{(step_folder / 'state').absolute()}"
    return {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }


def _model_config(file: Path) -> ModelConfig:
    """The "model" of a run's config.json."""
    try:
        fields = dict(json.loads(file.read_text(encoding="utf-8"))["model"])
        for name, kind in (("yarn", YarnConfig), ("bands", BandsConfig)):
            if fields.get(name) is not None:
                fields[name] = kind(**fields[name])
        if "encoder" not in fields:
            return ModelConfig(**fields)
        tokenizer = fields["tokenizer"]
        tokenizer = TokenizerConfig(**{**tokenizer, "multipliers": tuple(tokenizer["multipliers"])})
        fields |= {"encoder": EncoderConfig(**fields["encoder"]), "tokenizer": tokenizer}
        return JanusConfig(**fields)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not describe a model of this version ({error})") from None


def differences(a: ModelConfig, b: ModelConfig) -> list[str]:
    """Fields in which two configurations differ; those that are no property of weights left out."""
    if type(a) is not type(b):
        return [f"kind of model: {type(a).__name__} against {type(b).__name__}"]
    free = "init_std", "max_position"
    fields = [f.name for f in dataclasses.fields(a) if f.name not in free]
    return [
        f"{name}: {getattr(a, name)} against {getattr(b, name)}"
        for name in fields
        if getattr(a, name) != getattr(b, name)
    ]


def open_initial(path: Path, config: ModelConfig) -> tuple[Weights, tuple[str, ...]]:
    """Weights for a new run of the model `config`, and the parts of it that they lack: "mtp" where
    they have no MTP modules, "head" where theirs is the embedding.

    Raises ValueError that lists the fields in which the two models differ otherwise.
    """
    weights = open_weights(path)
    wanted, lacking = config, []
    if weights.config.mtp_depth == 0 and config.mtp_depth > 0:
        wanted, lacking = dataclasses.replace(wanted, mtp_depth=0), [*lacking, "mtp"]
    if weights.config.tie_embeddings and not config.tie_embeddings:
        wanted, lacking = dataclasses.replace(wanted, tie_embeddings=True), [*lacking, "head"]
    if unlike := differences(weights.config, wanted):
        raise ValueError(
            f"{path} holds another model than this run's:\n  "
            + "\n  ".join(unlike)
            + "\n(weights against run); give the run the same --config or --model.* fields"
        )
    return weights, tuple(lacking)


def load_initial(path: Path, config: ModelConfig, abstract: Any) -> tuple[Any, str]:
    """({"params", "router_bias"}, what was loaded) for a new run of the model `config`.

    `abstract` has the structure, types and shardings wanted. Weights without MTP modules serve a
    model with them: the returned trees then lack "mtp", and the text says so. A head that theirs
    lack begins as the embedding. Raises ValueError as `open_initial` does.
    """
    weights, lacking = open_initial(path, config)
    held = {
        tree: {k: v for k, v in abstract[tree].items() if k not in lacking}
        for tree in ("params", "router_bias")
    }
    loaded = weights.load(held)
    note = f"weights from {path}, fresh optimizer state"
    if "mtp" in lacking:
        note += "; it has no MTP modules, these start at random"
    if "head" in lacking:
        import jax

        place = abstract["params"]["head"]["kernel"].sharding
        head = jax.jit(lambda table_VD: table_VD.T, out_shardings=place)
        loaded["params"]["head"] = {"kernel": head(loaded["params"]["embed"]["table"])}
        note += "; its head is the embedding, from which this run's begins"
    return loaded, note
