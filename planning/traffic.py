"""Every collective of a step, in closed form: operation, axis, executions, bytes, link, seconds.

Bytes are those that one GPU sends for a whole array as `programs/collectives.py` counts them.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax

from model.blueprint import blueprint
from model.stages import ROUTED
from planning.case import Case
from planning.memory import held_weights, stage_weights
from planning.time import Passing
from planning.work import exchange_levels, exchange_ways, key_numbers, wire_bytes
from sharding.held import values_of
from sharding.rules import COPIED
from sharding.sizes import activation_shards, copied_bytes, device_bytes

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
    case: Case,
    op: str,
    axes: tuple[str, ...],
    times: float,
    size: float,
    what: str,
    exposed: float | None = None,
) -> Collective:
    """A gather, reduction or permute of `size` bytes in all, over its axes' links."""
    link = case.hardware.link(span(case, *axes))
    group = math.prod(_size(case, axis) for axis in axes)
    leaves = {"all-reduce": 2 * (group - 1) / group, "collective-permute": 1.0}
    seconds = size * leaves.get(op, (group - 1) / group) / case.hardware.collective(link)
    shown = seconds if exposed is None else min(exposed, seconds)
    return Collective(op, "+".join(axes), round(times), size, link, seconds, shown, what)


def link_seconds(case: Case, op: str, axes: tuple[str, ...], size: float) -> tuple[str, float]:
    """Link and seconds of a compiled program's collective, along mesh axes, of `size` bytes."""
    link = case.hardware.link(span(case, *axes))
    if "all-to-all" in op and set(axes) <= {"expert", "expert_nodes"}:
        return link, size / case.hardware.exchange(link, case.mesh.expert)
    one = _one(case, op, axes, 1, size, "")
    return one.link, one.seconds


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
    if case.mesh.expert == 1 or not case.model.has_experts:
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
        times, seconds = round((there + back) * layer_passes(case)), size / speed
        shown, what = seconds * (1 - hidden), "rows of tokens to their experts and back"
        found.append(Collective(ops[exchange], axis, times, size, link, seconds, shown, what))
    return found


def _weights(case: Case, passing: Passing) -> list[Collective]:
    """Weights to where they are computed with, gradients to where they are stored."""
    held = _held(case)
    copies = tuple(axis for axis in COPIED if _size(case, axis) > 1)
    everywhere = tuple(axis for axis in ("data", *copies) if _size(case, axis) > 1)
    ways = math.prod(_size(case, axis) for axis in copies)
    found = []
    if case.mesh.pipe > 1 and case.ways.fetches:
        pipe = ("pipe",)
        moved = held.dense / ways + held.experts
        found += [
            _one(case, "all-to-all", pipe, 1, moved, "weights to the ranks of their layers"),
            _one(case, "all-to-all", pipe, 1, held.sums(1 / ways), "gradients to their storage"),
        ]
        outer = tuple(axis for axis in ("pipe", *copies) if _size(case, axis) > 1)
        found += [
            _one(case, "all-gather", outer, 1, held.outer, "weights outside of the layers"),
            _one(case, "reduce-scatter", outer, 1, held.outer_sums, "their gradients"),
        ]
    if copies and case.ways.fetches:
        found.append(_one(case, "all-gather", copies, 1, held.dense, "copies of weights"))
    if everywhere and case.mesh.reduce == "step":
        size = held.dense_sums
        found.append(
            _one(case, "reduce-scatter", everywhere, 1, size, "gradients of copies, summed up")
        )
        if case.mesh.data > 1:
            size = held.expert_sums / case.mesh.pipe
            found.append(_one(case, "reduce-scatter", ("data",), 1, size, "gradients of experts"))
    elif everywhere:
        count = case.micro_batches
        size = count * held.dense_sums
        found.append(_one(case, "all-reduce", everywhere, count, size, "gradients of copies"))
    if case.mesh.data > 1 and case.mesh.zero1:
        stored = device_bytes(case.state["params"])
        found.append(_one(case, "all-gather", ("data",), 1, stored, "updated weights (ZeRO-1)"))
    return found + _of_fsdp(case, held, passing)


