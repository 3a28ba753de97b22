"""Checkpoint names and configurations of Hugging Face, to ours and back, on the golden files."""

import functools

import jax
import numpy as np
import pytest

from checkpoint.hf_config import from_hf_config, to_hf_config
from model.blueprint import blueprint
from model.config import ModelConfig, YarnConfig
from tests.hf_state import from_hf, to_hf
from tests.reference.cases import CASES
from tests.reference.golden import Reference, golden


@pytest.fixture(params=list(CASES))
def ref(request) -> Reference:
    return golden(request.param)


def test_tree_is_the_models(ref):
    plan = blueprint(ref.config)
    shapes = functools.partial(jax.tree.map, np.shape)
    assert shapes(ref.weights["params"]) == shapes(plan.params)
    assert shapes(ref.weights["router_bias"]) == shapes(plan.router_bias)


@pytest.mark.parametrize("fuse", [True, False])
def test_names_round_trip(ref, fuse):
    state = to_hf(ref.weights, ref.config, fuse=fuse)
    if fuse:
        assert {name for name in state if not is_copy(name, ref.config)} == ref.state.keys()
        for name, array in ref.state.items():
            np.testing.assert_array_equal(state[name], array)
    again = from_hf(state, ref.config)
    jax.tree.map(np.testing.assert_array_equal, again, ref.weights)


def is_copy(name: str, config: ModelConfig) -> bool:
    parts = name.split(".")
    ahead = parts[1] == "layers" and int(parts[2]) >= config.num_layers
    return ahead and parts[3:] in (["embed_tokens", "weight"], ["shared_head", "head", "weight"])


def test_expert_names_of_released_checkpoints():
    """One tensor per expert under the names of the R1 checkpoint, and the copies of layer 61."""
    ref = golden("v3_mtp")
    state = to_hf(ref.weights, ref.config)
    assert state["model.layers.1.mlp.experts.15.gate_proj.weight"].shape == (8, 32)
    fused = ref.state["model.layers.1.mlp.experts.gate_up_proj"][15]
    np.testing.assert_array_equal(
        state["model.layers.1.mlp.experts.15.gate_proj.weight"], fused[:8]
    )
    np.testing.assert_array_equal(state["model.layers.1.mlp.experts.15.up_proj.weight"], fused[8:])
    for copy, name in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        np.testing.assert_array_equal(
            state[f"model.layers.2.{copy}.weight"], state[f"{name}.weight"]
        )


def test_config_round_trip(ref):
    assert from_hf_config(to_hf_config(ref.config)) == ref.config


