"""Blocks of the kernels of latent attention, and the calls that they take.

A kernel keeps a tile of 128 rows (queries; for gradients of keys and values, those) and streams the
other side past it in blocks. Each of two computing warpgroups owns 64 rows of the tile.

Shape letters: B batch, T positions, N heads, P channels of a head without position, R rotary ones,
V value channels.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.mosaic import NUM_SMS, SMEM_BYTES

COMPUTE = 2
"""Warpgroups that compute."""
WARPGROUP_ROWS = 64
"""Rows of a tile that each of them owns."""
BLOCK = COMPUTE * WARPGROUP_ROWS
"""Rows of a tile; T is padded to a multiple."""
MOST_CHANNELS = 320
"""P + R + V whose gradients fit: 160 of the 232 registers of a thread."""
MOST_COLUMNS = 256
"""Columns of one product of a warpgroup."""


class Sizes(NamedTuple):
    """Shapes of one call, T padded."""

    B: int
    T: int
    N: int
    P: int
    R: int
    V: int

    @property
    def tiles(self) -> int:
        return self.B * self.N * (self.T // BLOCK)


class Tile(NamedTuple):
    """Rows of queries and keys that meet in one step, and how many steps are loaded ahead."""

    queries: int
    keys: int
    stages: int


class Blocks(NamedTuple):
    """Blocks of the three kernels: rows of what streams, and steps of it in shared memory."""

    forward_keys: int
    forward_stages: int
    dq_keys: int
    dq_stages: int
    dkv_stages: int
    programs: int = NUM_SMS
    """Programs that share the tiles of queries; 0 for one per tile."""

    @property
    def forward(self) -> Tile:
        return Tile(BLOCK, self.forward_keys, self.forward_stages)

    @property
    def dq(self) -> Tile:
        return Tile(BLOCK, self.dq_keys, self.dq_stages)

    @property
    def dkv(self) -> Tile:
        return Tile(WARPGROUP_ROWS, BLOCK, self.dkv_stages)


def unsupported(P: int, R: int, V: int, dtype: Any) -> str | None:
    """Reason why the kernels cannot take heads of these widths, a clause; None if they can."""
    if dtype != jnp.bfloat16:
        return f"attention's operands are {jnp.dtype(dtype)}, and its kernels multiply bfloat16"
    if min(P, R, V) <= 0 or P % 16 or R % 16 or V % 16:
        return f"heads have {P} + {R} query and {V} value channels; kernels take multiples of 16"
    if P != V:
        return (
            f"values have {V} channels and keys {P} without position; the kernels write outputs "
            "where queries lay, of the same width"
        )
    if P + R + V > MOST_CHANNELS:
        return (
            f"a head has {P} + {R} + {V} channels, whose gradients do not fit into registers: "
            f"{MOST_CHANNELS} is the most"
        )
    if P + R > MOST_COLUMNS:
        return f"queries have {P} + {R} channels; one product makes at most {MOST_COLUMNS} columns"
    return None


def choose_blocks(sizes: Sizes) -> Blocks:
    """The largest blocks whose sums fit into registers, with as many stages as fit, at most four.

    A thread holds, of 64 rows in fp32: forward, V/2 of outputs and S/2 of logits, of the next step
    too (S = 128 keys at V3's widths: 64 + 64, and 32 of weights in bfloat16); dq, (P + R)/2 of sums
    and 2 S/2 of logits and their gradients (S = 64: 96 + 64); dkv, (P + R + V)/2 of sums and Q/2 of
    logits or their gradients, one after the other (Q = 64 queries: 160 + 32).
    """
    return candidates(sizes)[0]


def candidates(sizes: Sizes) -> list[Blocks]:
    """Blocks that fit, for the tuner; the default first."""
    found = []
    for keys in (128, 64):
        for programs in (NUM_SMS, 0):
            for most in (4, 3, 2):
                stages = [_stages(sizes, keys, most, kernel) for kernel in range(3)]
                blocks = Blocks(keys, stages[0], 64, stages[1], stages[2], programs)
                if min(stages) >= 2 and blocks not in found:
                    found.append(blocks)
    return found


def _stages(sizes: Sizes, keys: int, most: int, kernel: int) -> int:
    """The most stages, up to `most`, with which a kernel fits into shared memory."""
    for stages in range(most, 0, -1):
        blocks = Blocks(keys, stages, 64, stages, stages)
        if smem_bytes(sizes, blocks)[kernel] <= SMEM_BYTES:
            return stages
    return 0


def check_blocks(sizes: Sizes, blocks: Blocks) -> None:
    """Raise ValueError unless the kernels can run with these blocks."""
    if not {blocks.forward_keys, blocks.dq_keys} <= {64, 128}:
        raise ValueError(f"{blocks} streams keys by other numbers than 64 or 128; give one of them")
    if min(blocks.forward_stages, blocks.dq_stages, blocks.dkv_stages) < 2 or blocks.programs < 0:
        raise ValueError(f"{blocks} needs at least 2 stages of each kernel and no negative count")
    if (most := max(smem_bytes(sizes, blocks))) > SMEM_BYTES:
        raise ValueError(
            f"{blocks} takes {most} bytes of shared memory, of {SMEM_BYTES}; give fewer stages"
        )


def smem_bytes(sizes: Sizes, blocks: Blocks) -> tuple[int, int, int]:
    """Shared memory of the forward, dq and dkv kernels: what stays, what streams, the rest."""
    query, all_three = sizes.P + sizes.R, sizes.P + sizes.R + sizes.V
    forward = BLOCK * query + blocks.forward_stages * blocks.forward_keys * all_three
    dq = BLOCK * all_three + blocks.dq_stages * blocks.dq_keys * all_three
    # Two fp32 per query stream along, and one block of weights is exchanged.
    dkv = (BLOCK + blocks.dkv_stages * blocks.dkv.queries) * all_three
    dkv += (4 * blocks.dkv_stages + BLOCK) * blocks.dkv.queries
    slack = 2048  # barriers, sums of rows, alignment
    return 2 * forward + slack, 2 * dq + slack, 2 * dkv + slack
