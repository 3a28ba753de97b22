"""What a model costs: parameters, FLOPs and cache bytes, counted from its abstract weights.

FLOPs are counted as published by DeepSeek (ISCA 2025, table 2): 6 per active parameter, attention
causally (half the square) or not, MTP and recomputation excluded.
"""

import dataclasses
import math
from typing import Any

import jax

from model.blueprint import blueprint
from model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; router biases count as parameters, as in the released checkpoints."""

    total: int
    """Main model."""
    active: int
    """Used for one token: chosen instead of all routed experts, embedding and head included."""
    mtp: int
    """MTP modules, without the shared embedding and head."""


def count_weights(tree: Any) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count the weights of the abstract model; allocates nothing."""
    plan = blueprint(config)
    main = {k: v for k, v in plan.params.items() if k != "mtp"}
    bias = {k: v for k, v in plan.router_bias.items() if k != "mtp"}
    total = count_weights(main) + count_weights(bias)
    idle = 0
    if config.num_moe_layers:
        moe = plan.params["moe_layers"]["moe"]
        routed = count_weights([moe["w_gate"], moe["w_up"], moe["w_down"]])
        idle = routed * (config.num_experts - config.experts_per_token) // config.num_experts
    mtp = count_weights(plan.params.get("mtp", {})) + count_weights(plan.router_bias.get("mtp", {}))
    return ParameterCount(total, total - idle, mtp)


def attention_flops_per_token(config: ModelConfig, seq_len: int, causal: bool = True) -> float:
    """Forward FLOPs per token of the products with the keys and the values, all layers."""
    per_key = 2 * config.num_heads * (config.qk_head_dim + config.v_head_dim)
    return per_key * seq_len * config.num_layers * (0.5 if causal else 1.0)


def train_flops_per_token(config: ModelConfig, seq_len: int, causal: bool = True) -> float:
    """FLOPs per token of forward and backward: 6 (active - V d) + 3 attention.

    A tied table is counted once and multiplied by once: nothing comes off.
    """
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    active = count_parameters(config).active - looked_up
    return 6.0 * active + 3.0 * attention_flops_per_token(config, seq_len, causal)


def cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """What a cache holds of a token: per layer the latent and the rotary key, or all key heads'
    keys and values."""
    values = config.kv_lora_rank + config.qk_rope_head_dim
    if config.attention == "grouped":
        values = config.num_kv_heads * (config.qk_head_dim + config.v_head_dim)
    return config.num_layers * values * bytes_per_value
