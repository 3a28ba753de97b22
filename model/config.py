"""Hyper-parameters of a DeepSeek-V3 family model, and nothing else.

Every semantic choice (how experts are scored, how they are selected, whether weights are
renormalised) is a field of its own, so that V2, V2-Lite, Moonlight, Kimi-K2 and V3 are the same
code with other values. Letters in brackets are the symbols of the V3 report (section 2) and of the
parameter formula in `model/costs.py`.
"""

import dataclasses
import math
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class YarnConfig:
    """Context extension by YaRN (V3 report, section 4.3). It belongs to the weights, not a run."""

    factor: float = 40.0
    """Context is extended `factor` times."""
    original_max_position: int = 4096
    """Context length before the extension, in tokens."""
    beta_fast: float = 32.0
    """Rotations over the original context above which a channel keeps its frequency."""
    beta_slow: float = 1.0
    """Rotations over the original context below which a channel is fully interpolated."""
    mscale: float = 1.0
    """Attention temperature coefficient on cos and sin (relative to mscale_all_dim)."""
    mscale_all_dim: float = 1.0
    """Attention temperature coefficient on the softmax scale; 0 leaves the scale alone."""

    def __post_init__(self):
        _require(1 <= self.factor < math.inf, f"yarn.factor is {self.factor}; it must be 1 or more")
        original, slow, fast = self.original_max_position, self.beta_slow, self.beta_fast
        _require(original > 0, f"yarn.original_max_position is {original}; it must be positive")
        _require(0 < slow <= fast, f"yarn.beta_slow={slow} is outside 0..beta_fast={fast}")
        for name in ("mscale", "mscale_all_dim"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"yarn.{name} is {value}; it must be 0 or more")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and semantics of one model."""

    vocab_size: int
    """Rows of the embedding table and columns of the head [V]."""
    hidden_size: int
    """Width of the residual stream [d]."""
    num_layers: int
    """Decoder layers, MTP modules not counted [L]."""
    num_dense_layers: int
    """First layers that use a dense MLP instead of experts [k]."""
    num_heads: int
    """Attention heads [H]."""
    q_lora_rank: int | None
    """Width of the compressed query latent [r_q]; None projects queries directly."""
    kv_lora_rank: int
    """Width of the compressed key-value latent [r_kv]."""
    qk_nope_head_dim: int
    """Per-head query/key channels without position [d_n]."""
    qk_rope_head_dim: int
    """Per-head query channels, and the single shared key's channels, that carry RoPE [d_r]."""
    v_head_dim: int
    """Per-head value channels [d_v]."""
    dense_ffn_size: int
    """Inner width of the dense MLP [F]."""
    expert_ffn_size: int
    """Inner width of one routed expert [f]."""
    num_experts: int
    """Routed experts per MoE layer [E]."""
    num_shared_experts: int
    """Shared experts, held as one MLP of width S*f [S]."""
    experts_per_token: int
    """Routed experts chosen per token [K]."""
    num_expert_groups: int = 1
    """Contiguous groups the experts form (nodes, in node-limited routing)."""
    groups_per_token: int = 1
    """Groups a token may choose experts from."""
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    """Affinity function of the fp32 gate logits."""
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    """Selection: bias and top-2 group scores (V3); max group scores (V2); plain top-K."""
    normalize_topk: bool = True
    """Divide the chosen affinities by their sum."""
    routed_scaling_factor: float = 1.0
    """Factor on the routed experts' weights, after normalisation."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    yarn: YarnConfig | None = None
    """Context extension; None for plain RoPE."""
    rope_interleaved: bool = True
    """Rotate channel pairs (0,1),(2,3)... as DeepSeek does; False rotates half-split pairs."""
    max_position: int = 4096
    """Longest sequence the model is meant for, in tokens."""
    norm_eps: float = 1e-6
    """Epsilon of the RMSNorms on the residual stream; the two latent norms always use 1e-6."""
    mtp_depth: int = 0
    """Multi-token prediction modules [D]."""
    init_std: float = 0.006
    """Standard deviation of every weight matrix at initialisation (V3 report, section 4.2)."""

    @property
    def qk_head_dim(self) -> int:
        """Channels of one query or key head: nope then rope."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts, MTP modules not counted."""
        return self.num_layers - self.num_dense_layers

    def module(self) -> Any:
        """The class that is built from it; a configuration with more parts has its own."""
        from model.transformer import DeepSeekV3

        return DeepSeekV3

    def __post_init__(self):
        for field in _POSITIVE:
            value = getattr(self, field)
            _require(0 < value < math.inf, f"{field} is {value}; it must be positive")
        rank, shared, base = self.q_lora_rank, self.num_shared_experts, self.rope_theta
        _require(rank is None or rank > 0, f"q_lora_rank is {rank}; it must be positive, or None")
        _require(shared >= 0, f"num_shared_experts is {shared}; it must be 0 or more")
        _require(1 < base < math.inf, f"rope_theta is {base}; it must be above 1")
        _require(
            0 <= self.init_std < math.inf, f"init_std is {self.init_std}; it must be 0 or more"
        )
        rope, dense, layers = self.qk_rope_head_dim, self.num_dense_layers, self.num_layers
        _require(rope % 2 == 0, f"qk_rope_head_dim is {rope}; RoPE rotates pairs, give an even one")
        _require(
            0 <= dense <= layers, f"num_dense_layers is {dense}, outside 0..num_layers={layers}"
        )
        _require(self.mtp_depth >= 0, f"mtp_depth is {self.mtp_depth}; it must be 0 or more")
        E, G, kept = self.num_experts, self.num_expert_groups, self.groups_per_token
        _require(
            E % G == 0, f"num_experts={E} does not split into num_expert_groups={G} equal groups"
        )
        _require(1 <= kept <= G, f"groups_per_token={kept} is outside 1..num_expert_groups={G}")
        _require(
            1 <= self.experts_per_token <= kept * (E // G),
            f"experts_per_token={self.experts_per_token}, but {kept} groups of {E // G} experts "
            f"offer {kept * (E // G)}",
        )
        _require(
            self.topk_method != "noaux_tc" or G == 1 or E // G >= 2,
            f"noaux_tc scores a group by its two best experts; groups of {E // G} are too small",
        )
        _require(
            self.topk_method != "greedy" or G == 1,
            f"topk_method='greedy' ignores groups; num_expert_groups is {G}, set it to 1",
        )


_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "num_experts",
    "num_expert_groups",
    "experts_per_token",
    "expert_ffn_size",
    "dense_ffn_size",
    "max_position",
    "norm_eps",
    "routed_scaling_factor",
)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(f"model config: {message}")
