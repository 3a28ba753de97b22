"""A Hugging Face DeepSeek `config.json` as our ModelConfig, and back.

Meaning, not spelling, is what is carried over: a key that would change the result and that we do
not implement is an error, and so is a key that is not known here.
"""

from typing import Any

from model.config import ModelConfig, YarnConfig

_SAME_MEANING = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "first_k_dense_replace": "num_dense_layers",
    "num_attention_heads": "num_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "intermediate_size": "dense_ffn_size",
    "moe_intermediate_size": "expert_ffn_size",
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "num_experts_per_tok": "experts_per_token",
    "routed_scaling_factor": "routed_scaling_factor",
    "norm_topk_prob": "normalize_topk",
    "max_position_embeddings": "max_position",
    "rms_norm_eps": "norm_eps",
}
"""Their key -> our field, for keys every configuration has and that need no translation."""

_TYPES = {
    "q_lora_rank": (int, type(None)),
    "n_shared_experts": (int, type(None)),
    "routed_scaling_factor": (float, int),
    "rms_norm_eps": (float, int),
    "norm_topk_prob": (bool,),
    "n_group": (int, type(None)),
    "topk_group": (int, type(None)),
}
"""Types of the keys above and below; the others are int."""
_OPTIONAL_COUNTS = {"n_group", "topk_group", "num_nextn_predict_layers", "num_mtp_layers"}

_SCORING = {"deepseek_v2": "softmax", "deepseek_v3": "sigmoid", "kimi_k2": "sigmoid"}
_TOPK_METHOD = {"deepseek_v2": "greedy", "deepseek_v3": "noaux_tc", "kimi_k2": "noaux_tc"}

_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
}
"""Keys for which we implement one value only, which is also what their absence means."""

_NO_EFFECT = {
    # About files, types and the program that reads them.
    "architectures", "auto_map", "model_type", "dtype", "torch_dtype", "transformers_version",
    "quantization_config", "use_cache", "name_or_path", "_name_or_path", "ep_size", "head_dim",
    "qk_head_dim", "output_router_logits", "output_hidden_states", "output_attentions",
    "return_dict", "problem_type", "is_encoder_decoder", "chunk_size_feed_forward", "id2label",
    "label2id", "experts_implementation", "attn_implementation", "_attn_implementation",
    # Tokens: the tokenizer's business.
    "bos_token_id", "eos_token_id", "pad_token_id",
    # Training of somebody else; the released values are not those of the reports.
    "initializer_range", "aux_loss_alpha", "seq_aux",
}  # fmt: skip

_YARN_KEYS = {
    "type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim",
}  # fmt: skip


def from_hf_config(hf: dict[str, Any]) -> ModelConfig:
    """The model that a `config.json` of deepseek_v2, deepseek_v3 or kimi_k2 describes.

    `init_std` is left at our default: `initializer_range` is not what the models were trained from.

    Raises ValueError for another model type, an unknown key, or a value we do not implement.
    """
    kind = hf.get("model_type")
    if kind not in _SCORING:
        raise ValueError(
            f"config.json: model_type is {kind!r}; only {', '.join(_SCORING)} can be read"
        )
    if missing := [key for key in _SAME_MEANING if key not in hf]:
        raise ValueError(f"config.json: missing {', '.join(missing)}")
    for key in sorted(hf.keys() & (_SAME_MEANING.keys() | _OPTIONAL_COUNTS)):
        value, kinds = hf[key], _TYPES.get(key, (int,))
        _require(hf, key, type(value) in kinds, f"must be {kinds[0].__name__}")
    for key, value in _FIXED.items():
        _require(hf, key, hf.get(key, value) == value, f"only {value!r} is implemented")
    heads = hf.get("num_key_value_heads")
    _require(hf, "num_key_value_heads", heads in (None, hf["num_attention_heads"]),
             f"must equal num_attention_heads={hf['num_attention_heads']}")  # fmt: skip
    fields = {ours: hf[theirs] for theirs, ours in _SAME_MEANING.items()}
    method = hf.get("topk_method", _TOPK_METHOD[kind])
    if kind == "deepseek_v2":
        _require(hf, "norm_topk_prob", not hf["norm_topk_prob"],
                 "implementations of deepseek_v2 disagree on what true means")  # fmt: skip
    theta, yarn = _rope(hf)
    # `greedy` configurations may carry group numbers that nothing reads.
    grouped = method != "greedy"
    config = ModelConfig(
        **fields,
        num_expert_groups=(hf.get("n_group") or 1) if grouped else 1,
        groups_per_token=(hf.get("topk_group") or 1) if grouped else 1,
        scoring=hf.get("scoring_func", _SCORING[kind]),
        topk_method=method,
        rope_theta=theta,
        yarn=yarn,
        rope_interleaved=hf.get("rope_interleave", True),
        mtp_depth=hf.get("num_nextn_predict_layers", hf.get("num_mtp_layers", 0)),
    )
    read = {"num_key_value_heads", "n_group", "topk_group", "scoring_func", "topk_method",
            "rope_theta", "rope_scaling", "rope_parameters", "rope_interleave",
            "num_nextn_predict_layers", "num_mtp_layers"}  # fmt: skip
    if unknown := sorted(hf.keys() - _SAME_MEANING.keys() - _FIXED.keys() - _NO_EFFECT - read):
        raise ValueError(
            f"config.json: unknown keys {', '.join(unknown)}; if they do not change the model's "
            "output, remove them from the file"
        )
    return config


