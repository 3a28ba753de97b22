"""The routed experts: rows sorted by expert, their SwiGLU, and the sums of a token's experts.

Read `sums.py` (all of it as one function), `permute.py` (rows to experts and back), `experts.py`
(the call and its backends),
`ragged.py` and `matmul.py` (by XLA); the kernels are `expert_ffn_mosaic.py` over `products.py` and
`weight_gradient.py`, which share `blocks.py`, `row_tiles.py` and `ring.py`. `separate.py` computes
experts that are arrays of their own. Kernels for Hopper ("mosaic", "emulated"), XLA elsewhere
("portable", "reference").
"""

from pallas_kernels.grouped.experts import expert_ffn
from pallas_kernels.grouped.permute import combine_rows, gather_rows, part_of, sort_by_expert
from pallas_kernels.grouped.products import unsupported
from pallas_kernels.grouped.separate import separate_expert_ffn, separate_experts
from pallas_kernels.grouped.sums import expert_sums

__all__ = [
    "combine_rows",
    "expert_ffn",
    "expert_sums",
    "gather_rows",
    "part_of",
    "separate_expert_ffn",
    "separate_experts",
    "sort_by_expert",
    "unsupported",
]
