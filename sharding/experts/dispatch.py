"""Expert parallelism: every token to the devices that hold its experts, and the results back.

Three ways, all exact (`MeshConfig.exchange`): an all-to-all of padded buffers, one of exact sizes,
or an all-gather of tokens and a reduce-scatter of results. With `expert_nodes` the all-to-all has
two levels: a token goes once to each node that holds one of its experts and fans out inside it
(V3 report, section 3.2.2). With one shard of experts nothing moves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from sharding.config import MeshConfig
from sharding.experts.exchange import even_share, level, slots_per_shard
from sharding.partition import gather, num_shards, options, scatter_sum, shard_index, sum_over


def exchange(
    x_ND: jax.Array,
    ids_NK: jax.Array,
    weights_NK: jax.Array,
    params: Any,
    num_local: int,
    local_experts: Callable[..., tuple[jax.Array, jax.Array]],
    groups: tuple[int, int] = (1, 1),
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of every token's experts [N, D], wherever they are.

    Args:
        x_ND: this device's tokens.
        ids_NK: their experts among all, int; distinct in a row.
        weights_NK: router weights, fp32.
        params: weights of this device's experts, a tree.
        num_local: number of experts here.
        local_experts: (params, x_RD, ids_RK, weights_RK) to weighted sums [R, D] and the number of
            choices computed. Ids count from the first expert here; others are computed elsewhere.
        groups: groups of experts, and how many of them a token chooses from.

    Returns:
        The sums, and the number of choices computed here, of whichever tokens.
    """
    config = options()

    def here(params, x_RD, ids_RK, weights_RK):
        first = shard_index("experts") * num_local
        return local_experts(params, x_RD, ids_RK - first, weights_RK)

    if config.exchange == "gather":
        # x[N_ep, D] -> AllGather_ep -> x[N, D]; y[N, D]{U_ep} -> ReduceScatter_ep -> y[N_ep, D]
        rows = (gather(a, "experts") for a in (x_ND, ids_NK, weights_NK))
        y_ND, computed = here(params, *rows)
        y_ND = scatter_sum(y_ND, "experts")
    else:
        (N, K), nodes = ids_NK.shape, num_shards("nodes")
        of_node = num_local * num_shards("experts_of_node")
        across_rows, inside_rows = mean_rows(N, K, num_local, of_node, nodes, groups)
        axis = "experts_of_node"
        inside = level(axis, axis, num_local, inside_rows, config, here)
        across = level("nodes", "experts", of_node, across_rows, config, inside)
        y_ND, computed = across(params, x_ND, ids_NK, weights_NK)
    return sum_over(y_ND, "expert_ffn"), computed  # y[N, D]{U_tp} -> AllReduce_tp -> y[N, D]


def mean_rows(
    tokens: int, choices: int, num_local: int, of_node: int, nodes: int, groups: tuple[int, int]
) -> tuple[float, float]:
    """Rows that a device sends to one node, and those that it then sends to one device inside its
    node, under even load; of experts a device holds `num_local`, a node `of_node`."""
    sent, fanned = (even_share(nodes * of_node, n, choices, groups) for n in (of_node, num_local))
    return tokens * sent, tokens * nodes * fanned


class Rows(NamedTuple):
    """Rows of a device's exchange, one way. Buffers are what is reserved and sent, padding
    included; means are what is filled under even load."""

    across: int
    """Buffer of the level between nodes; 0: there is one node."""
    inside: int
    """Buffer of the level inside a node; 0: a node is one device."""
    received: int
    """Rows that the experts here are given."""
    sorted: int
    """Places of rows sorted by expert."""
    mean_across: float
    mean_inside: float
    computed: float
    """Choices that the experts here compute."""


def exchange_rows(
    tokens: int, choices: int, experts: int, config: MeshConfig, groups: tuple[int, int]
) -> Rows:
    """What `exchange` reserves, sends and computes for `tokens` tokens of a device."""
    nodes, per_node = config.expert_nodes, config.expert // config.expert_nodes
    local = experts // config.expert
    computed = float(tokens * choices)
    if config.exchange == "gather" and config.expert > 1:
        held = tokens * config.expert
        return Rows(0, held, held, held * min(choices, local), 0.0, held, computed)
    to_node, to_device = mean_rows(tokens, choices, local, local * per_node, nodes, groups)
    capacity, rows = config.exchange_capacity, tokens
    across = nodes * slots_per_shard(rows, to_node, capacity) if nodes > 1 else 0
    rows = across or rows
    inside = per_node * slots_per_shard(rows, to_device, capacity) if per_node > 1 else 0
    rows = inside or rows
    return Rows(
        across, inside, rows, rows * min(choices, local), nodes * to_node * (nodes > 1),
        per_node * to_device * (per_node > 1), computed,
    )  # fmt: skip
