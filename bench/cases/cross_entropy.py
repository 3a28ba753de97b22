"""Cross-entropy's kernels at the heads of DeepSeek-V3, whole and cut over 8 devices, and `small`.

Rows are a micro batch of 4096 tokens. V is the vocabulary of one device: 16160 is an eighth of
V3's 129280 and no multiple of a tile.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import Case, Tunable
from pallas_kernels.cross_entropy.linear import logsumexp_and_target, spelled
from pallas_kernels.cross_entropy.tiles import candidates, choose_blocks, gradient, statistics

SHAPES = {"V3": (4096, 7168, 129280), "V3, 1/8": (4096, 7168, 16160), "small": (4096, 512, 16384)}
"""M rows, D width, V vocabulary."""


def _cases(name: str, M: int, D: int, V: int) -> dict[str, Case]:
    blocks = choose_blocks(M, D, V)
    x = jax.ShapeDtypeStruct((M, D), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((D, V), jnp.bfloat16)
    targets = jax.ShapeDtypeStruct((M,), jnp.int32)
    row = jax.ShapeDtypeStruct((M,), jnp.float32)
    run = {"blocks": blocks, "emulated": False}
    flops, read = 2.0 * M * D * V, 2.0 * (M * D + D * V)

    def drawn() -> list[np.ndarray]:
        return [np.random.default_rng(0).integers(0, V, M)]

    return {
        f"statistics, {name}": Case(
            partial(statistics, keep=False, **run),
            (x, w, targets),
            flops,
            read,
            integers=drawn,
            baselines={"XLA": partial(logsumexp_and_target, backend="reference")},
        ),
        f"statistics and exponentials, {name}": Case(
            partial(statistics, keep=True, **run),
            (x, w, targets),
            flops,
            read + 2.0 * M * V,
            integers=drawn,
            tunable=Tunable(
                "cross_entropy",
                spelled(M, D, V),
                candidates(M, D, V),
                lambda blocks: partial(statistics, keep=True, blocks=blocks, emulated=False),
            ),
        ),
        f"gradient, {name}": Case(
            partial(gradient, **run),
            (x, w, targets, row, row),
            flops,
            read + 2.0 * M * V,
            forward=False,
            integers=drawn,
        ),
    }


CASES = {key: case for name, shape in SHAPES.items() for key, case in _cases(name, *shape).items()}