def _require(hf: dict[str, Any], key: str, ok: bool, why: str) -> None:
    if not ok:
        raise ValueError(f"config.json: {key} is {hf.get(key)!r}; {why}")


def _number(key: str, value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"config.json: {key} is {value!r}; it must be a number")
    return float(value)


def _rope(hf: dict[str, Any]) -> tuple[float, YarnConfig | None]:
    """Base and extension; transformers 5 puts both in `rope_parameters`."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope scaling is {rope!r}; it must be an object")
    theta = _number("rope_theta", rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    unknown = sorted(rope.keys() - _YARN_KEYS)
    if kind != "yarn" or unknown:
        what = f"type {kind!r}" if kind != "yarn" else f"keys {', '.join(unknown)}"
        raise ValueError(f"config.json: rope scaling: {what} not implemented; only plain yarn is")
    if missing := [k for k in ("factor", "original_max_position_embeddings") if k not in rope]:
        raise ValueError(f"config.json: rope scaling: missing {', '.join(missing)}")
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim") or 0.0
    # Without mscale_all_dim, transformers ignores mscale where DeepSeek's code uses it; 1 is both.
    if (all_dim and not mscale) or (not all_dim and mscale not in (None, 1)):
        raise ValueError(
            f"config.json: rope scaling: mscale={mscale} with mscale_all_dim={all_dim}; "
            "implementations disagree on one without the other, give both or neither"
        )
    return theta, YarnConfig(
        factor=_number("factor", rope["factor"]),
        original_max_position=rope["original_max_position_embeddings"],
        beta_fast=_number("beta_fast", rope.get("beta_fast") or 32),
        beta_slow=_number("beta_slow", rope.get("beta_slow") or 1),
        mscale=_number("mscale", mscale or 1.0),
        mscale_all_dim=_number("mscale_all_dim", all_dim),
    )


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` that transformers reads as this model.

    Raises ValueError for a combination of scores and selection that no DeepSeek model type has.
    """
    sigmoid = (config.scoring, config.topk_method) == ("sigmoid", "noaux_tc")
    softmax = config.scoring == "softmax" and config.topk_method != "noaux_tc"
    if not sigmoid and not (softmax and not config.normalize_topk and config.rope_interleaved):
        raise ValueError(
            f"no Hugging Face model type has scoring={config.scoring!r} with "
            f"topk_method={config.topk_method!r}, normalize_topk={config.normalize_topk} and "
            f"rope_interleaved={config.rope_interleaved}: deepseek_v3 is sigmoid with noaux_tc, "
            "deepseek_v2 is softmax with the others, neither normalised nor half-split"
        )
    hf: dict[str, Any] = {theirs: getattr(config, ours) for theirs, ours in _SAME_MEANING.items()}
    hf |= {key: value for key, value in _FIXED.items() if key != "mlp_bias" or softmax}
    hf |= {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "architectures": ["DeepseekV3ForCausalLM" if sigmoid else "DeepseekV2ForCausalLM"],
        "num_key_value_heads": config.num_heads,
        "n_group": config.num_expert_groups,
        "topk_group": config.groups_per_token,
        "scoring_func": config.scoring,
        "topk_method": config.topk_method,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
    }
    if sigmoid:
        hf |= {
            "rope_interleave": config.rope_interleaved,
            "num_nextn_predict_layers": config.mtp_depth,
        }
    elif config.mtp_depth:
        raise ValueError(f"mtp_depth is {config.mtp_depth}; deepseek_v2 has no such modules")
    if config.yarn is not None:
        yarn = config.yarn
        hf["rope_scaling"] = {
            "type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    return hf
