"""Tiles of ragged groups: rows sorted by expert, cut for a loop of dense products.

A group of n rows becomes ceil(n / T) tiles of T rows that start at the group's first row. The last
tile of a group may run over into the next group: a product that writes its rows in tile order
needs no mask, because the next group's first tile writes the same rows again, correctly.
Tiles are processed B at a time as one batched product, which keeps every core busy where a single
small product would use one. The number of chunks is a run-time value: work follows the rows that
exist, not the length of the buffer that holds them.

Shape letters: M rows of the buffer, E experts, T rows of a tile, B tiles of a chunk, C tiles the
tables have room for.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Tiling(NamedTuple):
    """Static cut: rows of a tile [T] and tiles of a chunk [B]."""

    rows: int
    batch: int


class Tiles(NamedTuple):
    """Run-time tables of the tiles, int32. Tiles past the last one start at row M and are empty."""

    expert_C: Array
    start_C: Array
    end_C: Array
    """One past the last row of the tile's group."""
    num_chunks: Array
    """Chunks that hold at least one tile []."""
    num_rows: Array
    """Rows that belong to a group []."""


def choose_tiling(num_rows: int, num_experts: int, weight_size: int) -> Tiling:
    """Tile and chunk for `num_rows` rows over `num_experts` weights of `weight_size` elements.

    A tile costs its rows plus the fetch of its weight, worth about 16 rows of arithmetic on the
    CPUs this was measured on; a group wastes half a tile. The sum over n rows,
    (n/T + 1/2)(T + 16), is least at T = sqrt(32 n). A chunk is filled up to 2^25 multiply-adds,
    about 0.4 ms of one core: enough to split over cores, and its operands stay in cache.
    """
    mean_rows = max(1, num_rows // num_experts)
    rows = 2 ** round(math.log2(math.sqrt(32 * mean_rows)))
    rows = min(max(rows, 16), 512, 2 ** math.ceil(math.log2(num_rows)))
    batch = 2 ** round(math.log2(max(1, 2**25 / (rows * weight_size))))
    return Tiling(rows, min(batch, 16, 2 ** math.ceil(math.log2(-(-num_rows // rows)))))


def make_tiles(group_sizes_E: Array, num_rows: int, tiling: Tiling) -> Tiles:
    """Tables of the tiles that cover groups of `group_sizes_E` rows in a buffer of `num_rows`."""
    T, B = tiling
    E = group_sizes_E.shape[0]
    capacity = -(-(num_rows // T + E) // B) * B
    group_sizes_E = group_sizes_E.astype(jnp.int32)
    ends_E = jnp.cumsum(group_sizes_E)
    tile_counts_E = (group_sizes_E + T - 1) // T
    tile_ends_E = jnp.cumsum(tile_counts_E)
    index_C = jnp.arange(capacity, dtype=jnp.int32)
    # A comparison with every boundary beats a binary search: E is small and this is one pass.
    expert_C = jnp.sum(index_C[:, None] >= tile_ends_E[None, :], axis=1, dtype=jnp.int32)
    exists_C = expert_C < E
    expert_C = jnp.minimum(expert_C, E - 1)
    index_in_group_C = index_C - (tile_ends_E - tile_counts_E)[expert_C]
    start_C = (ends_E - group_sizes_E)[expert_C] + index_in_group_C * T
    return Tiles(
        expert_C,
        jnp.where(exists_C, start_C, num_rows),
        jnp.where(exists_C, ends_E[expert_C], num_rows),
        (tile_ends_E[-1] + B - 1) // B,
        ends_E[-1],
    )


class Chunk(NamedTuple):
    """B tiles of one loop step."""

    expert_B: Array
    start_B: Array
    rows_BT: Array
    """Row numbers, kept inside the buffer."""
    valid_BT1: Array
    """True where the row belongs to the tile's group."""


def take_chunk(tiles: Tiles, i: Array, num_rows: int, tiling: Tiling) -> Chunk:
    """The chunk of loop step `i`."""
    T, B = tiling
    expert_B, start_B, end_B = (
        lax.dynamic_slice(t, (i * B,), (B,)) for t in (tiles.expert_C, tiles.start_C, tiles.end_C)
    )
    rows_BT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)
    return Chunk(
        expert_B,
        start_B,
        jnp.minimum(rows_BT, num_rows - 1),
        (rows_BT < end_B[:, None])[:, :, None],
    )


def take(x: Array, index: Array) -> Array:
    """`x[index]` for an index known to be in bounds, without the checks."""
    return x.at[index].get(mode="promise_in_bounds")


def put_tiles(y: Array, tiles_BTN: Array, start_B: Array) -> Array:
    """Write B tiles at their start rows, in order; `y` has T rows more than the buffer."""
    for b in range(tiles_BTN.shape[0]):
        y = lax.dynamic_update_slice(y, tiles_BTN[b].astype(y.dtype), (start_B[b], 0))
    return y


def add_weights(w_EKN: Array, tiles_BKN: Array, expert_B: Array) -> Array:
    """Add B weight gradients to those of their experts, one after the other."""
    for b in range(tiles_BKN.shape[0]):
        at = (expert_B[b], 0, 0)
        old = lax.dynamic_slice(w_EKN, at, (1, *w_EKN.shape[1:]))
        w_EKN = lax.dynamic_update_slice(w_EKN, old + tiles_BKN[b], at)
    return w_EKN


def keep_rows(y: Array, num_valid: Array, num_rows: int) -> Array:
    """First `num_rows` rows, those from `num_valid` on set to zero."""
    index_M = jnp.arange(num_rows, dtype=jnp.int32)
    return jnp.where((index_M < num_valid)[:, None], y[:num_rows], 0)


def batched_dot(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    """Product of matching matrices of two stacks over one axis each, summed in fp32."""
    axes = (((contract_a,), (contract_b,)), ((0,), (0,)))
    return lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def transposed(x_BTK: Array) -> Array:
    """[B, K, T], materialised.

    XLA:CPU's fast product needs the left operand's contraction in its last axis; given T first it
    falls back to one that takes up to twice the time. The barrier keeps the copy from being folded
    back into the product.
    """
    return lax.optimization_barrier(jnp.swapaxes(x_BTK, 1, 2))


def zeros_varying(shape: tuple[int, ...], dtype, like: tuple[Array, ...]) -> Array:
    """Zeros that vary over every manual mesh axis that any of `like` varies over.

    A loop carry inside `jax.shard_map` must enter with the type it leaves with.
    """
    axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in like))
    zeros = jnp.zeros(shape, dtype)
    return lax.pcast(zeros, tuple(sorted(axes)), to="varying") if axes else zeros
