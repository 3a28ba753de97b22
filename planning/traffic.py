"""Every collective of a step, in closed form: operation, axis, executions, bytes, link, seconds.

Bytes are those that one GPU sends for a whole array as `programs/collectives.py` counts them.
"""

import dataclasses
import math
from typing import Any

import jax

from model.blueprint import blueprint
from model.stages import split_weights
from planning.case import Case
from planning.memory import stage_weights
from planning.time import Passing
from planning.work import exchange_levels, exchange_ways, wire_bytes
from sharding.sizes import device_bytes

ORDER = ("pipe", "data", "fsdp", "expert_nodes", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective of a step, on one axis."""

    op: str
    axis: str
    times: int
    bytes: float
    """Of all executions, per GPU: whole arrays, the own part included."""
    link: str
    """nvlink or network: the slowest that a group spans."""
    seconds: float
    exposed_seconds: float
    """Of them, those that nothing else fills."""
    what: str
    """What it moves."""


def traffic_of(case: Case, passing: Passing) -> tuple[Collective, ...]:
    """The collectives of a step."""
    found = [*_exchange(case, passing), *_weights(case, passing)]
    found += [*_tensor(case), *_context(case), *_pipe(case)]
    return tuple(one for one in found if one.times and one.bytes)


def span(case: Case, *axes: str) -> int:
    """Consecutive devices within which a group along these axes lies."""
    mesh = case.mesh
    sizes = {
        "pipe": mesh.pipe, "data": mesh.data, "fsdp": mesh.fsdp,
        "expert_nodes": mesh.expert_nodes, "expert": mesh.expert // mesh.expert_nodes,
        "context": mesh.context, "tensor": mesh.tensor,
    }  # fmt: skip
    outermost = min((ORDER.index(axis) for axis in axes), default=len(ORDER) - 1)
    return math.prod(sizes[name] for name in ORDER[outermost:])


def _one(
    case: Case, op: str, axes: tuple[str, ...], times: float, size: float, what: str,
    exposed: float | None = None,
) -> Collective:  # fmt: skip
    """A gather, reduction or permute of `size` bytes in all, over its axes' links."""
    link = case.hardware.link(span(case, *axes))
    group = math.prod(_size(case, axis) for axis in axes)
    leaves = {"all-reduce": 2 * (group - 1) / group, "collective-permute": 1.0}
    seconds = size * leaves.get(op, (group - 1) / group) / case.hardware.collective(link)
    shown = seconds if exposed is None else min(exposed, seconds)
    return Collective(op, "+".join(axes), round(times), size, link, seconds, shown, what)


def _size(case: Case, axis: str) -> int:
    mesh = case.mesh
    if axis == "expert":
        return mesh.expert // mesh.expert_nodes
    return getattr(mesh, axis)


def layer_passes(case: Case) -> float:
    """Layers with experts that a device runs in a step, MTP modules included."""
    model, mesh = case.model, case.mesh
    layers = model.num_moe_layers + model.mtp_depth
    return layers * case.micro_batches / mesh.pipe


def _exchange(case: Case, passing: Passing) -> list[Collective]:
    if case.mesh.expert == 1:
        return []
    found, exchange = [], case.mesh.exchange
    ways = exchange_ways(case)
    there = sum(ways[where][0] for where in "FI")
    back = sum(ways[where][1] for where in "FI")
    hidden = 1 - passing.exposed_exchange / passing.exchange if passing.exchange else 0.0
    inner = case.mesh.context * case.mesh.tensor
    for axis, rows, speed in exchange_levels(case):
        size = rows * (there * wire_bytes(case, False) + back * wire_bytes(case, True))
        size *= layer_passes(case)
        per = case.mesh.expert if axis == "expert_nodes" else _size(case, "expert")
        link = case.hardware.link(per * inner)
        ops = {"dense": "all-to-all", "ragged": "ragged-all-to-all", "gather": "all-gather"}
        seconds = size / speed
        found.append(
            Collective(
                ops[exchange], axis, round((there + back) * layer_passes(case)), size, link,
                seconds, seconds * (1 - hidden), "rows of tokens to their experts and back",
            )
        )  # fmt: skip
    return found


def _weights(case: Case, passing: Passing) -> list[Collective]:
    """Weights to where they are computed with, gradients to where they are stored."""
    mesh, found = case.mesh, []
    state = case.state["params"]
    stored = device_bytes(state)
    copies = tuple(
        axis for axis in ("data", "expert_nodes", "expert", "context") if _size(case, axis) > 1
    )
    dense = _dense_bytes(case)
    if mesh.pipe > 1:
        held = stage_weights(case)
        layers, outer = device_bytes(held.layers), device_bytes(held.outer)
        found += [
            _one(case, "all-to-all", ("pipe",), 1, layers, "weights to the ranks of their layers"),
            _one(case, "all-gather", ("pipe",), 1, outer, "weights outside of the layers"),
            _one(case, "all-to-all", ("pipe",), 1, layers, "gradients of layers to their storage"),
            _one(case, "reduce-scatter", ("pipe",), 1, outer, "gradients outside of the layers"),
        ]
        dense = device_bytes(held.outer) + layers * _share_dense(case)
    elif mesh.fsdp > 1:
        item = case.recipe.activation_dtype.itemsize
        count, compute = case.micro_batches, passing.seconds
        whole = stored * mesh.fsdp / 4 * item
        hidden = compute  # the compiler fetches a layer's weights beside the layer before
        gather = _one(
            case, "all-gather", ("fsdp",), 2 * count, 2 * count * whole, "weights of layers"
        )
        reduce = _one(
            case, "reduce-scatter", ("fsdp",), count, count * stored * mesh.fsdp,
            "gradients of layers",
        )  # fmt: skip
        over = max(0.0, gather.seconds + reduce.seconds - hidden)
        for one in (gather, reduce):
            share = one.seconds / (gather.seconds + reduce.seconds)
            found.append(dataclasses.replace(one, exposed_seconds=over * share))
    if copies:
        found.append(
            _one(case, "all-reduce", copies, 1, dense, "gradients of weights held in copies")
        )
    if mesh.data > 1 and mesh.zero1:
        found.append(_one(case, "all-gather", ("data",), 1, stored, "updated weights (ZeRO-1)"))
    return found


def _share_dense(case: Case) -> float:
    """Part of a MoE layer's weights on a device that other devices of `expert` hold as well."""
    plan: Any = blueprint(case.model).params.get("moe_layers", {})
    if not plan:
        return 1.0
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(plan))
    moe = plan["moe"]
    routed = sum(math.prod(moe[name].shape) for name in ("w_gate", "w_up", "w_down"))
    return (total - routed) / (total - routed + routed / case.mesh.expert)


