"""A run's weights as a Hugging Face folder for a server to load, straight from memory."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoint.hf_writer import export
from model.blueprint import Tree
from model.config import ModelConfig

SERVED = "served"
"""Folder of a run that a server loads."""


class LiveWeights:
    """Arrays in memory as `checkpoint/weights.py:Weights`; all are on devices of this process."""

    def __init__(self, config: ModelConfig, run_dir: Path, params: Tree, router_bias: Tree):
        self.path, self.config = run_dir, config
        state = {"params": params, "router_bias": router_bias}
        leaves, _ = jax.tree_util.tree_flatten_with_path(state)
        self._arrays = {
            jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves
        }

    @property
    def carried(self) -> list[Path]:
        """The run's tokenizer."""
        own = self.path / "tokenizer.json"
        return [own] if own.exists() else []

    def scale_inv(self, name: str) -> np.ndarray | None:
        """None: these weights were not released in FP8."""
        del name

    def read(self, tree: str, path: str, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """As `Weights.read`."""
        return np.asarray(jax.device_get(self._arrays[f"{tree}/{path}"][index])).astype(dtype)

    def load(self, abstract: Any, progress: Any = None) -> Any:
        """Not there: these weights are loaded already."""
        raise ValueError("these weights are in memory already; read them")


def export_live(
    config: ModelConfig, run_dir: Path, params: Tree, router_bias: Tree, folder: Path
) -> None:
    """Write the weights to `folder`, in bf16, as `convert.py export` would."""
    export(LiveWeights(config, run_dir, params, router_bias), folder, say=lambda line: None)
