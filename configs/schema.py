"""RunConfig: everything that decides a run, as one frozen tree of the parts' own dataclasses."""

import dataclasses
from typing import Literal

from checkpoint.config import CheckpointConfig
from data.config import DataConfig
from model.config import ModelConfig
from sharding.config import MeshConfig
from training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run. Presets in this package return it; the command line overrides any field."""

    model: ModelConfig
    """Sizes and semantics of the model."""
    train: TrainConfig
    """Length, batches, optimizer, schedules."""
    data: DataConfig = DataConfig()
    """Sources, tokenizer, packing."""
    mesh: MeshConfig = MeshConfig()
    """Devices per mesh axis."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Cadence and retention of checkpoints."""
    seed: int = 0
    """Seed of initialisation and data order."""
    run_dir: str = ""
    """Folder of the run; empty is runs/<preset>. A run found there is resumed."""
    kernels: Literal["auto", "portable", "reference"] = "auto"
    """Backend of the hot paths."""
