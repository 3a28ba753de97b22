"""Shapes of the released models, as values.

Sources: V3 report section 4.2; V2 report section 3.1.2 and appendix B; the configurations released
with the checkpoints of V3, V2, V2-Lite, Moonlight-16B-A3B and Kimi-K2.
"""

import dataclasses

from model.config import ModelConfig, YarnConfig


def v3_671b() -> ModelConfig:
    """DeepSeek-V3 and R1 as pre-trained at 4K context; see `extended` for the released 128K."""
    return ModelConfig(
        vocab_size=129280,
        hidden_size=7168,
        num_layers=61,
        num_dense_layers=3,
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        dense_ffn_size=18432,
        expert_ffn_size=2048,
        num_experts=256,
        num_shared_experts=1,
        experts_per_token=8,
        num_expert_groups=8,
        groups_per_token=4,
        scoring="sigmoid",
        topk_method="noaux_tc",
        normalize_topk=True,
        routed_scaling_factor=2.5,
        max_position=4096,
        mtp_depth=1,
    )


def v2() -> ModelConfig:
    """DeepSeek-V2, 236B."""
    return ModelConfig(
        vocab_size=102400,
        hidden_size=5120,
        num_layers=60,
        num_dense_layers=1,
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        dense_ffn_size=12288,
        expert_ffn_size=1536,
        num_experts=160,
        num_shared_experts=2,
        experts_per_token=6,
        num_expert_groups=8,
        groups_per_token=3,
        scoring="softmax",
        topk_method="group_limited_greedy",
        normalize_topk=False,
        routed_scaling_factor=16.0,
        max_position=4096,
    )


def v2_lite() -> ModelConfig:
    """DeepSeek-V2-Lite, 16B."""
    return ModelConfig(
        vocab_size=102400,
        hidden_size=2048,
        num_layers=27,
        num_dense_layers=1,
        num_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        dense_ffn_size=10944,
        expert_ffn_size=1408,
        num_experts=64,
        num_shared_experts=2,
        experts_per_token=6,
        scoring="softmax",
        topk_method="greedy",
        normalize_topk=False,
        routed_scaling_factor=1.0,
        max_position=4096,
    )


def moonlight_16b() -> ModelConfig:
    """Moonlight-16B-A3B: V2-Lite's shape with V3's routing."""
    return dataclasses.replace(
        v2_lite(),
        vocab_size=163840,
        dense_ffn_size=11264,
        scoring="sigmoid",
        topk_method="noaux_tc",
        normalize_topk=True,
        routed_scaling_factor=2.446,
        rope_theta=50000.0,
        max_position=8192,
        norm_eps=1e-5,
    )


def kimi_k2() -> ModelConfig:
    """Kimi-K2, 1T: V3's shape with more experts, fewer heads, no groups and no MTP."""
    return dataclasses.replace(
        v3_671b(),
        vocab_size=163840,
        num_dense_layers=1,
        num_heads=64,
        num_experts=384,
        num_expert_groups=1,
        groups_per_token=1,
        routed_scaling_factor=2.827,
        rope_theta=50000.0,
        mtp_depth=0,
    )


V3_YARN = YarnConfig()
"""V3 and R1 at 128K (and the released configuration's 163,840 positions)."""
V2_YARN = YarnConfig(mscale=0.707, mscale_all_dim=0.707)
"""V2 and V2-Lite at 128K."""
KIMI_K2_YARN = YarnConfig(factor=32.0, beta_fast=1.0, beta_slow=1.0)
"""Kimi-K2 at 128K."""


def extended(model: ModelConfig, yarn: YarnConfig) -> ModelConfig:
    """The model after context extension: YaRN on, positions times its factor."""
    length = int(yarn.original_max_position * yarn.factor)
    return dataclasses.replace(model, yarn=yarn, max_position=length)
