"""The `config.json` of a Hugging Face Janus folder as our JanusConfig, and back.

It holds three configurations. As everywhere, every key is read, held to the one value that is
implemented, or known to have no effect; any other key is an error.
"""

import dataclasses
from typing import Any

from checkpoint.hf_values import number, require
from model.config import ModelConfig
from vision.config import EncoderConfig, JanusConfig, TokenizerConfig

MODEL_TYPE, CLASS = "janus", "JanusForConditionalGeneration"

_ENCODER = {
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "layer_norm_eps": "norm_eps",
    "attention_bias": "attention_bias",
}
_TOKENIZER = {
    "num_embeddings": "num_codes",
    "embed_dim": "code_width",
    "latent_channels": "latent_width",
    "base_channels": "base_width",
    "channel_multiplier": "multipliers",
    "num_res_blocks": "num_blocks",
}
_FIXED = {
    "vision_config": {"model_type": "janus_vision_model", "num_channels": 3, "hidden_act": "gelu",
                      "use_qk_norm": False},
    "vq_config": {"model_type": "janus_vqgan", "hidden_act": "gelu", "double_latent": False,
                  "in_channels": 3, "out_channels": 3},
}  # fmt: skip
"""Keys for which one value is implemented, which is also what their absence means."""
_NO_EFFECT = {
    "attention_dropout", "hidden_dropout_rate", "projection_dropout", "dropout",
    "initializer_range", "dtype", "torch_dtype", "_attn_implementation", "attn_implementation",
    "transformers_version", "architectures", "_name_or_path", "name_or_path", "num_patches",
    "output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "problem_type",
}  # fmt: skip
"""Keys of the parts that cannot change the results. Dropouts act in training alone; `num_patches`
is replaced by what the encoder's sizes say, here as in transformers."""
_TOP = {
    "model_type",
    "text_config",
    "vision_config",
    "vq_config",
    "image_token_id",
    "tie_word_embeddings",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
} | _NO_EFFECT


def text_config(hf: dict[str, Any]) -> dict[str, Any]:
    """The language model's part, as a `config.json` of its own.

    Tying is the whole model's business: what the part says of it has no effect, and absence means
    true, as in transformers.
    """
    text = hf.get("text_config")
    require(isinstance(text, dict), "text_config", text, "must be an object")
    assert isinstance(text, dict)
    return text | {"tie_word_embeddings": hf.get("tie_word_embeddings", True)}


def from_janus_config(hf: dict[str, Any], language: ModelConfig) -> JanusConfig:
    """The model that a `config.json` of type janus describes, around its language model.

    Raises ValueError for unknown keys, values that are not implemented, and sizes that do not meet.
    """
    if unknown := sorted(hf.keys() - _TOP):
        raise ValueError(f"config.json: unknown keys {', '.join(unknown)}")
    classes = hf.get("architectures") or [CLASS]
    ok = isinstance(classes, list) and CLASS in classes
    require(ok, "architectures", classes, f"model_type janus is {CLASS}")
    encoder, seen = _part(hf, "vision_config", _ENCODER, EncoderConfig)
    ratio = number("vision_config.mlp_ratio", seen.pop("mlp_ratio", 4.0), above=0.0)
    encoder = dataclasses.replace(encoder, ffn_size=int(encoder.width * ratio))
    tokenizer, drawn = _part(hf, "vq_config", _TOKENIZER, TokenizerConfig)
    for part, key, found in (
        ("vision_config", "projection_dim", seen.pop("projection_dim", 2048)),
        ("vq_config", "projection_dim", drawn.pop("projection_dim", 2048)),
        ("vq_config", "image_token_embed_dim", drawn.pop("image_token_embed_dim", 2048)),
    ):
        wanted = f"must be the language model's hidden_size, {language.hidden_size}"
        require(found == language.hidden_size, f"{part}.{key}", found, wanted)
    fields = {
        "aligner_depth": seen.pop("depth", 2),
        "drawing_depth": drawn.pop("num_hidden_layers", 2),
        "drawn_tokens": seen.pop("num_image_tokens", 576),
        "image_token_id": hf.get("image_token_id", 100581),
    }
    for key, value in fields.items():
        require(type(value) is int, key, value, "must be an integer")
    for part, left in (("vision_config", seen), ("vq_config", drawn)):
        if left:
            raise ValueError(f"config.json: unknown keys {', '.join(sorted(left))} in {part}")
    inherited = {f.name: getattr(language, f.name) for f in dataclasses.fields(ModelConfig)}
    return JanusConfig(**inherited, encoder=encoder, tokenizer=tokenizer, **fields)