def _dense_bytes(case: Case) -> float:
    """Bytes of gradients, as stored, that devices of other axes hold as well."""
    plan = blueprint(case.model)
    weights = split_weights(plan.params, plan.router_bias)
    del weights
    return device_bytes(case.state["params"]) * _share_dense(case)


def _tensor(case: Case) -> list[Collective]:
    mesh = case.mesh
    if mesh.tensor == 1:
        return []
    item = case.recipe.activation_dtype.itemsize
    again = 1 + (case.recipe.remat != "none")
    times = 2 * (again + 1) * (layer_passes(case) + _dense_passes(case))
    size = times * case.tokens * case.model.hidden_size * item
    if not mesh.sequence:
        return [_one(case, "all-reduce", ("tensor",), times, size, "sums over heads and widths")]
    return [
        _one(case, "all-gather", ("tensor",), times, size, "the residual stream's parts"),
        _one(case, "reduce-scatter", ("tensor",), times, size, "sums over heads and widths"),
    ]


def _dense_passes(case: Case) -> float:
    return case.model.num_dense_layers * case.micro_batches / case.mesh.pipe


def _context(case: Case) -> list[Collective]:
    mesh, model = case.mesh, case.model
    if mesh.context == 1:
        return []
    latents = model.kv_lora_rank + model.qk_rope_head_dim
    item = case.recipe.activation_dtype.itemsize
    again = 1 + (case.recipe.remat == "full")
    passes = (again + 3) * (layer_passes(case) + _dense_passes(case))
    times = passes * (mesh.context - 1)
    op = "collective-permute" if mesh.context_exchange == "ring" else "all-gather"
    size = times * case.tokens * latents * item
    return [_one(case, op, ("context",), times, size, "latents of other parts of a sequence")]


def _pipe(case: Case) -> list[Collective]:
    if case.mesh.pipe == 1:
        return []
    table, item = case.table, case.recipe.activation_dtype.itemsize
    ways = sum(
        used for name, used in table.channels._asdict().items() if not name.endswith("_same")
    )
    times = ways * table.ticks
    tokens = (
        case.rows
        * case.train.seq_len
        // (case.mesh.context * (case.mesh.tensor if case.mesh.sequence else 1))
    )
    size = times * tokens * case.model.hidden_size * item
    return [
        _one(case, "collective-permute", ("pipe",), times, size, "activations and their gradients")
    ]
