"""A Hugging Face DeepSeek `config.json` as our ModelConfig, and back.

Meaning, not spelling, is what is carried over. Every key is read (_FIELDS and from_hf_config), held
to the one value that we implement (_FIXED), or ignored because it cannot change what the model
computes (_NO_EFFECT). A key that is none of these is an error, and so is one that is said twice in
different ways: programs that read the file disagree on which of the two counts.
"""

import re
from typing import Any, NamedTuple

from checkpoint.hf_rope import read_rope
from checkpoint.hf_values import number, require
from model.config import ModelConfig


class _Field(NamedTuple):
    """One of our fields that a key gives: an integer of `least` or more unless said otherwise."""

    ours: str
    least: int = 1
    kind: type[int] | type[float] | type[bool] = int
    null: bool = False
    """Whether null is a value, and means that there is no such part."""


_FIELDS = {
    "vocab_size": _Field("vocab_size"),
    "hidden_size": _Field("hidden_size"),
    "num_hidden_layers": _Field("num_layers"),
    "first_k_dense_replace": _Field("num_dense_layers", 0),
    "num_attention_heads": _Field("num_heads"),
    "q_lora_rank": _Field("q_lora_rank", null=True),
    "kv_lora_rank": _Field("kv_lora_rank"),
    "qk_nope_head_dim": _Field("qk_nope_head_dim"),
    "qk_rope_head_dim": _Field("qk_rope_head_dim"),
    "v_head_dim": _Field("v_head_dim"),
    "intermediate_size": _Field("dense_ffn_size"),
    "moe_intermediate_size": _Field("expert_ffn_size"),
    "n_routed_experts": _Field("num_experts"),
    "n_shared_experts": _Field("num_shared_experts", 0, null=True),
    "num_experts_per_tok": _Field("experts_per_token"),
    "routed_scaling_factor": _Field("routed_scaling_factor", kind=float),
    "norm_topk_prob": _Field("normalize_topk", kind=bool),
    "max_position_embeddings": _Field("max_position"),
    "rms_norm_eps": _Field("norm_eps", kind=float),
}
"""Keys that every configuration has."""
_GROUPS = {"n_group": "num_expert_groups", "topk_group": "groups_per_token"}
"""Keys that a selection by groups needs."""

_SCORING = {"deepseek_v2": "softmax", "deepseek_v3": "sigmoid", "kimi_k2": "sigmoid"}
_TOPK_METHODS = {
    "deepseek_v2": ("greedy", "group_limited_greedy"),
    "deepseek_v3": ("noaux_tc",),
    "kimi_k2": ("noaux_tc",),
}
"""What a model type may say; absence means the first. Programs compute this whatever it says."""
_CLASS = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
}

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
_FIXED_READ = _FIXED | {"partial_rotary_factor": 1.0, "is_encoder_decoder": False}
"""The same with keys that we do not write."""

_NO_EFFECT = {
    # About files, types and the program that reads them.
    "auto_map", "model_type", "dtype", "torch_dtype", "transformers_version",
    "use_cache", "name_or_path", "_name_or_path", "ep_size",
    "output_router_logits", "output_hidden_states", "output_attentions",
    "return_dict", "problem_type", "chunk_size_feed_forward", "id2label",
    "label2id", "experts_implementation", "attn_implementation", "_attn_implementation",
    # Tokens: the tokenizer's business.
    "bos_token_id", "eos_token_id", "pad_token_id",
    # Training of somebody else; the released values are not those of the reports.
    "initializer_range", "aux_loss_alpha", "seq_aux",
}  # fmt: skip
"""Keys that cannot change what the model computes from its weights."""

_FP8_FIXED = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
    "expert_dtype": "fp8",
}
_FP8_NO_EFFECT = {"scale_fmt", "dequantize", "modules_to_not_convert", "modules_to_convert"}
"""The files tell which tensors are FP8 and what their factors are."""


def from_hf_config(hf: dict[str, Any]) -> ModelConfig:
    """The model that a `config.json` of deepseek_v2, deepseek_v3 or kimi_k2 describes.

    `init_std` is left at our default: `initializer_range` is not what the models were trained from.

    Raises ValueError for another model type, an unknown key, a value we do not implement or that no
    model can have, and two keys that contradict each other.
    """
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in _SCORING:
        raise ValueError(
            f"config.json: model_type is {kind!r}; only {', '.join(_SCORING)} can be read"
        )
    method = _one_of(hf, "topk_method", _TOPK_METHODS[kind])
    groups = _GROUPS if method != "greedy" else {}
    if missing := [key for key in (*_FIELDS, *groups) if key not in hf]:
        raise ValueError(f"config.json: missing {', '.join(missing)}")
    fields = {field.ours: _value(hf, key, field) for key, field in _FIELDS.items()}
    # `greedy` configurations may carry group numbers that nothing reads.
    fields |= {ours: _value(hf, key, _Field(ours)) for key, ours in groups.items()}
    read = _check_fixed(hf, kind)
    theta, yarn = read_rope(hf)
    read |= {"rope_theta", "rope_scaling", "rope_parameters"}
    interleaved = hf.get("rope_interleave", True)
    require(type(interleaved) is bool, "rope_interleave", interleaved, "must be true or false")
    require(
        interleaved or kind == "deepseek_v3",
        "rope_interleave",
        interleaved,
        f"no program reads it for {kind}, whose pairs are interleaved",
    )
    known = _FIELDS.keys() | _GROUPS.keys() | _NO_EFFECT | read | {"rope_interleave"}
    if unknown := sorted(hf.keys() - known):
        raise ValueError(
            f"config.json: unknown keys {', '.join(unknown)}; if they do not change the model's "
            "output, remove them from the file"
        )
    try:
        return ModelConfig(
            **fields,
            scoring=_one_of(hf, "scoring_func", (_SCORING[kind],)),
            topk_method=method,
            rope_theta=theta,
            yarn=yarn,
            rope_interleaved=interleaved,
            mtp_depth=_mtp_depth(hf, kind),
        )
    except ValueError as error:
        theirs = {field.ours: key for key, field in _FIELDS.items()}
        theirs |= {ours: key for key, ours in _GROUPS.items()}
        said = re.sub(r"\w+", lambda word: theirs.get(word[0], word[0]), str(error))
        raise ValueError(said.replace("model config:", "config.json:")) from None


