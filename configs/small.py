"""Preset `small`: real text on one GPU."""

import dataclasses

from checkpoint.config import CheckpointConfig
from configs import tiny
from configs.schema import RunConfig
from data.config import DataConfig
from model.config import ModelConfig
from training.config import Phase, TrainConfig

STEPS = 20_000


def model() -> ModelConfig:
    """Shape of the model: `tiny`'s, twice as wide, with 12 layers and 32 experts."""
    return dataclasses.replace(
        tiny.model(),
        vocab_size=16384,
        hidden_size=512,
        num_layers=12,
        num_heads=8,
        q_lora_rank=256,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        dense_ffn_size=2048,
        num_experts=32,
        max_position=1024,
    )


def small() -> RunConfig:
    """Small: about 100 M parameters, the V3 recipe for one GPU.

    12 layers, 32 experts, 8 heads; bf16 activations; 1.3 B tokens. Give it real text:

        python train.py --config small --data.sources.0.path "/data/books/*.jsonl"
    """
    return dataclasses.replace(
        tiny.tiny(),
        model=model(),
        train=TrainConfig(
            steps=STEPS,
            seq_len=1024,
            batch_size=64,
            learning_rate=(
                Phase(500, 1e-3, "linear", "steps"),
                Phase(int(0.7 * STEPS), 1e-3, "constant", "steps"),
                Phase(STEPS, 1e-4, "cosine", "steps"),
            ),
            dtype="bfloat16",
            remat="selective",
            eval_every=500,
            eval_batches=16,
            log_every=10,
        ),
        data=DataConfig(vocab_size=16384),
        checkpoint=CheckpointConfig(every=1000),
    )
