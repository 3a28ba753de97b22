"""Tiles of sorted rows for the grouped kernels on Hopper: which group, which rows.

A kernel that looked its group up among E boundaries would unroll E comparisons and spill registers.
The tables are made once, by a few small XLA operations, and read one entry per tile. Rows beyond
the last group form one more group, number E, whose product is empty: its tiles are how the kernels
write zeros there, in the same way and at the same time as everything else.

Shape letters: M rows, E experts, G = E + 1 groups, C tiles the tables have room for.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

ALIGNMENT = 8
"""Rows of a swizzle pattern: TMA into the layout that products read starts at its multiples."""


class RowTiles(NamedTuple):
    """Run-time tables, int32. A tile holds rows of one group; every row is in one tile.

    A tile starts at a multiple of `ALIGNMENT`, so that the first one of a group may begin in the
    group before: its own rows are those from `first` to `end`.
    """

    group_C: Array
    """Group of the tile; E for rows beyond the last group."""
    start_C: Array
    """First row of the tile in the buffer."""
    first_C: Array
    """First own row, counted from `start`; less than `ALIGNMENT`."""
    end_C: Array
    """One past the last own row, counted from `start`."""
    count_1: Array
    """Tiles that exist; entries beyond it mean nothing."""


def group_spans(group_sizes_E: Array, num_rows: int) -> tuple[Array, Array]:
    """First row of each group and one past its last, then those of the rows in none [G], int32.

    Groups that claim rows beyond `num_rows` are cut there.
    """
    ends_E = jnp.minimum(jnp.cumsum(group_sizes_E.astype(jnp.int32)), num_rows)
    starts_G = jnp.concatenate([jnp.zeros(1, jnp.int32), ends_E])
    ends_G = jnp.append(ends_E, num_rows).astype(jnp.int32)
    return starts_G, ends_G


def most_tiles(num_rows: int, num_experts: int, tile_rows: int) -> int:
    """Tiles that any sizes of the groups can need.

    A group of n > 0 rows needs at most ceil((n + 7) / T) <= (n + 6) / T + 1.
    """
    return (num_rows + (num_experts + 1) * (tile_rows + ALIGNMENT - 2)) // tile_rows


def make_row_tiles(group_sizes_E: Array, num_rows: int, tile_rows: int) -> RowTiles:
    """Cut every group, and the rows beyond the last one, into tiles of `tile_rows` rows.

    Args:
        group_sizes_E: rows of each expert, int [E].
        num_rows: M, rows of the buffer.
        tile_rows: T, a multiple of `ALIGNMENT`.
    """
    starts_G, ends_G = group_spans(group_sizes_E, num_rows)
    aligned_G = starts_G // ALIGNMENT * ALIGNMENT
    counts_G = jnp.where(ends_G > starts_G, (ends_G - aligned_G + tile_rows - 1) // tile_rows, 0)
    last_G = jnp.cumsum(counts_G)
    index_C = jnp.arange(most_tiles(num_rows, group_sizes_E.shape[0], tile_rows), dtype=jnp.int32)
    group_C = jnp.searchsorted(last_G, index_C, side="right", method="compare_all")
    group_C = jnp.minimum(group_C, group_sizes_E.shape[0]).astype(jnp.int32)
    start_C = aligned_G[group_C] + (index_C - (last_G - counts_G)[group_C]) * tile_rows
    return RowTiles(
        group_C,
        start_C,
        jnp.maximum(starts_G[group_C] - start_C, 0),
        jnp.minimum(ends_G[group_C] - start_C, tile_rows),
        last_G[-1:].astype(jnp.int32),
    )
