"""Preset `tiny`: the first one to run."""

from checkpoint.config import CheckpointConfig
from configs.schema import RunConfig
from data.config import DataConfig
from model.config import ModelConfig
from sharding.config import MeshConfig
from training.config import Phase, TrainConfig

STEPS = 400


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


def tiny() -> RunConfig:
    """Tiny: a whole DeepSeek-V3 that learns Python source text on a laptop's CPU in minutes.

    Everything of V3 is there at small size: query and key-value latents, a dense first layer,
    shared and routed experts with group-limited sigmoid routing and loss-free balancing, one MTP
    module, FIM, and packing. 8.4 M parameters, 4.9 M active.

        make train            # 8 emulated devices: fsdp 2 x expert 2 x tensor 2

    V3's schedules are shrunk from 243 K steps to 400. Widths are small, so weights start larger
    (0.02) than V3's 0.006 at width 7168; and steps are few, so the router biases move 20 times
    faster than V3's 0.001 to balance the experts in time.
    """
    return RunConfig(
        model=model(),
        train=TrainConfig(
            steps=STEPS,
            seq_len=256,
            batch_size=8,
            learning_rate=(
                Phase(STEPS // 20, 3e-3, "linear", "steps"),
                Phase(STEPS // 2, 3e-3, "constant", "steps"),
                Phase(STEPS, 3e-4, "cosine", "steps"),
            ),
            bias_update_rate=(
                Phase(0.97 * STEPS, 0.02, unit="steps"),
                Phase(STEPS, 0, unit="steps"),
            ),
            mtp_weight=(Phase(0.68 * STEPS, 0.3, unit="steps"), Phase(STEPS, 0.1, unit="steps")),
            eval_every=50,
            eval_batches=4,
        ),
        data=DataConfig(vocab_size=4096),
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(every=100),
    )