class Held(NamedTuple):
    """Bytes of the weights that a device computes with in a step."""

    dense: float
    """Held in copies by the devices of the batch axes, in the type of the step."""
    experts: float
    outer: float
    """Of a pipeline: what lies around the layers, embedding and head aside."""
    dense_sums: float
    """Their sums of gradients, fp32."""
    expert_sums: float
    outer_sums: float

    def sums(self, share: float) -> float:
        """Those of dense weights, a share of them, and of the experts."""
        return self.dense_sums * share + self.expert_sums


def _held(case: Case) -> Held:
    if case.mesh.pipe == 1:
        weights, _ = held_weights(case)
        plan = blueprint(case.model)
        copies, sums = copied_bytes(weights, plan.params_axes, case.layout)
        experts = device_bytes(expert_weights(case.state["params"]))
        # Experts are not gathered, but a step holds them in its type.
        item = max((w.dtype.itemsize for w in expert_weights(weights)), default=0)
        dense = max(0.0, copies - experts / 4 * item)
        return Held(dense, experts, 0.0, sums - experts, experts, 0.0)
    held = stage_weights(case)
    numbered = values_of(held)
    experts = expert_weights(numbered.layers)
    fp32 = {leaf.dtype.itemsize for leaf in experts} or {4}
    of_experts, item = device_bytes(experts), max(fp32)
    dense = device_bytes([held.layers, held.vocab]) - of_experts
    numbers = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves([numbered.layers, numbered.vocab])
    )
    ends = [numbered.first, numbered.last]
    outer = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(ends))
    expert_sums = of_experts / item * 4
    sums = numbers * 4 - expert_sums
    return Held(dense, of_experts, device_bytes(ends), sums, expert_sums, outer * 4)


def expert_weights(params: Any) -> list[Any]:
    """Routed experts' weights of a tree of parameters."""
    found = jax.tree_util.tree_leaves_with_path(params)
    return [
        leaf
        for path, leaf in found
        if (words := [getattr(step, "key", "") for step in path])
        and "moe" in words
        and words[-1] in ROUTED
    ]


def _of_fsdp(case: Case, held: "Held", passing: Passing) -> list[Collective]:
    """Weights gathered layer by layer, forward and backward, and their gradients reduced."""
    fsdp = case.mesh.fsdp
    if fsdp == 1:
        return []
    count, over = case.micro_batches, ("fsdp",)
    size = count * held.sums(1.0) / 4 * fsdp * case.recipe.activation_dtype.itemsize
    gather = _one(case, "all-gather", over, 2 * count, 2 * size, "weights of layers")
    reduce = _one(case, "reduce-scatter", over, count, size, "gradients of layers")
    # The compiler fetches a layer's weights beside the layer before.
    seconds = gather.seconds + reduce.seconds
    shown = max(0.0, 1 - passing.seconds / seconds)
    return [
        dataclasses.replace(one, exposed_seconds=shown * one.seconds) for one in (gather, reduce)
    ]


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
    mesh = case.mesh
    if mesh.context == 1:
        return []
    item = case.recipe.activation_dtype.itemsize
    again = 1 + (case.recipe.remat == "full")
    passes = (again + 3) * (layer_passes(case) + _dense_passes(case))
    times = passes * (mesh.context - 1)
    op = "collective-permute" if mesh.context_exchange == "ring" else "all-gather"
    size = times * case.tokens * key_numbers(case) * item
    return [_one(case, op, ("context",), times, size, "keys of other parts of a sequence")]


def _pipe(case: Case) -> list[Collective]:
    if case.mesh.pipe == 1:
        return []
    table, item = case.table, case.recipe.activation_dtype.itemsize
    ways = sum(
        used for name, used in table.channels._asdict().items() if not name.endswith("_same")
    )
    times = ways * table.ticks
    tokens = case.rows * case.train.seq_len // activation_shards(case.layout, "stream")
    x = tokens * case.model.hidden_size * item
    # Embeddings looked up (twice those of the first stage), their gradients, hidden states to the
    # head's parts, and their gradients: a sum over all ranks each.
    sums = case.micro_batches * (5 + 4 * case.model.mtp_depth)
    hidden = 0.0 if case.ways.hides_messages else None
    messages = _one(
        case, "collective-permute", ("pipe",), times, times * x, "activations and gradients", hidden
    )
    if not case.ways.vocabulary_on_ranks:
        return [messages]
    return [
        messages,
        _one(case, "all-reduce", ("pipe",), sums, sums * x, "embeddings and hidden states"),
    ]
