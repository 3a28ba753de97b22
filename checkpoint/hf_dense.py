"""A Hugging Face `config.json` of a dense model with grouped attention: ours of it, and back.

Three formats differ in what they never say: one has biases on queries, keys and values, one norms
of every head, one neither. What is read, held to a value or ignored is listed as in hf_config.py.
"""

from typing import Any, NamedTuple

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


class _Kind(NamedTuple):
    """A format."""

    name: str
    """The class that reads it."""
    qkv_bias: bool = False
    qk_norm: bool = False
    fixed: dict[str, Any] = {}  # noqa: RUF012 - never changed
    """Keys with one value, which is also what their absence means."""
    windows: bool = False
    """Whether there are keys for sliding windows."""
    derived: tuple[str, ...] = ()
    """Keys that may be missing, and follow from others then."""


_FIELDS = {
    "vocab_size": Field("vocab_size"),
    "hidden_size": Field("hidden_size"),
    "num_hidden_layers": Field("num_layers"),
    "num_attention_heads": Field("num_heads"),
    "num_key_value_heads": Field("num_kv_heads"),
    "head_dim": Field("qk_rope_head_dim"),
    "intermediate_size": Field("dense_ffn_size"),
    "max_position_embeddings": Field("max_position"),
    "rms_norm_eps": Field("norm_eps", kind=float),
}
_FIXED = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "use_mrope": False,
}
_NO_BIAS = {"attention_bias": False}

KINDS = {
    "qwen2": _Kind("Qwen2ForCausalLM", qkv_bias=True, windows=True, derived=("head_dim",)),
    "qwen3": _Kind("Qwen3ForCausalLM", qk_norm=True, fixed=_NO_BIAS, windows=True),
    "llama": _Kind(
        "LlamaForCausalLM",
        fixed=_NO_BIAS | {"mlp_bias": False, "pretraining_tp": 1},
        derived=("head_dim", "num_key_value_heads"),
    ),
}
"""Formats by `model_type`."""
_WINDOWS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
_EXTENSIONS = ("default", "yarn", "llama3")


def read(hf: dict[str, Any]) -> ModelConfig:
    """The model that a file of one of KINDS describes; raises ValueError as `from_hf_config`."""
    kind = KINDS[hf["model_type"]]
    given = {key: hf[key] for key in _FIELDS if hf.get(key) is not None}
    if missing := [key for key in _FIELDS if key not in given and key not in kind.derived]:
        raise ValueError(f"config.json: missing {', '.join(missing)}")
    values = {key: value_of(given, key, _FIELDS[key]) for key in given}
    if "head_dim" not in values:
        size, heads = values["hidden_size"], values["num_attention_heads"]
        require(
            size % heads == 0,
            "hidden_size",
            size,
            f"without head_dim it must be a multiple of num_attention_heads={heads}",
        )
        values["head_dim"] = size // heads
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    fixed = _FIXED | kind.fixed
    for key, value in fixed.items():
        require(hf.get(key, value) == value, key, hf.get(key), f"only {value!r} is implemented")
    tied = hf.get("tie_word_embeddings", False)
    require(type(tied) is bool, "tie_word_embeddings", tied, "must be true or false")
    classes = hf.get("architectures") or [kind.name]
    require(
        isinstance(classes, list) and kind.name in classes,
        "architectures",
        classes,
        f"model_type {hf['model_type']} is {kind.name}; make them agree",
    )
    if kind.windows:
        _check_windows(hf, values["num_hidden_layers"])
    check_quantization(hf.get("quantization_config"))
    rope = read_rope(hf, _EXTENSIONS)
    known = {*_FIELDS, *fixed, *NO_EFFECT, *(_WINDOWS if kind.windows else ())}
    known |= {"tie_word_embeddings", "architectures", "quantization_config"}
    known |= {"rope_theta", "rope_scaling", "rope_parameters"}
    if unknown := sorted(hf.keys() - known):
        raise ValueError(
            f"config.json: unknown keys {', '.join(unknown)}; if they do not change the model's "
            "output, remove them from the file"
        )
    try:
        return ModelConfig(
            **{_FIELDS[key].ours: value for key, value in values.items()},
            attention="grouped",
            num_dense_layers=values["num_hidden_layers"],
            v_head_dim=values["head_dim"],
            qkv_bias=kind.qkv_bias,
            qk_norm=kind.qk_norm,
            tie_embeddings=tied,
            rope_interleaved=False,
            **rope,
        )
    except ValueError as error:
        raise in_their_words(error, {field.ours: k for k, field in _FIELDS.items()}) from None


def _check_windows(hf: dict[str, Any], layers: int) -> None:
    """Raise ValueError if any layer sees a window of its past alone, or may."""
    types = hf.get("layer_types")
    require(
        types is None or (isinstance(types, list) and len(types) == layers),
        "layer_types",
        types,
        f"must be null or a list with one entry for each of {layers} layers",
    )
    used = hf.get("use_sliding_window", False)
    require(type(used) is bool, "use_sliding_window", used, "must be true or false")
    window, first = hf.get("sliding_window"), hf.get("max_window_layers")
    for key, value in (("sliding_window", window), ("max_window_layers", first)):
        ok = value is None or (type(value) is int and value >= 0)
        require(ok, key, value, "must be null or an integer of 0 or more")
    if types is not None:
        other = sorted({repr(kind) for kind in types if kind != "full_attention"})
        require(
            not other,
            "layer_types",
            ", ".join(other),
            "layers that see a window of their past are not implemented, only 'full_attention'",
        )
        return
    # Without the list, layers from max_window_layers on have the window.
    require(
        not used or window is None or (first is not None and first >= layers),
        "use_sliding_window",
        used,
        f"layers that see a window of {window} tokens are not implemented",
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` of one of KINDS; ValueError for a combination that none has."""
    wanted = config.qkv_bias, config.qk_norm
    kinds = [name for name, kind in KINDS.items() if (kind.qkv_bias, kind.qk_norm) == wanted]
    if not kinds or config.has_experts or config.rope_interleaved:
        raise ValueError(
            f"no Hugging Face model type has grouped attention with qkv_bias={config.qkv_bias}, "
            f"qk_norm={config.qk_norm}, rope_interleaved={config.rope_interleaved} and "
            f"{config.num_moe_layers} MoE layers: {', '.join(KINDS)} are dense and half-split, "
            "with biases, norms, or neither"
        )
    kind = KINDS[kinds[0]]
    hf = {key: getattr(config, field.ours) for key, field in _FIELDS.items()}
    hf |= kind.fixed
    if kind.windows:
        hf |= {"use_sliding_window": False}
    return hf | {
        "model_type": kinds[0],
        "architectures": [kind.name],
        "hidden_act": _FIXED["hidden_act"],
        "attention_dropout": _FIXED["attention_dropout"],
        "tie_word_embeddings": config.tie_embeddings,
        **write_rope(config),
    }
