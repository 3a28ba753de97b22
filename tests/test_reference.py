"""Our model against Hugging Face's on tiny random weights: values and gradients.

The golden files (tests/golden, written by tests/reference/make_golden.py) hold weights, inputs and
results of transformers in fp32. Both sides compute in fp32 but sum in other orders, which moves
results of order 1 by about 1e-6; the tolerances below are a few tens of that, and far below what
any wrong formula does (the last tests make sure).
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint.hf_config import from_hf_config, to_hf_config
from model.blueprint import bind
from model.recipe import Recipe
from model.router import affinities, select
from tests.hf_state import to_hf
from tests.reference.cases import CASES
from tests.reference.golden import Reference, golden, read

BLOCK_ATOL = 1e-5
"""On outputs of one block, which are of order 1; experts: times the routed scaling factor."""
MODEL_ATOL = 1e-4
"""On hidden states and logits of the whole model, of order 1 to 4."""
GRADIENT_RTOL = 1e-4
"""On a gradient, relative to the largest entry of the reference's gradient of the same tensor."""
LOSS_RTOL = 1e-5

HERE = pathlib.Path(__file__).resolve().parent
RECIPE = Recipe()
MOE_CASES = [name for name in CASES if name != "v3_all_dense"]
MTP_CASES = [name for name, case in CASES.items() if case.hf.get("num_nextn_predict_layers")]
WHOLE_MODEL = ("v3_all_dense", "v2")
"""Cases compiled whole, forward and backward, in the default suite; the others are slow tests."""


@pytest.fixture(params=list(CASES))
def ref(request) -> Reference:
    return golden(request.param)


@pytest.fixture(params=MOE_CASES)
def moe_ref(request) -> Reference:
    return golden(request.param)


@pytest.fixture(
    params=[n if n in WHOLE_MODEL else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def compiled_ref(request) -> Reference:
    return golden(request.param)


def close(ours, theirs: np.ndarray, atol: float) -> None:
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=atol)


# --- blocks -----------------------------------------------------------------------------------


def test_golden_file_is_of_its_case(ref):
    assert ref.meta["config"] == CASES[ref.meta["case"]].hf
    assert ref.meta["margin"] >= 1e-3, "near ties make the comparison a matter of luck"
    if ref.config.topk_method == "noaux_tc" and ref.config.num_moe_layers:
        assert ref.meta["bias_flips"] > 0.1, "the bias must decide some choices"


def test_attention(ref):
    x_BTD = jnp.asarray(ref["attn_in"])
    out, _ = ref.layer(0).attn(x_BTD, ref.tokens.positions_BT, None)
    close(out, ref["attn_out"], BLOCK_ATOL)


def routing(ref: Reference):
    """Scores, chosen experts and weights of the first MoE layer on the recorded inputs."""
    router = ref.first_moe.router
    scores_BTE = affinities(router.logits(jnp.asarray(ref["moe_in"])), ref.config)
    bias_E = None if router.bias is None else router.bias[...]
    return scores_BTE, bias_E, *select(scores_BTE, bias_E, ref.config)


def test_router(moe_ref):
    """Same experts, same weight for each; the order of the K choices is free."""
    *_, ids, weights = routing(moe_ref)
    ours, theirs = np.argsort(ids, -1), np.argsort(moe_ref["router_index"], -1)
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(ids), ours, -1),
        np.take_along_axis(moe_ref["router_index"], theirs, -1),
    )
    close(
        np.take_along_axis(np.asarray(weights), ours, -1),
        np.take_along_axis(moe_ref["router_weight"], theirs, -1),
        BLOCK_ATOL,
    )


def test_experts(moe_ref):
    out, stats = moe_ref.first_moe(jnp.asarray(moe_ref["moe_in"]), moe_ref.tokens.valid_BT, RECIPE)
    close(out, moe_ref["moe_out"], BLOCK_ATOL * max(1.0, moe_ref.config.routed_scaling_factor))
    assert stats.served.dropped == 0


# --- the whole model --------------------------------------------------------------------------


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


