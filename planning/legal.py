"""What a layout may be: the legal ones of a number of GPUs, and the nearest to one that is not."""

import dataclasses
import math
from collections.abc import Iterator

from configs.schema import RunConfig
from planning.case import make_case
from planning.hardware import Hardware
from sharding.config import AXES, MeshConfig

NEIGHBOURS = 3
TRIES = 12
"""Layouts and batches that are tried for them: an answer takes no longer than a plan."""


def describe_refusal(reason: str, run: RunConfig, hardware: Hardware, gpus: int) -> str:
    """The reason, and the nearest layouts or batches that work."""
    found = [
        text for _, text in zip(range(NEIGHBOURS), _neighbours(run, hardware, gpus), strict=False)
    ]
    return reason + (f". Legal and near: {'; '.join(found)}" if found else "")


def _neighbours(run: RunConfig, hardware: Hardware, gpus: int) -> Iterator[str]:
    """What differs in a legal plan, nearest first; a bounded search."""
    mesh, train = run.mesh, run.train
    seen: set[str] = set()
    tries = 0
    for candidate in _near(mesh, gpus):
        if candidate.expert > 1 and not run.model.has_experts:
            continue
        shards = candidate.data * candidate.fsdp * candidate.expert
        for count in _counts(candidate, train.batch_size // shards):
            settled = dataclasses.replace(
                train,
                micro_batch_size=shards,
                batch_size=shards * count,
                batch_ramp_from=0,
                batch_ramp_tokens=0.0,
            )
            micro = train.micro_batch_size or train.batch_size
            if micro % shards == 0 and train.batch_size % micro == 0:
                settled = train
            tries += 1
            if tries > TRIES:
                return
            try:
                make_case(dataclasses.replace(run, mesh=candidate, train=settled), hardware, gpus)
            except ValueError:
                continue
            text = _difference(run, candidate, settled.micro_batch_size, settled.batch_size)
            if text not in seen:
                seen.add(text)
                yield text
            break


def _counts(mesh: MeshConfig, wanted: int) -> Iterator[int]:
    yield max(1, wanted)
    if mesh.pipe > 1:
        yield from (2 * mesh.pipe, 4 * mesh.pipe)


def _near(mesh: MeshConfig, gpus: int) -> Iterator[MeshConfig]:
    """Meshes of `gpus` GPUs, by how far their axes are from the given ones."""
    sizes = {axis: max(1, getattr(mesh, axis)) for axis in AXES}

    def distance(other: MeshConfig) -> tuple[int, int]:
        changed = sum(getattr(other, axis) != sizes[axis] for axis in AXES)
        ratio = sum(
            max(getattr(other, axis), sizes[axis]) // min(getattr(other, axis), sizes[axis])
            for axis in AXES
        )
        return changed, ratio

    options = [mesh] if math.prod(sizes.values()) == gpus else []
    for axis in AXES:
        rest = math.prod(sizes.values()) // sizes[axis]
        if gpus % rest == 0:
            options.append(_with(mesh, **{axis: gpus // rest}))
        for other in AXES:
            if other != axis:
                rest = math.prod(sizes.values()) // sizes[axis] // sizes[other]
                for factor in (sizes[axis] * 2, sizes[axis] // 2, 1):
                    if factor and gpus % (rest * factor) == 0:
                        options.append(_with(mesh, **{axis: factor, other: gpus // rest // factor}))
    unique = {dataclasses.astuple(option): option for option in options}
    return iter(sorted(unique.values(), key=distance)[:12])


def _with(mesh: MeshConfig, **sizes: int) -> MeshConfig:
    whole = {axis: max(1, getattr(mesh, axis)) for axis in AXES} | sizes
    nodes = mesh.expert_nodes if whole["expert"] % mesh.expert_nodes == 0 else 1
    return dataclasses.replace(mesh, **whole, expert_nodes=nodes)


def _difference(run: RunConfig, mesh: MeshConfig, micro: int, batch: int) -> str:
    changed = [
        f"{axis}={getattr(mesh, axis)}"
        for axis in AXES
        if getattr(mesh, axis) != getattr(run.mesh, axis)
    ]
    train = run.train
    if micro != train.micro_batch_size:
        changed.append(f"micro_batch_size={micro}")
    if batch != train.batch_size:
        changed.append(f"batch_size={batch}")
    return ", ".join(changed) or "as it is"
