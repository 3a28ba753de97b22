"""Reasoning RL of the recipe `r1`: right answers in the prompt's script (R1 report, 2.3.2).

python train.py --config r1_reasoning --init-from runs/r1/cold
"""

import dataclasses

from configs import r1_base2, r1_zero
from configs.schema import RunConfig
from rl.config import TaskConfig

STEPS = 60


def config() -> RunConfig:
    """The run: `r1_zero`'s, with language consistency as a reward of its own."""
    base, zero = r1_base2.config(), r1_zero.config()
    return dataclasses.replace(
        zero,
        model=base.model,
        data=base.data,
        task=TaskConfig("permutations", r1_base2.PROMPTS),
        train=dataclasses.replace(zero.train, steps=STEPS, eval_every=20),
        rl=dataclasses.replace(zero.rl, language_weight=1.0),
    )
