"""Causal attention with gradients, latent in its expanded form or grouped: training and prefill.

Read `mla.py` (the call and its backends), `portable.py` (by XLA), `blocks.py` (how a call is cut),
`tiles.py` (what the kernels share), `forward.py`, then `backward.py` with `dq.py` and `dkv.py`;
`grouped.py` for keys that groups of queries share.
Kernels for Hopper ("mosaic", "emulated"), XLA elsewhere ("portable", "reference").
"""

from pallas_kernels.attention.blocks import unsupported
from pallas_kernels.attention.grouped import cudnn_unsupported, grouped_attention
from pallas_kernels.attention.grouped import unsupported as grouped_unsupported
from pallas_kernels.attention.mla import mla_attention, starts_of_segments

__all__ = [
    "cudnn_unsupported",
    "grouped_attention",
    "grouped_unsupported",
    "mla_attention",
    "starts_of_segments",
    "unsupported",
]
