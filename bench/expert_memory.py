"""Memory of one MoE layer's routed experts, forward and backward, compiled for absent GPUs.

    PYTHONPATH=.gpu-compiler python -m bench.expert_memory [--write]

DeepSeek-V3's widths on 64 GPUs of 8 nodes, 4096 tokens a GPU, bf16, the layer computed again in its
backward pass; by the room of its buffers (`sharding/experts/room.py`).

Shape letters: B sequences, T tokens of one, K choices, D width.
"""

import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bench.command import Command
from configs import preset
from model.moe import MoE
from model.recipe import Kernels, Recipe
from programs.absent_gpus import INSPECTION, absent_gpus
from programs.scheduled import Scheduled, until_scheduled
from sharding.config import MeshConfig
from sharding.mesh import make_layout
from sharding.partition import Layout, batch_sharding, use_layout

MODEL = preset("v3_671b").model
TOKENS = 4096
ROOMS = {"derived": 0.0, "2 times even load": 2.0, "everything": float("inf")}
BACKENDS = ("portable", "mosaic")
GIB = 2**30


def main() -> None:
    """Compile, print, and with `--write` record."""
    command = Command(__doc__, rooms=1)
    command.add_argument("--rooms", type=int, default=len(ROOMS), help="rooms, the first so many")
    options = command.options()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    lines = ["| room | " + " | ".join(BACKENDS) + " |", "|---" * (1 + len(BACKENDS)) + "|"]
    for name, capacity in list(ROOMS.items())[: options.rooms]:
        found = [program(backend, capacity).temporaries / GIB for backend in BACKENDS]
        lines.append(f"| {name} | {' | '.join(f'{size:.2f}' for size in found)} |")
    about = f"GiB per GPU besides weights and tokens, by backend; {TOKENS} tokens a GPU."
    command.show("Memory of the routed experts", [about, "", *lines])
    sys.stdout.flush()
    os._exit(0)  # the compiler is still at work for nobody (programs/scheduled.py)


def program(backend: Any, capacity: float) -> Scheduled:
    """Gradients of the routed experts, as XLA has scheduled them."""
    mesh = MeshConfig(expert=64, expert_nodes=8, exchange_capacity=capacity)
    layout = make_layout(mesh, absent_gpus(8, 8, "h800"))
    recipe = Recipe("bfloat16", "full", Kernels(experts=backend))
    definition, weights = nnx.split(nnx.eval_shape(lambda: MoE(MODEL, nnx.Rngs(0))))

    def gradients(weights, x_BTD, ids_BTK, weights_BTK, dy_BTD):
        def routed(weights, x_BTD, weights_BTK):
            return nnx.merge(definition, weights).routed(x_BTD, ids_BTK, weights_BTK, recipe)[0]

        with use_layout(layout):
            y_BTD, vjp = jax.vjp(recipe.rematerialize(routed), weights, x_BTD, weights_BTK)
            # The cotangent waits for the output, as it does in a model.
            return vjp(dy_BTD * jnp.sum(y_BTD.astype(jnp.float32)).astype(y_BTD.dtype))

    lowered = jax.jit(gradients).lower(weights_of(layout, weights), *rows(layout))
    return until_scheduled(lowered, INSPECTION)


def weights_of(layout: Layout, weights: Any) -> Any:
    """Shapes of the layer's weights, the experts' over their devices."""

    def place(leaf):
        names = ("experts", None, None) if leaf.ndim == 3 else (None,) * leaf.ndim
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding(layout, names))

    return jax.tree.map(place, weights)


def rows(layout: Layout) -> list[jax.ShapeDtypeStruct]:
    """Shapes of tokens, their experts and weights, and a cotangent."""
    B, K, D = layout.mesh.size, MODEL.experts_per_token, MODEL.hidden_size
    kinds = ((D, jnp.bfloat16), (K, jnp.int32), (K, jnp.float32), (D, jnp.bfloat16))
    sharding = batch_sharding(layout, ("batch", None, None))
    return [jax.ShapeDtypeStruct((B, TOKENS, n), t, sharding=sharding) for n, t in kinds]


if __name__ == "__main__":
    main()
