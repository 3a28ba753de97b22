"""Decoding over the latent cache at DeepSeek-V3's heads, whole and cut over 8 devices, and `small`.

Rows have 4096 slots, or one row has 65536; two queries are a token and its draft.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import Case, Tunable
from pallas_kernels.decode.mla import Blocks, candidates, choose_blocks, mla_decode, spelled

V3, SMALL = (512, 64), (128, 32)
SHAPES = {
    "V3, 128 rows": (128, 1, 128, 4096, *V3),
    "V3, 128 rows, 2 queries": (128, 2, 128, 4096, *V3),
    "V3, 1 row, 65536 slots": (1, 1, 128, 65536, *V3),
    "V3, 1/8, 128 rows": (128, 1, 16, 4096, *V3),
    "V3, 1/8, 4 rows": (4, 1, 16, 4096, *V3),
    "small, 32 rows": (32, 1, 16, 4096, *SMALL),
}
"""B rows, Q queries, N heads, S slots, C latent and R rotary channels."""
PAGE = 64


def _case(B: int, Q: int, N: int, S: int, C: int, R: int, page: int | None) -> Case:
    L, shape = C + R, jax.ShapeDtypeStruct
    q, lengths = shape((B, Q, N, L), jnp.bfloat16), shape((B,), jnp.int32)
    if page:
        cache, table = (
            shape((B * S // page, page, L), jnp.bfloat16),
            shape((B, S // page), jnp.int32),
        )
    else:
        cache, table = shape((B, S, L), jnp.bfloat16), None
    blocks: Blocks = choose_blocks(B, Q * N, S, C, L)
    run = partial(mla_decode, scale=L**-0.5, latent=C, backend="mosaic", blocks=blocks)
    xla = partial(mla_decode, scale=L**-0.5, latent=C, backend="portable")
    return Case(
        lambda q, cache, lengths, table: run(q, cache, lengths, block_table_BP=table),
        (q, cache, lengths, table),
        flops=2.0 * B * Q * N * S * (L + C),
        bytes=2.0 * B * (S * L + Q * N * (L + C)),
        integers=lambda: [np.full(B, S), *([np.arange(B * S // page)] if page else [])],
        baselines={
            "XLA": lambda q, cache, lengths, table: xla(q, cache, lengths, block_table_BP=table)
        },
        tunable=None
        if page
        else Tunable(
            "mla_decode",
            spelled(B, Q * N, S, C, L),
            candidates(B, Q * N, S),
            lambda blocks: lambda q, cache, lengths, _: run(q, cache, lengths, blocks=blocks),
        ),
    )


CASES = {name: _case(*shape, page=None) for name, shape in SHAPES.items()} | {
    "V3, 1/8, 4 rows, paged": _case(*SHAPES["V3, 1/8, 4 rows"], page=PAGE)
}
