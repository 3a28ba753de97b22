"""Published training schedules of DeepSeek-V2, V2-Lite and V3, as values.

Sources: V3 report (arXiv 2412.19437), section 4.2; V2 report (arXiv 2405.04434), section 3.1.2 and
appendix B. Lengths in tokens are the reports' own; the step count follows from the batch plan.
"""

from typing import NamedTuple

from training.config import Phase


class BatchRamp(NamedTuple):
    """Fields of TrainConfig that grow the batch."""

    seq_len: int
    batch_size: int
    batch_ramp_from: int
    batch_ramp_tokens: float


V3_TOKENS = 14.8e12
"""Pre-training tokens of V3."""
V3_BATCH = BatchRamp(4096, 15360, 3072, 469e9)
"""3072 to 15360 sequences of 4096 tokens over the first 469B tokens."""

V2_TOKENS = 8.1e12
"""Pre-training tokens of V2."""
V2_BATCH = BatchRamp(4096, 9216, 2304, 225e9)
"""2304 to 9216 sequences of 4096 tokens over the first 225B tokens."""

V2_LITE_TOKENS = 5.7e12
"""Pre-training tokens of V2-Lite."""
V2_LITE_BATCH = BatchRamp(4096, 4608, 0, 0.0)
"""Constant."""


def v3_learning_rate() -> tuple[Phase, ...]:
    """2000 steps of warm-up; constant to 10T; cosine to a tenth over 4.3T; constant 333B, 167B."""
    return (
        Phase(2000, 2.2e-4, "linear", "steps"),
        Phase(10e12, 2.2e-4),
        Phase(14.3e12, 2.2e-5, "cosine"),
        Phase(14.633e12, 2.2e-5),
        Phase(14.8e12, 7.3e-6),
    )


def v3_bias_update_rate() -> tuple[Phase, ...]:
    """Gamma: 0.001 for 14.3T tokens, then 0 for the last 500B."""
    return (Phase(14.3e12, 0.001), Phase(14.8e12, 0.0))


def v3_mtp_weight() -> tuple[Phase, ...]:
    """Lambda: 0.3 for the first 10T tokens, 0.1 for the last 4.8T."""
    return (Phase(10e12, 0.3), Phase(14.8e12, 0.1))


def v2_learning_rate() -> tuple[Phase, ...]:
    """Warm-up of 2000 steps to 2.4e-4, then times 0.316 at 60% and at 90% of the tokens."""
    return _step_decay(2.4e-4, V2_TOKENS, 0.6, 0.9)


def v2_lite_learning_rate() -> tuple[Phase, ...]:
    """Warm-up of 2000 steps to 4.2e-4, then times 0.316 at 80% and at 90% of the tokens."""
    return _step_decay(4.2e-4, V2_LITE_TOKENS, 0.8, 0.9)


def _step_decay(peak: float, tokens: float, first: float, second: float) -> tuple[Phase, ...]:
    return (
        Phase(2000, peak, "linear", "steps"),
        Phase(first * tokens, peak),
        Phase(second * tokens, peak * 0.316),
        Phase(tokens, peak * 0.316**2),
    )
