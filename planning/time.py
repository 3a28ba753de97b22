"""Seconds of a step: passes of layers, put in order by the schedule's ticks or one after the other.

In a pipeline a rank goes on to its next tick when its neighbours' messages of this one have come,
as the executor's permutes make it (`sharding/pipeline/executor.py`); so a tick ends on a rank when
its own work is done and its neighbours have ended the tick before.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from planning.case import Case
from planning.work import (
    EMPTY,
    NOTHING,
    Passes,
    Seconds,
    dense_layer,
    embedding,
    head,
    mtp_module,
    paired,
    stack_layer,
)
from sharding.pipeline.schedule import spans
from sharding.pipeline.stages import ends_of
from sharding.pipeline.ticks import CODES
from sharding.sizes import device_bytes


class Tick(NamedTuple):
    """What a rank does from `start` to `end`, seconds from the start of the first tick."""

    kind: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Passing:
    """The passes over all micro batches."""

    seconds: float
    parts: dict[str, float]
    """By kind of work, of the busiest rank; `bubble` is what it waits."""
    bubble: float
    """Share of the time that all ranks together do nothing."""
    exposed_exchange: float
    """Seconds of the busiest rank's exchange that nothing else fills."""
    exchange: float
    """Seconds of its exchange altogether."""
    timeline: tuple[Tick, ...] = ()
    """Of the busiest rank."""
    layer: Passes = EMPTY


def passes_of(case: Case) -> Passing:
    """Forward and backward passes of a step."""
    return _pipeline(case) if case.mesh.pipe > 1 else _sequence(case)


def _ends(case: Case) -> tuple[Passes, Passes]:
    """What is computed before the stack of layers and after it, embedding and head left out."""
    before = EMPTY
    if case.model.num_moe_layers:
        before = dense_layer(case).times(case.model.num_dense_layers)
    after = EMPTY
    if case.model.mtp_depth:
        after = mtp_module(case).times(case.model.mtp_depth)
    if case.mesh.pipe > 1 and not case.ways.vocabulary_on_ranks:
        count = 1 + case.model.mtp_depth
        return before + embedding(case), after + head(case).times(count)
    return before, after


def _vocabulary(case: Case) -> Passes:
    """Embeddings and losses of a micro batch, those of MTP modules included."""
    return (embedding(case) + head(case)).times(1 + case.model.mtp_depth)


def _parts(work: Seconds) -> dict[str, float]:
    return {name: seconds for name, seconds in work._asdict().items() if name != "exchange"}


# ---- one after the other ------------------------------------------------------------------------


def _sequence(case: Case) -> Passing:
    layer = stack_layer(case)
    before, after = _ends(case)
    layers = layer.times(case.model.stack_size)
    count = case.micro_batches
    work = (before + after + layers + _vocabulary(case)).times(count)
    total = work.F + work.B
    exposed = total.exchange
    if case.mesh.overlap:
        both = layers.times(count)
        serial = both.F + both.B
        hidden = serial.total - _side_by_side(serial, case)
        exposed = max(0.0, exposed - hidden)
    seconds = total.compute + total.tensor + exposed
    parts = _parts(total) | {"exchange": exposed, "bubble": 0.0}
    return Passing(seconds, parts, 0.0, exposed, total.exchange, layer=layer)


def _side_by_side(work: Seconds, case: Case) -> float:
    """Seconds of work of two micro batches that fill each other's exchange."""
    return paired(work, NOTHING, case.hardware, travels=True)


# ---- in a pipeline ------------------------------------------------------------------------------


class _Chunk(NamedTuple):
    """Seconds of a chunk of a rank."""

    F: Seconds
    I: Seconds  # noqa: E741
    W: Seconds
    B: Seconds


def _pipeline(case: Case) -> Passing:
    table, chunks = case.table, _chunks(case)
    busy, parts, exposed, travelled = _durations(case, chunks)
    ends = np.zeros(table.code.shape[1])
    runs = np.zeros((2, *table.code.shape))
    meets = np.zeros(table.ticks, bool)
    if case.ways.vocabulary_on_ranks:
        meets = _common(case, busy, parts)
    for tick, durations in enumerate(busy if case.ways.in_step else ()):
        ready = np.maximum(ends, np.maximum(np.roll(ends, 1), np.roll(ends, -1)))
        if meets[tick]:
            ready = np.full_like(ends, ends.max())
        ends = ready + durations
        runs[:, tick] = ready, ends
    if not case.ways.in_step:
        works = table.code > 0
        left = [iter(busy[works[:, rank], rank]) for rank in range(len(ends))]
        assert case.schedule is not None
        for rank, found in enumerate(spans(case.schedule, lambda rank, _: float(next(left[rank])))):
            runs[:, works[:, rank], rank] = np.transpose(found)
    seconds = float(runs.max())
    worked = busy.sum(0)
    rank = int(worked.argmax())
    bubble = 1 - float(worked.sum()) / (seconds * len(worked))
    found = {name: float(values[:, rank].sum()) for name, values in parts.items()}
    found |= {"exchange": float(exposed[:, rank].sum()), "bubble": seconds - float(worked[rank])}
    kinds = {code: kind for kind, code in CODES.items()}
    timeline = tuple(
        Tick(kinds[int(code)], float(runs[0, t, rank]), float(runs[1, t, rank]))
        for t, code in enumerate(table.code[:, rank])
        if code
    )
    sent = float(exposed[:, rank].sum()), float(travelled[:, rank].sum())
    return Passing(seconds, found, bubble, *sent, timeline, stack_layer(case))


