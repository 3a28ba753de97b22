"""A file of hf_reference.py, with our model holding the same weights."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoint.hf_config import from_hf_config
from model.blueprint import bind
from model.config import ModelConfig
from model.transformer import Tokens
from tests.hf_state import from_hf

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """One run of hf_reference.py, and our model with the same weights. Compared by identity."""

    config: ModelConfig
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    weights: dict[str, Any]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    @functools.cached_property
    def model(self):
        """Our model with these weights."""
        weights = jax.tree.map(jnp.asarray, self.weights)
        return bind(self.config, weights["params"], weights["router_bias"])

    @functools.cached_property
    def tokens(self) -> Tokens:
        """The inputs, at positions 0, 1, 2..."""
        ids_BT = jnp.asarray(self.arrays["tokens"])
        return Tokens(ids_BT, jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape), None)

    def layer(self, index: int) -> nnx.Module:
        """One decoder layer taken out of its stack."""
        dense = self.config.num_dense_layers
        stack = self.model.dense_layers if index < dense else self.model.moe_layers
        graph, weights = nnx.split(stack)
        offset = index if index < dense else index - dense
        return nnx.merge(graph, jax.tree.map(lambda a: a[offset], weights))

    @property
    def first_moe(self):
        """The experts whose inputs and outputs were recorded."""
        return self.layer(self.config.num_dense_layers).moe


def read(file: pathlib.Path) -> Reference:
    with np.load(file) as archive:
        arrays = dict(archive)
    meta = json.loads(str(arrays.pop("meta")))
    config = from_hf_config(meta["config"])
    state = {name[2:]: value for name, value in arrays.items() if name.startswith("w:")}
    return Reference(config, meta, arrays, state, from_hf(state, config))


@functools.cache
def golden(case: str) -> Reference:
    return read(GOLDEN / f"{case}.npz")
