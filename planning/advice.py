"""What limits a plan, and the nearest changes that help: each is planned, none is guessed."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from planning.case import Case, make_case
from planning.memory import memory_of
from planning.report import GIB, Report, report_of


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
    for what, changed in changes(case):
        memory = memory_of(changed)
        gain = (report.memory.total - memory.total) / GIB
        if gain > 0.05:
            saved.append(
                (
                    not memory.fits,
                    -gain,
                    f"{what} saves {gain:.1f} GiB" + (", and then it fits" if memory.fits else ""),
                )
            )
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
    for what, changed in changes(case):
        other = report_of(changed, report.name)
        gain = other.tokens_per_s_per_gpu / report.tokens_per_s_per_gpu - 1
        if gain > 0.01 and other.memory.fits:
            gains.append((-gain, f"{what}: {gain:+.1%} tokens/s"))
    gains.sort()
    return (*lines, *(line for _, line in gains[:most]))


def changes(case: Case) -> Iterator[tuple[str, Case]]:
    """Cases one step away, with what was changed; only those that can work."""
    mesh, train = case.mesh, case.train
    shards = mesh.data * mesh.fsdp * mesh.expert
    proposals: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    if train.remat != "full":
        proposals.append(("remat full", {}, {"remat": "full"}))
    if train.remat != "selective":
        proposals.append(("remat selective", {}, {"remat": "selective"}))
    if train.dtype == "float32":
        proposals.append(("dtype bfloat16", {}, {"dtype": "bfloat16"}))
    if not train.fp8 and train.dtype == "bfloat16":
        proposals.append(("FP8 products", {}, {"fp8": True}))
    if case.rows > 1:
        proposals.append(
            ("half the micro batch", {}, {"micro_batch_size": shards * case.rows // 2})
        )
    proposals.append(("twice the micro batch", {}, {"micro_batch_size": shards * case.rows * 2}))
    if mesh.expert > 1 and mesh.exchange == "dense":
        proposals.append(("exchange ragged", {"exchange": "ragged"}, {}))
    if mesh.expert > 1 and not mesh.exchange_dtype and train.dtype == "bfloat16":
        proposals.append(("tokens travel in FP8", {"exchange_dtype": "float8_e4m3fn"}, {}))
    if mesh.expert > 1 and not mesh.exchange_capacity:
        proposals.append(("exchange_capacity 1.5", {"exchange_capacity": 1.5}, {}))
    if mesh.exchange_capacity > 1.25:
        proposals.append(("exchange_capacity 1.25", {"exchange_capacity": 1.25}, {}))
    if mesh.pipe > 1:
        for name in ("1f1b", "zb1p", "dualpipe", "dualpipev"):
            if name != mesh.schedule:
                proposals.append((f"schedule {name}", {"schedule": name, "pipe_chunks": 1}, {}))
    elif mesh.expert > 1 and not mesh.overlap:
        proposals.append(("overlap (micro batches in pairs)", {"overlap": True}, {}))
    if mesh.tensor > 1 and not mesh.sequence:
        proposals.append(("sequence parallelism", {"sequence": True}, {}))
    for grown, shrunk in (
        ("fsdp", "data"),
        ("expert", "data"),
        ("expert", "fsdp"),
        ("pipe", "data"),
        ("data", "pipe"),
        ("fsdp", "tensor"),
    ):
        size = getattr(mesh, shrunk)
        if size % 2 == 0:
            sizes = {grown: 2 * getattr(mesh, grown), shrunk: size // 2}
            if "expert" in sizes:
                inner = mesh.context * mesh.tensor
                nodes = max(1, sizes["expert"] * inner // case.hardware.per_node)
                sizes["expert_nodes"] = nodes if mesh.expert_nodes > 1 or nodes > 1 else 1
            what = ", ".join(f"{name} {size}" for name, size in sizes.items())
            proposals.append((what, sizes, {}))
    for what, of_mesh, of_train in proposals:
        changed = _changed(case, of_mesh, of_train)
        if changed is not None:
            yield what, changed


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
