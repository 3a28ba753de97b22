"""Values of a Hugging Face `config.json`, checked one by one: errors name the key and the value."""

import math
import re
from typing import Any, NamedTuple

NO_EFFECT = {
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


class Field(NamedTuple):
    """One of our fields that a key gives: an integer of `least` or more unless said otherwise."""

    ours: str
    least: int = 1
    kind: type[int] | type[float] | type[bool] = int
    null: bool = False
    """Whether null is a value, and means that there is no such part."""


def require(ok: bool, key: str, value: Any, why: str) -> None:
    """Raise ValueError that names the key, its value and `why`, unless `ok`."""
    if not ok:
        raise ValueError(f"config.json: {key} is {value!r}; {why}")


def number(key: str, value: Any, above: float = -math.inf, least: float = -math.inf) -> float:
    """A finite number above `above` and not below `least`."""
    bound = f" above {above:g}" if above > -math.inf else ""
    bound += f" of {least:g} or more" if least > -math.inf else ""
    try:
        ok = type(value) in (int, float) and math.isfinite(value) and least <= value > above
        found = float(value) if ok else 0.0
    except OverflowError:
        ok, found = False, 0.0
    require(ok, key, value, f"must be a number{bound}")
    return found


def value_of(hf: dict[str, Any], key: str, field: Field) -> Any:
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


def check_quantization(stored: Any) -> None:
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


def in_their_words(error: ValueError, theirs: dict[str, str]) -> ValueError:
    """A ValueError of ModelConfig with the file's names for our fields."""
    said = re.sub(r"\w+", lambda word: theirs.get(word[0], word[0]), str(error))
    return ValueError(said.replace("model config:", "config.json:"))
