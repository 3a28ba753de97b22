"""Time and memory of a schedule, from the durations of its ops.

Table 2 of the V3 report gives, for PP stages, the time that a rank is idle and the activations it
holds. What is counted, and when it comes out exactly:

- Times are per stage: F, B, W and F&B are those of one of the model's PP stages. DualPipe has PP
  ranks, DualPipeV PP/2; both hold two stages per rank.
- The bubble is the whole time minus the busy time, on the rank where that is largest. All ranks are
  idle alike unless F&B is below F + B: the outer ranks of DualPipe run fewer pairs than the ranks
  in the middle, are busy for longer, and idle less.
- An activation is the share of one micro-batch in one stage (1/PP of all layers), held from the
  start of its F to the end of its B, or of its W if the backward is split. The peak is that of the
  rank where it is largest: rank 0 in 1F1B, every rank in the others.

The bubbles are the table's

- of 1F1B for any durations and any number of micro-batches. So are GPipe's, which are the same, and
  those of the interleaved schedule, with F and B of its shorter stages;
- of ZB1P for W <= F, W <= B - W and at least PP micro-batches;
- of DualPipe and DualPipeV for W <= F = B - W and max(F, B) <= F&B <= F + B: the formula takes a
  forward pass to last as long as the gradient of the input. For F > B - W >= W the eight steps take
  (PP/2-1)(F&B + F - 2W), which is more; for F < B - W they can take less or more.
"""

from collections.abc import Callable
from typing import NamedTuple

from sharding.pipeline.schedule import Op, Schedule, parts, spans


class Costs(NamedTuple):
    """Durations of one stage, in any unit. Integers and fractions stay exact."""

    F: float
    """Forward pass."""
    B: float
    """Full backward pass."""
    W: float
    """The weight gradients' part of B; the input's takes B - W."""
    FB: float
    """A forward and a full backward pass that overlap."""


UNIT_COSTS = Costs(F=1, B=2, W=1, FB=3)
"""All passes alike, a backward pass being two, and nothing gained by overlapping."""


class Simulation(NamedTuple):
    """Result of a simulation, per rank where not said otherwise."""

    spans: tuple[tuple[tuple[float, float], ...], ...]
    """(start, end) of each op, in the order of `Schedule.orders`."""
    makespan: float
    """End of the last op of all ranks."""
    busy: tuple[float, ...]
    """Sum of the durations of its ops."""
    bubble: tuple[float, ...]
    """`makespan` minus `busy`. The paper's figure is the largest."""
    peak: tuple[int, ...]
    """Most activations held at once; one is the share of a micro-batch in one stage. The paper's
    figure is the largest."""


def simulate(schedule: Schedule, costs: Costs = UNIT_COSTS) -> Simulation:
    """Run a schedule with these durations, each op as early as it can. Messages take no time.

    Errors: ValueError for durations that are none, or ranks that wait for each other without end.
    """
    if not (costs.F > 0 and 0 < costs.W < costs.B and costs.FB > 0):
        raise ValueError(f"{costs}: F and FB must be above 0, and W between 0 and B, which has it")
    times = {"F": costs.F, "B": costs.B, "W": costs.W, "I": costs.B - costs.W, "FB": costs.FB}
    found = spans(schedule, lambda _, op: times[op.kind])
    makespan = max(rank[-1][1] for rank in found)
    busy = tuple(sum(times[op.kind] for op in order) for order in schedule.orders)
    bubble = tuple(makespan - time for time in busy)
    return Simulation(found, makespan, busy, bubble, tuple(map(_peak, schedule.orders)))


def _peak(order: tuple[Op, ...]) -> int:
    held = peak = 0
    for op in order:
        kinds = [part.kind for part in parts(op)]
        held += "F" in kinds
        # before anything is given back: a pair holds both of its micro-batches
        peak = max(peak, held)
        held -= "B" in kinds or "W" in kinds
    return peak


PAPER_BUBBLES: dict[str, Callable[[int, Costs], float]] = {
    "1f1b": lambda PP, c: (PP - 1) * (c.F + c.B),
    "zb1p": lambda PP, c: (PP - 1) * (c.F + c.B - 2 * c.W),
    "dualpipe": lambda PP, c: (PP // 2 - 1) * (c.FB + c.B - 3 * c.W),
    "dualpipev": lambda PP, c: (PP // 2 - 1) * (c.FB + c.B - 3 * c.W),
}
"""The bubble by schedule, PP and durations, as table 2 of the V3 report states it."""


def paper_bubble(name: str, stages: int, costs: Costs) -> float:
    """The bubble that table 2 of the V3 report states for a schedule with so many stages.

    Errors: ValueError for a schedule that the table does not have.
    """
    if name not in PAPER_BUBBLES:
        raise ValueError(f"table 2 of the V3 report has {', '.join(PAPER_BUBBLES)}, not {name}")
    return PAPER_BUBBLES[name](stages, costs)
