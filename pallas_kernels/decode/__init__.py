"""Attention of a few new tokens over a cache, of latents (absorbed form) or of grouped keys.

Read `mla.py` (the call, its backends and splits), `portable.py` (by XLA), then `kernel.py`;
`grouped.py` for keys that groups of queries share.
A kernel for Hopper ("mosaic", "emulated"), XLA elsewhere ("portable", "reference").
"""

from pallas_kernels.decode.grouped import grouped_decode, kept, slot_axis
from pallas_kernels.decode.grouped import unsupported as grouped_unsupported
from pallas_kernels.decode.mla import mla_decode, unsupported

__all__ = [
    "grouped_decode",
    "grouped_unsupported",
    "kept",
    "mla_decode",
    "slot_axis",
    "unsupported",
]
