"""Tiny: a whole DeepSeek-V3 that learns Python source text on a laptop's CPU in minutes.

Everything of V3 is there at small size: query and key-value latents, a dense first layer, shared
and routed experts with group-limited sigmoid routing and loss-free balancing, one MTP module, FIM,
and packing. 8.4 M parameters, 4.9 M active.

    make train            # 8 emulated devices: fsdp 2 x expert 2 x tensor 2
"""

from checkpoint.config import CheckpointConfig
from configs.schema import RunConfig
from data.config import DataConfig
from model.config import ModelConfig
from sharding.config import MeshConfig
from training.config import OptimizerConfig, Phase, TrainConfig

STEPS = 600


def model() -> ModelConfig:
    """Shape of the model."""
    return ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        num_layers=4,
        num_dense_layers=1,
        num_heads=4,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        dense_ffn_size=1024,
        expert_ffn_size=128,
        num_experts=16,
        num_shared_experts=1,
        experts_per_token=4,
        num_expert_groups=4,
        groups_per_token=2,
        routed_scaling_factor=2.5,
        max_position=256,
        mtp_depth=1,
        init_std=0.02,
    )


def config() -> RunConfig:
    """The run. Widths are small, so weights start larger (0.02) than V3's 0.006 at width 7168."""
    return RunConfig(
        model=model(),
        train=TrainConfig(
            steps=STEPS,
            seq_len=256,
            batch_size=8,
            optimizer=OptimizerConfig(name="muon"),
            learning_rate=(
                Phase(20, 4e-3, "linear", "steps"),
                Phase(STEPS // 2, 4e-3, "constant", "steps"),
                Phase(STEPS, 2e-4, "cosine", "steps"),
            ),
            eval_every=100,
            eval_batches=4,
        ),
        data=DataConfig(vocab_size=4096),
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(every=100),
    )
