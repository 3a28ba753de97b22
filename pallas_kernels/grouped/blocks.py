"""Blocks of grouped products on Hopper: tiles, slots, clusters, and the fastest choice.

A tile has 128 rows, 64 for each of two warpgroups that multiply. Two blocks of a cluster may take
neighbouring tiles and read what they share once.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import NUM_SMS, SMEM_BYTES

PRODUCT_WARPGROUPS = 2
"""Warpgroups that multiply; one more loads."""
WARPGROUP_ROWS = 64
"""Rows of a tile that one of them computes: those of one tensor core instruction."""
TILE_ROWS = PRODUCT_WARPGROUPS * WARPGROUP_ROWS
DEPTH = 64
"""Contraction of one slot: 128 bytes of bf16, the width of the widest swizzle."""

Pair = Literal["rows", "columns", "none"]
"""Along what the two blocks of a cluster take neighbouring tiles; "none": no clusters."""


class Blocks(NamedTuple):
    """Static cut of a grouped product."""

    columns: int
    """Columns of a tile, per weight where two lie side by side."""
    slots: int
    """Stages of the ring."""
    band: int
    """Tiles, or pairs of them, of a band of columns."""
    pair: Pair = "none"
    programs: int = NUM_SMS
    """Most blocks of the grid: one per streaming multiprocessor."""

    @property
    def peers(self) -> int:
        """Blocks of a cluster."""
        return 1 if self.pair == "none" else 2

    @property
    def pair_rows(self) -> int:
        """Tiles of a cluster along the rows."""
        return 2 if self.pair == "rows" else 1

    @property
    def pair_columns(self) -> int:
        """Tiles of a cluster along the columns."""
        return 2 if self.pair == "columns" else 1

    def clusters(self, most_tiles: int) -> int:
        """Programs of the grid, a block or a pair each, for at most so many tiles of a program."""
        return max(1, min(self.programs // self.peers, most_tiles))

    def grid(self, most_tiles: int) -> dict[str, Any]:
        """Options of `mosaic_kernel` that lay out programs, their blocks and warpgroups."""
        options: dict[str, Any] = {
            "grid": (self.clusters(most_tiles),),
            "grid_names": ("program",),
            "num_threads": PRODUCT_WARPGROUPS + 1,
            "thread_name": "warpgroup",
        }
        if self.peers > 1:
            options |= {"cluster": (self.peers,), "cluster_names": ("peer",)}
        return options

    def barriers(self, copies: int) -> list[Any]:
        """Scratch types of a ring's `loaded`, for so many copies per slot, and `free`."""
        free: dict[str, Any] = {"num_arrivals": PRODUCT_WARPGROUPS, "num_barriers": self.slots}
        return [
            plgpu.Barrier(num_arrivals=copies, num_barriers=self.slots),
            plgpu.ClusterBarrier(collective_axes=("peer",), **free)
            if self.peers > 1
            else plgpu.Barrier(**free),
        ]

    def peer(self) -> Array | int:
        """Number of this block in its cluster."""
        return lax.axis_index("peer") if self.peers > 1 else 0


def choose(found: list[Blocks], tiles: Callable[[Blocks], float], side_by_side: int = 1) -> Blocks:
    """The blocks that take the fewest cycles for so many `tiles` (of a cluster).

    A step of a tile takes the larger of its tensor cores' cycles, 128 * 64 * columns / 2048, and
    its operands' way from L2, 128 bytes * (128 + columns) at about 32 bytes per cycle (7.4 TB/s of
    132 at 1.755 GHz), where what a pair shares counts half. Time is that of a step by the waves of
    tiles.
    """

    def cycles(blocks: Blocks) -> float:
        columns = side_by_side * blocks.columns
        read = TILE_ROWS / blocks.pair_columns + columns / blocks.pair_rows
        waves = -(-tiles(blocks) // (NUM_SMS // blocks.peers))
        return waves * max(4 * columns, 4 * read)

    # A band of about 2048 columns by 2048 rows: a square of tiles reads the fewest operands.
    squarest = [b for b in found if b.band * b.pair_columns * b.columns <= 2048]
    return min(squarest, key=lambda b: (cycles(b), -b.columns, -b.band * b.pair_columns))


def bands(num_columns: int) -> list[int]:
    """Widths of bands worth timing: the most that cut `num_columns` evenly, up to 4, 8 and 16."""
    widest = [max(d for d in range(1, most + 1) if num_columns % d == 0) for most in (4, 8, 16)]
    return sorted(set(widest))


def cuts(outputs: int, side_by_side: int, shared_memory: Callable[[Blocks], int]) -> list[Blocks]:
    """Every sensible cut of `outputs` columns whose `shared_memory` and accumulators fit.

    Accumulators of 64 x 256 per warpgroup are 128 registers per thread; more would spill. 6 slots
    of the narrowest tiles hide 2500 cycles of latency; more hide nothing.
    """
    found = []
    for columns in (256, 192, 128, 64):
        if outputs % columns or side_by_side * columns > 256:
            continue
        slots = max(s for s in range(2, 7) if shared_memory(Blocks(columns, s, 1)) <= SMEM_BYTES)
        for pair in get_args(Pair):
            tiles, rest = divmod(outputs // columns, 2 if pair == "columns" else 1)
            if not rest:
                found += [Blocks(columns, slots, band, pair) for band in bands(tiles)]
    return found
