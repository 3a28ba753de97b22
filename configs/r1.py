"""Last stage of the recipe `r1`, RL for all scenarios: all rewards (R1 report, 2.3.4).

python train.py --config r1 --init-from runs/r1/sft
"""

import dataclasses

from configs import r1_reasoning
from configs.schema import RunConfig

STEPS = 40


def config() -> RunConfig:
    """The run: at R1's lower temperature of this stage, 0.7."""
    base = r1_reasoning.config()
    return dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, steps=STEPS),
        rl=dataclasses.replace(base.rl, temperature=0.7, format_weight=1.0),
    )
