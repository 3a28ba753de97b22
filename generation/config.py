"""Options of drawing tokens, and of redundant experts."""

import dataclasses
from pathlib import Path
from typing import Literal

Speculation = bool | Literal["auto"]
"""Whether the MTP module drafts tokens; auto measures, and stops where drafts do not pay."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the model's logits; applied in this order."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most probable token (greedy)."""
    top_k: int = 0
    """Keep the k most probable tokens, of equals the lower ids; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most probable tokens whose probabilities first reach this sum; 1 keeps all."""
    seed: int = 0
    """Seed of the draws. A row's draws depend on it, the row's number and the position only."""

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give more than 0, at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; give a number of tokens, or 0 for all")


@dataclasses.dataclass(frozen=True)
class ExpertOptions:
    """Redundant experts, and the load that decides which."""

    redundant_experts: int = 0
    """Copies of busy experts in every MoE layer, besides the experts themselves; a multiple of the
    shards of experts. Text stays the same."""
    expert_load: Path | None = None
    """.npy or .json file of tokens per expert [MoE layers, MTP module last, experts], as
    --save-expert-load writes it: which experts get copies."""
    save_expert_load: Path | None = None
    """Count the tokens of every expert, and write them to this .npy or .json file."""
