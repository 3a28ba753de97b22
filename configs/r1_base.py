"""Base model of `r1_zero`: composed permutations, 70% answered at once, 30% in noisy steps.

A corpus of its own, written on first use (`rl/tasks/permutations.py`). 1.1 M parameters, MLA and
MoE in every layer, fp32. A document stands alone in attention, so the model continues a prompt as
it has read them. Muon: with AdamW, 300 steps do not suffice to learn to copy moves. No document is
held out; `r1_zero` measures on problems that are.

    make r1            # this, then r1_zero from its weights
"""

from typing import Any

from checkpoint.config import CheckpointConfig
from configs.schema import RunConfig
from data.config import DataConfig
from model.config import ModelConfig
from rl.config import TaskConfig
from sharding.config import MeshConfig
from training.config import OptimizerConfig, Phase, TrainConfig

STEPS = 300
VOCABULARY = 24


def model() -> ModelConfig:
    """Shape of the model."""
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_layers=4,
        num_dense_layers=0,
        num_heads=4,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        dense_ffn_size=256,
        expert_ffn_size=64,
        num_experts=8,
        num_shared_experts=1,
        experts_per_token=2,
        max_position=256,
        init_std=0.05,
    )


def schedule(steps: int) -> dict[str, Any]:
    """Fields of TrainConfig: up in 20 steps, level to the middle, down to a tenth; balancing ends
    before the end."""
    return {
        "steps": steps,
        "learning_rate": (
            Phase(20, 4e-3, "linear", "steps"),
            Phase(steps // 2, 4e-3, "constant", "steps"),
            Phase(steps, 4e-4, "cosine", "steps"),
        ),
        "bias_update_rate": (
            Phase(0.9 * steps, 0.01, unit="steps"),
            Phase(steps, 0.0, unit="steps"),
        ),
    }


def config() -> RunConfig:
    """The run: about 100 documents a step."""
    return RunConfig(
        model=model(),
        train=TrainConfig(
            seq_len=192,
            batch_size=12,
            optimizer=OptimizerConfig(name="muon", weight_decay=0.01, moment_dtype="float32"),
            **schedule(STEPS),
            eval_every=0,
            log_every=10,
        ),
        data=DataConfig(vocab_size=VOCABULARY, held_out=0.0, fim_rate=0.0, segment_mask=True),
        task=TaskConfig("permutations"),
        mesh=MeshConfig(data=1),
        checkpoint=CheckpointConfig(every=0),
    )
