"""Figures of pipeline schedules: `python -m sharding.pipeline.draw --schedule dualpipe --ranks 4
...`."""

import argparse
import os
from typing import Any

from sharding.pipeline.schedule import SCHEDULES, Op, Schedule, make_schedule, parts
from sharding.pipeline.simulate import (
    PAPER_BUBBLES,
    UNIT_COSTS,
    Costs,
    Simulation,
    paper_bubble,
    simulate,
)
from sharding.pipeline.ticks import CODES, Table, op_at, tick_table

_WORDS = {
    "F": "F forward",
    "B": "B backward",
    "FB": "F and B in one column a pair that overlaps",
    "I": "I backward of the input only",
    "W": "W weight gradients of an earlier I",
}
# light for chunks 0, 2, ..., dark for chunks 1, 3, ...
_COLORS = {
    "F": ("#c6dbef", "#6baed6"),
    "B": ("#c7e9c0", "#74c476"),
    "I": ("#dadaeb", "#9e9ac8"),
    "W": ("#fdd0a2", "#fd8d3c"),
}
_EDGE = "#4d4d4d"


def text(what: Schedule | Table) -> str:
    """A line per rank and a column per tick, with a legend: F3 is the forward pass of micro-batch 3
    on chunk 0, F3' on chunk 1, F3'' on chunk 2."""
    table = tick_table(what) if isinstance(what, Schedule) else what
    ticks, ranks = table.code.shape
    cells = [[_cell(op_at(table, tick, rank)) for tick in range(ticks)] for rank in range(ranks)]
    widths = [max(len(row[tick]) for row in cells) for tick in range(ticks)]
    head = max(len("tick"), len(f"rank {ranks - 1}"))
    # Every fifth tick has its number, which may run over the empty columns after it.
    ruler = [str(tick) if tick % 5 == 0 else "" for tick in range(ticks)]
    lines = []
    for name, row in [("tick", ruler), *((f"rank {i}", row) for i, row in enumerate(cells))]:
        line = f"{name:<{head}} |"
        end = len(line)
        for cell, width in zip(row, widths, strict=True):
            line = f"{line:<{end}} {cell}"
            end += 1 + width
        lines.append(line.rstrip())
    return "\n".join([*lines, "", _legend(table)])


def _cell(op: Op | None) -> str:
    return "".join(f"{kind}{m}{_mark(chunk)}" for kind, chunk, m in parts(op)) if op else "."


def _mark(chunk: int) -> str:
    return "'" * chunk


def _legend(table: Table) -> str:
    used = [_WORDS[kind] for kind, code in CODES.items() if code in table.codes]
    used += [". idle"] if 0 in table.codes else []
    chunks = 1 + int(max(table.f_chunk.max(), table.b_chunk.max()))
    if chunks > 1:
        used.append("without prime chunk 0, ' chunk 1" + ", and so on" * (chunks > 2))
    return "; ".join(used)


def report(schedule: Schedule, costs: Costs) -> str:
    """The figure of a schedule and, below it, its numbers."""
    table, result = tick_table(schedule), simulate(schedule, costs)
    bubble = f"{max(result.bubble):g} of {result.makespan:g} ({_costs(costs)})"
    if schedule.name in PAPER_BUBBLES:
        bubble += f"; table 2: {paper_bubble(schedule.name, schedule.num_stages, costs):g}"
    numbers = [
        ("ticks", str(table.ticks)),
        ("bubble", bubble),
        ("peak", f"{max(result.peak)} activations of {schedule.num_stages} stages"),
        ("slots", f"x {table.num_x}, dy {table.num_dy}, saved {table.num_saved}"),
    ]
    return "\n".join([text(table), "", *(f"{name:<6} {value}" for name, value in numbers)])


def _costs(costs: Costs) -> str:
    return ", ".join(f"{'F&B' if n == 'FB' else n}={c:g}" for n, c in costs._asdict().items())


def picture(schedule: Schedule, path: str | os.PathLike[str], costs: Costs = UNIT_COSTS) -> None:
    """Draw the ops at their simulated times into an SVG or PNG file; equal inputs, equal bytes."""
    # Only this figure needs it, and the text must print at once.
    import matplotlib
    from matplotlib.figure import Figure

    result = simulate(schedule, costs)
    ops = sum(map(len, schedule.orders)) / schedule.ranks
    size = (min(40.0, 2.5 + 0.42 * ops), 1.2 + 0.5 * schedule.ranks)
    with matplotlib.rc_context({"svg.hashsalt": "meshseek"}):
        figure = Figure(figsize=size, layout="constrained")
        axis = figure.subplots()
        _draw(axis, schedule, result)
        is_svg = os.fspath(path).endswith(".svg")
        figure.savefig(path, dpi=110, metadata={"Date": None} if is_svg else None)


def _draw(axis: Any, schedule: Schedule, result: Simulation) -> None:
    for rank, order in enumerate(schedule.orders):
        for op, (start, end) in zip(order, result.spans[rank], strict=True):
            shown = parts(op)
            height = 0.8 / len(shown)
            for row, (kind, chunk, micro) in enumerate(shown):
                top = rank - 0.4 + row * height
                axis.broken_barh(
                    [(start, end - start)], (top, height), facecolor=_COLORS[kind][chunk % 2],
                    edgecolor=_EDGE, linewidth=0.5,
                )  # fmt: skip
                label = f"{micro}{_mark(chunk)}"
                at = (start + end) / 2, top + height / 2
                axis.text(
                    *at, label, ha="center", va="center", fontsize=7 if len(shown) == 1 else 6
                )
    axis.set_ylim(schedule.ranks - 0.5, -0.5)
    axis.set_xlim(0, result.makespan)
    axis.set_yticks(range(schedule.ranks), [f"rank {rank}" for rank in range(schedule.ranks)])
    axis.set_xlabel("time")
    axis.set_title(
        f"{schedule.name}: {schedule.ranks} ranks, {schedule.micro_batches} micro-batches, "
        f"bubble {max(result.bubble):g} of {result.makespan:g}"
    )
    kinds = {part.kind for order in schedule.orders for op in order for part in parts(op)}
    for kind, (light, _) in _COLORS.items():
        if kind in kinds:
            axis.bar(0, 0, color=light, edgecolor=_EDGE, label=_WORDS[kind])
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def main(arguments: list[str] | None = None) -> None:
    """The command line: print a schedule and its numbers, and draw it where asked."""
    parser = argparse.ArgumentParser(prog="python -m sharding.pipeline.draw", description=__doc__)
    parser.add_argument("--schedule", choices=SCHEDULES, required=True)
    parser.add_argument("--ranks", type=int, required=True, help="ranks of the pipeline")
    parser.add_argument("--micro-batches", type=int, required=True)
    parser.add_argument("--chunks", type=int, default=1, help="stages per rank, for interleaved")
    parser.add_argument(
        "--costs", type=float, nargs=4, default=UNIT_COSTS, metavar=tuple(Costs._fields),
        help="durations of a stage: forward, whole backward, its weight gradients, a pair",
    )  # fmt: skip
    parser.add_argument("--out", help="draw a picture, FILE.svg or FILE.png", metavar="FILE")
    options = parser.parse_args(arguments)
    costs = Costs(*options.costs)
    if options.out and not options.out.endswith((".svg", ".png")):
        parser.error(f"--out {options.out}: end the name in .svg or .png")
    try:
        schedule = make_schedule(
            options.schedule, options.ranks, options.micro_batches, options.chunks
        )
        print(report(schedule, costs))
        if options.out:
            picture(schedule, options.out, costs)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
