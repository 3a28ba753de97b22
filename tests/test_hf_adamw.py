"""Training from a checkpoint of transformers follows transformers with torch's AdamW."""

import pathlib
import subprocess

import jax
import numpy as np
import pytest

from checkpoint.weights import load_initial, open_weights
from model.recipe import Recipe
from sharding.config import MeshConfig
from sharding.mesh import make_layout
from tests.test_reference import interpreter
from training.config import OptimizerConfig, TrainConfig
from training.step import Trainer

SCRIPT = pathlib.Path(__file__).resolve().parent / "reference" / "hf_adamw.py"
STEPS, BATCH, LENGTH = 40, 4, 24
RATE = 2.2e-4
"""V3's peak (V3 report, section 4.2)."""
RTOL = 2e-6
"""Of loss and gradient norm at every step, fp32."""


@pytest.mark.reference
def test_forty_steps_follow_transformers(tmp_path):
    rng = np.random.default_rng(1)
    # Few rows that come again, so that there is something to learn.
    rows = rng.integers(0, 64, (8, LENGTH + 1)).astype(np.int32)
    tokens = rows[rng.integers(0, 8, (STEPS, BATCH))]
    np.save(tmp_path / "tokens.npy", tokens)
    folder = tmp_path / "checkpoint"
    command = [interpreter(), str(SCRIPT), "v3", str(folder), str(tmp_path / "tokens.npy")]
    done = subprocess.run(
        [*command, str(STEPS), str(RATE)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    theirs = np.load(folder / "steps.npz")

    config = open_weights(folder).config
    train = TrainConfig(
        steps=STEPS,
        seq_len=LENGTH,
        batch_size=BATCH,
        balance_weight=0.0,
        optimizer=OptimizerConfig(moment_dtype="float32"),
    )
    layout = make_layout(MeshConfig(), jax.devices()[:1])
    trainer = Trainer(config, train, Recipe(), layout)
    state = trainer.init(jax.random.key(0))
    state |= load_initial(folder, config, trainer.abstract_state)[0]
    knobs = {"learning_rate": RATE, "bias_update_rate": 0.0, "mtp_weight": 0.0}
    knobs = {name: np.float32(value) for name, value in knobs.items()}
    ours = {"loss": [], "grad_norm": []}
    for step in range(STEPS):
        state, metrics = trainer.step(state, {"tokens": tokens[step][None]}, knobs)
        for name, values in ours.items():
            values.append(float(metrics[f"train/{name}"]))
    assert np.mean(theirs["loss"][-8:]) < 0.9 * np.mean(theirs["loss"][:8]), "nothing is learned"
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name], rtol=RTOL, err_msg=name)
