"""Cold start of the recipe `r1`: few correct, readable chains before rewards (R1 report, 2.3.1).

python train.py --config r1_cold --init-from runs/r1/base
"""

import dataclasses

from configs import r1_base2
from configs.schema import RunConfig
from rl.config import RLConfig, SFTConfig, TaskConfig

READABLE = ("share_of_chains=1", "noise=0", "mixing=0")


def config() -> RunConfig:
    """The run: 200 demonstrations, 8 epochs."""
    return dataclasses.replace(
        r1_base2.config(),
        stage="sft",
        task=TaskConfig("permutations", (*r1_base2.PROMPTS, *READABLE)),
        train=r1_base2.tuned(30),
        sft=SFTConfig(demonstrations=200),
        rl=RLConfig(max_new_tokens=28),
    )
