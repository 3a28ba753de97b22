"""Kernels of the library `tokamax`: for GPUs that ours are not cut for, and a second opinion.

Read `installed.py` (what there is for which GPU, and how the library is asked), `attention.py`,
`grouped.py`. The backend "library" of attention and of the grouped products; nothing here is
imported by another one. The library is an optional extra (`[gpu-kernels]`).
"""

from pallas_kernels.library.attention import attend, attention_refusal
from pallas_kernels.library.grouped import (
    experts_backward,
    experts_forward,
    experts_refusal,
    fp8_experts_refusal,
    fp8_rows,
    fp8_weights,
    matmul,
)
from pallas_kernels.library.installed import by_xla, missing, unusable

__all__ = [
    "attend",
    "attention_refusal",
    "by_xla",
    "experts_backward",
    "experts_forward",
    "experts_refusal",
    "fp8_experts_refusal",
    "fp8_rows",
    "fp8_weights",
    "matmul",
    "missing",
    "unusable",
]
