"""A plan's report: memory, traffic, time and advice of one layout, for people and as JSON."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from model.costs import train_flops_per_token
from planning.case import Case
from planning.memory import Memory, memory_of
from planning.time import Passing, Tick, passes_of, update_seconds
from planning.traffic import Collective, traffic_of
from sharding.config import AXES

GIB = 2**30
ERROR = ("kind", "low", "high", "programs")
CLOSED = "closed form"
COMPILED = "compiled program"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a layout costs. `to_json` has the same by stable keys (docs/planning.md)."""

    name: str
    """Preset and layout."""
    gpu: str
    gpus: int
    layout: Mapping[str, Any]
    """Options of the mesh that differ from the defaults, and those of the batch."""
    derived: tuple[str, ...]
    memory: Memory
    collectives: tuple[Collective, ...]
    parts_seconds: Mapping[str, float]
    """Of the busiest rank; they add up to the step."""
    bubble_fraction: float
    timeline: tuple[Tick, ...]
    tokens_per_step: int
    mfu: tuple[float, float]
    """Model FLOPs over the BF16 peak: causal attention counted as half, and whole."""
    tokens: float
    """Of the whole training."""
    dollars_per_hour: float
    advice: tuple[str, ...] = ()
    compiled: Mapping[str, Any] | None = None
    """The same from the compiled program, where it was asked for."""

    @property
    def step_seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.parts_seconds.values())

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Tokens a second and GPU."""
        return self.tokens_per_step / self.step_seconds / self.gpus

    @property
    def gpu_hours(self) -> float:
        """GPU hours of the whole training at this speed."""
        return self.tokens / self.tokens_per_s_per_gpu / 3600

    @property
    def cost(self) -> float:
        """Dollars of it."""
        return self.gpu_hours * self.dollars_per_hour

    @property
    def fits(self) -> bool:
        """Whether a GPU's memory suffices, by the engine that `engine` names."""
        if self.compiled is not None:
            return self.compiled["memory_gib"]["total"] * GIB <= self.memory.limit
        return self.memory.fits

    @property
    def engine(self) -> str:
        """What the memory and the collectives are of."""
        return CLOSED if self.compiled is None else COMPILED

    def to_json(self) -> dict[str, Any]:
        """Figures by stable names; of a compiled report those of the closed form stand beside."""
        memory = self.memory
        closed = {name: size / GIB for name, size in memory.parts().items()}
        closed |= {"total": memory.total / GIB, "limit": memory.limit / GIB}
        sent = [collective_json(one) for one in self.collectives]
        found: dict[str, Any] = {
            "engine": self.engine,
            "name": self.name,
            "gpu": self.gpu,
            "gpus": self.gpus,
            "layout": dict(self.layout),
            "derived": list(self.derived),
            "fits": self.fits,
            "memory_gib": closed,
            "memory_limit": list(memory.explained),
            "memory_error": {key: getattr(memory.error, key) for key in ERROR},
            "collectives": sent,
            "step_seconds": self.step_seconds,
            "parts_seconds": dict(self.parts_seconds),
            "bubble_fraction": self.bubble_fraction,
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_s_per_gpu": self.tokens_per_s_per_gpu,
            "mfu_causal": self.mfu[0],
            "mfu_noncausal": self.mfu[1],
            "tokens": self.tokens,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
            "dollars_per_gpu_hour": self.dollars_per_hour,
            "timeline": [tick._asdict() for tick in self.timeline],
            "advice": list(self.advice),
        }
        if self.compiled is not None:
            both = {"memory_gib": closed, "collectives": sent}
            found |= {"closed_form": both} | dict(self.compiled)
        return found

    def write(self, path: str) -> None:
        """Write the JSON to a file."""
        pathlib.Path(path).write_text(json.dumps(self.to_json(), indent=1))


