"""Legal layouts of a number of GPUs, by closed form: ranked, with the front of memory and speed.

Axes are cut as a network asks for: `tensor` and `context` inside of a node, experts over as few
nodes as they need. What does not divide, or cannot work, is left out by the same checks that refuse
a run. The best are compiled where that is asked for.
"""

import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

from rich.progress import track

from configs.schema import RunConfig
from planning.case import Case, make_case, whole_state
from planning.hardware import Hardware
from planning.memory import memory_of
from planning.report import GIB, Report, axes_of, report_of
from sharding.config import MeshConfig
from training.schedule import BatchPlan

SCHEDULES: tuple[Literal["1f1b", "zb1p", "dualpipe", "dualpipev"], ...] = (
    "1f1b", "zb1p", "dualpipe", "dualpipev",
)  # fmt: skip
REMAT: tuple[Literal["selective", "full"], ...] = ("selective", "full")
MOST_BEST = 64
"""Layouts that a search keeps."""
COMPILING_GIB = 8
"""Main memory that compiling V3's step may take."""
MOST_GPUS = 1 << 14
"""Where `fewest` gives up."""


class Limits(NamedTuple):
    """Constraints of a search."""

    max_tensor: int = 8
    max_pipe: int = 64
    max_sequences: int = 4
    """Per GPU and micro batch."""


DEFAULT = Limits()


@dataclasses.dataclass(frozen=True)
class Found:
    """Result of a search."""

    name: str
    gpus: int
    tried: int
    """Layouts that divide the GPUs."""
    legal: int
    best: tuple[Report, ...]
    """Of those that fit, the fastest first; where none fits, the smallest first."""
    front: tuple[Report, ...]
    """Those that fit and that no other beats in both memory and speed."""
    cases: tuple[Case, ...] = dataclasses.field(default=(), repr=False)
    """Those of `best`."""

    def to_json(self) -> dict[str, Any]:
        """Figures by stable names."""
        return {
            "name": self.name,
            "gpus": self.gpus,
            "tried": self.tried,
            "legal": self.legal,
            "best": [report.to_json() for report in self.best],
            "front": [report.to_json() for report in self.front],
        }


