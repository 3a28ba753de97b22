"""DeepSeek-V2: 236 B parameters, 21.4 B active, 8.1 T tokens.

V2's expert-level balance loss is trained with its published weight (0.003); its device and
communication losses and its token dropping belong to a layout that this code does not need.

    python train.py --config v2 --print-config --emulate 8
"""

from checkpoint.config import CheckpointConfig
from configs import deepseek_models, deepseek_schedules
from configs.schema import RunConfig
from data.config import DataConfig
from sharding.config import MeshConfig
from training.config import Phase, TrainConfig

STEPS = 219_703
"""Steps that 8.1 T tokens take under the batch ramp."""


def config() -> RunConfig:
    """The run."""
    return RunConfig(
        model=deepseek_models.v2(),
        train=TrainConfig(
            steps=STEPS,
            **deepseek_schedules.V2_BATCH._asdict(),
            micro_batch_size=768,
            learning_rate=deepseek_schedules.v2_learning_rate(),
            bias_update_rate=(Phase(0, 0.0),),
            balance_weight=0.003,
            dtype="bfloat16",
            remat="selective",
            eval_every=1000,
        ),
        data=DataConfig(vocab_size=100018),
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(every=1000),
    )
