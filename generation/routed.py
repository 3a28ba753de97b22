"""The routed experts of one layer while text is generated: as copies, as arrays of their own.

Letters: B batch, T tokens of a row, K choices per token, D hidden width.
"""

import functools
from typing import Any, NamedTuple

import jax

from generation.replicas import Replicas
from model.config import ModelConfig
from model.moe import W_IN, W_OUT, Served, routed_on_shards, sums_by, weighted_sums
from model.recipe import Recipe
from pallas_kernels.grouped import expert_ffn, separate_expert_ffn


class RoutedExperts(NamedTuple):
    """Experts of a layer as `generation/decode.py:unstack` lays them out."""

    config: ModelConfig
    params: tuple[Any, Any, Any]
    """Gate, up and down: an array each, or a tuple of one array per expert (`separate_experts`)."""
    replicas: Replicas | None
    """Copies that the weights hold in place of experts."""

    def __call__(
        self, x_BTD: jax.Array, ids_BTK: jax.Array, weights_BTK: jax.Array, recipe: Recipe
    ) -> tuple[jax.Array, Served]:
        """Weighted sums of the chosen experts' outputs [B, T, D], and how they came about."""
        groups = self.config.num_expert_groups, self.config.groups_per_token
        if self.replicas is not None:
            ids_BTK = self.replicas.choose(ids_BTK)
            groups = 1, 1  # their copies are spread over a node's devices
        separate = isinstance(self.params[0], tuple)
        ffn = _separate_ffn if separate else expert_ffn
        ffn = functools.partial(ffn, backend=recipe.kernels.experts)
        names = (W_OUT, W_OUT, W_IN) if separate else (W_IN, W_IN, W_OUT)  # apart, output first
        local = functools.partial(weighted_sums, sums_by(ffn))
        params = jax.tree.map(lambda w: w.astype(x_BTD.dtype), self.params)
        return routed_on_shards(x_BTD, ids_BTK, weights_BTK, params, names, local, groups)


def _separate_ffn(x_MD, w_gate, w_up, w_down, group_sizes_E, backend) -> jax.Array:
    """`separate_expert_ffn` of one device's experts, [1, out, in] each."""
    gate, up, down = ([w[0] for w in ws] for ws in (w_gate, w_up, w_down))
    return separate_expert_ffn(x_MD, gate, up, down, group_sizes_E, backend=backend)
