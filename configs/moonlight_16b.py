"""Moonlight-16B-A3B: 16.0 B parameters, 2.9 B active, 5.7 T tokens with Muon (Moonlight report).

Sequences of 8K; weight decay also on norm gains; bias update off in the last stage.

    python train.py --config moonlight_16b --print-config --emulate 8
"""

from checkpoint.config import CheckpointConfig
from configs import deepseek_models
from configs.schema import RunConfig
from data.config import DataConfig
from sharding.config import MeshConfig
from training.config import OptimizerConfig, Phase, TrainConfig

STEPS = 175_834
"""Steps that 5.7 T tokens take: batch 2048, from 200 B tokens on 4096."""


def config() -> RunConfig:
    """The run; it ends with 100 steps up to 1e-4 and a linear descent to 0 over 500 B tokens."""
    return RunConfig(
        model=deepseek_models.moonlight_16b(),
        train=TrainConfig(
            steps=STEPS,
            seq_len=8192,
            batch_size=4096,
            micro_batch_size=2048,
            batch_ramp_from=2048,
            batch_ramp_tokens=400e9,
            optimizer=OptimizerConfig(name="muon", decay_1d=True),
            learning_rate=(
                Phase(2000, 4.2e-4, "linear", "steps"),
                Phase(5.2e12, 4.2e-5, "cosine"),
                Phase(5.2034e12, 1e-4, "linear"),
                Phase(5.7e12, 0.0, "linear"),
            ),
            bias_update_rate=(Phase(5.2e12, 0.001), Phase(5.7e12, 0.0)),
            dtype="bfloat16",
            remat="selective",
            eval_every=1000,
        ),
        data=DataConfig(vocab_size=163840),
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(every=1000),
    )
