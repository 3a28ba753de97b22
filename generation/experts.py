"""Redundant experts for generation: files of measured load, and the copies that follow from one.

Letters: L MoE layers (MTP modules last), E experts, R copies in all, S shards of the experts.
"""

import json
import os
from pathlib import Path

import numpy as np

from generation.config import ExpertOptions
from model.config import ModelConfig
from sharding.experts.eplb import ExpertPlacement, place_experts
from sharding.partition import Layout, num_shards, use_layout

SUFFIXES = (".npy", ".json")


def check_options(options: ExpertOptions, has_experts: bool) -> None:
    """Raise ValueError for options that contradict each other or the model."""
    extra, load, save = (
        options.redundant_experts, options.expert_load, options.save_expert_load
    )  # fmt: skip
    if not has_experts and (extra or load or save):
        raise ValueError(
            "the model has no layers of experts; leave out --redundant-experts, --expert-load and "
            "--save-expert-load"
        )
    if extra < 0:
        raise ValueError(f"--redundant-experts is {extra}; give 0 or more")
    if extra and load is None:
        raise ValueError(
            f"--redundant-experts {extra} needs --expert-load FILE: which experts get copies "
            "follows from the load. Measure it with --save-expert-load FILE"
        )
    if load is not None and not extra:
        raise ValueError(
            f"--expert-load {load} has no effect without copies; add --redundant-experts"
        )
    for option, path in (("--expert-load", load), ("--save-expert-load", save)):
        if path is not None and path.suffix not in SUFFIXES:
            raise ValueError(f"{option} {path}: the name must end in {' or '.join(SUFFIXES)}")
    if save is not None and not save.parent.is_dir():
        raise ValueError(f"--save-expert-load {save}: there is no folder {save.parent}")


def redundant_experts(
    options: ExpertOptions, config: ModelConfig, mtp_depth: int, layout: Layout
) -> tuple[ExpertPlacement | None, str]:
    """Copies of every MoE layer's experts, MTP modules last, and a line about them for people.

    Args:
      options: how many, and the file of the load. None and "" where it asks for no copies.
      config: the model as it is loaded.
      mtp_depth: MTP modules that the checkpoint has, loaded or not: the file may speak of them.
      layout: the devices.
    Raises ValueError for copies that do not split over the shards and for a load that does not fit.
    """
    if not options.redundant_experts or options.expert_load is None:
        return None, ""
    with use_layout(layout):
        shards, nodes = num_shards("experts"), num_shards("nodes")
    E, extra = config.num_experts, options.redundant_experts
    if (E + extra) % shards:
        below = extra - (E + extra) % shards
        near = " or ".join(str(n) for n in (below, below + shards) if n > 0)
        raise ValueError(
            f"--redundant-experts {extra}: {E} experts and {extra} copies are {E + extra}, which "
            f"do not split over {shards} shards of experts; give {near}"
        )
    load_LE = load_of_layers(read_load(options.expert_load), config, mtp_depth, options.expert_load)
    placement = place_experts(load_LE, E + extra, config.num_expert_groups, nodes, shards)
    before, after = busiest(load_LE, None, shards), busiest(load_LE, placement, shards)
    return placement, (
        f"{extra} redundant experts beside {E} per layer: by {options.expert_load.name}, the "
        f"busiest of {shards} shards has {after:.2f} times the mean load, {before:.2f} without them"
    )


def load_of_layers(
    load_LE: np.ndarray, config: ModelConfig, mtp_depth: int, path: Path
) -> np.ndarray:
    """The rows of a load for the MoE layers that are loaded; ValueError, naming `path`, if it does
    not fit the model. MTP modules beyond the first, which never draft, have the load of the first.
    """
    main, E = config.num_moe_layers, config.num_experts
    fewest = main + bool(config.mtp_depth)
    if load_LE.ndim != 2 or load_LE.shape[1] != E or not fewest <= len(load_LE) <= main + mtp_depth:
        module = ", then the MTP module" if config.mtp_depth else ""
        draft = " and --speculate on" if config.mtp_depth else ""
        raise ValueError(
            f"{path} has shape {list(load_LE.shape)}; this model needs tokens per expert "
            f"[{fewest}, {E}], a row per MoE layer{module}. Measure it on this model with "
            f"--save-expert-load{draft}"
        )
    rows = np.minimum(np.arange(main + config.mtp_depth), len(load_LE) - 1)
    idle = [int(row) for row in np.unique(rows) if not load_LE[row].any()]
    if idle:
        raise ValueError(
            f"{path}: no tokens at all in layers {idle} (of {len(load_LE)}, from 0); measure the "
            "load on more text"
        )
    return load_LE[rows]


def busiest(load_LE: np.ndarray, placement: ExpertPlacement | None, shards: int) -> float:
    """Load of the busiest shard over the mean, in the worst layer, if copies share evenly."""
    by_copy_LR = load_LE
    if placement is not None:
        share_LE = load_LE / placement.counts_LE
        by_copy_LR = np.take_along_axis(share_LE, placement.expert_of_LR, axis=1)
    by_shard_LS = by_copy_LR.reshape(len(load_LE), shards, -1).sum(-1)
    return float((by_shard_LS.max(1) / by_shard_LS.mean(1)).max())


def read_load(path: Path) -> np.ndarray:
    """Tokens per expert, float64; ValueError for a file that holds none."""
    if not path.is_file():
        raise ValueError(f"--expert-load {path}: no such file; --save-expert-load writes one")
    try:
        if path.suffix == ".json":
            load = np.array(json.loads(path.read_text("utf-8")), np.float64)
        else:
            load = np.asarray(np.load(path, allow_pickle=False), np.float64)
    except (ValueError, TypeError, EOFError) as error:
        raise ValueError(f"{path} holds no table of numbers ({error})") from None
    if not np.isfinite(load).all() or (load < 0).any():
        raise ValueError(f"{path} holds numbers that are no counts; give 0 or more tokens each")
    return load


def write_load(path: Path, load_LE: np.ndarray) -> None:
    """The file that `read_load` reads; it gets its name when whole."""
    part = path.with_name(f"{path.name}.partial")
    if path.suffix == ".json":
        part.write_text(json.dumps(load_LE.tolist()) + "\n", "utf-8")
    else:
        with part.open("wb") as file:
            np.save(file, load_LE)
    os.replace(part, path)
