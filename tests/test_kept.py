"""What one layer keeps from its forward pass for its backward pass: by entries and type.

Everything kept is held per layer and micro batch, so one array too many is the largest of a run.
"""

import collections
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax._src.ad_checkpoint import saved_residuals  # behind jax.ad_checkpoint.print_saved_residuals

from configs import preset
from model.recipe import Kernels, Recipe
from model.transformer import Block, Tokens
from sharding.config import MeshConfig
from sharding.partition import use_layout
from tests.layout_helpers import layout_of

MODEL = preset("tiny").model
B, T = 2, 128
N, V = MODEL.num_heads, MODEL.v_head_dim
BACKENDS = ("portable", "reference", "mosaic")
MESHES = {"one device": MeshConfig(), "fsdp 2 x tensor 2": MeshConfig(fsdp=2, tensor=2)}


def kept(remat: str, backend: str, mesh: MeshConfig, stash: str = "") -> collections.Counter[tuple]:
    """Entries and types of what a MoE layer's forward pass keeps, its arguments aside."""
    kernels = Kernels(attention=backend, experts=backend)
    recipe = Recipe("bfloat16", remat, kernels, stash=stash)
    graph, values = nnx.split(nnx.eval_shape(lambda: Block(MODEL, nnx.Rngs(0), moe=True)))

    def layer(values, x_BTD, ids_BT):
        block = nnx.merge(graph, values)
        return block(x_BTD, Tokens(ids_BT, ids_BT, None), recipe)[0].astype(jnp.float32).sum()

    x_BTD = jax.ShapeDtypeStruct((B, T, MODEL.hidden_size), jnp.bfloat16)
    ids_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
    with use_layout(layout_of(mesh)):
        found = saved_residuals(recipe.rematerialize(layer), values, x_BTD, ids_BT)
    # Frequencies of the rotary angles, in any case.
    rotary = (MODEL.qk_rope_head_dim // 2,)
    return collections.Counter(
        (math.prod(aval.shape), aval.dtype.name)
        for aval, why in found
        if "argument" not in why and aval.shape != rotary
    )


ATTENTION_OUTPUT = B * T * N * V, "bfloat16"
LOG_SUMS = B * T * N, "float32"
MARKED = (
    (B * T * MODEL.q_lora_rank, "bfloat16"),  # latents of queries
    (B * T * (MODEL.kv_lora_rank + MODEL.qk_rope_head_dim), "bfloat16"),  # latents of keys
    ATTENTION_OUTPUT,
    (B * T * MODEL.experts_per_token, "int32"),  # chosen experts
    (B * T * MODEL.experts_per_token, "float32"),  # their weights
)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_selective_recomputation_keeps_what_is_marked_and_each_once(backend, mesh):
    """And the log-sums of the kernels, without which their forward pass would run again."""
    want = [*MARKED, *([LOG_SUMS] if backend == "mosaic" else [])]
    assert kept("selective", backend, mesh) == collections.Counter(want)


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_full_recomputation_keeps_nothing(backend, mesh):
    assert not kept("full", backend, mesh)


HELD = {
    "e5m6": ((B * T * N * V * 3 // 2, "uint8"), (B * T * N * V // 128, "int8")),
    "e4m3": ((B * T * N * V, "float8_e4m3fn"), (B * T * N * V // 128, "float32")),
}
"""Attention's output in 12 and 8 bits, and its scales."""


@pytest.mark.parametrize("stash", HELD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_output_is_kept_in_few_bits_and_not_beside_them(backend, stash):
    want = [*MARKED, *HELD[stash], *([LOG_SUMS] if backend == "mosaic" else [])]
    want.remove(ATTENTION_OUTPUT)
    found = kept("selective", backend, MESHES["one device"], stash)
    assert found == collections.Counter(want)


def test_without_recomputation_the_kernels_keep_few_bits_too():
    """And the product after them its own operand, which is bf16 without FP8."""
    for stash, held in HELD.items():
        found = kept("none", "mosaic", MESHES["one device"], stash)
        assert found[held[0]] == 1
        assert (
            found[ATTENTION_OUTPUT]
            <= kept("none", "mosaic", MESHES["one device"])[ATTENTION_OUTPUT]
        )
