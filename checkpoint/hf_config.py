"""A Hugging Face `config.json` as our ModelConfig, and back; here DeepSeek's, the others in
hf_dense.py.

Meaning, not spelling, is what is carried over. Every key is read (_FIELDS and from_hf_config), held
to the one value that we implement (_FIXED), or ignored because it cannot change what the model
computes (hf_values.py:NO_EFFECT). A key that is none of these is an error, and so is one that is
said twice in different ways: programs that read the file disagree on which of the two counts.
"""

from typing import Any

from checkpoint import hf_dense, janus_config
from checkpoint.hf_rope import read_rope, write_rope
from checkpoint.hf_values import (
    NO_EFFECT,
    Field,
    check_quantization,
    in_their_words,
    require,
    value_of,
)
from model.config import ModelConfig
from vision.config import JanusConfig

_FIELDS = {
    "vocab_size": Field("vocab_size"),
    "hidden_size": Field("hidden_size"),
    "num_hidden_layers": Field("num_layers"),
    "first_k_dense_replace": Field("num_dense_layers", 0),
    "num_attention_heads": Field("num_heads"),
    "q_lora_rank": Field("q_lora_rank", null=True),
    "kv_lora_rank": Field("kv_lora_rank"),
    "qk_nope_head_dim": Field("qk_nope_head_dim"),
    "qk_rope_head_dim": Field("qk_rope_head_dim"),
    "v_head_dim": Field("v_head_dim"),
    "intermediate_size": Field("dense_ffn_size"),
    "moe_intermediate_size": Field("expert_ffn_size"),
    "n_routed_experts": Field("num_experts"),
    "n_shared_experts": Field("num_shared_experts", 0, null=True),
    "num_experts_per_tok": Field("experts_per_token"),
    "routed_scaling_factor": Field("routed_scaling_factor", kind=float),
    "norm_topk_prob": Field("normalize_topk", kind=bool),
    "max_position_embeddings": Field("max_position"),
    "rms_norm_eps": Field("norm_eps", kind=float),
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


def from_hf_config(hf: dict[str, Any]) -> ModelConfig:
    """The model that a `config.json` describes: deepseek_v2, deepseek_v3 or kimi_k2, or a dense
    model (hf_dense.py).

    `init_std` is left at our default: `initializer_range` is not what the models were trained from.

    Raises ValueError for another model type, an unknown key, a value we do not implement or that no
    model can have, and two keys that contradict each other.
    """
    kind, kinds = hf.get("model_type"), (*_SCORING, *hf_dense.KINDS, janus_config.MODEL_TYPE)
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"config.json: model_type is {kind!r}; only {', '.join(kinds)} can be read"
        )
    if kind == janus_config.MODEL_TYPE:
        language = from_hf_config(janus_config.text_config(hf))
        return janus_config.from_janus_config(hf, language)
    if kind in hf_dense.KINDS:
        return hf_dense.read(hf)
    method = _one_of(hf, "topk_method", _TOPK_METHODS[kind])
    groups = _GROUPS if method != "greedy" else {}
    if missing := [key for key in (*_FIELDS, *groups) if key not in hf]:
        raise ValueError(f"config.json: missing {', '.join(missing)}")
    fields = {field.ours: value_of(hf, key, field) for key, field in _FIELDS.items()}
    # `greedy` configurations may carry group numbers that nothing reads.
    fields |= {ours: value_of(hf, key, Field(ours)) for key, ours in groups.items()}
    read = _check_fixed(hf, kind)
    rope = read_rope(hf, ("default", "yarn"))
    read |= {"rope_theta", "rope_scaling", "rope_parameters"}
    interleaved = hf.get("rope_interleave", True)
    require(type(interleaved) is bool, "rope_interleave", interleaved, "must be true or false")
    require(
        interleaved or kind == "deepseek_v3",
        "rope_interleave",
        interleaved,
        f"no program reads it for {kind}, whose pairs are interleaved",
    )
    known = _FIELDS.keys() | _GROUPS.keys() | NO_EFFECT | read | {"rope_interleave"}
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
            **rope,
            rope_interleaved=interleaved,
            mtp_depth=_mtp_depth(hf, kind),
        )
    except ValueError as error:
        theirs = {field.ours: key for key, field in _FIELDS.items()}
        theirs |= {ours: key for key, ours in _GROUPS.items()}
        raise in_their_words(error, theirs) from None


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
    check_quantization(hf.get("quantization_config"))
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


def _mtp_depth(hf: dict[str, Any], kind: str) -> int:
    """MTP modules; the key has two names."""
    names = ("num_nextn_predict_layers", "num_mtp_layers")
    depths = {key: value_of(hf, key, Field("mtp_depth", 0)) for key in names if key in hf}
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


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` that transformers reads as this model.

    Raises ValueError for a combination of parts that no model type has.
    """
    if isinstance(config, JanusConfig):
        text = to_hf_config(janus_config.language_of(config))
        return janus_config.to_janus_config(config, text)
    if config.attention == "grouped":
        return hf_dense.write(config)
    if config.tie_embeddings or config.bands:
        raise ValueError("deepseek_v3 and deepseek_v2 have neither tied embeddings nor bands")
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
        **write_rope(config),
    }
    if sigmoid:
        hf |= {
            "rope_interleave": config.rope_interleaved,
            "num_nextn_predict_layers": config.mtp_depth,
        }
    elif config.mtp_depth:
        raise ValueError(f"mtp_depth is {config.mtp_depth}; deepseek_v2 has no such modules")
    return hf