def collective_json(one: Collective) -> dict[str, Any]:
    """A collective by stable names."""
    return {
        "op": one.op,
        "axis": one.axis,
        "times": one.times,
        "gib": one.bytes / GIB,
        "link": one.link,
        "seconds": one.seconds,
        "exposed_seconds": one.exposed_seconds,
        "what": one.what,
    }


def report_of(case: Case, name: str) -> Report:
    """The report of a case by closed form."""
    passing = passes_of(case)
    sent = traffic_of(case, passing)
    parts = parts_of(passing, sent, update_seconds(case))
    step = sum(parts.values())
    tokens = case.train.batch_size * case.train.seq_len
    per_gpu = tokens / step / case.gpus
    peak = case.hardware.gpu.bf16
    mfu = tuple(
        train_flops_per_token(case.model, case.train.seq_len, causal) * per_gpu / peak
        for causal in (True, False)
    )
    return Report(
        name=name,
        gpu=case.hardware.gpu_name,
        gpus=case.gpus,
        layout=options_of(case),
        derived=case.derived,
        memory=memory_of(case),
        collectives=sent,
        parts_seconds=parts,
        bubble_fraction=passing.bubble,
        timeline=passing.timeline,
        tokens_per_step=tokens,
        mfu=(mfu[0], mfu[1]),
        tokens=case.total_tokens,
        dollars_per_hour=case.hardware.dollars_per_hour,
    )


def parts_of(passing: Passing, sent: tuple[Collective, ...], update: float) -> dict[str, float]:
    """Seconds of a step by part. The exchange and sums over `tensor` are in the passes already;
    other collectives add what of them is exposed."""
    parts = dict(passing.parts)
    apart = [one for one in sent if one.axis not in ("expert", "expert_nodes", "tensor", "context")]
    named = {"pipe": "pipe", "fsdp": "weights"}  # else gradients
    for one in apart:
        key = named.get(one.axis, "gradients")
        if one.op in ("all-to-all", "all-gather"):
            key = "weights"
        parts[key] = parts.get(key, 0.0) + one.exposed_seconds
    return parts | {"optimizer": update}


def options_of(case: Case) -> dict[str, Any]:
    """What the layout is: axes and options that are not the defaults, and the batch."""
    mesh = case.mesh
    fields = dataclasses.fields(mesh)
    found = {
        field.name: getattr(mesh, field.name)
        for field in fields
        if getattr(mesh, field.name) != field.default
    }
    return found | {
        "micro_batches": case.micro_batches,
        "sequences_per_gpu": case.rows,
        "seq_len": case.train.seq_len,
        "batch_size": case.train.batch_size,
        "dtype": case.train.dtype,
        "fp8": case.train.fp8,
        "remat": case.train.remat,
        "attention": case.recipe.kernels.attention,
    }


# ---- for people ---------------------------------------------------------------------------------


def plain(value: float, digits: int = 2) -> str:
    """A number with so many decimals, or three digits where these say nothing."""
    return f"{value:.{digits}f}" if not value or abs(value) >= 10**-digits * 10 else f"{value:.3g}"


def scaled(value: float) -> str:
    """A number in thousands, millions, billions or trillions."""
    units = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " K"))
    size, unit = next(((size, unit) for size, unit in units if value >= size), (1.0, ""))
    return f"{value / size:.4g}{unit}"


def axes_of(sizes: Mapping[str, Any]) -> list[str]:
    """Axes of a layout in words, and the schedule of its pipeline."""
    found = [f"{axis} {sizes[axis]}" for axis in AXES if sizes.get(axis, 1) > 1] or ["one GPU"]
    return [*found, str(sizes.get("schedule", "1f1b"))] if sizes.get("pipe", 1) > 1 else found


