"""DeepSeek-V2-Lite: 15.7 B parameters, 2.7 B active, 5.7 T tokens; fits one 8-GPU host.

python train.py --config v2_lite --print-config --emulate 8
"""

from checkpoint.config import CheckpointConfig
from configs import deepseek_models, deepseek_schedules
from configs.schema import RunConfig
from data.config import DataConfig
from sharding.config import MeshConfig
from training.config import Phase, TrainConfig

STEPS = 301_997
"""Steps that 5.7 T tokens take at 4608 sequences of 4096 tokens."""


def config() -> RunConfig:
    """The run."""
    return RunConfig(
        model=deepseek_models.v2_lite(),
        train=TrainConfig(
            steps=STEPS,
            **deepseek_schedules.V2_LITE_BATCH._asdict(),
            micro_batch_size=64,
            learning_rate=deepseek_schedules.v2_lite_learning_rate(),
            bias_update_rate=(Phase(0, 0.0),),
            balance_weight=0.001,
            dtype="bfloat16",
            remat="selective",
            eval_every=1000,
        ),
        data=DataConfig(vocab_size=100018),
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(every=1000),
    )
