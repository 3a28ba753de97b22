"""Folders of dense models as they are released: what config.json may say, heads that are tied, and
sampling that the folder asks for."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import convert
import generate
from checkpoint.hf_config import from_hf_config, to_hf_config
from checkpoint.hf_reader import HuggingFaceFolder
from checkpoint.weights import load_initial, open_weights
from configs import preset
from generation.config import Sampling
from generation.defaults import folder_sampling, said_of_sampling
from model.blueprint import blueprint
from model.config import ModelConfig
from tests.hf_state import to_hf
from tests.test_reference import interpreter

QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02,
    "intermediate_size": 8960, "max_position_embeddings": 131072, "max_window_layers": 21,
    "model_type": "qwen2", "num_attention_heads": 12, "num_hidden_layers": 28,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.44.0",
    "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
"""R1-Distill-Qwen-1.5B's file."""
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip


def test_released_files_are_the_presets():
    for hf, name in ((QWEN, "r1_distill_qwen_1_5b"), (LLAMA, "llama31_8b")):
        model = preset(name).model
        assert from_hf_config(hf) == dataclasses.replace(model, init_std=0.006)


@pytest.mark.parametrize(
    ("hf", "change", "words"),
    [
        (QWEN, {"use_sliding_window": True}, "layers that see a window of 4096 tokens"),
        (QWEN, {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "layer_types"),
        (QWEN, {"layer_types": ["full_attention"] * 27}, "one entry for each of 28 layers"),
        (QWEN, {"use_mrope": True}, "use_mrope is True"),
        (QWEN, {"num_key_value_heads": 5}, "num_key_value_heads=5"),
        (QWEN, {"num_key_value_heads": None}, "missing num_key_value_heads"),
        (QWEN, {"hidden_size": 1537}, "multiple of num_attention_heads=12"),
        (QWEN, {"num_experts": 8}, "unknown keys num_experts"),
        (QWEN, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (QWEN, {"architectures": ["Qwen2ForSequenceClassification"]}, "make them agree"),
        (QWEN, {"tie_word_embeddings": None}, "tie_word_embeddings is None"),
        (LLAMA, {"attention_bias": True}, "attention_bias is True"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias is True"),
        (LLAMA, {"use_sliding_window": False}, "unknown keys use_sliding_window"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' not implemented"),
        (LLAMA, {"rope_scaling": LLAMA["rope_scaling"] | {"low_freq_factor": 5.0}}, "above 5"),
        (LLAMA, {"rope_scaling": LLAMA["rope_scaling"] | {"beta_fast": 32}}, "no beta_fast"),
        (LLAMA, {"model_type": "mistral"}, "model_type is 'mistral'"),
    ],
)  # fmt: skip
def test_what_would_change_the_output_is_refused(hf, change, words):
    with pytest.raises(ValueError, match=words):
        from_hf_config(hf | change)


def test_sliding_windows_that_no_layer_uses_are_none():
    """`use_sliding_window` with max_window_layers at the end, or a list of full layers."""
    for change in (
        {"use_sliding_window": True, "max_window_layers": 28},
        {"use_sliding_window": True, "layer_types": ["full_attention"] * 28},
    ):
        assert from_hf_config(QWEN | change) == from_hf_config(QWEN)


@pytest.mark.reference
@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Llama"])
def test_every_field_of_transformers_is_read_refused_or_ignored(kind):
    import subprocess

    program = (
        f"import dataclasses, json; from transformers import {kind}Config as C; c = C(); "
        "print(json.dumps({f.name: getattr(c, f.name) for f in dataclasses.fields(C)} "
        "| c.to_dict()))"
    )
    done = subprocess.run([interpreter(), "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout.splitlines()[-1])
    assert from_hf_config(config).num_kv_heads == config["num_key_value_heads"]


def test_no_format_has_biases_and_norms():
    both = dataclasses.replace(preset("tiny_dense").model, qk_norm=True)
    with pytest.raises(ValueError, match="no Hugging Face model type has grouped attention with"):
        to_hf_config(both)


# ---- folders ------------------------------------------------------------------------------------

TIED = ModelConfig(
    vocab_size=40, hidden_size=16, num_layers=2, num_dense_layers=2, num_heads=4,
    attention="grouped", num_kv_heads=2, qkv_bias=True, qk_rope_head_dim=4, v_head_dim=4,
    dense_ffn_size=24, rope_interleaved=False, tie_embeddings=True, max_position=64, init_std=0.3,
)  # fmt: skip


def weights_of(config: ModelConfig):
    rng = np.random.default_rng(5)
    draw = lambda x: rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    return {"params": jax.tree.map(draw, blueprint(config).params), "router_bias": {}}


def folder(path, config: ModelConfig = TIED, copy: bool = False, **files):
    path.mkdir()
    state = to_hf(weights_of(config), config, mtp_copies=copy)
    save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(to_hf_config(config)))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_a_tied_head_may_be_stored_but_not_differ(tmp_path):
    plain, copied = folder(tmp_path / "a"), folder(tmp_path / "b", copy=True)
    for found in (HuggingFaceFolder(plain), HuggingFaceFolder(copied)):
        assert "head" not in {path.split("/")[0] for _, path in found._entries}
    state = to_hf(weights_of(TIED), TIED)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, copied / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        HuggingFaceFolder(copied)


def test_import_and_export_keep_biases_and_no_copy(tmp_path):
    """There and back through `convert.py`: the tensors of the folder, to the bit."""
    source = folder(tmp_path / "hf")
    assert convert.main(["import", str(source), str(tmp_path / "run")]) == 0
    back = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "fp32"]
    assert convert.main(back) == 0
    from safetensors.numpy import load_file

    found = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(file)
    wanted = load_file(source / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert "lm_head.weight" not in found
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert from_hf_config(json.loads((tmp_path / "out" / "config.json").read_text())) == (
        dataclasses.replace(TIED, init_std=0.006)
    )


def test_a_head_of_ones_own_begins_as_the_embedding(tmp_path):
    """As the students of R1 whose bases are tied."""
    path = folder(tmp_path / "hf")
    untied = dataclasses.replace(TIED, tie_embeddings=False, max_position=128)
    plan, place = blueprint(untied), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        "params": jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), plan.params
        ),
        "router_bias": {},
    }
    loaded, note = load_initial(path, untied, abstract)
    assert "its head is the embedding" in note
    params = loaded["params"]
    np.testing.assert_array_equal(params["head"]["kernel"], params["embed"]["table"].T)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, plan.params)


def test_generate_follows_generation_config(tmp_path, capsys, monkeypatch):
    """Several ends, greedy because `do_sample` is false; the command line goes before it."""
    monkeypatch.setattr(generate.Common, "compilation_cache", "")
    ends = [7, 9, 11]
    path = folder(tmp_path / "hf", generation_config={"do_sample": False, "eos_token_id": ends})
    options = generate.parse(["--checkpoint", str(path), "--prompt-ids", "1,2"])
    assert options.sampling == Sampling(temperature=0.0)
    options = generate.parse(
        ["--checkpoint", str(path), "--prompt-ids", "1,2", "--temperature", "0.5"]
    )
    assert options.sampling == Sampling(temperature=0.5)
    assert generate.end_ids(open_weights(path), None) == tuple(ends)
    words = ["--checkpoint", str(path), "--prompt-ids", "1,2,3", "--max-new-tokens", "4"]
    assert generate.main(words) == 0
    said = capsys.readouterr()
    assert "sampling: temperature 0, top_k 0, top_p 1, as" in said.err
    assert said.out.strip()


@pytest.mark.parametrize(
    ("given", "sampling", "words"),
    [
        ({}, Sampling(), ()),
        ({"temperature": 0.6}, Sampling(), ()),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95},
            Sampling(0.6, top_p=0.95),
            ("temperature 0.6, top_k 0, top_p 0.95",),
        ),
        (
            {"do_sample": True, "top_k": 20, "repetition_penalty": 1.05},
            Sampling(top_k=20),
            ("top_k 20", "repetition_penalty=1.05, which is not followed"),
        ),
    ],
)
def test_sampling_of_a_folder(tmp_path, given, sampling, words):
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    assert folder_sampling(tmp_path) == sampling
    said = "\n".join(said_of_sampling(tmp_path, sampling))
    assert all(word in said for word in words), said
    assert bool(said) == bool(words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"do_sample": 1}, "do_sample is 1"),
        ({"do_sample": True, "temperature": "hot"}, "temperature is 'hot'"),
        ({"do_sample": True, "top_p": 2.0}, "top_p is 2.0"),
        ({"do_sample": True, "top_k": 1.5}, "top_k is 1.5; it must be an integer"),
        ({"do_sample": True, "temperature": 10**400}, "too large"),
    ],
)
def test_sampling_that_no_one_can_follow(tmp_path, given, words):
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=words):
        folder_sampling(tmp_path)
