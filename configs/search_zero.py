"""More thinking pays: GRPO on `search_base`'s weights, for right answers and for readable ones.

The base gives up after a try or two. Rewards teach it to go on: accuracy and tries rise together.
As in R1-Zero form counts too: long answers are rare in the corpus, and without a reward for form a
fifth of them comes apart.

    python train.py --config search_zero --init-from runs/search_base
"""

import dataclasses

from configs import r1_zero, search_base
from configs.schema import RunConfig
from rl.config import GRPOConfig
from training.config import Phase

STEPS = 120
PROMPTS, GROUP = 8, 16


def config() -> RunConfig:
    """The run: 120 rollouts of 8 prompts x 16 answers of at most eight tries, one update each."""
    base, zero = search_base.config(), r1_zero.config()
    return dataclasses.replace(
        zero,
        task=base.task,
        train=dataclasses.replace(
            zero.train,
            steps=STEPS,
            seq_len=80,
            batch_size=PROMPTS * GROUP,
            learning_rate=(Phase(0, 2e-4),),
            eval_every=20,
        ),
        rl=dataclasses.replace(
            zero.rl,
            prompts_per_step=PROMPTS,
            max_new_tokens=64,
            eval_prompts=160,
            format_weight=0.25,
            objective=GRPOConfig(group_size=GROUP, clip_low=0.2, clip_high=0.28),
        ),
    )