def text_of(report: Report) -> list[str]:
    """The report, line by line."""
    sizes = report.layout
    lines = [
        f"{report.name}: {report.gpus} x {report.gpu.upper()}, {', '.join(axes_of(sizes))}",
        f"  {sizes['micro_batches']} micro batches of {sizes['sequences_per_gpu']} x "
        f"{sizes['seq_len']} tokens a GPU, {sizes['dtype']}{', FP8 products' * sizes['fp8']}, "
        f"remat {sizes['remat']}, attention by {sizes['attention']}",
        *(f"  derived: {line}" for line in report.derived),
        "",
        *memory_lines(report),
        "",
        *traffic_lines(report),
        "",
        *time_lines(report),
    ]
    if report.advice:
        lines += ["", "advice", *(f"  {line}" for line in report.advice)]
    return lines


def memory_lines(report: Report) -> list[str]:
    """Memory, part by part, against the limit; closed form and compiled program side by side."""
    memory, compiled = report.memory, report.compiled
    verdict = "fits" if report.fits else "DOES NOT FIT"
    head = "memory, GiB of the most loaded GPU" + " " * 6 + CLOSED
    lines = [head + (f"   {COMPILED}" if compiled else "")]
    rows = [*memory.parts().items(), ("total", memory.total)]
    for name, size in rows:
        other = f"{plain(compiled['memory_gib'][name]):>14}" if compiled else ""
        lines.append(f"  {name:36} {plain(size / GIB):>12}{other}")
    total = compiled["memory_gib"]["total"] * GIB if compiled else memory.total
    left = (memory.limit - total) / GIB
    lines.append(
        f"  {verdict}: {memory.limit / GIB:.2f} GiB can be had, "
        f"{abs(left):.2f} GiB {'are left' if left >= 0 else 'are missing'}"
    )
    lines += [f"    {line}" for line in memory.explained]
    error = memory.error
    if error.programs:
        lines.append(
            f"  closed form against {error.programs} compiled programs of this class "
            f"({error.kind}): {error.low:+.1%} to {error.high:+.1%}"
        )
    else:
        lines.append(f"  no compiled program of this class ({error.kind}): workspace is a guess")
    return lines


def traffic_lines(report: Report) -> list[str]:
    """The collectives of a step."""
    lines = [
        f"traffic of a step, per GPU ({CLOSED})",
        f"  {'operation':20} {'axis':26} {'times':>8} {'GiB':>9}  {'link':8} {'s':>8} "
        f"{'exposed':>8}  what",
    ]
    lines += [_sent(collective_json(one)) for one in report.collectives]
    if report.compiled:
        lines += ["  of the compiled program:", *map(_sent, report.compiled["collectives"])]
    return lines


def _sent(one: Mapping[str, Any]) -> str:
    figures = (plain(one[name], 3) for name in ("seconds", "exposed_seconds"))
    return (
        f"  {one['op']:20} {one['axis']:26} {one['times']:8} {plain(one['gib'], 3):>9}  "
        f"{one['link']:8} {' '.join(f'{figure:>8}' for figure in figures)}  {one['what']}"
    )


def time_lines(report: Report) -> list[str]:
    """Time, part by part, and what follows."""
    step = report.step_seconds
    parts = sorted(report.parts_seconds.items(), key=lambda part: -part[1])
    shown = [
        f"  {name:12} {plain(seconds, 3):>9} s {seconds / step:6.1%}"
        for name, seconds in parts
        if seconds > 5e-4 * step
    ]
    return [
        f"time of a step, seconds of the busiest rank ({CLOSED})",
        *shown,
        f"  {'step':12} {plain(step, 3):>9} s; all ranks: {report.bubble_fraction:.1%} bubble",
        f"  {report.tokens_per_s_per_gpu:,.1f} tokens/s/GPU; MFU {report.mfu[0]:.2%} causal, "
        f"{report.mfu[1]:.2%} non-causal, of the BF16 peak",
        f"  {scaled(report.tokens)} tokens: {scaled(report.gpu_hours)} GPU hours, "
        f"{scaled(report.cost)} $ at {report.dollars_per_hour:g} $ an hour",
    ]
