"""Distillation: 0.2 M parameters from random weights on a larger model's answers (R1 report, 2.4).

python train.py --config r1_student --sft.policy runs/r1_zero
"""

import dataclasses

from configs import r1_base
from configs.schema import RunConfig
from model.config import ModelConfig
from rl.config import RLConfig, SFTConfig
from training.config import OptimizerConfig

STEPS = 700


def model() -> ModelConfig:
    """Shape of the student: half the width and depth of `r1_base`, weights of 1 / sqrt(width)."""
    return dataclasses.replace(
        r1_base.model(), hidden_size=64, num_layers=2, expert_ffn_size=32, dense_ffn_size=128,
        init_std=0.125,
    )  # fmt: skip


def config() -> RunConfig:
    """The run: 6,000 traces and more, 12 rows a step."""
    base = r1_base.config()
    return dataclasses.replace(
        base,
        stage="distill",
        model=model(),
        train=dataclasses.replace(
            base.train,
            optimizer=OptimizerConfig(name="muon", weight_decay=0.01, moment_dtype="float32"),
            **r1_base.schedule(STEPS),
            eval_every=100,
        ),
        sft=SFTConfig(rounds=8, prompts_per_round=512, per_prompt=2, max_new_tokens=28),
        rl=RLConfig(max_new_tokens=28),
    )