def _check_fixed(hf: dict[str, Any], kind: str) -> set[str]:
    """Check keys that must say what the others already say; returns the keys."""
    for key, value in _FIXED_READ.items():
        require(hf.get(key, value) == value, key, hf.get(key), f"only {value!r} is implemented")
    heads, rope = hf["num_attention_heads"], hf["qk_rope_head_dim"]
    repeated = {
        "num_key_value_heads": ("num_attention_heads", heads),
        "head_dim": ("qk_rope_head_dim", rope),
        "qk_head_dim": ("qk_nope_head_dim + qk_rope_head_dim", hf["qk_nope_head_dim"] + rope),
    }
    for key, (others, value) in repeated.items():
        require(
            hf.get(key) is None or hf[key] == value,
            key,
            hf.get(key),
            f"must equal {others}={value}",
        )
    classes = hf.get("architectures") or [_CLASS[kind]]
    require(
        isinstance(classes, list) and _CLASS[kind] in classes,
        "architectures",
        classes,
        f"model_type {kind} is {_CLASS[kind]}; make them agree",
    )
    if kind == "deepseek_v2":
        require(
            not hf["norm_topk_prob"],
            "norm_topk_prob",
            True,
            "implementations of deepseek_v2 disagree on what true means",
        )
    _check_quantization(hf.get("quantization_config"))
    return {
        *_FIXED_READ,
        *repeated,
        "architectures",
        "quantization_config",
        "scoring_func",
        "topk_method",
        "num_nextn_predict_layers",
        "num_mtp_layers",
    }


def _check_quantization(stored: Any) -> None:
    """Raise ValueError unless weights are plain, or FP8 in the blocks of checkpoint/fp8.py."""
    if stored is None or stored == {}:
        return
    name = "quantization_config"
    require(isinstance(stored, dict), name, stored, "must be an object")
    for key, value in _FP8_FIXED.items():
        absent = value if key != "quant_method" else None
        require(
            stored.get(key, absent) == value,
            f"{name}.{key}",
            stored.get(key),
            f"only {value!r} can be read",
        )
    unknown = sorted(stored.keys() - _FP8_FIXED.keys() - _FP8_NO_EFFECT)
    require(not unknown, name, stored, f"unknown keys {', '.join(unknown)}")


def _mtp_depth(hf: dict[str, Any], kind: str) -> int:
    """MTP modules; the key has two names."""
    names = ("num_nextn_predict_layers", "num_mtp_layers")
    depths = {key: _value(hf, key, _Field("mtp_depth", 0)) for key in names if key in hf}
    if len({*depths.values()}) > 1:
        raise ValueError(f"config.json: {depths} contradict each other; leave one")
    depth = next(iter(depths.values()), 0)
    require(
        not depth or kind != "deepseek_v2",
        next(iter(depths), ""),
        depth,
        "deepseek_v2 has no such layers",
    )
    return depth


def _one_of(hf: dict[str, Any], key: str, values: tuple[Any, ...]) -> Any:
    value = hf.get(key, values[0])
    require(value in values, key, value, f"{hf['model_type']} has {' or '.join(map(repr, values))}")
    return value


def _value(hf: dict[str, Any], key: str, field: _Field) -> Any:
    """The value of a key that must be there, checked."""
    value = hf[key]
    if value is None and field.null:
        return None if field.ours == "q_lora_rank" else 0
    if field.kind is float:
        return number(key, value, above=0.0)
    if field.kind is bool:
        require(type(value) is bool, key, value, "must be true or false")
    else:
        ok = type(value) is int and value >= field.least
        require(ok, key, value, f"must be an integer of {field.least} or more")
    return value


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
    hf: dict[str, Any] = {key: getattr(config, field.ours) for key, field in _FIELDS.items()}
    hf |= {key: value for key, value in _FIXED.items() if key != "mlp_bias" or softmax}
    hf |= {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "architectures": [_CLASS["deepseek_v3" if sigmoid else "deepseek_v2"]],
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
