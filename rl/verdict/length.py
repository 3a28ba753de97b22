"""Reward by length, which is counted in tokens and so belongs to the rollout, not to the text.

Letters: B answers.
"""

import numpy as np


def soft_overlong(tokens_B: np.ndarray, max_tokens: int, buffer: int) -> np.ndarray:
    """DAPO's soft over-long punishment (DAPO, eq. 13), float64 [B], -1..0.

    tokens_B: lengths of the answers in tokens, the end token included. 0 up to max_tokens - buffer,
    then falling by 1/buffer per token, -1 beyond max_tokens. ValueError unless
    0 < buffer <= max_tokens.
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(
            f"buffer is {buffer} and max_tokens is {max_tokens}; give a buffer of 1 to max_tokens "
            "tokens"
        )
    over_B = np.asarray(tokens_B, np.float64) - (max_tokens - buffer)
    return -np.clip(over_B / buffer, 0.0, 1.0)