def _common(case: Case, busy: np.ndarray, parts: dict[str, np.ndarray]) -> np.ndarray:
    """Adds to every rank's ticks its part of embeddings and losses, which all ranks compute
    together; whether they meet in a tick."""
    firsts = ends_of(case.table, case.placement.is_first)
    lasts = ends_of(case.table, case.placement.is_last)
    work = _vocabulary(case).times(1 / case.mesh.pipe)
    counts = {
        "F": firsts.is_forward.sum(1),
        "I": lasts.is_backward.sum(1),
        "W": firsts.is_backward.sum(1),
    }
    for where, times in counts.items():
        of_pass: Seconds = getattr(work, where)
        busy += times[:, None] * of_pass.compute
        for name, seconds in of_pass._asdict().items():
            if name in parts:
                parts[name] += times[:, None] * seconds
    return np.sum(list(counts.values()), axis=0) > 0


def _chunks(case: Case) -> dict[tuple[int, int], _Chunk]:
    """Work of every rank's chunk in a pass of each kind."""
    layer, (before, after) = stack_layer(case), _ends(case)
    placement, found = case.placement, {}
    for rank, chunk in np.ndindex(placement.is_first.shape):
        count = int((placement.layer_of[rank, chunk] >= 0).sum())
        work = layer.times(count)
        if placement.is_first[rank, chunk]:
            # Computed with the forward pass, and again for its gradient when that of x is known.
            work = Passes(work.F + before.F, work.I + before.F + before.I + before.W, work.W)
        if placement.is_last[rank, chunk]:
            # Loss and MTP are run where the gradient of their input is asked for.
            work = Passes(work.F, work.I + after.F + after.I + after.W, work.W)
        found[rank, chunk] = _Chunk(work.F, work.I, work.W, work.B)
    return found


def _durations(case: Case, chunks: dict[tuple[int, int], _Chunk]):
    """Seconds of every tick and rank; of them by kind of work, of exchange that nothing fills; and
    those that the exchange takes by itself."""
    table = case.table
    shape = table.code.shape
    busy, exposed, travelled = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    names = [name for name in Seconds._fields if name != "exchange"]
    parts = {name: np.zeros(shape) for name in names}
    ranks = np.broadcast_to(np.arange(shape[1]), shape)
    columns = np.stack([ranks, table.code, table.f_chunk, table.b_chunk], -1)
    alike, which = np.unique(columns.reshape(-1, 4), axis=0, return_inverse=True)
    for number, (rank, code, f, b) in enumerate(alike.tolist()):
        if not code:
            continue
        seconds, work = _tick(case, chunks, rank, code, f, b)
        own = work.compute + work.tensor
        where = (which == number).reshape(shape)
        busy[where], travelled[where] = seconds, work.exchange
        exposed[where] = max(0.0, seconds - own)
        for name in names:
            parts[name][where] = getattr(work, name) * min(seconds, own) / max(own, 1e-12)
    return busy, parts, exposed, travelled


def _tick(
    case: Case, chunks: dict[tuple[int, int], _Chunk], rank: int, code: int, f: int, b: int
) -> tuple[float, Seconds]:
    """Seconds of an op, and its work."""
    kind = next(kind for kind, number in CODES.items() if number == code)
    if kind == "F":
        work = chunks[rank, f].F
        return work.total, work
    if kind != "FB":
        work = getattr(chunks[rank, b], kind)
        return work.total, work
    forward, backward = chunks[rank, f].F, chunks[rank, b].B
    # Layers are side by side as far as both chunks have them; what surrounds them is not.
    seconds = paired(forward, backward, case.hardware, travels=case.mesh.expert > 1)
    return seconds, forward + backward


# ---- the update ---------------------------------------------------------------------------------


def update_seconds(case: Case) -> float:
    """Clipping and optimizer: weights, gradients and moments read, weights and moments written."""
    state = case.state
    weights = device_bytes(state["params"])
    moments = device_bytes([state["opt"], state.get("ema", {})])
    share = _share_updated(case)
    size = 2 * weights * share + 2 * moments + 2 * weights * share
    seconds = size / case.hardware.memory_speed
    if case.train.optimizer.name == "muon":
        seconds += _muon(case, share)
    return seconds


def _share_updated(case: Case) -> float:
    """Part of the stored weights whose moments a device holds (ZeRO-1)."""
    return 1 / case.mesh.data if case.mesh.zero1 else 1.0


def _muon(case: Case, share: float) -> float:
    """Five rounds of Newton-Schulz on the matrices: three products of [A, A] x [A, B] each, A the
    shorter side (arXiv 2502.16982)."""
    import jax

    flops = 0.0
    for leaf in jax.tree.leaves(case.state["params"]):
        if len(leaf.shape) < 2:
            continue
        local = leaf.sharding.shard_shape(leaf.shape)
        A, B = sorted((leaf.shape[-2], leaf.shape[-1]))
        flops += 5 * (2 * 2 * A * A * B + 2 * A**3) * math.prod(local) / (A * B)
    return flops * share / case.hardware.product(4096, 4096, 4096, False)
