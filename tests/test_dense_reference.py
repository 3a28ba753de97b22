"""Dense models against Hugging Face's on tiny random weights: tests/test_reference.py has the way.

Golden files by tests/reference/make_golden.py from `DENSE` of tests/reference/cases.py.
"""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint.hf_config import from_hf_config, to_hf_config
from tests.hf_state import to_hf
from tests.reference.cases import DENSE
from tests.reference.golden import Reference, golden, read
from tests.test_reference import (
    BLOCK_ATOL,
    MODEL_ATOL,
    RECIPE,
    close,
    compare_gradients,
    compare_logits,
    run_reference,
)

WHOLE_MODEL = ("dense_one_key_head", "dense_norms", "dense_bands")
"""Cases compiled whole, forward and backward, in the default suite; the others are slow tests."""


@pytest.fixture(params=list(DENSE))
def ref(request) -> Reference:
    return golden(request.param)


def test_golden_file_is_of_its_case(ref):
    assert ref.meta["config"] == DENSE[ref.meta["case"]].hf


def test_attention(ref):
    out, _ = ref.layer(0).attn(jnp.asarray(ref["attn_in"]), ref.tokens.positions_BT, None)
    close(out, ref["attn_out"], BLOCK_ATOL)


def test_hidden_states_and_logits(ref):
    """The embedding, then every layer, the final norm and the head, one after the other."""
    x_BTD = ref.model.embed(ref.tokens.ids_BT, RECIPE)
    close(x_BTD, ref["hidden"][0], 0)
    for index in range(ref.config.num_layers):
        x_BTD, _ = ref.layer(index)(x_BTD, ref.tokens, RECIPE)
        close(x_BTD, ref["hidden"][index + 1], MODEL_ATOL)
    hidden_BTD = ref.model.final_norm(x_BTD)
    close(hidden_BTD, ref["final_hidden"], MODEL_ATOL)
    close(hidden_BTD @ ref.model.head_kernel(), ref["logits"], MODEL_ATOL)


@pytest.mark.parametrize(
    "case", [n if n in WHOLE_MODEL else pytest.param(n, marks=pytest.mark.slow) for n in DENSE]
)
def test_loss_and_gradients(case):
    compare_logits(golden(case))
    compare_gradients(golden(case))


@pytest.mark.parametrize("case", DENSE)
def test_the_configuration_comes_back(case):
    """Written and read again, in the format that it came in."""
    config = golden(case).config
    written = to_hf_config(config)
    assert written["model_type"] == DENSE[case].hf["model_type"]
    assert from_hf_config(written) == config


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("dense_plain", {"rope_interleaved": True}),
        ("dense_bias_yarn", {"yarn": None}),
        ("dense_bias_yarn", {"yarn": {"mscale": 0.5}}),
        ("dense_norms_yarn", {"yarn": {"beta_slow": 0.1}}),
        ("dense_bands", {"bands": None}),
        ("dense_bands", {"bands": {"high_freq_factor": 2.0}}),
        ("dense_bias_bands", {"bands": {"low_freq_factor": 0.5}}),
        ("dense_norms_tied", {"rope_theta": 1e4}),
    ],
)
def test_attention_notices(case, change):
    ref = golden(case)
    (field, value), config = *change.items(), ref.config
    if isinstance(value, dict):
        change = {field: dataclasses.replace(getattr(config, field), **value)}
    changed = dataclasses.replace(ref, config=dataclasses.replace(config, **change))
    out, _ = changed.layer(0).attn(jnp.asarray(ref["attn_in"]), ref.tokens.positions_BT, None)
    assert np.abs(np.asarray(out) - ref["attn_out"]).max() > 10 * BLOCK_ATOL


def test_norms_of_heads_have_the_epsilon_of_the_stream():
    ref = golden("dense_epsilon")
    layer = ref.layer(0)
    assert {layer.attn_norm.eps, layer.attn.q_norm.eps, layer.attn.k_norm.eps} == {0.01}


# --- live, against the installed transformers ---------------------------------------------------


@pytest.mark.reference
@pytest.mark.parametrize("case", DENSE)
def test_live_with_another_seed(case, tmp_path):
    out = tmp_path / f"{case}.npz"
    seed = str(DENSE[case].seed + 50_000)
    run_reference("run", "--case", case, "--seed", seed, "--out", str(out))
    ref = read(out)
    compare_logits(ref)
    compare_gradients(ref)


@pytest.mark.reference
@pytest.mark.parametrize("case", DENSE)
def test_live_transformers_reads_our_export(case, tmp_path):
    """Our weights and configuration, written as a released checkpoint, give the same logits."""
    ref = golden(case)
    state = to_hf(ref.weights, ref.config, mtp_copies=False)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(ref.config)))
    np.save(tmp_path / "tokens.npy", ref["tokens"])
    paths = {"--checkpoint": tmp_path, "--tokens": tmp_path / "tokens.npy"}
    flags = [str(part) for pair in paths.items() for part in pair]
    run_reference("load", *flags, "--out", str(tmp_path / "out.npz"))
    with np.load(tmp_path / "out.npz") as out:
        close(out["logits"], ref["logits"], MODEL_ATOL)