def predictions(ref: Reference, params):
    """Logits [B, T, V] and the list of MTP logits, module k cut to the T - k positions it can have.

    The last position has no next token, so what it makes of the padding is cut away too.
    """
    model = bind(ref.config, params, ref.weights["router_bias"])
    ids_BT = ref.tokens.ids_BT
    next_BT = jnp.pad(ids_BT[:, 1:], ((0, 0), (0, 1)))
    out = model(ref.tokens, RECIPE, next_BT if ref.config.mtp_depth else None)
    head_DV = model.head_kernel()
    logits_BTV = out.hidden_BTD @ head_DV
    mtp = [(hidden @ head_DV)[:, : -k - 1] for k, hidden in enumerate(out.mtp_hidden)]
    return logits_BTV, mtp


def cross_entropy(logits_BTV, targets_BT):
    log_p = jax.nn.log_softmax(logits_BTV)
    return -jnp.take_along_axis(log_p, targets_BT[..., None], -1).mean()


def training_loss(ref: Reference, params):
    """The loss of hf_reference.py, with (logits, MTP logits)."""
    logits, mtp = predictions(ref, params)
    ids_BT = ref.tokens.ids_BT
    loss = cross_entropy(logits[:, :-1], ids_BT[:, 1:])
    ahead = [cross_entropy(m[:, :-1], ids_BT[:, k:]) for k, m in enumerate(mtp, start=2)]
    if ahead:
        loss += ref.meta["mtp_weight"] * sum(ahead) / len(ahead)
    return loss, (logits, mtp)


@functools.cache
def ours(ref: Reference):
    """Loss, (logits, MTP logits) and gradients of our model, compiled once per case."""
    step = jax.jit(
        jax.value_and_grad(functools.partial(training_loss, ref), has_aux=True),
        # Compiling is nearly all the time of this test; unoptimised code compiles twice as fast.
        compiler_options={"xla_backend_optimization_level": 0},
    )
    (loss, outputs), gradients = step(ref.weights["params"])
    return jax.device_get((loss, outputs, gradients))


def compare_logits(ref: Reference) -> None:
    loss, (logits, mtp), _ = ours(ref)
    close(logits, ref["logits"], MODEL_ATOL)
    assert len(mtp) == ref.config.mtp_depth
    for k, logits in enumerate(mtp, start=1):
        close(logits, ref[f"mtp_logits_{k}"], MODEL_ATOL)
    np.testing.assert_allclose(loss, ref["loss"], rtol=LOSS_RTOL)


def compare_gradients(ref: Reference) -> None:
    """Tensor by tensor under the checkpoint's names, so that a failure names the matrix."""
    *_, gradients = ours(ref)
    mine = to_hf({"params": gradients}, ref.config, mtp_copies=False, fuse=True)
    theirs = {name[2:]: value for name, value in ref.arrays.items() if name.startswith("g:")}
    assert mine.keys() == theirs.keys()
    worst = {
        name: np.abs(mine[name] - theirs[name]).max() / np.abs(theirs[name]).max() for name in mine
    }
    assert max(worst.values()) < GRADIENT_RTOL, {
        k: v for k, v in worst.items() if v > GRADIENT_RTOL
    }


def test_compiled_model(compiled_ref):
    compare_logits(compiled_ref)


def test_gradients(compiled_ref):
    compare_gradients(compiled_ref)


# --- the comparison would notice --------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("v3", {"rope_interleaved": False}),
        ("v3_half_split", {"rope_interleaved": True}),
        ("v3_yarn", {"yarn": None}),
        ("v3_yarn", {"yarn": {"mscale_all_dim": 0.0, "mscale": 0.0}}),
        ("v3_all_dense", {"yarn": {"mscale": 0.5}}),
        ("kimi_k2", {"yarn": {"beta_fast": 32.0}}),
        ("v2", {"yarn": {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    ],
)
def test_attention_notices(case, change):
    ref = golden(case)
    if change.get("yarn"):
        change = {"yarn": dataclasses.replace(ref.config.yarn, **change["yarn"])}
    changed = dataclasses.replace(ref, config=dataclasses.replace(ref.config, **change))
    out, _ = changed.layer(0).attn(jnp.asarray(ref["attn_in"]), ref.tokens.positions_BT, None)
    assert np.abs(np.asarray(out) - ref["attn_out"]).max() > 10 * BLOCK_ATOL


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("v3", {"normalize_topk": False}),
        ("v3_all_moe", {"normalize_topk": True}),
        ("v3", {"groups_per_token": 4}),
        ("v3", {"routed_scaling_factor": 1.0}),
        ("v3", {"scoring": "softmax"}),
        ("v2", {"scoring": "sigmoid"}),
        ("v2", {"groups_per_token": 4}),
        ("v2_lite", {"normalize_topk": True}),
    ],
)
def test_router_notices(case, change):
    ref = golden(case)
    changed = dataclasses.replace(ref, config=dataclasses.replace(ref.config, **change))
    *_, weights = routing(changed)
    difference = np.sort(weights, -1) - np.sort(ref["router_weight"], -1)
    assert np.abs(difference).max() > 10 * BLOCK_ATOL


