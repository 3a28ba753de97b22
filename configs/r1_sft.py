"""Third stage of the recipe `r1`: the base again, on answers that its successor got right.

Rejection sampling from `r1_reasoning` (R1 report, 2.3.3): correct, different, in one script. R1
adds 200 K examples of other kinds; here these are 200 demonstrations.

    python train.py --config r1_sft --sft.policy runs/r1/reasoning --init-from runs/r1/base
"""

import dataclasses

from configs import r1_base2, r1_cold
from configs.schema import RunConfig
from rl.config import RLConfig, SFTConfig, TaskConfig


def config() -> RunConfig:
    """The run: five epochs of some 2,000 traces and the demonstrations."""
    return dataclasses.replace(
        r1_base2.config(),
        stage="sft",
        task=TaskConfig("permutations", (*r1_base2.PROMPTS, *r1_cold.READABLE)),
        train=r1_base2.tuned(120),
        sft=SFTConfig(
            demonstrations=200, rounds=8, prompts_per_round=256, max_new_tokens=28, language=1.0
        ),
        rl=RLConfig(max_new_tokens=28),
    )
