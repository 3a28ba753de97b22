"""Base model of `search_zero`: 3-SUM by trial and error, which it gives up early.

Every third demonstration hits at once, the others try at random and give up after a miss with a
chance of 35% (`rl/tasks/search.py`). Checks are right in 97 of 100.

    python train.py --config search_base
"""

import dataclasses

from configs import r1_base
from configs.schema import RunConfig
from rl.config import TaskConfig

STEPS = 800


def config() -> RunConfig:
    """The run: `r1_base`'s shape and rates, about 80 documents a step."""
    base = r1_base.config()
    return dataclasses.replace(
        base,
        train=dataclasses.replace(
            base.train,
            **r1_base.schedule(STEPS),
        ),
        task=TaskConfig("search", documents=70_000),
    )
