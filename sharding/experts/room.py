"""How many rows the buffers of expert parallelism have room for, and what that takes.

A token goes to few of the shards, so a buffer for all tokens would be several times too long. Room
is what even load would bring, by the closed form, and some more; what comes beyond takes a further
round (`sharding/experts/rounds.py`), which costs time and loses nothing.

Shape letters: N tokens of a device, K choices of a token, E experts, D width.
"""

import math
from typing import NamedTuple

from sharding.config import MeshConfig

SPARE = 1.25
"""Room where a user sets none, in means of even load: what routing that its bias keeps even needs.
More is sent and held at every step; less makes further rounds the rule."""
SPREAD = 4.0
"""Besides, in standard deviations of a count of independent choices, for buffers of few rows."""
NEARLY_ALL = 0.8
"""Share of the worst case from which on the room is that: rounds would save little."""
SMALL = 2**25
"""Bytes up to which a buffer holds everything, where nothing is set: less is not worth a round."""
MULTIPLE = 8
"""Rooms are multiples of so many rows."""


def room(mean: float, most: int, capacity: float, all_bytes: int) -> int:
    """Rows of a buffer that gets `mean` of them under even load and never more than `most`.

    capacity: in means; infinite: `most`. 0: a room derived, and `most` if these are no more than
    SMALL of `all_bytes`.
    """
    if capacity:
        rows, enough = capacity * mean, most
    else:
        rows, enough = SPARE * mean + SPREAD * math.sqrt(mean), NEARLY_ALL * most
    if rows >= enough or (not capacity and all_bytes <= SMALL):
        return most
    return min(most, math.ceil(rows / MULTIPLE) * MULTIPLE)


def even_share(num_experts: int, experts: int, choices: int, groups: tuple[int, int]) -> float:
    """Probability that a token needs a shard of `experts` experts, if choices are even.

    `groups` are how many there are and how many of them a token chooses from. A shard is a part of
    a group, or some whole groups.
    """
    count, chosen = groups
    size = num_experts // count
    held, part = max(1, experts // size), min(experts, size)
    share = 0.0
    for j in range(min(held, chosen) + 1):  # of its groups are chosen
        likely = math.comb(held, j) * math.comb(count - held, chosen - j) / math.comb(count, chosen)
        missed = math.comb(chosen * size - j * part, choices) / math.comb(chosen * size, choices)
        share += likely * (1 - missed)
    return share


class Buffer(NamedTuple):
    """A buffer of a device, or one of each shard that it sends to."""

    what: str
    rows: int
    """Rows that the buffer has room for."""
    mean: float
    """Rows that it gets under even load."""
    most: int
    """Rows that it could get at most."""
    number: int
    """Number of such buffers that a device receives."""

    def describe(self, row_bytes: int) -> str:
        """Size, against even load, and what happens beyond."""
        size = f"{self.number * self.rows * row_bytes / 2**30:.2g} GiB"
        rows = f"{self.number} x {self.rows:,} rows" if self.number > 1 else f"{self.rows:,} rows"
        if self.rows == self.most:
            return f"{self.what}: {rows} ({size}), which holds everything"
        return (
            f"{self.what}: {rows} ({size}), {self.rows / self.mean:.2f} times even load; more goes "
            f"in further rounds (room for all: {self.most / self.rows:.1f} times as much)"
        )


class Buffers(NamedTuple):
    """Buffers of one layer."""

    nodes: Buffer
    """Rows from a device for one node."""
    devices: Buffer
    """Rows from a device for a device of its node."""
    choices: Buffer
    """Choices that a device computes, sorted by expert."""

    def describe(self, row_bytes: int) -> list[str]:
        """A line for each in use."""
        used = [b for b in self[:2] if b.number > 1]
        return [b.describe(row_bytes) for b in (*used, self.choices)]


def buffers(
    num_experts: int,
    shards: tuple[int, int],
    tokens: int,
    choices: int,
    groups: tuple[int, int],
    row_bytes: int,
    config: MeshConfig,
) -> Buffers:
    """Buffers of devices that come with `tokens` tokens each; `shards` are nodes, and devices of
    one, over which the experts are cut."""
    capacity, (nodes, inside) = config.exchange_capacity, shards
    of_node, num_local = num_experts // nodes, num_experts // (nodes * inside)
    received = tokens
    levels: list[Buffer] = []
    if config.exchange == "gather":
        received, nodes, inside = tokens * nodes * inside, 1, 1
    for what, number, held, rows in (
        ("to a node", nodes, of_node, tokens),
        ("to a device", inside, num_local, tokens * nodes),
    ):
        mean, most = rows * even_share(num_experts, held, choices, groups), received
        size = number * most * row_bytes
        slots = room(mean, most, capacity, size) if number > 1 else most
        levels.append(Buffer(what, slots, mean, most, number))
        received = number * levels[-1].rows
    mean, most = tokens * choices, received * min(choices, num_local)
    rows = room(mean, most, capacity, most * row_bytes)
    return Buffers(levels[0], levels[1], Buffer("computed at a time", rows, mean, most, 1))
