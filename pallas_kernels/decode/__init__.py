"""Latent attention of a few new tokens over the latent cache, in its absorbed form: decoding.

Read `mla.py` (the call, its backends and splits), `portable.py` (by XLA), then `kernel.py`.
A kernel for Hopper ("mosaic", "emulated"), XLA elsewhere ("portable", "reference").
"""

from pallas_kernels.decode.mla import mla_decode, unsupported

__all__ = ["mla_decode", "unsupported"]
