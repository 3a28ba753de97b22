"""What limits a plan, and the nearest changes that help: each is planned, none is guessed."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from planning.case import Case, make_case
from planning.memory import memory_of
from planning.report import GIB, Report, report_of

BY_BUBBLE = ("gpipe", "1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev")
"""Schedules, those that leave ranks idle longest first."""


def advise(case: Case, report: Report, most: int = 3) -> tuple[str, ...]:
    """Lines: what limits, then changes by their effect."""
    if not report.fits:
        return _make_it_fit(case, report, most)
    return _make_it_faster(case, report, most)


def _make_it_fit(case: Case, report: Report, most: int) -> tuple[str, ...]:
    missing = (report.memory.total - report.memory.limit) / GIB
    largest = max(report.memory.parts().items(), key=lambda part: part[1])
    lines = [
        f"does not fit by {missing:.1f} GiB; most of it is {largest[0]}, {largest[1] / GIB:.1f} GiB"
    ]
    saved = []
    for what, changed in changes(case, to_fit=True):
        memory = memory_of(changed)
        gain = (report.memory.total - memory.total) / GIB
        if gain > 0.05:
            then = ", and then it fits" if memory.fits else ""
            saved.append((not memory.fits, -gain, f"{what} saves {gain:.1f} GiB{then}"))
    saved.sort()
    return (*lines, *(line for _, _, line in saved[:most])) + (
        () if saved else ("no single change saves memory here; take more GPUs: --fits-on",)
    )


def _make_it_faster(case: Case, report: Report, most: int) -> tuple[str, ...]:
    parts = sorted(report.parts_seconds.items(), key=lambda part: -part[1])
    name, seconds = parts[0]
    lines = [f"limited by {name}: {seconds / report.step_seconds:.0%} of the step"]
    sent = [one for one in report.collectives if one.axis in ("expert", "expert_nodes")]
    whole = sum(one.seconds for one in sent)
    if whole > 0.05 * report.step_seconds:
        exposed = sum(one.exposed_seconds for one in sent)
        lines.append(f"{exposed / whole:.0%} of the exchange with experts is exposed")
    gains = []
    for what, changed in changes(case, to_fit=False):
        other = report_of(changed, report.name)
        gain = other.tokens_per_s_per_gpu / report.tokens_per_s_per_gpu - 1
        if gain > 0.01 and other.memory.fits:
            gains.append((-gain, f"{what}: {gain:+.1%} tokens/s"))
    gains.sort()
    return (*lines, *(line for _, line in gains[:most]))


Proposal = tuple[str, dict[str, Any], dict[str, Any]]
"""A change in words, its fields of the mesh, and of the training."""


def changes(case: Case, to_fit: bool) -> Iterator[tuple[str, Case]]:
    """Cases one step away, with what was changed; only those that can work.

    to_fit: whether memory is wanted, else speed; what cannot bring it is left out.
    """
    for what, of_mesh, of_train in (*_settings(case, to_fit), *_sizes(case)):
        changed = _changed(case, of_mesh, of_train)
        if changed is not None:
            yield what, changed


def _settings(case: Case, to_fit: bool) -> list[Proposal]:
    """Other options on the same mesh."""
    mesh, train, rows = case.mesh, case.train, case.rows
    one = mesh.data * mesh.fsdp * mesh.expert
    exchanges, bf16 = mesh.expert > 1 and case.model.has_experts, train.dtype == "bfloat16"
    less = "none" if to_fit else "full"
    room = 1.25 if mesh.exchange_capacity > 1.25 else 0.0 if mesh.exchange_capacity else 1.5
    sent = {"exchange_dtype": "float8_e4m3fn"}
    options: list[tuple[bool, str, dict[str, Any], dict[str, Any]]] = [
        (to_fit and train.remat != "full", "remat full", {}, {"remat": "full"}),
        (train.remat == less, "remat selective", {}, {"remat": "selective"}),
        (not bf16, "dtype bfloat16", {}, {"dtype": "bfloat16"}),
        (bf16 and not train.fp8, "FP8 products", {}, {"fp8": True}),
        (to_fit and rows > 1, "half the micro batch", {}, {"micro_batch_size": one * rows // 2}),
        (not to_fit, "twice the micro batch", {}, {"micro_batch_size": one * rows * 2}),
        (exchanges and mesh.exchange == "dense", "exchange ragged", {"exchange": "ragged"}, {}),
        (exchanges and bf16 and not mesh.exchange_dtype, "tokens travel in FP8", sent, {}),
        (exchanges and bool(room), f"exchange_capacity {room}", {"exchange_capacity": room}, {}),
        (
            exchanges and mesh.pipe == 1 and not mesh.overlap,
            "overlap (micro batches in pairs)",
            {"overlap": True},
            {},
        ),
        (mesh.tensor > 1 and not mesh.sequence, "sequence parallelism", {"sequence": True}, {}),
    ]
    for name in BY_BUBBLE if mesh.pipe > 1 else ():
        slower = BY_BUBBLE.index(name) <= BY_BUBBLE.index(mesh.schedule)
        wanted = name not in ("gpipe", "interleaved", mesh.schedule) and (to_fit or not slower)
        options.append((wanted, f"schedule {name}", {"schedule": name, "pipe_chunks": 1}, {}))
    return [proposal for wanted, *proposal in options if wanted]  # pyright: ignore


def _sizes(case: Case) -> Iterator[Proposal]:
    """Meshes of as many GPUs with one axis twice as long and another half."""
    mesh = case.mesh
    pairs = ("fsdp data", "expert data", "expert fsdp", "pipe data", "data pipe", "fsdp tensor")
    for grown, shrunk in map(str.split, pairs):
        size = getattr(mesh, shrunk)
        if size % 2 or (grown == "expert" and not case.model.has_experts):
            continue
        sizes = {grown: 2 * getattr(mesh, grown), shrunk: size // 2}
        what = ", ".join(f"{name} {size}" for name, size in sizes.items())
        if grown == "expert":
            inner = mesh.context * mesh.tensor
            sizes["expert_nodes"] = max(1, sizes["expert"] * inner // case.hardware.per_node)
        yield what, sizes, {}


def _changed(case: Case, of_mesh: dict[str, Any], of_train: dict[str, Any]) -> Case | None:
    mesh = dataclasses.replace(case.mesh, **of_mesh)
    if of_mesh.keys() & {"data", "fsdp", "expert"} and "micro_batch_size" not in of_train:
        shards = mesh.data * mesh.fsdp * mesh.expert
        of_train = of_train | {"micro_batch_size": shards * case.rows}
    train = dataclasses.replace(case.train, **of_train)
    run = dataclasses.replace(case.run, mesh=mesh, train=train)
    try:
        return make_case(run, case.hardware, case.gpus, total_tokens=case.total_tokens)
    except ValueError:
        return None
