"""Expert parallelism: every token to the devices that hold its experts, and the results back.

Three ways, all exact (`MeshConfig.exchange`): an all-to-all of padded buffers, one of exact sizes,
or an all-gather of tokens and a reduce-scatter of results. With `expert_nodes` the all-to-all has
two levels: a token goes once to each node that holds one of its experts and fans out inside it
(V3 report, section 3.2.2). With one shard of experts nothing moves.
"""

from collections.abc import Callable
from typing import Any

import jax

from sharding.experts.exchange import level
from sharding.experts.room import buffers
from sharding.experts.rounds import Count
from sharding.partition import gather, num_shards, options, scatter_sum, shard_index, sum_over

Local = Callable[..., tuple[jax.Array, Count]]
"""(params, x_RD, ids_RK, weights_RK, rows) to weighted sums [R, D] and what was counted. Ids count
from the first expert here; others are computed elsewhere. `rows` choices are computed at a time."""


def exchange(
    x_ND: jax.Array,
    ids_NK: jax.Array,
    weights_NK: jax.Array,
    params: Any,
    num_local: int,
    local_experts: Local,
    groups: tuple[int, int] = (1, 1),
) -> tuple[jax.Array, Count]:
    """Weighted sum of every token's experts [N, D], wherever they are.

    Args:
        x_ND: this device's tokens.
        ids_NK: their experts among all, int; distinct in a row.
        weights_NK: router weights, fp32.
        params: weights of this device's experts, a tree.
        num_local: number of experts here.
        local_experts: what a device does with the rows it gets.
        groups: groups of experts, and how many of them a token chooses from.

    Returns:
        The sums, and what was counted here, of whichever tokens.
    """
    config, (N, K) = options(), ids_NK.shape
    shards = num_shards("nodes"), num_shards("experts_of_node")
    of_node = num_local * shards[1]
    row_bytes = x_ND.shape[1] * x_ND.dtype.itemsize
    rooms = buffers(of_node * shards[0], shards, N, K, groups, row_bytes, config)

    def here(params, x_RD, ids_RK, weights_RK):
        first = shard_index("experts") * num_local
        return local_experts(params, x_RD, ids_RK - first, weights_RK, rooms.choices.rows)

    if config.exchange == "gather":
        # x[N_ep, D] -> AllGather_ep -> x[N, D]; y[N, D]{U_ep} -> ReduceScatter_ep -> y[N_ep, D]
        rows = (gather(a, "experts") for a in (x_ND, ids_NK, weights_NK))
        y_ND, count = here(params, *rows)
        y_ND = scatter_sum(y_ND, "experts")
    else:
        axis = "experts_of_node"
        inside = level(axis, axis, num_local, rooms.devices.rows, config, here)
        across = level("nodes", "experts", of_node, rooms.nodes.rows, config, inside)
        y_ND, count = across(params, x_ND, ids_NK, weights_NK)
    return sum_over(y_ND, "expert_ffn"), count  # y[N, D]{U_tp} -> AllReduce_tp -> y[N, D]
