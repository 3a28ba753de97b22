"""Causal latent attention in its expanded form, with gradients: training and prefill.

Read `mla.py` (the call and its backends), `portable.py` (by XLA), `stash.py` (how a result waits
for the backward pass), `blocks.py` (how a call is cut), `tiles.py` (what the kernels share),
`forward.py`, then `backward.py` with `dq.py` and `dkv.py`.
Kernels for Hopper ("mosaic", "emulated"), XLA elsewhere ("portable", "reference").
"""

from pallas_kernels.attention.blocks import unsupported
from pallas_kernels.attention.mla import mla_attention, starts_of_segments
from pallas_kernels.attention.stash import Stash, through

__all__ = ["Stash", "mla_attention", "starts_of_segments", "through", "unsupported"]
