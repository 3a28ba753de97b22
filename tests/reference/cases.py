"""Tiny models that differ in one semantic choice each: the values behind the golden files.

`hf` is a Hugging Face `config.json` in the spelling of the released checkpoints (`rope_scaling`,
`num_nextn_predict_layers`), so that reading real configurations is tested by the same cases.
Sizes are the smallest at which every choice matters: several experts per group, several groups,
a YaRN ramp with untouched, blended and fully interpolated channels.
"""

import dataclasses
from typing import Any

BATCH, LENGTH = 2, 24
"""Sequences and tokens per sequence of every case."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One model to compare: its Hugging Face configuration and the seed of its golden file."""

    hf: dict[str, Any]
    seed: int
    """First seed tried; near a tie of a top-K, the reference program goes on to the next."""
    why: str
    """The choice that this case, and no other, checks."""


_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    # Unlike qk_nope_head_dim: splitting kv_b per head in the wrong place must not go unnoticed.
    "v_head_dim": 6,
    "intermediate_size": 40,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
}
_V3 = _COMMON | {
    "model_type": "deepseek_v3",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
}
_V2 = {key: value for key, value in _COMMON.items() if key != "num_nextn_predict_layers"} | {
    "model_type": "deepseek_v2",
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
    "n_shared_experts": 2,
}
# 64 rather than 4096 original positions: 8 rotary frequencies then cross the whole ramp.
_YARN = {
    "type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

CASES: dict[str, Case] = {
    "v3": Case(_V3, 100, "sigmoid scores, biased top-2 group limit, renormalised, scaled"),
    "v3_yarn": Case(
        _V3 | {"rope_scaling": _YARN, "qk_rope_head_dim": 16, "num_hidden_layers": 2},
        200,
        "YaRN frequencies and the squared temperature on the softmax scale",
    ),
    "moonlight": Case(
        _V3
        | {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 2,
            "num_hidden_layers": 2,
            "routed_scaling_factor": 2.446,
            "rope_theta": 50000.0,
            # Far above the released 1e-5, so that latent norms using it too would show.
            "rms_norm_eps": 1e-2,
        },
        300,
        "direct query projection; norm epsilon on the stream, 1e-6 on the latents",
    ),
    "kimi_k2": Case(
        _V3
        | {
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.827,
            "num_hidden_layers": 2,
            "rope_scaling": _YARN | {"factor": 32.0, "beta_fast": 1, "beta_slow": 1},
        },
        400,
        "one group; YaRN ramp of a single step",
    ),
    "v3_half_split": Case(
        _V3 | {"rope_interleave": False, "num_hidden_layers": 2},
        500,
        "rotary pairs half-split instead of interleaved",
    ),
    "v3_all_moe": Case(
        _V3 | {"first_k_dense_replace": 0, "num_hidden_layers": 2, "norm_topk_prob": False},
        600,
        "no dense layer; chosen scores not renormalised",
    ),
    "v3_all_dense": Case(
        _V3
        | {
            "first_k_dense_replace": 3,
            "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
        },
        700,
        "no MoE layer; YaRN temperature split between cos/sin and the softmax scale",
    ),
    "v3_mtp": Case(
        _V3 | {"num_nextn_predict_layers": 1, "num_hidden_layers": 2},
        800,
        "one multi-token prediction module",
    ),
    "v3_mtp2": Case(
        _V3
        | {
            "num_nextn_predict_layers": 2,
            "num_hidden_layers": 2,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
        },
        900,
        "a second module chained to the first",
    ),
    "v2": Case(
        _V2
        | {
            "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
            "routed_scaling_factor": 16.0,
            "num_hidden_layers": 2,
        },
        1000,
        "softmax scores, group score is the maximum, no renormalisation, scale 16",
    ),
    "v2_lite": Case(
        _V2
        | {
            "q_lora_rank": None,
            "num_hidden_layers": 2,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.0,
        },
        1100,
        "softmax scores, plain top-K",
    ),
}

# --- dense models ---------------------------------------------------------------------------------

_DENSE = {
    "vocab_size": 48,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_QWEN2 = _DENSE | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096}
_QWEN3 = _DENSE | {"model_type": "qwen3", "head_dim": 12, "attention_bias": False}
_LLAMA = _DENSE | {"model_type": "llama", "attention_bias": False, "mlp_bias": False}
# 24 rather than 8192 original positions: some pairs of a head of 12 are kept, blended and slowed.
_BANDS = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

DENSE: dict[str, Case] = {
    "dense_biases": Case(_QWEN2, 2000, "biases on queries, keys and values; groups of two"),
    "dense_one_key_head": Case(
        _QWEN2 | {"num_key_value_heads": 1, "tie_word_embeddings": True},
        2100,
        "one key head for all; tied embeddings with biases",
    ),
    "dense_bias_yarn": Case(
        _QWEN2
        | {
            "rope_scaling": _YARN,
            "rope_theta": 1e6,
            "max_position_embeddings": 256,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
        },
        2200,
        "YaRN as Qwen writes it: the temperature sits on cos and sin",
    ),
    "dense_8_to_1": Case(
        _QWEN2 | {"num_attention_heads": 16, "num_key_value_heads": 2, "hidden_size": 32},
        2300,
        "eight heads of queries to one of keys, of two channels",
    ),
    "dense_bias_bands": Case(
        _QWEN2
        | {
            "rope_scaling": _BANDS,
            "hidden_size": 24,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        2400,
        "bands, with biases",
    ),
    "dense_bias_odd": Case(
        _QWEN2
        | {
            "hidden_size": 20,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "intermediate_size": 33,
            "vocab_size": 67,
        },
        2500,
        "odd sizes, as many key heads as heads",
    ),
    "dense_norms": Case(_QWEN3, 2600, "norms of every head; wider heads than hidden / heads"),
    "dense_norms_tied": Case(
        _QWEN3 | {"tie_word_embeddings": True, "rope_theta": 1e6}, 2700, "the same, tied"
    ),
    "dense_norms_yarn": Case(
        _QWEN3
        | {
            "rope_scaling": _YARN | {"beta_fast": 4},
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
        },
        2800,
        "YaRN with norms",
    ),
    "dense_plain": Case(
        _LLAMA | {"num_key_value_heads": 4}, 2900, "neither biases nor norms, no groups"
    ),
    "dense_bands": Case(
        _LLAMA | {"rope_scaling": _BANDS, "head_dim": 12, "rope_theta": 5e5},
        3000,
        "frequencies by bands; a head_dim of its own",
    ),
    "dense_bands_tied": Case(
        _LLAMA
        | {
            "rope_scaling": _BANDS,
            "hidden_size": 24,
            "num_attention_heads": 2,
            "tie_word_embeddings": True,
        },
        3100,
        "bands, tied",
    ),
    "dense_odd": Case(
        _LLAMA
        | {
            "hidden_size": 18,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 25,
            "vocab_size": 61,
            "num_hidden_layers": 3,
        },
        3200,
        "odd sizes, groups of three",
    ),
    "dense_epsilon": Case(
        _QWEN3 | {"rms_norm_eps": 1e-2, "num_attention_heads": 3, "num_key_value_heads": 3},
        3300,
        "one epsilon, that of the stream, for the norms of heads too",
    ),
}