def candidates(
    run: RunConfig, hardware: Hardware, gpus: int, limits: Limits
) -> Iterator[RunConfig]:
    """Runs on all meshes of `gpus` GPUs under the limits; not all of them are legal."""
    experts = max(1, run.model.num_experts)
    for pipe, tensor, context, expert in itertools.product(
        divisors(gpus, limits.max_pipe),
        divisors(gpus, min(limits.max_tensor, hardware.per_node)),
        divisors(gpus, hardware.per_node),
        divisors(gpus, experts),
    ):
        inner, used = tensor * context, pipe * tensor * context * expert
        if gpus % used or experts % expert or inner > hardware.per_node:
            continue
        if context > 1 and run.train.seq_len < 32768:
            continue  # sequences that a GPU holds whole are better left whole
        nodes = max(1, expert * inner // hardware.per_node)
        rest = gpus // used
        for fsdp in divisors(rest, 1 if pipe > 1 else rest):
            mesh = dataclasses.replace(
                run.mesh,
                pipe=pipe,
                tensor=tensor,
                context=context,
                expert=expert,
                expert_nodes=nodes,
                fsdp=fsdp,
                data=rest // fsdp,
                sequence=tensor > 1,
                pipe_chunks=1,
                overlap=False,
            )
            yield from _variants(run, mesh, limits)


def _variants(run: RunConfig, mesh: MeshConfig, limits: Limits) -> Iterator[RunConfig]:
    """Schedules, recomputation and micro batches of a mesh."""
    shards = mesh.data * mesh.fsdp * mesh.expert
    schedules = SCHEDULES if mesh.pipe > 1 else (mesh.schedule,)
    for schedule, remat, rows in itertools.product(
        schedules, REMAT, divisors(limits.max_sequences, limits.max_sequences)
    ):
        micro = shards * rows
        if run.train.batch_size % micro:
            continue
        train = dataclasses.replace(
            run.train, micro_batch_size=micro, remat=remat, batch_ramp_from=0, batch_ramp_tokens=0.0
        )
        chosen = dataclasses.replace(mesh, schedule=schedule)
        yield dataclasses.replace(run, mesh=chosen, train=train)


def divisors(number: int, most: int) -> list[int]:
    """Divisors of a number up to `most`."""
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def ranked(
    run: RunConfig,
    hardware: Hardware,
    gpus: int,
    limits: Limits = DEFAULT,
    name: str = "run",
    show: bool = True,
) -> Found:
    """All legal layouts of `gpus` GPUs, ranked.

    Raises:
        ValueError: none is legal.
    """
    tokens = float(BatchPlan(run.train).tokens_before(run.train.steps))
    tried = list(candidates(run, hardware, gpus, limits))
    fitting: list[tuple[Report, Case]] = []
    others: list[Case] = []
    reason = "no mesh divides them"
    bar: Callable[..., Any] = track if show and sys.stderr.isatty() else _plainly
    for candidate in bar(tried, description=f"{len(tried)} layouts"):
        try:
            case = make_case(candidate, hardware, gpus, total_tokens=tokens)
            if memory_of(case).fits:
                fitting.append((report_of(case, name), case))
            else:
                others.append(case)
        except ValueError as error:
            reason = str(error)
    legal = len(fitting) + len(others)
    if not legal:
        raise ValueError(f"no layout of {gpus} GPUs is legal under the limits: {reason}")
    fitting.sort(key=lambda pair: -pair[0].tokens_per_s_per_gpu)
    if not fitting:
        others.sort(key=lambda case: memory_of(case).total)
        fitting = [(report_of(case, name), case) for case in others[:MOST_BEST]]
    front = pareto([report for report, _ in fitting])
    best, cases = zip(*fitting[:MOST_BEST], strict=True)
    return Found(name, gpus, len(tried), legal, best, tuple(front), cases)


def _plainly(items: list[RunConfig], description: str) -> Iterator[RunConfig]:
    """Items with a line on stderr now and then."""
    for number, item in enumerate(items):
        if number % 200 == 0:
            print(f"{description}: {number} planned", file=sys.stderr, flush=True)
        yield item


def pareto(reports: list[Report]) -> list[Report]:
    """Reports that no other beats in memory and speed, the smallest first."""
    front: list[Report] = []
    order = sorted(reports, key=lambda r: (r.memory.total, -r.tokens_per_s_per_gpu))
    for report in order:
        if not front or report.tokens_per_s_per_gpu > front[-1].tokens_per_s_per_gpu:
            front.append(report)
    return front


def fewest(
    run: RunConfig, hardware: Hardware, limits: Limits = DEFAULT, name: str = "run"
) -> Found:
    """The fewest GPUs, in powers of two, on which a run trains; its batch may be made a multiple of
    the layout's.

    Raises:
        ValueError: not even MOST_GPUS suffice.
    """
    gpus, last = 1, ""
    state = whole_state(run.model, run.train)
    while state / gpus > hardware.limit(0)[0]:  # fewer cannot hold it, however it is cut
        gpus *= 2
    while gpus <= MOST_GPUS:
        batch = -(-run.train.batch_size // gpus) * gpus
        train = dataclasses.replace(run.train, batch_size=batch)
        try:
            found = ranked(
                dataclasses.replace(run, train=train), hardware, gpus, limits, name, show=False
            )
            if found.best[0].memory.fits:
                return found
            last = f"{found.best[0].memory.total / GIB:.1f} GiB at least on {gpus}"
        except ValueError as error:
            last = str(error)
        print(f"{gpus} GPUs: does not fit ({last})", file=sys.stderr, flush=True)
        gpus *= 2
    raise ValueError(f"{name} does not train on {MOST_GPUS} GPUs: {last}")


def compiled(found: Found, count: int, cache: str) -> Found:
    """The best compiled, and ranked by closed-form speed among those that fit by their program.

    As many at a time as processors and main memory allow. One that fails is named and left out.
    """
    from planning.compiled import with_compiled

    def one(number: int, report: Report, case: Case) -> Report | None:
        def say(line: str) -> None:
            print(
                f"{number} of {len(best)}, {describe(report)}: {line}", file=sys.stderr, flush=True
            )

        try:
            return with_compiled(report, case, cache, say)
        except ValueError as error:
            return say(str(error))

    best = list(zip(found.best, found.cases, strict=True))[:count]
    with ThreadPoolExecutor(at_a_time()) as pool:
        waiting = [pool.submit(one, number, *pair) for number, pair in enumerate(best, 1)]
        try:
            reports = [report for job in waiting if (report := job.result()) is not None]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    reports.sort(key=lambda r: (not r.fits, -r.tokens_per_s_per_gpu))
    return dataclasses.replace(found, best=(*reports, *found.best[count:]))


def at_a_time() -> int:
    """Programs to compile beside each other on this host."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(os.cpu_count() or 1, int(memory / GIB) // COMPILING_GIB))


def describe(report: Report) -> str:
    """A layout in words."""
    sizes = report.layout
    words = [*axes_of(sizes), f"remat {sizes['remat']}"]
    return ", ".join([*words, f"{sizes['sequences_per_gpu']} x {sizes['seq_len']}"])


def table(found: Found, count: int) -> list[str]:
    """The best, and the front, as lines."""
    head = f"{'layout':66} {'GiB':>7} {'of':>6} {'tokens/s/GPU':>13} {'MFU':>6} {'bubble':>7}"
    fits = found.best[0].memory.fits
    lines = [
        f"{found.name} on {found.gpus} GPUs: {found.tried} layouts, {found.legal} legal"
        + ("" if fits else "; none fits, the smallest first"),
        head,
    ]
    for report in found.best[:count]:
        lines.append(_row(report))
    lines += ["", "front of memory and speed", head]
    return [*lines, *(_row(report) for report in found.front[:24])]


def _row(report: Report) -> str:
    memory = report.memory
    total = report.compiled["memory_gib"]["total"] if report.compiled else memory.total / GIB
    mark = "*" if report.compiled else " "
    return (
        f"{describe(report):66} {total:6.1f}{mark} {memory.limit / GIB:6.1f} "
        f"{report.tokens_per_s_per_gpu:13,.1f} {report.mfu[0]:6.1%} {report.bubble_fraction:7.1%}"
        + ("" if report.fits else "  does not fit")
    )