YARN = CASES["v3_yarn"].hf["rope_scaling"]
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deepseek_v32"}, "model_type is 'deepseek_v32'"),
        ({"model_type": ["deepseek_v3"]}, r"model_type is \['deepseek_v3'\]"),
        ({"architectures": ["DeepseekV2ForCausalLM"]}, "deepseek_v3 is DeepseekV3ForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"attention_bias": True}, "attention_bias is True; only False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; only False"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2; only 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1.0"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2; must equal num_attention_heads=4"),
        ({"head_dim": 16}, "head_dim is 16; must equal qk_rope_head_dim=8"),
        ({"qk_head_dim": 8}, "qk_head_dim is 8; must equal .*=16"),
        ({"hidden_size": "32"}, "hidden_size is '32'; must be an integer of 1 or more"),
        ({"vocab_size": True}, "vocab_size is True; must be an integer"),
        ({"num_hidden_layers": 3.0}, "num_hidden_layers is 3.0; must be an integer"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4; must be an integer of 1 or more"),
        ({"q_lora_rank": 0}, "q_lora_rank is 0; must be an integer of 1 or more"),
        ({"n_shared_experts": -1}, "n_shared_experts is -1; must be an integer of 0 or more"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace is 4, outside 0..num_hidden_layers"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9, but 2 groups of 4"),
        ({"n_group": None}, "n_group is None; must be an integer of 1"),
        ({"topk_group": 0}, "topk_group is 0; must be an integer of 1"),
        ({"n_group": 3}, "n_routed_experts=16 does not split into n_group=3"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; must be true or false"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0; must be a number above 0"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor is nan; must be a number"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06; must be a number above 0"),
        ({"scoring_func": "foo"}, "scoring_func is 'foo'; deepseek_v3 has 'sigmoid'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; deepseek_v3 has 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'; deepseek_v3 has 'noaux_tc'"),
        ({"num_nextn_predict_layers": None}, "num_nextn_predict_layers is None; must be an int"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1; must be an integer"),
        ({"num_mtp_layers": 2}, "'num_mtp_layers': 2} contradict each other"),
        ({"rope_interleave": None}, "rope_interleave is None; must be true or false"),
        ({"rope_theta": [1]}, r"rope_theta is \[1\]; must be a number above 1"),
        ({"rope_theta": 10**400}, "must be a number above 1"),
        ({"rope_theta": 0}, "rope_theta is 0; must be a number above 1"),
        ({"rope_parameters": {"rope_theta": 5e4}}, "'rope_theta': 10000.0, .* contradict"),
        ({"rope_scaling": 3}, "rope_scaling is 3; must be an object or null"),
        ({"rope_scaling": False}, "rope_scaling is False; must be an object or null"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "leave the one"),
        ({"rope_scaling": {"factor": 40.0}}, "it must say its type, once"),
        ({"rope_scaling": YARN | {"rope_type": "default"}}, "it must say its type, once"),
        ({"rope_scaling": YARN | {"type": "default"}}, "type 'default' has no beta_fast, beta_sl"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear' not implemented"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "missing original_max_position"),
        ({"rope_scaling": YARN | {"factor": 0}}, "factor is 0; must be a number of 1 or more"),
        ({"rope_scaling": YARN | {"factor": "40"}}, "factor is '40'; must be a number of 1"),
        ({"rope_scaling": YARN | {"beta_fast": 0}}, "beta_fast is 0; must be a number above 0"),
        ({"rope_scaling": YARN | {"beta_slow": 64}}, "beta_slow is 64.0; it exceeds beta_fast=32"),
        ({"rope_scaling": YARN | {"mscale": -1}}, "mscale is -1; must be a number of 0 or more"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "integer of 1 or more"),
        ({"rope_scaling": YARN | {"attention_factor": 2.0}}, "attention_factor is 2.0; only None"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate is False; only True"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'; only 'fp8'"),
        ({"quantization_config": {"fmt": "e4m3"}}, "quant_method is None; only 'fp8'"),
        ({"quantization_config": FP8 | {"weight_block_size": [64, 64]}}, r"only \[128, 128\]"),
        ({"quantization_config": FP8 | {"activation_scheme": "static"}}, "only 'dynamic'"),
        ({"quantization_config": FP8 | {"bits": 4}}, "unknown keys bits"),
        ({"index_topk": 2048}, "unknown keys index_topk"),
    ],
)
def test_configurations_that_would_be_misread(change, message):
    with pytest.raises(ValueError, match=message):
        from_hf_config(CASES["v3"].hf | change)


def test_temperature_given_by_half_is_refused():
    scaling = CASES["v3_yarn"].hf["rope_scaling"]
    with pytest.raises(ValueError, match="give both or neither"):
        from_hf_config(CASES["v3_yarn"].hf | {"rope_scaling": scaling | {"mscale": None}})
    neither = {k: v for k, v in scaling.items() if not k.startswith("mscale")}
    yarn = from_hf_config(CASES["v3_yarn"].hf | {"rope_scaling": neither}).yarn
    assert yarn is not None
    assert (yarn.mscale, yarn.mscale_all_dim) == (1.0, 0.0)


@pytest.mark.parametrize(
    "change",
    [
        {"topk_method": "noaux_tc"},
        {"scoring_func": "sigmoid"},
        {"norm_topk_prob": True},
        {"rope_interleave": False},
        {"num_nextn_predict_layers": 1},
    ],
)
def test_values_that_deepseek_v2_does_not_have(change):
    with pytest.raises(ValueError, match=f"config.json: {next(iter(change))} is"):
        from_hf_config(CASES["v2"].hf | change)


def test_values_said_in_another_way_are_the_same():
    """Two spellings of YaRN, the type's own repetitions, and null for no shared experts."""
    hf = CASES["v3_yarn"].hf
    expected = from_hf_config(hf)
    both = {"rope_theta": 10000.0, "rope_type": "yarn", "truncate": True} | YARN
    said = {"head_dim": 16, "qk_head_dim": 24, "architectures": ["DeepseekV3ForCausalLM"]}
    fp8 = {"quantization_config": FP8 | {"activation_scheme": "dynamic", "scale_fmt": "ue8m0"}}
    assert from_hf_config(hf | said | fp8 | {"rope_parameters": both}) == expected
    moved = {key: value for key, value in hf.items() if not key.startswith("rope_")}
    assert from_hf_config(moved | {"rope_parameters": both}) == expected
    assert from_hf_config(hf | {"n_shared_experts": None}).num_shared_experts == 0


@pytest.mark.parametrize("key", ["n_group", "topk_group", "q_lora_rank"])
def test_keys_whose_absence_programs_fill_differently(key):
    hf = {k: value for k, value in CASES["v3"].hf.items() if k != key}
    with pytest.raises(ValueError, match=f"missing {key}"):
        from_hf_config(hf)


@pytest.mark.parametrize(
    "wrong",
    [
        {"factor": 0.0},
        {"factor": float("nan")},
        {"original_max_position": 0},
        {"beta_fast": 1.0, "beta_slow": 2.0},
        {"mscale": -1.0},
    ],
)
def test_context_extensions_that_none_has(wrong):
    with pytest.raises(ValueError, match=f"yarn.*{next(iter(wrong))}"):
        YarnConfig(**wrong)
