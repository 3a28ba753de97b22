"""Grouped products of the expert FFN: DeepSeek-V3's experts, all or those of a device, and small's.

65536 rows are 8192 tokens of 8 experts each. 256 experts then have 256 rows each, as on one device;
8 experts have 8192, as on each of 32 devices that exchange tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import Case, Tunable
from pallas_kernels.grouped.matmul import grouped_matmul
from pallas_kernels.grouped.products import candidates, grouped_products, spelled
from pallas_kernels.grouped.weight_gradient import grouped_weight_gradient
from pallas_kernels.swiglu import swiglu

SHAPES = {
    "V3, 8 experts": (65536, 8, 7168, 2048),
    "V3, 256 experts": (65536, 256, 7168, 2048),
    "small": (24576, 64, 512, 128),
}
"""M rows, E experts, D model width, F expert width."""


def _shape(*sizes: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _products(x, *operands, num_weights=1, **options):
    """One call of the kernel: rows and their weights, repeated per summand, then the sizes."""
    *operands, sizes = (x, *operands)
    each = 1 + num_weights
    summands = [
        (operands[i], tuple(operands[i + 1 : i + each])) for i in range(0, len(operands), each)
    ]
    return grouped_products(summands, sizes, emulated=False, **options)


def _hidden(gate, up):
    return (swiglu(gate, up),)


def _hidden_and_kept(gate, up):
    return swiglu(gate, up), gate, up


def _cases(name: str, M: int, E: int, D: int, F: int) -> dict[str, Case]:
    flops = 2.0 * M * D * F
    rows_D, rows_F, weight = 2.0 * M * D, 2.0 * M * F, 2.0 * E * D * F
    x, h, sizes = _shape(M, D), _shape(M, F), _shape(E, dtype=jnp.int32)
    w_in, w_out = _shape(E, D, F), _shape(E, F, D)
    forward = partial(_products, name="grouped_matmul_forward")
    backward = partial(_products, transposed=True, name="grouped_matmul_rows")
    both = partial(_products, num_weights=2)
    alone = partial(both, finish=_hidden, name="grouped_swiglu")
    kept = partial(both, finish=_hidden_and_kept, num_outputs=3, name="grouped_swiglu_kept")
    weights = partial(grouped_weight_gradient, emulated=False)
    whole = rows_D + weight + rows_F
    two = (h, w_in, h, w_in, sizes)
    return {
        f"up, {name}": Case(forward, (x, w_in, sizes), flops, whole),
        f"down, {name}": Case(forward, (h, w_out, sizes), flops, whole),
        f"SwiGLU, {name}": Case(
            alone, (x, w_in, w_in, sizes), 2 * flops, rows_D + 2 * weight + rows_F
        ),
        f"SwiGLU, gate and up kept, {name}": Case(
            kept, (x, w_in, w_in, sizes), 2 * flops, rows_D + 2 * weight + 3 * rows_F
        ),
        f"dh, {name}": Case(backward, (x, w_out, sizes), flops, whole, forward=False),
        f"dx, {name}": Case(
            backward, two, 2 * flops, rows_D + 2 * weight + 2 * rows_F, forward=False
        ),
        f"dw up, {name}": Case(
            partial(weights, dtype=jnp.bfloat16), (x, h, sizes), flops, whole, forward=False
        ),
        f"dw up in fp32, {name}": Case(
            weights, (x, h, sizes), flops, whole + weight, forward=False
        ),
        f"dw down, {name}": Case(
            partial(weights, dtype=jnp.bfloat16), (h, x, sizes), flops, whole, forward=False
        ),
    }


def _finished(key: str, case: Case, E: int) -> Case:
    """With group sizes for timing, and for single products the choice that a tuner has."""
    rows, *_ = case.arguments
    case = case._replace(integers=lambda: [np.full(E, rows.shape[0] // E)])
    if not key.startswith(("up", "down")):
        return case
    w = case.arguments[1]
    return case._replace(
        baselines={"XLA": lambda x, w, sizes: grouped_matmul(x, w, sizes)},
        tunable=Tunable(
            "grouped_products",
            spelled(rows.shape[0], *w.shape),
            candidates(w.shape[2]),
            lambda blocks: partial(case.run, blocks=blocks),
        ),
    )


CASES = {
    key: _finished(key, case, shape[1])
    for name, shape in SHAPES.items()
    for key, case in _cases(name, *shape).items()
}
