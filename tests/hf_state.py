"""Checkpoints of Hugging Face as plain dictionaries, to ours and back: for tests.

Pure numpy, by the same table of names as the product's reader and writer
(`checkpoint/hf_names.py`). A state is a mapping from tensor name to array.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from checkpoint.hf_names import PARAMS, ROUTER_BIAS, shared_copies, table
from model.config import ModelConfig

Tree = dict[str, Any]
State = Mapping[str, np.ndarray]


def from_hf(state: State, config: ModelConfig) -> Tree:
    """{"params": ..., "router_bias": ...} in fp32 from a checkpoint's tensors.

    Experts may be one tensor each or fused (`experts.gate_up_proj`, `experts.down_proj`), as
    transformers 5 holds them in memory. No tensor is missing or left over, but for MTP copies.
    """
    state, entries, copies = split_fused(state), table(config), shared_copies(config)
    names = {name for entry in entries for name in entry.names.flat}
    assert state.keys() - copies.keys() == names
    for copy in copies.keys() & state.keys():
        np.testing.assert_array_equal(state[copy], state[copies[copy]])
    result: Tree = {PARAMS: {}, ROUTER_BIAS: {}}
    for entry in entries:
        array = np.empty(entry.our_shape, np.float32)
        for index in np.ndindex(entry.names.shape):
            tensor = np.asarray(state[entry.names[index]])
            assert tensor.shape == entry.stored_shape, entry.names[index]
            array[index] = entry.load(tensor)
        *parents, last = entry.path.split("/")
        place = result[entry.tree]
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = array
    return result


def to_hf(
    trees: Tree, config: ModelConfig, *, mtp_copies: bool = True, fuse: bool = False
) -> dict[str, np.ndarray]:
    """The inverse of `from_hf`: fp32 tensors from {"params": ..., "router_bias": ...}.

    `mtp_copies` repeats embedding and head in every MTP layer, as released checkpoints do; `fuse`
    makes the experts of a layer two tensors instead of three per expert.
    """
    ours = {f"{tree}/{path}": a for tree, sub in trees.items() for path, a in _walk(sub)}
    entries = [entry for entry in table(config) if entry.tree in trees]
    assert ours.keys() == {f"{entry.tree}/{entry.path}" for entry in entries}
    state = {}
    for entry in entries:
        array = np.asarray(ours[f"{entry.tree}/{entry.path}"], np.float32)
        assert array.shape == entry.our_shape, entry.path
        for index in np.ndindex(entry.names.shape):
            state[entry.names[index]] = entry.store(array[index])
    if mtp_copies:
        state |= {copy: state[original] for copy, original in shared_copies(config).items()}
    return fused(state) if fuse else state


def split_fused(state: State) -> dict[str, np.ndarray]:
    """One tensor per expert from `gate_up_proj` [E, 2f, d] (gate first) and `down_proj` [E, d, f].

    Views, no copies.
    """
    pattern = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)")
    result = {}
    for name, tensor in state.items():
        match = pattern.fullmatch(name)
        if match is None:
            result[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = {"down_proj": matrix}
            if match[2] == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), np.split(matrix, 2), strict=True))
            result |= {f"{match[1]}{expert}.{part}.weight": w for part, w in parts.items()}
    return result


def fused(state: State) -> dict[str, np.ndarray]:
    """The inverse of `split_fused`."""
    pattern = re.compile(r"(.*\.mlp\.experts\.)0\.gate_proj\.weight")
    result = dict(state)
    for prefix in [match[1] for name in state if (match := pattern.fullmatch(name))]:
        count = sum(name.startswith(prefix) for name in state) // 3
        gate, up, down = (
            np.stack([result.pop(f"{prefix}{e}.{part}.weight") for e in range(count)])
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        result[f"{prefix}gate_up_proj"] = np.concatenate([gate, up], axis=1)
        result[f"{prefix}down_proj"] = down
    return result


def _walk(tree: Tree, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value
