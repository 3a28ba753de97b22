"""A whole V3 of a few thousand weights, and folders that hold it, for tests of files and text."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np

from checkpoint.config import CheckpointConfig
from checkpoint.hf_config import to_hf_config
from checkpoint.manager import CheckpointManager
from model.blueprint import initialize
from model.config import ModelConfig
from tests.hf_state import to_hf

CONFIG = ModelConfig(
    vocab_size=320, hidden_size=32, num_layers=3, num_dense_layers=1, num_heads=4,
    q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12,
    dense_ffn_size=48, expert_ffn_size=16, num_experts=8, num_shared_experts=1,
    experts_per_token=2, num_expert_groups=4, groups_per_token=2, routed_scaling_factor=2.5,
    max_position=512, mtp_depth=1, init_std=0.15,
)  # fmt: skip


@functools.cache
def weights(config: ModelConfig = CONFIG) -> Any:
    """{"params", "router_bias"} as numpy arrays; biases are not zero."""
    params, bias = jax.device_get(initialize(config, jax.random.key(1)))
    rng = np.random.default_rng(2)
    bias = jax.tree.map(lambda b: rng.normal(0, 0.05, b.shape).astype(np.float32), bias)
    return {"params": params, "router_bias": bias}


def run_folder(path: pathlib.Path, trees: Any, config: ModelConfig = CONFIG) -> pathlib.Path:
    """A run folder of ours with these weights."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model": dataclasses.asdict(config)}))
    state = jax.tree.map(jax.numpy.asarray, trees)
    with CheckpointManager(path / "checkpoints", CheckpointConfig()) as manager:
        manager.save(0, state, {}, {}, {})
    return path


def tensors(trees: Any, config: ModelConfig = CONFIG, **options: Any) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face folder, contiguous."""
    state = to_hf(trees, config, **options)
    return {name: np.ascontiguousarray(tensor) for name, tensor in state.items()}


def hf_folder(
    path: pathlib.Path, shards: list[dict[str, np.ndarray]], config: ModelConfig = CONFIG
) -> pathlib.Path:
    """A Hugging Face folder written by the safetensors library, with an index."""
    from safetensors.numpy import save_file

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(to_hf_config(config)))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, path / name)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path
