"""Training through the kernels, emulated, against training through XLA: the same curve.

bf16 throughout; both round products' results to 8 bits, at different places. Tolerances: losses
2e-3 relative, gradient norms 2e-2 (they are what bf16 on one device shows between two orders of
summation).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import preset
from model.kernels import choose
from model.recipe import Kernels, Recipe
from sharding.config import MeshConfig
from sharding.mesh import make_layout
from tests.kernel_ladder import emulate
from tests.layout_helpers import start
from training.step import Trainer

TINY = preset("tiny")
MODEL = dataclasses.replace(
    TINY.model,
    num_layers=2,
    mtp_depth=0,
    vocab_size=512,
    num_heads=2,
    num_experts=4,
    experts_per_token=2,
    num_expert_groups=2,
    groups_per_token=1,
)
"""`tiny` with one dense and one MoE layer, fewer heads, experts and tokens: every kernel of a step,
each once. What an emulated kernel takes grows with its blocks."""
TOKENS, STEPS = 128, 2
TRAIN = dataclasses.replace(
    TINY.train,
    seq_len=TOKENS,
    batch_size=1,
    micro_batch_size=0,
    batch_ramp_from=0,
    dtype="bfloat16",
)


def curve(kernels: Kernels) -> list[tuple[float, float]]:
    """Loss and gradient norm of the first steps."""
    layout = make_layout(MeshConfig(data=1), jax.devices()[:1])
    trainer = Trainer(MODEL, TRAIN, Recipe("bfloat16", kernels=kernels), layout)
    state = start(trainer)
    rows = np.random.default_rng(0).integers(0, 64, (1, 1, TOKENS + 1)).astype(np.int32)
    knobs = {"learning_rate": 3e-4, "bias_update_rate": 1e-3, "mtp_weight": 0.0}
    knobs = {name: jnp.float32(value) for name, value in knobs.items()}
    points = []
    for _ in range(STEPS):
        state, metrics = trainer.step(state, {"tokens": jnp.asarray(rows)}, knobs)
        points.append((float(metrics["train/loss"]), float(metrics["train/grad_norm"])))
    return points


@pytest.mark.slow
def test_kernels_and_xla_give_the_same_curve():
    layout = make_layout(MeshConfig(data=1), jax.devices()[:1])
    kernels = choose("emulated", MODEL, "bfloat16", layout).kernels
    assert set(kernels) - {"portable"} == {"emulated"}
    got, want = np.array(emulate(curve, kernels)), np.array(curve(Kernels()))
    print(got, want)
    assert want[0, 0] - want[-1, 0] > 0.3, "nothing is learned, so nothing is shown"
    np.testing.assert_allclose(got[:, 0], want[:, 0], rtol=2e-3)
    np.testing.assert_allclose(got[:, 1], want[:, 1], rtol=2e-2)
