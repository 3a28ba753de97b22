"""Base of the recipe `r1`: `r1_base` with two to ten moves in two scripts, which its chains mix.

Every stage of the recipe shares its shape, its tokenizer and its prompts.
"""

import dataclasses

from configs import r1_base
from configs.schema import RunConfig
from rl.config import TaskConfig
from training.config import OptimizerConfig, Phase, TrainConfig

STEPS = 500
VOCABULARY = 34
PROMPTS = "scripts=2", "shortest=2"
"""Two to ten moves, in two scripts. A base that reads ten alone answers no other number later."""


def config() -> RunConfig:
    """The run: as `r1_base`, with ten more letters, longer and with more chains.

    To follow a move in either script takes longer to learn: with 30% of chains it guesses for 300
    to 600 steps.
    """
    base = r1_base.config()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, vocab_size=VOCABULARY),
        data=dataclasses.replace(base.data, vocab_size=VOCABULARY),
        train=dataclasses.replace(
            base.train,
            **r1_base.schedule(STEPS),
        ),
        task=TaskConfig("permutations", (*PROMPTS, "share_of_chains=0.6")),
    )


def tuned(steps: int, rows: int = 12, learning_rate: float = 1e-3) -> TrainConfig:
    """Fine-tuning of the base: R1's cosine to a tenth (R1 report, B.4), at this model's rate."""
    return dataclasses.replace(
        config().train,
        steps=steps,
        batch_size=rows,
        optimizer=OptimizerConfig(name="muon", weight_decay=0.01, moment_dtype="float32"),
        learning_rate=(
            Phase(0, learning_rate, unit="steps"),
            Phase(steps, learning_rate / 10, "cosine", "steps"),
        ),
        bias_update_rate=(
            Phase(0.9 * steps, 0.01, unit="steps"),
            Phase(steps, 0.0, unit="steps"),
        ),
        eval_every=steps,
    )
