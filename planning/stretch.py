"""The tick table of a schedule of many micro batches, from a table of few.

A schedule repeats itself between its ends: with one more micro batch (of each direction, or of
every rank) the same ticks come once more. So the table of a thousand micro batches is that of a few
with a block of ticks repeated, which takes milliseconds to write down and not half a minute.
"""

import functools

import numpy as np

from sharding.pipeline.schedule import make_schedule
from sharding.pipeline.ticks import Table, tick_table


@functools.lru_cache(maxsize=256)
def planned_table(name: str, ranks: int, micro_batches: int, chunks: int) -> Table:
    """The schedule's table. Ops and chunks are those of `tick_table`; where a block was repeated,
    numbers of micro batches and slots are repeated with it, and mean nothing."""
    few = 3 * ranks
    period = {"interleaved": ranks, "dualpipe": 2}.get(name, 1)
    times, rest = divmod(micro_batches - few, period)
    if name == "gpipe" or rest or times < 2:
        return _table(name, ranks, micro_batches, chunks)
    short, longer = (_table(name, ranks, few + more, chunks) for more in (0, period))
    block = _repeated(short, longer)
    if block is None:
        return _table(name, ranks, micro_batches, chunks)
    start, stop = block
    ticks = np.arange(longer.ticks)
    order = np.concatenate([ticks[:start], *[ticks[start:stop]] * times, ticks[stop:]])
    return longer._replace(**{name: column[order] for name, column in longer.columns().items()})


@functools.lru_cache(maxsize=256)
def _table(name: str, ranks: int, micro_batches: int, chunks: int) -> Table:
    return tick_table(make_schedule(name, ranks, micro_batches, chunks))


def _repeated(short: Table, longer: Table) -> tuple[int, int] | None:
    """From where to where ticks of `longer` are left out to get `short`; None if it is not so."""
    slots = [(t.num_x, t.num_dy, t.num_saved, t.num_cotangents) for t in (short, longer)]
    a, b = (np.stack([t.code, t.f_chunk, t.b_chunk], axis=-1) for t in (short, longer))
    same = (a == b[: len(a)]).all((1, 2))
    start = len(a) if same.all() else int(same.argmin())
    stop = start + len(b) - len(a)
    if slots[0] != slots[1] or not np.array_equal(a[start:], b[stop:]):
        return None
    return start, stop
