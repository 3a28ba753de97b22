"""How many rows the buffers of expert parallelism have room for, and what that takes.

A token goes to few of the shards, so a buffer for all tokens would be several times too long. Room
is what even load would bring, by the closed form, and some more; what comes beyond takes a further
round (`sharding/experts/rounds.py`), which costs time and loses nothing.

Shape letters: N tokens of a device, K choices of a token, E experts, D width.
"""

import math
from typing import NamedTuple

SPARE = 1.25
"""Room where a user sets none, in means of even load: what routing that its bias keeps even needs.
More is sent and held at every step; less makes further rounds the rule."""
SPREAD = 4.0
"""Besides, in standard deviations of a count of independent choices, for buffers of few rows."""
NEARLY_ALL = 0.8
"""Share of the worst case from which on the room is that: a loop would save little."""
MULTIPLE = 8
"""Rooms are multiples of so many rows."""


def room(mean: float, most: int, capacity: float) -> int:
    """Rows of a buffer that gets `mean` of them under even load and never more than `most`.

    capacity: in means, or 0 for a room derived; infinite: `most`.
    """
    rows = capacity * mean if capacity else SPARE * mean + SPREAD * math.sqrt(mean)
    if rows >= (most if capacity else NEARLY_ALL * most):
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


class Load(NamedTuple):
    """Rows of one device under even load."""

    to_node: float
    """From one device to one node."""
    to_device: float
    """From the devices of one index, one in each node, to one device of a node."""
    choices: float
    """Choices that a device computes."""


def even_load(
    num_experts: int, num_local: int, nodes: int, tokens: int, choices: int, groups: tuple[int, int]
) -> Load:
    """Load if devices hold `num_local` experts each, and come with `tokens` tokens each."""
    of_node = num_experts // nodes
    sent, fanned = (even_share(num_experts, n, choices, groups) for n in (of_node, num_local))
    return Load(tokens * sent, tokens * nodes * fanned, tokens * choices)
