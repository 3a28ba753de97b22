"""Rows of a layer's expert exchange on a device, for whoever counts its memory and its traffic."""

from typing import NamedTuple

from sharding.config import MeshConfig
from sharding.experts.room import buffers


class Rows(NamedTuple):
    """Rows, one way. Buffers are what is reserved and sent, padding included; means are what is
    filled under even load."""

    across: int
    """Buffer of the level between nodes; 0: there is one node."""
    inside: int
    """Buffer of the level inside a node; 0: a node is one device."""
    received: int
    """Rows that the experts here are given."""
    sorted: int
    """Places of choices sorted by expert."""
    mean_across: float
    mean_inside: float
    computed: float
    """Choices that the experts here compute under even load."""


def exchange_rows(
    tokens: int,
    choices: int,
    experts: int,
    config: MeshConfig,
    groups: tuple[int, int],
    row_bytes: int,
) -> Rows:
    """Rows of an exchange of devices with `tokens` tokens each (`sharding/experts/dispatch.py`);
    none of a model without experts."""
    if not experts:
        return Rows(0, 0, 0, 0, 0.0, 0.0, 0.0)
    shards = config.expert_nodes, config.expert // config.expert_nodes
    found = buffers(experts, shards, tokens, choices, groups, row_bytes, config)
    if config.exchange == "gather" and config.expert > 1:
        held = tokens * config.expert
        return Rows(0, held, held, found.choices.rows, 0.0, held, found.choices.mean)
    across, inside = (b.number * b.rows * (b.number > 1) for b in found[:2])
    to_node, to_device = (b.number * b.mean * (b.number > 1) for b in found[:2])
    received = inside or across or tokens
    return Rows(
        across, inside, received, found.choices.rows, to_node, to_device, found.choices.mean
    )
