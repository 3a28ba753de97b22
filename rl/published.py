"""The objectives of published systems, as configurations.

A number that its paper does not state is marked "not stated" beside it.
"""

from rl.config import GRPOConfig, check_choice

PUBLISHED = {
    # DeepSeekMath (2402.03300), section 4.2; the clip is not stated: PPO's.
    "deepseekmath": GRPOConfig(
        group_size=64, aggregation="grpo", clip_low=0.2, clip_high=0.2, kl_coef=0.04
    ),
    # R1, first RL stage (Nature 2025, methods): a clip of 10 leaves only ratios above 11 clipped.
    "r1": GRPOConfig(aggregation="grpo", clip_low=10, clip_high=10, kl_coef=0.001),
    # V3.2 (2512.02556), section 3.1; beta and delta are not stated: R1's, and 0.5.
    "v3_2": GRPOConfig(
        advantage="dr_grpo", aggregation="grpo", clip_low=0.2, clip_high=0.2,
        kl_coef=0.001, kl_estimator="v3_2", off_policy_delta=0.5,
    ),
    # DAPO (2503.14476), section 4.1.
    "dapo": GRPOConfig(dynamic_sampling=True, overlong_filter=True),
    # Dr. GRPO (2503.20783): no std, no length; 8 answers of at most 3000 tokens.
    "dr_grpo": GRPOConfig(
        group_size=8, advantage="dr_grpo", aggregation="dr_grpo", dr_grpo_length=3000,
        clip_low=0.2, clip_high=0.2,
    ),
    # GSPO (2507.18071), section 5.1; the group size is not stated.
    "gspo": GRPOConfig(ratio="gspo", aggregation="grpo", clip_low=3e-4, clip_high=4e-4),
    # MiniMax-M1 (2506.13585), section 3.1: no lower bound; the upper one is not stated: weights
    # of at most 5.
    "cispo": GRPOConfig(ratio="cispo", clip_low=10, clip_high=4),
}  # fmt: skip


def published(name: str) -> GRPOConfig:
    """The objective of the system called `name`; ValueError with near matches if there is none."""
    check_choice("the objective", name, PUBLISHED)
    return PUBLISHED[name]
