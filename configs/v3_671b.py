"""DeepSeek-V3: 671 B parameters, 37.6 B active, 14.8 T tokens, as published.

Group-limited routing, loss-free balancing, balance loss, MTP and the fp32 gate are on. The batch
ramp is taken in 17 plateaus: its published ends and length are kept, its shape is not published.
Published cost: 2,048 H800, 2,664 K GPU hours, about 1,540 tokens/s per GPU with FP8 and 16 pipeline
stages. Look at it on any machine:

    python train.py --config v3_671b --print-config --emulate 8
"""

from checkpoint.config import CheckpointConfig
from configs import deepseek_models, deepseek_schedules
from configs.schema import RunConfig
from data.config import DataConfig
from sharding.config import MeshConfig
from training.config import TrainConfig

STEPS = 242_830
"""Steps that 14.8 T tokens take under the batch ramp."""


def config() -> RunConfig:
    """The run."""
    return RunConfig(
        model=deepseek_models.v3_671b(),
        train=TrainConfig(
            steps=STEPS,
            **deepseek_schedules.V3_BATCH._asdict(),
            micro_batch_size=768,
            learning_rate=deepseek_schedules.v3_learning_rate(),
            bias_update_rate=deepseek_schedules.v3_bias_update_rate(),
            mtp_weight=deepseek_schedules.v3_mtp_weight(),
            dtype="bfloat16",
            remat="selective",
            eval_every=1000,
        ),
        data=DataConfig(vocab_size=128815),
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(every=1000),
    )
