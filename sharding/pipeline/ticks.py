"""A schedule as a table of ticks, which an executor runs without knowing the schedule.

In a tick every rank runs at most one op. What the op sends (the stage's output to the owner of the
next stage, the gradient of the stage's input to the owner of the one before) and what it keeps for
its own later ops is written at the end of the tick into slots of stashes, and can be read from the
next tick on. A rank has four stashes: `x` inputs of stages, `dy` gradients of their outputs,
`saved` what a forward pass keeps for the backward pass, and `cotangents` what I keeps for W. Each
has one slot more than is counted, the trash, for writing what nobody reads.
"""

import heapq
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from sharding.pipeline.schedule import Kind, Op, Part, Schedule, parts, spans

IDLE = 0
CODES: dict[Kind, int] = {"F": 1, "B": 2, "FB": 3, "I": 4, "W": 5}
"""Number of each kind of op in `Table.code`; IDLE is 0."""

_KINDS: dict[int, Kind] = {code: kind for kind, code in CODES.items()}


class Channels(NamedTuple):
    """Ways between ranks that a schedule uses; an executor leaves out the others.

    `up` goes from a rank to the next (from the last to rank 0), `down` to the one before, `same`
    stays on the rank. Between two ranks both are one way, and all goes `up`.
    """

    x_up: bool
    x_down: bool
    x_same: bool
    dy_up: bool
    dy_down: bool
    dy_same: bool


class Table(NamedTuple):
    """Work of every rank in every tick: int32 arrays [ticks, ranks].

    Entries that a tick does not use are 0 (chunk, micro-batch) or the trash slot.
    """

    code: np.ndarray
    """IDLE or one of CODES."""
    f_chunk: np.ndarray
    """F and FB: chunk and micro-batch of the forward pass."""
    f_micro: np.ndarray
    f_x: np.ndarray
    """Read: slot of the stage's input. Trash at the first stage, whose input are tokens."""
    f_saved: np.ndarray
    """Write: slot for what the backward pass needs, kept until B or W."""
    b_chunk: np.ndarray
    """B, FB, I and W: chunk and micro-batch of the backward pass."""
    b_micro: np.ndarray
    b_saved: np.ndarray
    """Read: slot of what the forward pass kept."""
    b_dy: np.ndarray
    """Read, not in W: slot of the gradient of the stage's output; at the last stage of the output
    itself, from which the loss makes it."""
    b_cotangents: np.ndarray
    """Read, in W only: slot of what I kept."""
    i_cotangents: np.ndarray
    """Write, in I only: slot of `cotangents`."""
    y_kept: np.ndarray
    """Write: slot of `dy` for the last stage's output."""
    x_up: np.ndarray
    """Write: slot of `x` for the stage output that the rank before sends in this tick."""
    x_down: np.ndarray
    """The same of the rank after."""
    x_same: np.ndarray
    """The same of this rank itself."""
    dy_up: np.ndarray
    """Write: slot of `dy` for the input gradient that the rank before sends in this tick."""
    dy_down: np.ndarray
    dy_same: np.ndarray
    num_x: int
    """Slots of `x` that the fullest rank needs; also the number of its trash slot."""
    num_dy: int
    """The same of `dy`."""
    num_saved: int
    """The same of `saved`."""
    num_cotangents: int
    """The same of `cotangents`."""
    channels: Channels
    codes: frozenset[int]
    """Values that occur in `code`."""

    @property
    def ticks(self) -> int:
        """Number of ticks."""
        return len(self.code)

    def columns(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in _COLUMNS}


_COLUMNS = Table._fields[: Table._fields.index("num_x")]
_STASHES = ("x", "dy", "saved", "cotangents")
_STASH_OF = {
    name: next((s for s in _STASHES if s in name.split("_")), "dy" if name == "y_kept" else None)
    for name in _COLUMNS
}


class _Stay(NamedTuple):
    """The time that something takes a slot of `rank`: written at the end of tick `since`, last
    read in tick `until`."""

    since: int
    until: int
    rank: int
    micro: int
    stage: int
    """The stage that reads it."""
    column: str
    """The column that says where it is written."""


_Slots = dict[tuple[int, int], int]
"""Slot by (micro-batch, stage)."""


