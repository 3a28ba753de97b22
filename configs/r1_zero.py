"""R1-Zero in small: GRPO with nothing but right and wrong, from `r1_base`'s weights, no SFT.

The base writes steps in three answers of ten and errs in one step of seventeen. Rewards alone teach
it to write them always, and rightly: accuracy and length rise together.

    python train.py --config r1_zero --init-from runs/r1_base
"""

import dataclasses

from checkpoint.config import CheckpointConfig
from configs import r1_base
from configs.schema import RunConfig
from rl.config import GRPOConfig, RLConfig
from training.config import OptimizerConfig, Phase, TrainConfig

STEPS = 150
PROMPTS, GROUP = 8, 16


def config() -> RunConfig:
    """The run: 150 rollouts of 8 prompts x 16 answers, one update each."""
    base = r1_base.config()
    return dataclasses.replace(
        base,
        stage="rl",
        train=TrainConfig(
            steps=STEPS,
            seq_len=40,
            batch_size=PROMPTS * GROUP,
            optimizer=OptimizerConfig(weight_decay=0.01, moment_dtype="float32"),
            learning_rate=(Phase(0, 2e-4),),
            eval_every=10,
        ),
        rl=RLConfig(
            prompts_per_step=PROMPTS,
            max_new_tokens=28,
            replay_routing=False,
            objective=GRPOConfig(group_size=GROUP, clip_low=0.2, clip_high=0.28),
        ),
        checkpoint=CheckpointConfig(every=25),
    )
