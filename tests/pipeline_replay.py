"""Replay of a pipeline's table of ticks: the proof that every op finds what it must read."""

import numpy as np

from sharding.pipeline.schedule import Part, Schedule, parts
from sharding.pipeline.ticks import Channels, Table, op_at

_Tag = tuple[int, int]
"""(micro-batch, stage) of the stage that reads something."""
_Held = dict[tuple[str, int], _Tag]
"""What a rank holds, by (stash, slot). The trash slots are never in it."""


def verify_table(schedule: Schedule, table: Table) -> None:
    """Replay a table with tags for arrays: prove that each op reads what it must.

    Data moves as an executor moves it: what a rank sends in a tick goes every used way, and each
    receiver writes it where its own columns say.
    Errors: ValueError with the tick and rank of the first op that goes wrong.
    """
    for rank, order in enumerate(schedule.orders):
        ops = tuple(op for tick in range(table.ticks) if (op := op_at(table, tick, rank)))
        if ops != order:
            raise ValueError(f"table of {schedule.name}, rank {rank}: its ops are not the order's")
    codes = frozenset(int(code) for code in np.unique(table.code))
    if codes != table.codes:
        raise ValueError(f"table of {schedule.name}: codes {table.codes} should be {codes}")
    stage_of, last = schedule.stage_of, schedule.num_stages - 1
    held: list[_Held] = [{} for _ in range(schedule.ranks)]
    for tick in range(table.ticks):
        sent: list[dict[str, _Tag]] = [{} for _ in range(schedule.ranks)]
        for rank in range(schedule.ranks):
            op = op_at(table, tick, rank)
            for part in parts(op) if op else ():
                stage = stage_of[rank][part.chunk]
                _read(table, tick, rank, part, stage, held[rank])
                sent[rank] |= _left_behind(part, stage, last)
        for rank in range(schedule.ranks):
            _write(table, tick, rank, held[rank], sent)


def _read(table: Table, tick: int, rank: int, part: Part, stage: int, held: _Held) -> None:
    """Refuse a part of an op that finds something else in its slots than it must."""
    stashes = {
        "F": {"x": "f_x"},
        "B": {"saved": "b_saved", "dy": "b_dy"},
        "I": {"saved": "b_saved", "dy": "b_dy"},
        "W": {"saved": "b_saved", "cotangents": "b_cotangents"},
    }[part.kind]
    for stash, column in stashes.items():
        slot = int(getattr(table, column)[tick, rank])
        if part.kind == "F" and stage == 0:
            good, expected = slot == table.num_x, "the trash slot"
        else:
            expected = (part.micro, stage)
            good = held.get((stash, slot)) == expected
        if not good:
            raise ValueError(
                f"tick {tick}, rank {rank}, {part}: {column} is slot {slot} of {stash}, which "
                f"holds {held.get((stash, slot))}; should be {expected}"
            )


def _left_behind(part: Part, stage: int, last: int) -> dict[str, _Tag]:
    """What a part of an op produces, with the tag of who is to read it: `x` and `dy` for other
    stages, the rest under the name of the column that says where it stays."""
    here = part.micro, stage
    if part.kind == "F":
        output = {"x": (part.micro, stage + 1)} if stage < last else {"y_kept": here}
        return output | {"f_saved": here}
    if part.kind == "W":
        return {}
    gradient = {"dy": (part.micro, stage - 1)} if stage else {}
    return gradient | ({"i_cotangents": here} if part.kind == "I" else {})


def _write(table: Table, tick: int, rank: int, held: _Held, sent: list[dict[str, _Tag]]) -> None:
    """The end of a tick on one rank. What is written without being meant for here spoils a slot."""
    count = {"x": table.num_x, "dy": table.num_dy, "cotangents": table.num_cotangents}
    writes = [("saved", "f_saved", sent[rank].get("f_saved"))]
    writes.append(("cotangents", "i_cotangents", sent[rank].get("i_cotangents")))
    writes.append(("dy", "y_kept", sent[rank].get("y_kept")))
    for stash in ("x", "dy"):
        for way, sender in (("up", rank - 1), ("down", rank + 1), ("same", rank)):
            tag = sent[sender % len(sent)].get(stash)
            writes.append((stash, f"{stash}_{way}", tag))
    written = set()
    for stash, column, tag in writes:
        slot, trash = int(getattr(table, column)[tick, rank]), count.get(stash, table.num_saved)
        if slot == trash:
            continue
        unused = column in Channels._fields and not getattr(table.channels, column)
        if unused or not 0 <= slot < trash or (stash, slot) in written:
            raise ValueError(
                f"tick {tick}, rank {rank}: {column} is slot {slot} of {trash}: it does not exist, "
                "is written twice, or its way is not among the channels"
            )
        written.add((stash, slot))
        held.pop((stash, slot), None)
        if tag is not None:
            held[stash, slot] = tag
