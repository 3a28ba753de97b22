"""RunConfig: everything that decides a run, as one frozen tree of the parts' own dataclasses."""

import dataclasses
from typing import Literal

from checkpoint.config import CheckpointConfig
from data.config import DataConfig
from model.config import ModelConfig
from rl.config import RLConfig, SFTConfig, TaskConfig
from sharding.config import MeshConfig
from training.config import TrainConfig
from vision.config import ImageTraining


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run. Presets in this package return it; the command line overrides any field."""

    model: ModelConfig
    """Sizes and semantics of the model."""
    train: TrainConfig
    """Length, batches, optimizer, schedules."""
    data: DataConfig = DataConfig()
    """Sources, tokenizer, packing."""
    stage: Literal["pretrain", "sft", "rl", "distill", "images"] = "pretrain"
    """pretrain: next-token prediction. sft: answers of examples are learned. rl: a policy learns
    from rewards. distill: a student learns what a teacher answers. images: a model with eyes and
    brush learns to use them."""
    images: ImageTraining = ImageTraining()
    """What stage images learns, and from what."""
    task: TaskConfig = TaskConfig()
    """A task with a verifier."""
    rl: RLConfig = RLConfig()
    """Rollout and objective of stage rl."""
    sft: SFTConfig = SFTConfig()
    """Examples of stages sft and distill."""
    mesh: MeshConfig = MeshConfig()
    """Devices per mesh axis."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Cadence and retention of checkpoints."""
    seed: int = 0
    """Seed of initialisation and data order."""
    run_dir: str = ""
    """Folder of the run; empty is runs/<preset>. A run found there is resumed."""
    sample_prompt: str = ""
    """What the text that stage pretrain leaves in sample.txt begins with; empty: a prompt of the
    task, or "def "."""
    kernels: Literal["auto", "mosaic", "emulated", "library", "portable", "reference"] = "auto"
    """Backend of the hot paths. auto: our kernels on Hopper, a library's on other GPUs where it is
    installed (make gpu-env), XLA for the rest. mosaic: our kernels or an error. library: the
    library's where it has one. emulated: our kernels on CPU, for tests."""
