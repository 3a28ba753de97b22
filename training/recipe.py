"""The numerics of a run, of its configuration."""

from model.recipe import Kernels, Recipe
from training.config import TrainConfig


def recipe_of(train: TrainConfig, kernels: Kernels) -> Recipe:
    """What a run computes with. Attention's output waits in E5M6 with FP8, unless an option says
    otherwise (V3 report, section 3.3.3)."""
    stash = train.attention_output
    if stash == "auto":
        stash = "e5m6" if train.fp8 else "full"
    more = {"fp8": train.fp8, "stash": "" if stash == "full" else stash, "unroll": train.unroll}
    return Recipe(train.dtype, train.remat, kernels, **more)
