"""Moving tokens to the devices that hold their experts, and the results back.

The exchange here is an all-gather of tokens over the `experts` axis and a reduce-scatter of the
partial results, both exact: nothing is dropped, and the receive buffer is the gathered tokens.
With one shard of experts both are the identity. Notation: x[N_ep, D] is sharded over N.
"""

import jax

from sharding.partition import gather, scatter_sum, shard_index, sum_over


def dispatch(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Give every expert shard all tokens of its row: a[N_ep, ...] -> AllGather_ep -> a[N, ...]."""
    return tuple(gather(a, "experts") for a in arrays)


def combine(y_ND: jax.Array) -> jax.Array:
    """Sum what the expert shards (and shards of expert width) contributed to each token.

    y[N, D]{U_ep, U_tp} -> ReduceScatter_ep -> AllReduce_tp -> y[N_ep, D]
    """
    return sum_over(scatter_sum(y_ND, "experts"), "expert_ffn")


def first_local_expert(experts_per_shard: int) -> jax.Array | int:
    """Global id of this device's first expert."""
    return shard_index("experts") * experts_per_shard
