"""Presets against published numbers, counted again here from the formulas of the papers."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from checkpoint.hf_config import to_hf_config
from configs import PRESETS, preset
from configs.command import parse
from configs.deepseek import KIMI_K2_YARN, V2_YARN, V3_YARN, extended
from model.config import ModelConfig
from model.costs import (
    attention_flops_per_token,
    cache_bytes_per_token,
    count_parameters,
    train_flops_per_token,
)
from model.rope import frequencies, rotation, softmax_scale
from sharding.mesh import resolve
from sharding.pipeline.schedule import make_schedule
from tests.test_reference import interpreter
from training.schedule import BatchPlan

ROOT = pathlib.Path(__file__).resolve().parent.parent

TOTAL = {
    "v3_671b": 671_026_419_200, "v2": 235.741e9, "v2_lite": 15.706e9,
    "moonlight_16b": 15.960e9, "kimi_k2": 1026.41e9,
}  # fmt: skip
ACTIVE = {
    "v3_671b": 37_552_297_472, "v2": 21.376e9, "v2_lite": 2.661e9,
    "moonlight_16b": 2.915e9, "kimi_k2": 32.862e9,
}  # fmt: skip
"""Parameters of the released models, embedding and head included, as far as they are published."""
DENSE = {
    "qwen25_1_5b": 1_543_714_304, "qwen25_7b": 7_615_616_512, "qwen25_14b": 14_770_033_664,
    "qwen25_32b": 32_763_876_352, "llama31_8b": 8_030_261_248, "llama33_70b": 70_553_706_496,
    "llama31_405b": 405_853_388_800, "r1_distill_qwen_1_5b": 1_777_088_000,
    "r1_distill_qwen_7b": 7_615_616_512, "r1_distill_qwen_14b": 14_770_033_664,
    "r1_distill_qwen_32b": 32_763_876_352, "r1_distill_llama_8b": 8_030_261_248,
    "r1_distill_llama_70b": 70_553_706_496,
}  # fmt: skip
"""Dense models, as transformers' classes count them (a reference test builds these)."""


def attention_size(c: ModelConfig) -> int:
    d, H = c.hidden_size, c.num_heads
    if c.attention == "grouped":
        projected = (H + 2 * c.num_kv_heads) * c.v_head_dim
        biases, norms = projected * c.qkv_bias, 2 * c.v_head_dim * c.qk_norm
        return d * projected + biases + norms + H * c.v_head_dim * d
    q_head = c.qk_nope_head_dim + c.qk_rope_head_dim
    queries = d * H * q_head
    if c.q_lora_rank:
        queries = d * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * H * q_head
    keys = d * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    expanded = c.kv_lora_rank * H * (c.qk_nope_head_dim + c.v_head_dim)
    return queries + keys + expanded + H * c.v_head_dim * d


def moe_size(c: ModelConfig, experts: int) -> int:
    """Of one layer, with `experts` of the routed ones counted."""
    bias = c.num_experts if c.topk_method == "noaux_tc" else 0
    expert = 3 * c.hidden_size * c.expert_ffn_size
    return c.num_experts * c.hidden_size + bias + (experts + c.num_shared_experts) * expert


def model_size(c: ModelConfig, experts: int) -> int:
    d = c.hidden_size
    outside = (2 - c.tie_embeddings) * c.vocab_size * d + d
    layers = c.num_layers * (attention_size(c) + 2 * d)
    dense = c.num_dense_layers * 3 * d * c.dense_ffn_size
    return outside + layers + dense + (c.num_layers - c.num_dense_layers) * moe_size(c, experts)


@pytest.mark.parametrize("name", [n for n in PRESETS if type(preset(n).model) is ModelConfig])
def test_parameters_by_the_formula(name):
    """Exact, to the last parameter, for every language model; MTP: 2 d^2 + 5 d besides a layer.

    Those with eyes: tests/test_janus_parity.py.
    """
    c = preset(name).model
    count = count_parameters(c)
    assert count.total == model_size(c, c.num_experts)
    assert count.active == model_size(c, c.experts_per_token)
    d = c.hidden_size
    module = attention_size(c) + moe_size(c, c.num_experts) + 2 * d * d + 5 * d
    assert count.mtp == c.mtp_depth * module


@pytest.mark.parametrize("name", DENSE)
def test_dense_parameters(name):
    count = count_parameters(preset(name).model)
    assert (count.total, count.active, count.mtp) == (DENSE[name], DENSE[name], 0)