def tick_table(schedule: Schedule) -> Table:
    """Assign each op to the earliest tick, and all that it leaves behind to slots.

    A slot is free again after its last reading. Slots are handed out greedily in the order of
    writing, so as many are needed as are in use at once on the fullest rank.
    """
    starts = [[int(start) for start, _ in rank] for rank in spans(schedule, lambda *_: 1)]
    shape = (1 + max(rank[-1] for rank in starts), schedule.ranks)
    columns = {name: np.zeros(shape, np.int32) for name in _COLUMNS}
    slots: dict[str, _Slots] = {}
    count: dict[str, int] = {}
    for stash, stays in _stays(schedule, starts).items():
        places, count[stash] = _hand_out(stays)
        slots[stash] = {(stay.micro, stay.stage): slot for stay, slot in places}
        for name in (name for name in _COLUMNS if _STASH_OF[name] == stash):
            columns[name][:] = count[stash]
        for stay, slot in places:
            columns[stay.column][stay.since, stay.rank] = slot
    for tick, rank, op, part, stage in _parts_in_time(schedule, starts):
        at, prefix = (part.micro, stage), "f" if part.kind == "F" else "b"
        entries: dict[str, int] = {"code": CODES[op.kind]}
        entries |= {f"{prefix}_chunk": part.chunk, f"{prefix}_micro": part.micro}
        if part.kind == "F":
            entries["f_x"] = slots["x"].get(at, count["x"])
        else:
            entries["b_saved"] = slots["saved"][at]
            if part.kind != "W":
                entries["b_dy"] = slots["dy"][at]
            else:
                entries["b_cotangents"] = slots["cotangents"][at]
        for name, value in entries.items():
            columns[name][tick, rank] = value
    used = {way: bool((columns[way] != count[way.split("_")[0]]).any()) for way in Channels._fields}
    return Table(
        **columns,
        num_x=count["x"],
        num_dy=count["dy"],
        num_saved=count["saved"],
        num_cotangents=count["cotangents"],
        channels=Channels(**used),
        codes=frozenset(int(code) for code in np.unique(columns["code"])),
    )


def _parts_in_time(
    schedule: Schedule, starts: list[list[int]]
) -> Iterator[tuple[int, int, Op, Part, int]]:
    """(tick, rank, op, part, stage) of every part of every op."""
    stage_of = schedule.stage_of
    for rank, order in enumerate(schedule.orders):
        for tick, op in zip(starts[rank], order, strict=True):
            for part in parts(op):
                yield tick, rank, op, part, stage_of[rank][part.chunk]


def _stays(schedule: Schedule, starts: list[list[int]]) -> dict[str, list[_Stay]]:
    """All that is written into each stash."""
    last = schedule.num_stages - 1
    when: dict[tuple[Literal["F", "dy", "end"], int, int], int] = {}
    for tick, _, _, (kind, _, micro), stage in _parts_in_time(schedule, starts):
        if kind == "F":
            when["F", micro, stage] = tick
        if kind in ("B", "I"):
            when["dy", micro, stage] = tick
        if kind in ("B", "W"):
            when["end", micro, stage] = tick
    found: dict[str, list[_Stay]] = {stash: [] for stash in _STASHES}
    for micro, route in enumerate(schedule.route_of):
        ranks = [rank for rank, _ in schedule.routes[route]]
        for stage, rank in enumerate(ranks):
            at = micro, stage
            forward, backward = when["F", *at], when["dy", *at]
            end = when["end", *at]
            found["saved"].append(_Stay(forward, end, rank, *at, "f_saved"))
            if end > backward:
                found["cotangents"].append(_Stay(backward, end, rank, *at, "i_cotangents"))
            if stage:
                sent = when["F", micro, stage - 1]
                column = f"x_{_way(ranks[stage - 1], rank, schedule.ranks)}"
                found["x"].append(_Stay(sent, forward, rank, *at, column))
            if stage < last:
                sent = when["dy", micro, stage + 1]
                column = f"dy_{_way(ranks[stage + 1], rank, schedule.ranks)}"
                found["dy"].append(_Stay(sent, backward, rank, *at, column))
            else:
                found["dy"].append(_Stay(forward, backward, rank, *at, "y_kept"))
    return found


def _hand_out(stays: list[_Stay]) -> tuple[list[tuple[_Stay, int]], int]:
    """A slot for each stay, and the slots of the rank that needs most."""
    taken: dict[int, list[tuple[int, int]]] = {}
    free: dict[int, list[int]] = {}
    count: dict[int, int] = {}
    found = []
    for stay in sorted(stays):
        leaving, unused = taken.setdefault(stay.rank, []), free.setdefault(stay.rank, [])
        # Read in the tick at whose end this one is written: free in time.
        while leaving and leaving[0][0] <= stay.since:
            heapq.heappush(unused, heapq.heappop(leaving)[1])
        slot = heapq.heappop(unused) if unused else count.get(stay.rank, 0)
        count[stay.rank] = max(count.get(stay.rank, 0), slot + 1)
        heapq.heappush(leaving, (stay.until, slot))
        found.append((stay, slot))
    return found, max(count.values(), default=0)


def _way(sender: int, receiver: int, ranks: int) -> str:
    """Name of the way between two ranks; with two ranks every message between them goes up."""
    if sender == receiver:
        return "same"
    if receiver == (sender + 1) % ranks:
        return "up"
    assert receiver == (sender - 1) % ranks, f"{sender} and {receiver} are no neighbours"
    return "down"


def op_at(table: Table, tick: int, rank: int) -> Op | None:
    """The op that a rank runs in a tick; None if it is idle."""
    kind = _KINDS.get(int(table.code[tick, rank]))
    if kind is None:
        return None
    forward = int(table.f_chunk[tick, rank]), int(table.f_micro[tick, rank])
    backward = int(table.b_chunk[tick, rank]), int(table.b_micro[tick, rank])
    none = (-1, -1)
    return Op(
        kind, *(forward if kind in ("F", "FB") else none), *(none if kind == "F" else backward)
    )
