"""Latent attention in its expanded form: one causal sequence; forward and both gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import Case, Tunable
from pallas_kernels.attention.blocks import BLOCK, Blocks, Sizes, candidates, choose_blocks
from pallas_kernels.attention.dkv import key_gradients
from pallas_kernels.attention.dq import query_gradients
from pallas_kernels.attention.forward import forward
from pallas_kernels.attention.mla import mla_attention, spelled
from pallas_kernels.attention.tiles import Plan

SHAPES = {
    "V3": Sizes(B=1, T=4096, N=128, P=128, R=64, V=128),
    "V3, 1/8, 16384": Sizes(B=1, T=16384, N=16, P=128, R=64, V=128),
    "small": Sizes(B=8, T=1024, N=8, P=64, R=32, V=64),
    "tiny": Sizes(B=8, T=256, N=4, P=32, R=16, V=32),
}


def _cudnn(q_BTNH, kv_BTNW, k_rope_BTR, start_BT, *, sizes: Sizes):
    """cuDNN's attention, which wants whole keys, and values as wide as they are."""
    B, T, N, P, R, V = sizes
    rope = jnp.broadcast_to(k_rope_BTR[:, :, None], (B, T, N, R))
    k_BTNH = jnp.concatenate([kv_BTNW[..., :P], rope], axis=-1)
    v_BTNH = jnp.pad(kv_BTNW[..., P:], ((0, 0), (0, 0), (0, 0), (0, P + R - V)))
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTNH, v_BTNH, is_causal=True, implementation="cudnn"
    )[..., :V]


def _both_passes(sizes: Sizes, blocks: Blocks):
    """Output and gradients with given blocks, as a function of a forward case's arguments."""
    scale = (sizes.P + sizes.R) ** -0.5

    def run(q, kv, k_rope, start):
        attend = partial(mla_attention, scale=scale, backend="mosaic", blocks=blocks)
        o, pull = jax.vjp(lambda q, kv, k_rope: attend(q, kv, k_rope, start), q, kv, k_rope)
        return o, pull(o)

    return run


def _cases(name: str, sizes: Sizes) -> dict[str, Case]:
    B, T, N, P, R, V = sizes
    blocks = choose_blocks(sizes)
    array = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    q, kv, k_rope, do = (
        array((B, T, N, P + R)),
        array((B, T, N, P + V)),
        array((B, T, R)),
        array((B, T, N, V)),
    )
    start = jax.ShapeDtypeStruct((B, T), jnp.int32)
    row = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    until = jax.ShapeDtypeStruct((B, 2, T // BLOCK), jnp.int32)
    plan = partial(Plan, (P + R) ** -0.5, sizes, emulated=False)
    programs = min(blocks.programs, sizes.tiles)
    # Half of the pairs, two per multiply-add.
    pairs, heads = B * N * T * T, B * T * N
    read = 2.0 * (heads * (2 * P + R + V) + B * T * R)
    # One document: every row sees from the first position on, and every key is seen to the end.
    starts, ends = np.zeros((B, T)), np.full((B, 2, T // BLOCK), T)
    return {
        f"forward, {name}": Case(
            partial(forward, plan=plan(blocks.forward, programs)),
            (q, kv, k_rope, start),
            1.0 * pairs * (P + R + V),
            read + heads * (2.0 * V + 4),
            integers=lambda: [starts],
            baselines={
                "cuDNN": partial(_cudnn, sizes=sizes),
                "XLA": partial(mla_attention, scale=(P + R) ** -0.5, backend="portable"),
            },
            tunable=Tunable(
                "mla_attention", spelled(sizes), candidates(sizes), partial(_both_passes, sizes)
            ),
        ),
        f"query gradients, {name}": Case(
            partial(query_gradients, plan=plan(blocks.dq, programs)),
            (q, kv, k_rope, start, do, row, row),
            1.0 * pairs * (2 * (P + R) + V),
            read + heads * (2.0 * (V + P + R) + 8),
            forward=False,
            integers=lambda: [starts],
        ),
        f"key gradients, {name}": Case(
            partial(key_gradients, plan=plan(blocks.dkv, sizes.tiles)),
            (q, kv, k_rope, start, do, row, row, until),
            2.0 * pairs * (P + R + V),
            read + heads * (2.0 * (V + P + V + R) + 8),
            forward=False,
            integers=lambda: [starts, ends],
        ),
    }


CASES = {key: case for name, sizes in SHAPES.items() for key, case in _cases(name, sizes).items()}
