"""Output head and cross-entropy in one, without logits of all tokens at a time.

Read `linear.py` (the calls and their backends), then `tiles.py` (the kernels). Kernels for Hopper
("mosaic", "emulated"), XLA elsewhere ("portable", "reference").
"""

from pallas_kernels.cross_entropy.linear import (
    Parts,
    loss_and_gradients,
    loss_sum,
    merge,
    unsupported,
)

__all__ = ["Parts", "loss_and_gradients", "loss_sum", "merge", "unsupported"]
