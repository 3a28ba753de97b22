"""Kimi-K2: 1.03 T parameters, 32.9 B active, 15.5 T tokens; V3's code with other values.

The shape is exact, the training recipe is not: Muon with V3's kind of schedule stands in for
MuonClip, whose QK-clip is not there.

    python train.py --config kimi_k2 --print-config --emulate 8
"""

from checkpoint.config import CheckpointConfig
from configs import deepseek_models
from configs.schema import RunConfig
from data.config import DataConfig
from sharding.config import MeshConfig
from training.config import OptimizerConfig, Phase, TrainConfig

STEPS = 230_968
"""Steps that 15.5 T tokens take at 16384 sequences of 4096 tokens."""


def config() -> RunConfig:
    """The run."""
    return RunConfig(
        model=deepseek_models.kimi_k2(),
        train=TrainConfig(
            steps=STEPS,
            seq_len=4096,
            batch_size=16384,
            micro_batch_size=1024,
            optimizer=OptimizerConfig(name="muon"),
            learning_rate=(
                Phase(500, 2e-4, "linear", "steps"),
                Phase(10e12, 2e-4),
                Phase(15.5e12, 2e-5, "cosine"),
            ),
            dtype="bfloat16",
            remat="selective",
            eval_every=1000,
        ),
        data=DataConfig(vocab_size=163840),
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(every=1000),
    )
