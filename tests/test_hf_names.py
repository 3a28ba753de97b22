"""Checkpoint names and configurations of Hugging Face, to ours and back, on the golden files."""

import functools

import jax
import numpy as np
import pytest

from checkpoint.hf_config import from_hf_config, to_hf_config
from model.blueprint import blueprint
from model.config import ModelConfig
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deepseek_v32"}, "model_type is 'deepseek_v32'"),
        ({"attention_bias": True}, "attention_bias is True; only False"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ({"hidden_size": "32"}, "hidden_size is '32'; must be int"),
        ({"vocab_size": True}, "vocab_size is True; must be int"),
        ({"num_nextn_predict_layers": None}, "num_nextn_predict_layers is None; must be int"),
        ({"rope_theta": [1]}, r"rope_theta is \[1\]; it must be a number"),
        ({"rope_scaling": 3}, "rope scaling is 3; it must be an object"),
        ({"index_topk": 2048}, "unknown keys index_topk"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear' not implemented"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "missing original_max_position"),
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
