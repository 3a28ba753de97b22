"""Linear layers and routed experts in FP8, gradients included (V3 report, section 3.3).

Read `linear.py` and `expert_ffn.py` (the calls), `quantize.py` (values and their scales), then
`matmul.py`, `grouped.py` and `product.py` (the products and what their kernels share). Kernels for
Hopper ("mosaic", "emulated"), XLA elsewhere ("portable", "reference").
"""

from pallas_kernels.fp8.expert_ffn import fp8_expert_ffn
from pallas_kernels.fp8.expert_ffn import unsupported as experts_unsupported
from pallas_kernels.fp8.linear import fp8_linear, fp8_linears
from pallas_kernels.fp8.linear import unsupported as linear_unsupported
from pallas_kernels.fp8.quantize import Prepared, Quantized, block_scale, with_block_scale
from pallas_kernels.scales import E4M3, TILE

__all__ = [
    "E4M3",
    "TILE",
    "Prepared",
    "Quantized",
    "block_scale",
    "experts_unsupported",
    "fp8_expert_ffn",
    "fp8_linear",
    "fp8_linears",
    "linear_unsupported",
    "with_block_scale",
]
