"""Hyper-parameters of a DeepSeek-V3 family model or of a dense one, and nothing else.

Every semantic choice (the kind of attention, how experts are scored, whether weights are
renormalised) is a field of its own, so that V2, V2-Lite, Moonlight, Kimi-K2 and V3, and the dense
students of R1, are the same code with other values. Letters in brackets are the symbols of the V3
report (section 2) and of the parameter formula in `model/costs.py`.
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
class BandsConfig:
    """Context extension by bands of frequencies: Hugging Face's rope type `llama3` (arXiv
    2407.21783)."""

    factor: float = 8.0
    """Pairs that turn too slowly are slowed further, `factor` times."""
    low_freq_factor: float = 1.0
    """Rotations over the original context up to which a pair is slowed in full."""
    high_freq_factor: float = 4.0
    """Rotations over the original context from which on a pair keeps its frequency."""
    original_max_position: int = 8192
    """Context length before the extension, in tokens."""

    def __post_init__(self):
        low, high, original = (
            self.low_freq_factor,
            self.high_freq_factor,
            self.original_max_position,
        )
        _require(
            1 <= self.factor < math.inf, f"bands.factor is {self.factor}; it must be 1 or more"
        )
        _require(original > 0, f"bands.original_max_position is {original}; it must be positive")
        _require(
            0 < low < high < math.inf,
            f"bands.low_freq_factor={low} is outside 0..high_freq_factor={high}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and semantics of one model. What a model lacks, latents or experts, has size 0."""

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
    attention: Literal["mla", "grouped"] = "mla"
    """Keys and values from a shared latent (model/mla.py), or of heads that groups of queries share
    (model/grouped.py)."""
    num_kv_heads: int = 0
    """Heads of keys and values; grouped attention alone has them."""
    qkv_bias: bool = False
    """Biases on queries, keys and values; grouped attention."""
    qk_norm: bool = False
    """RMSNorm of every head's query and key, before RoPE; grouped attention."""
    q_lora_rank: int | None = None
    """Width of the compressed query latent [r_q]; None projects queries directly."""
    kv_lora_rank: int = 0
    """Width of the compressed key-value latent [r_kv]."""
    qk_nope_head_dim: int = 0
    """Per-head query/key channels without position [d_n]; 0 in grouped attention."""
    qk_rope_head_dim: int
    """Per-head query channels that carry RoPE, and as many of the key [d_r]: one key for all heads
    in latent attention, one per key head in grouped."""
    v_head_dim: int
    """Per-head value channels [d_v]."""
    dense_ffn_size: int
    """Inner width of the dense MLP [F]."""
    expert_ffn_size: int = 0
    """Inner width of one routed expert [f]."""
    num_experts: int = 0
    """Routed experts per MoE layer [E]."""
    num_shared_experts: int = 0
    """Shared experts, held as one MLP of width S*f [S]."""
    experts_per_token: int = 0
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
    bands: BandsConfig | None = None
    """Another extension of the context, instead of YaRN."""
    rope_interleaved: bool = True
    """Rotate channel pairs (0,1),(2,3)... as DeepSeek does; False rotates half-split pairs."""
    max_position: int = 4096
    """Longest sequence the model is meant for, in tokens."""
    norm_eps: float = 1e-6
    """Epsilon of the RMSNorms on the residual stream; the two latent norms always use 1e-6."""
    tie_embeddings: bool = False
    """The head multiplies by the embedding table instead of a matrix of its own."""
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

    @property
    def has_experts(self) -> bool:
        """Whether any layer, MTP modules included, has experts."""
        return self.num_moe_layers > 0 or self.mtp_depth > 0

    @property
    def stack(self) -> str:
        """Name of the stack of layers that a pipeline cuts: those with experts, or all of a model
        without any."""
        return "moe_layers" if self.num_moe_layers else "dense_layers"

    @property
    def first_parts(self) -> tuple[str, ...]:
        """Parts of the parameters that the first stage of a pipeline computes before its layers;
        but for the vocabulary's, everything else is the last one's."""
        return ("dense_layers",)

    @property
    def stack_size(self) -> int:
        """Layers of `stack`."""
        return self.num_moe_layers or self.num_layers

    def module(self) -> Any:
        """The class that is built from it; a configuration with more parts has its own."""
        from model.transformer import DeepSeekV3

        return DeepSeekV3

    def __post_init__(self):
        for field in _POSITIVE:
            value = getattr(self, field)
            _require(0 < value < math.inf, f"{field} is {value}; it must be positive")
        base = self.rope_theta
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
        _require(
            self.yarn is None or self.bands is None,
            "yarn and bands both extend the context; give one of them",
        )
        checks = {"mla": self._check_latent, "grouped": self._check_grouped}
        _require(
            self.attention in checks,
            f"attention is {self.attention!r}; it is one of {', '.join(checks)}",
        )
        checks[self.attention]()
        if self.has_experts or self.num_experts:
            self._check_experts()

    def _check_latent(self) -> None:
        for field in ("kv_lora_rank", "qk_nope_head_dim"):
            value = getattr(self, field)
            _require(0 < value < math.inf, f"{field} is {value}; it must be positive")
        rank = self.q_lora_rank
        _require(rank is None or rank > 0, f"q_lora_rank is {rank}; it must be positive, or None")
        for field in ("num_kv_heads", "qkv_bias", "qk_norm"):
            value = getattr(self, field)
            _require(not value, f"{field} is {value}; only attention='grouped' has it")

    def _check_grouped(self) -> None:
        heads, kv = self.num_heads, self.num_kv_heads
        _require(
            kv > 0 and heads % kv == 0,
            f"num_heads={heads} does not split into num_kv_heads={kv} equal groups",
        )
        for field in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim"):
            value = getattr(self, field)
            _require(not value, f"{field} is {value}; only attention='mla' has it")
        _require(
            self.v_head_dim == self.qk_rope_head_dim,
            f"v_head_dim={self.v_head_dim} differs from qk_rope_head_dim={self.qk_rope_head_dim}; "
            "heads of grouped attention have one width",
        )

    def _check_experts(self) -> None:
        for field in _POSITIVE_EXPERTS:
            value = getattr(self, field)
            _require(0 < value < math.inf, f"{field} is {value}; it must be positive")
        shared = self.num_shared_experts
        _require(shared >= 0, f"num_shared_experts is {shared}; it must be 0 or more")
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
    "qk_rope_head_dim",
    "v_head_dim",
    "dense_ffn_size",
    "max_position",
    "norm_eps",
)
_POSITIVE_EXPERTS = (
    "num_experts",
    "num_expert_groups",
    "experts_per_token",
    "expert_ffn_size",
    "routed_scaling_factor",
)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(f"model config: {message}")
