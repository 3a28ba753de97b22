"""Recipes: stages that follow each other, each a preset with the run that it starts from.

`train.py --recipe NAME` runs one (`rl/recipe.py`).
"""

import dataclasses

from configs.r1 import PROMPTS
from configs.r1 import TWO_SCRIPTS_VOCABULARY as VOCABULARY


@dataclasses.dataclass(frozen=True)
class Stage:
    """One run of a recipe."""

    name: str
    """Of its run folder, below the recipe's."""
    preset: str
    init_from: str = ""
    """Stage whose weights it starts from; empty for random ones."""
    policy: str = ""
    """Stage whose answers it learns."""
    options: tuple[str, ...] = ()
    """Of its command line, besides."""


TWO_SCRIPTS = (
    "--model.vocab-size", str(VOCABULARY), "--data.vocab-size", str(VOCABULARY),
    "--task.options", *PROMPTS,
)  # fmt: skip
"""What `r1_base2` differs in from `r1_base`, for the presets that others use as well."""

RECIPES: dict[str, tuple[Stage, ...]] = {
    "r1_zero": (
        Stage("r1_base", "r1_base"),
        Stage("r1_zero", "r1_zero", "r1_base"),
    ),
    "r1": (
        Stage("base", "r1_base2"),
        Stage("zero", "r1_zero", "base", "", TWO_SCRIPTS),
        Stage("cold", "r1_cold", "base"),
        Stage("reasoning", "r1_reasoning", "cold"),
        Stage("sft", "r1_sft", "base", "reasoning"),
        Stage("r1", "r1", "sft"),
        Stage("student", "r1_student", "", "r1", TWO_SCRIPTS),
    ),
}  # fmt: skip
"""r1_zero: rewards alone. r1: R1's figure 2, R1-Zero beside it and a student after it."""