@pytest.mark.reference
def test_dense_parameters_are_those_of_transformers():
    """The classes that read our config.json, built without values."""
    configs = {name: to_hf_config(preset(name).model) for name in DENSE}
    program = (
        "import json, sys, torch; from transformers import AutoConfig, AutoModelForCausalLM as M\n"
        "found = {}\n"
        "for name, hf in json.load(sys.stdin).items():\n"
        "    with torch.device('meta'):\n"
        "        model = M.from_config(AutoConfig.for_model(**hf))\n"
        "    found[name] = sum(p.numel() for p in model.parameters())\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run(
        [interpreter(), "-c", program], input=json.dumps(configs), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == DENSE


@pytest.mark.parametrize(
    ("name", "rate"),
    [("qwen_1_5b", 1e-4), ("qwen_7b", 8e-5), ("qwen_14b", 7e-5), ("qwen_32b", 6e-5),
     ("llama_8b", 5e-5), ("llama_70b", 2e-5)],
)  # fmt: skip
def test_students_have_r1s_settings(name, rate):
    """R1 report, B.4.3 and its table of rates: cosine to a tenth, 64 sequences of 32,768."""
    train = preset(f"r1_distill_{name}").train
    assert (train.seq_len, train.batch_size) == (32768, 64)
    first, last = train.learning_rate
    assert (first.value, last.value, last.shape) == (rate, pytest.approx(rate / 10), "cosine")


@pytest.mark.parametrize("name", TOTAL)
def test_parameters_as_published(name):
    """Published to five digits; half a unit of the last is 5e-5 of the smallest."""
    count = count_parameters(preset(name).model)
    assert count.total == pytest.approx(TOTAL[name], rel=5e-5)
    assert count.active == pytest.approx(ACTIVE[name], rel=2e-4)


def test_v3_to_the_last_parameter():
    """Main model 671B, 37B active; MTP module 11.6B besides the shared embedding and head."""
    c = preset("v3_671b").model
    count = count_parameters(c)
    assert count.total == 671_026_419_200
    assert count.active == 37_552_297_472
    assert count.active - c.vocab_size * c.hidden_size == 36_625_618_432
    assert count.mtp == 11_610_068_224
    assert attention_size(c) == 187_107_328
    assert moe_size(c, c.num_experts) == 11_320_164_608


@pytest.mark.parametrize(
    ("name", "causal", "gflop"),
    [("v3_671b", True, 250.5), ("v3_671b", False, 281.2), ("v2", True, 155.3)],
)
def test_flops_per_token(name, causal, gflop):
    """Training FLOPs at 4K (ISCA 2025, table 2: 250 for V3, 155 for V2), to 0.05 GFLOP."""
    flops = train_flops_per_token(preset(name).model, 4096, causal)
    assert flops / 1e9 == pytest.approx(gflop, abs=0.05)


def test_causal_attention_is_half_the_square():
    c = preset("v3_671b").model
    square = attention_flops_per_token(c, 4096, causal=False)
    assert square == 2 * 128 * (192 + 128) * 4096 * 61
    assert attention_flops_per_token(c, 4096) == square / 2


def test_cache_of_v3():
    """61 layers x (512 + 64) values x 2 bytes (ISCA 2025, table 1)."""
    assert cache_bytes_per_token(preset("v3_671b").model) == 70_272


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_whole(name):
    """Nothing that makes the model what it is waits for a flag."""
    run = preset(name)
    assert run.train.steps > 0
    assert run.train.learning_rate
    assert run.train.seq_len <= run.model.max_position
    assert run.train.batch_size % (run.train.micro_batch_size or run.train.batch_size) == 0
    assert run.data.vocab_size <= run.model.vocab_size
    if run.model.has_experts and run.model.topk_method == "noaux_tc":
        assert any(phase.value > 0 for phase in run.train.bias_update_rate)
    if run.model.has_experts:
        assert run.train.balance_weight > 0
    if run.model.mtp_depth:
        assert any(phase.value > 0 for phase in run.train.mtp_weight)


def test_v3_has_what_makes_it_v3():
    """Peers' presets of the same name leave these off."""
    run = preset("v3_671b")
    c, train = run.model, run.train
    assert (c.num_expert_groups, c.groups_per_token) == (8, 4)
    assert (c.scoring, c.topk_method, c.normalize_topk) == ("sigmoid", "noaux_tc", True)
    assert (c.routed_scaling_factor, c.mtp_depth, c.init_std) == (2.5, 1, 0.006)
    assert (train.balance_weight, train.bias_update_rate[0].value) == (1e-4, 0.001)
    assert train.mtp_weight[0].value == 0.3
    assert (train.optimizer.beta2, train.optimizer.weight_decay) == (0.95, 0.1)


def test_unknown_preset_names_the_near_one():
    with pytest.raises(ValueError, match=r"unknown preset 'v3_671'; did you mean v3_671b\?"):
        preset("v3_671")


def test_pretraining_has_plain_rope():
    """YaRN comes with context extension; 4K pre-training rotates by the plain frequencies."""
    for name in PRESETS:
        assert preset(name).model.yarn is None


def test_yarn_frequencies_of_v3():
    """Pairs below 10 keep theirs, from 23 on they turn 40 times slower, a ramp lies between."""
    plain = preset("v3_671b").model
    long = extended(plain, V3_YARN)
    before, after = frequencies(plain), frequencies(long)
    np.testing.assert_allclose(before, 1e4 ** (-np.arange(32) / 32), rtol=1e-12)
    np.testing.assert_array_equal(after[:11], before[:11])
    np.testing.assert_allclose(after[23:], before[23:] / 40, rtol=1e-12)
    expected = {10: 5.623413e-2, 11: 3.900693e-2, 16: 5.5e-3, 22: 1.778279e-4,
                23: 3.333804e-5, 31: 3.333804e-6}  # fmt: skip
    for pair, frequency in expected.items():
        assert after[pair] == pytest.approx(frequency, rel=1e-6)
    assert long.max_position == 163_840


@pytest.mark.parametrize(
    ("name", "yarn", "m"),
    [
        ("v3_671b", V3_YARN, 1.3688879454),  # 0.1 ln 40 + 1
        ("v2", V2_YARN, 1.2608037774),  # 0.0707 ln 40 + 1
        ("kimi_k2", KIMI_K2_YARN, 1.3465735903),  # 0.1 ln 32 + 1
    ],
)
def test_yarn_temperature_is_on_the_softmax_scale(name, yarn, m):
    plain = preset(name).model
    long = extended(plain, yarn)
    assert softmax_scale(plain) == 192**-0.5
    assert softmax_scale(long) == pytest.approx(192**-0.5 * m * m, rel=1e-9)
    cos, sin = rotation(long, np.zeros((1, 1), np.int32))
    assert cos.min() == 1.0
    assert sin.max() == 0.0


def test_yarn_without_mscale_all_dim_scales_the_rotation():
    """Then the scale stays and cos and sin carry m: the other way to write the same thing."""
    yarn = dataclasses.replace(V3_YARN, mscale_all_dim=0.0)
    long = extended(preset("v3_671b").model, yarn)
    assert softmax_scale(long) == 192**-0.5
    cos, _ = rotation(long, np.zeros((1, 1), np.int32))
    np.testing.assert_allclose(cos, 1.3688879454, rtol=1e-6)


def test_v3_on_its_own_layout():
    """Every plateau of the batch fills DualPipe; on other machines the error names the remedy."""
    command = parse(["--config", "v3_671b", "--layout", "deepseek"])
    mesh, train = command.run.mesh, command.run.train
    assert resolve(mesh, 2048) == mesh
    assert (mesh.pipe, mesh.expert, mesh.expert_nodes, mesh.schedule) == (16, 64, 8, "dualpipe")
    assert (train.fp8, mesh.exchange_dtype, mesh.zero1) == (True, "float8_e4m3fn", True)
    plan = BatchPlan(train)
    for count in plan.micro_batch_counts():
        make_schedule(mesh.schedule, mesh.pipe, count)
    assert math.ceil(plan.steps_at(14.8e12)) == train.steps
    with pytest.raises(ValueError, match=r"2048 devices, but 8 are present; .*--emulate 2048"):
        resolve(mesh, 8)


@pytest.mark.slow
def test_v3_on_its_own_layout_is_printed():
    words = ["--config", "v3_671b", "--layout", "deepseek", "--emulate", "2048", "--print-config"]
    done = subprocess.run(
        [sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert (
        "devices      2048 x cpu (emulated): pipe 16 x data 2 x expert_nodes 8 x expert 8" in said
    )
    assert "state        3.73 GiB per device: weights, moments, biases" in said
    assert "batch        15360 x 4096 tokens in 120 micro batches" in said
