"""Tiny configurations of Janus for tests/reference/janus.py: every option of the format occurs."""

from typing import Any


def _case(
    seed: int,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    vq: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    width = (text or {}).get("hidden_size", 64)
    hf = {
        "text_config": {
            "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 112,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
            "max_position_embeddings": 256, "rope_parameters": {"rope_type": "default",
            "rope_theta": 10000.0}, "tie_word_embeddings": False, **(text or {}),
        },
        "vision_config": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
            "patch_size": 8, "projection_dim": width, "num_image_tokens": 16, **(vision or {}),
        },
        "vq_config": {
            "embed_dim": 4, "num_embeddings": 40, "latent_channels": 16, "base_channels": 32,
            "channel_multiplier": [1, 2], "num_res_blocks": 1, "num_patches": 4,
            "projection_dim": width, "image_token_embed_dim": width, **(vq or {}),
        },
        "image_token_id": 7,
        "tie_word_embeddings": False,
    }  # fmt: skip
    case = {"seed": seed, "images": 1, "length": 9, "prompt": 6, "guidance": 5.0, "hf": hf}
    hf |= {key: more.pop(key) for key in ("tie_word_embeddings", "image_token_id") if key in more}
    return case | more


JANUS_CASES: dict[str, dict[str, Any]] = {
    "plain": _case(100),
    "two_images": _case(200, images=2, length=14, shard="60KB"),
    "grouped_heads": _case(300, text={"num_key_value_heads": 2, "rms_norm_eps": 1e-5}, prompt=11),
    "deep_tokenizer": _case(400, vq={"channel_multiplier": [1, 1, 2], "num_res_blocks": 2}),
    "coarse": _case(
        500,
        vision={"image_size": 48, "patch_size": 16, "num_image_tokens": 9, "mlp_ratio": 2.5},
        guidance=2.0,
    ),
    "no_bias": _case(600, vision={"attention_bias": False, "num_attention_heads": 4}),
    "depths": _case(700, vision={"depth": 3}, vq={"num_hidden_layers": 1}),
    "narrow_codes": _case(800, vq={"embed_dim": 8, "num_embeddings": 24, "latent_channels": 32}),
    "wide": _case(900, text={"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3,
                             "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
                  vision={"hidden_size": 48, "num_attention_heads": 3}, guidance=1.5),
    "tied": _case(950, text={"tie_word_embeddings": True}, tie_word_embeddings=True,
                  image_token_id=95),
}  # fmt: skip
