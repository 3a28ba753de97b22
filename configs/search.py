"""Presets of a task where more thinking pays: 3-SUM by trial and error (`rl/tasks/search.py`)."""

import dataclasses

from configs.r1 import r1_base, r1_zero, schedule
from configs.schema import RunConfig
from rl.config import GRPOConfig, TaskConfig
from training.config import Phase


def search_base() -> RunConfig:
    """Base model of `search_zero`: 3-SUM by trial and error, which it gives up early.

    Every third demonstration hits at once, the others try at random and give up after a miss with
    a chance of 35%. Checks are right in 97 of 100. `r1_base`'s shape and rates, about 80 documents
    a step.
    """
    base = r1_base()
    return dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, **schedule(800)),
        task=TaskConfig("search", documents=70_000),
    )


def search_zero() -> RunConfig:
    """More thinking pays: GRPO on `search_base`'s weights, for right answers and for readable ones.

    The base gives up after a try or two. Rewards teach it to go on: accuracy and tries rise
    together. As in R1-Zero form counts too: long answers are rare in the corpus, and without a
    reward for form a fifth of them comes apart. 120 rollouts of 8 prompts x 16 answers of at most
    eight tries, one update each.
    """
    prompts, group = 8, 16
    zero = r1_zero()
    return dataclasses.replace(
        zero,
        task=search_base().task,
        train=dataclasses.replace(
            zero.train,
            steps=120,
            seq_len=80,
            batch_size=prompts * group,
            learning_rate=(Phase(0, 2e-4),),
            eval_every=20,
        ),
        rl=dataclasses.replace(
            zero.rl,
            prompts_per_step=prompts,
            max_new_tokens=64,
            eval_prompts=160,
            format_weight=0.25,
            objective=GRPOConfig(group_size=group, clip_low=0.2, clip_high=0.28),
        ),
    )
