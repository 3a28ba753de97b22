"""Redundant experts: which experts get copies, and which device holds which, from measured load.

For serving: a device holds one expert more than its share, and busy experts exist several times
(V3 report, section 3.4). The algorithm is DeepSeek's expert-parallel load balancer. Where expert
groups spread evenly over nodes, groups stay on one node, which node-limited routing wants; copies
are then made and spread over devices inside each node. Otherwise all experts are one group on one
node. numpy only; layers are independent.

Letters: L layers, E experts, R copies in all, C most copies of one expert.
"""

from typing import NamedTuple

import numpy as np


class ExpertPlacement(NamedTuple):
    """Places of experts. Device d holds the R / devices copies from d * R / devices on."""

    expert_of_LR: np.ndarray
    """Expert of each copy, int [L, R]."""
    copies_LEC: np.ndarray
    """Copies of each expert, padded with -1: int [L, E, C]."""
    counts_LE: np.ndarray
    """Number of copies of each expert, int [L, E]."""


def place_experts(
    load_LE: np.ndarray, num_copies: int, num_groups: int, num_nodes: int, num_devices: int
) -> ExpertPlacement:
    """Copies of experts and their places for a measured load, tokens per expert [L, E].

    Raises ValueError for counts that do not divide, and for fewer copies than experts.
    """
    load_LE = np.asarray(load_LE, np.float64)
    _check(load_LE, num_copies, num_groups, num_nodes, num_devices)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    expert_of_LR = np.stack(
        [_place_layer(load_E, num_copies, num_groups, num_nodes, num_devices) for load_E in load_LE]
    )
    num_experts = load_LE.shape[1]
    counts_LE = np.stack([np.bincount(row, minlength=num_experts) for row in expert_of_LR])
    copies_LEC = np.full((*load_LE.shape, counts_LE.max()), -1)
    for layer, row in enumerate(expert_of_LR):
        for expert in range(num_experts):
            held = np.flatnonzero(row == expert)
            copies_LEC[layer, expert, : len(held)] = held
    return ExpertPlacement(expert_of_LR, copies_LEC, counts_LE)


def _check(load_LE, num_copies: int, num_groups: int, num_nodes: int, num_devices: int) -> None:
    if load_LE.ndim != 2 or not np.isfinite(load_LE).all() or (load_LE < 0).any():
        raise ValueError(
            f"expert load has shape {load_LE.shape}; give tokens per expert [layers, experts], "
            "finite and not negative"
        )
    E = load_LE.shape[1]
    if num_copies < E:
        raise ValueError(f"{num_copies} copies for {E} experts; every expert needs at least one")
    for what, size, name, parts in (
        ("experts", E, "groups", num_groups),
        ("copies", num_copies, "devices", num_devices),
        ("devices", num_devices, "nodes", num_nodes),
    ):
        if parts < 1 or size % parts:
            raise ValueError(f"{size} {what} do not split over {parts} {name}; give a divisor")


def _place_layer(
    load_E: np.ndarray, num_copies: int, num_groups: int, num_nodes: int, num_devices: int
) -> np.ndarray:
    """Expert of each copy, in the order of devices [R]."""
    experts_GM = np.arange(len(load_E)).reshape(num_groups, -1)
    groups_of_node = _pack(load_E[experts_GM].sum(1), num_nodes)
    placed = []
    for groups in groups_of_node:
        experts = experts_GM[groups].reshape(-1)
        copies = _replicate(load_E[experts], num_copies // num_nodes)
        share = load_E[experts] / np.bincount(copies, minlength=len(experts))
        for held in _pack(share[copies], num_devices // num_nodes):
            placed.append(experts[copies[held]])
    return np.concatenate(placed)


def _replicate(load_E: np.ndarray, num_copies: int) -> np.ndarray:
    """Expert of each copy [copies]: one each, then again and again the one with the most load per
    copy."""
    counts_E = np.ones(len(load_E), np.int64)
    copies = list(range(len(load_E)))
    for _ in range(num_copies - len(load_E)):
        busiest = int(np.argmax(load_E / counts_E))
        copies.append(busiest)
        counts_E[busiest] += 1
    return np.array(copies)


def _pack(load: np.ndarray, num_packs: int) -> list[list[int]]:
    """Items of each pack, equally many: the heaviest first, each into the lightest with room."""
    room = len(load) // num_packs
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    weight = np.zeros(num_packs)
    for item in np.argsort(-load, kind="stable"):
        open_packs = [pack for pack in range(num_packs) if len(packs[pack]) < room]
        pack = min(open_packs, key=lambda pack: weight[pack])
        packs[pack].append(int(item))
        weight[pack] += load[item]
    return packs