def test_norm_epsilon_of_the_stream_is_not_the_latents():
    """moonlight's epsilon of 0.01 must reach the block norms, and only them."""
    ref = golden("moonlight")
    layer = ref.layer(0)
    assert (layer.attn_norm.eps, layer.ffn_norm.eps, layer.attn.kv_norm.eps) == (0.01, 0.01, 1e-6)
    changed = dataclasses.replace(ref, config=dataclasses.replace(ref.config, norm_eps=1e-6))
    x_BTD = jnp.asarray(ref["hidden"][0])
    out, _ = changed.layer(0)(x_BTD, ref.tokens, RECIPE)
    assert np.abs(np.asarray(out) - ref["hidden"][1]).max() > 10 * MODEL_ATOL


# --- live, against the installed transformers ---------------------------------------------------


def interpreter() -> str:
    """An interpreter with torch and transformers."""
    root = HERE.parent
    venv = root / os.environ.get("REFERENCE_VENV", ".venv-reference") / "bin" / "python"
    if python := os.environ.get("MESHSEEK_REFERENCE_PYTHON"):
        return python
    if venv.exists():
        return str(venv)
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        return sys.executable
    pytest.fail(
        f"no interpreter with torch and transformers: {venv} does not exist and "
        f"{sys.executable} lacks them; run `make reference-env`, or name one in "
        "MESHSEEK_REFERENCE_PYTHON"
    )


def run_reference(*arguments: str) -> None:
    command = [interpreter(), str(HERE / "reference" / "hf_reference.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


@pytest.mark.reference
@pytest.mark.parametrize("case", list(CASES))
def test_live_with_another_seed(case, tmp_path):
    out = tmp_path / f"{case}.npz"
    run_reference(
        "run", "--case", case, "--seed", str(CASES[case].seed + 50_000), "--out", str(out)
    )
    ref = read(out)
    assert ref.meta["seed"] != golden(case).meta["seed"]
    compare_logits(ref)
    compare_gradients(ref)


@pytest.mark.reference
@pytest.mark.parametrize("case", [name for name in CASES if name not in MTP_CASES])
def test_live_transformers_reads_our_export(case, tmp_path):
    """Our weights and configuration, written as a released checkpoint, give the same logits."""
    ref = golden(case)
    save_file(to_hf(ref.weights, ref.config), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(ref.config)))
    np.save(tmp_path / "tokens.npy", ref["tokens"])
    paths = {"--checkpoint": tmp_path, "--tokens": tmp_path / "tokens.npy"}
    flags = [str(part) for pair in paths.items() for part in pair]
    run_reference("load", *flags, "--out", str(tmp_path / "out.npz"))
    with np.load(tmp_path / "out.npz") as out:
        close(out["logits"], ref["logits"], MODEL_ATOL)


@pytest.mark.reference
@pytest.mark.parametrize("kind", ["v3", "v2"])
def test_live_every_field_of_transformers_is_read_refused_or_ignored(kind):
    """The file that transformers writes, with every field of its class, opens."""
    program = (
        f"import dataclasses, json; from transformers import Deepseek{kind.upper()}Config as C; "
        "c = C(num_experts_per_tok=2, num_attention_heads=16, num_key_value_heads=16); "
        "print(json.dumps({f.name: getattr(c, f.name) for f in dataclasses.fields(C)} "
        "| c.to_dict()))"
    )
    done = subprocess.run([interpreter(), "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout.splitlines()[-1])
    read = from_hf_config(config)
    assert read.num_layers == config["num_hidden_layers"]
    assert read.mtp_depth == config.get("num_nextn_predict_layers", 0)