def _part(hf: dict[str, Any], name: str, fields: dict[str, str], kind: type) -> tuple[Any, dict]:
    """One of the two configurations of images, and its keys that are not read yet."""
    part = hf.get(name)
    require(isinstance(part, dict), name, part, "must be an object")
    left = {key: value for key, value in dict(part or {}).items() if key not in _NO_EFFECT}
    for key, value in _FIXED[name].items():
        found = left.pop(key, value)
        require(found == value, f"{name}.{key}", found, f"only {value!r} is implemented")
    values = {}
    for key, ours in fields.items():
        if key not in left:
            continue
        value, default = left.pop(key), getattr(kind(), ours)
        if key == "channel_multiplier":
            ok = isinstance(value, list) and all(type(factor) is int for factor in value)
            require(ok, f"{name}.{key}", value, "must be a list of integers")
            value = tuple(value)
        elif key == "layer_norm_eps":
            value = number(f"{name}.{key}", value, above=0.0)
        else:
            wanted = f"must be {'true or false' if default is True else 'an integer'}"
            require(type(value) is type(default), f"{name}.{key}", value, wanted)
        values[ours] = value
    return kind(**values), left


def depths(config: ModelConfig) -> dict[str, int]:
    """How many of a kind there are beside the language model's layers, by key: each has a tensor of
    its own."""
    if not isinstance(config, JanusConfig):
        return {}
    tokenizer = config.tokenizer
    return {
        "vision_config.num_hidden_layers": config.encoder.num_layers,
        "vision_config.depth": config.aligner_depth,
        "vq_config.num_hidden_layers": config.drawing_depth,
        "vq_config.num_res_blocks": tokenizer.num_blocks * len(tokenizer.multipliers),
    }


def language_of(config: JanusConfig) -> ModelConfig:
    """The language model alone."""
    return ModelConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(ModelConfig)})


def to_janus_config(config: JanusConfig, text: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` that transformers reads as this model; `text` is its language model's."""
    e, t, size = config.encoder, config.tokenizer, config.hidden_size
    tied = text.get("tie_word_embeddings", False)
    ratio = e.ffn_size / e.width
    if int(e.width * ratio) != e.ffn_size:
        raise ValueError(f"encoder.ffn_size={e.ffn_size} is no ratio of width={e.width}")
    vision = {key: getattr(e, ours) for key, ours in _ENCODER.items()}
    vq = {key: getattr(t, ours) for key, ours in _TOKENIZER.items()}
    return {
        "model_type": MODEL_TYPE,
        "architectures": [CLASS],
        "text_config": {key: x for key, x in text.items() if key != "architectures"},
        "vision_config": vision
        | _FIXED["vision_config"]
        | {
            "mlp_ratio": ratio,
            "projection_dim": size,
            "depth": config.aligner_depth,
            "num_image_tokens": config.drawn_tokens,
        },
        "vq_config": vq
        | _FIXED["vq_config"]
        | {
            "channel_multiplier": list(t.multipliers),
            "projection_dim": size,
            "image_token_embed_dim": size,
            "num_hidden_layers": config.drawing_depth,
            "num_patches": e.grid,
        },
        "image_token_id": config.image_token_id,
        "tie_word_embeddings": tied,
    }
