"""Train steps compiled for GPUs that are not there: time, memory, collectives, overlap.

    make gpu-compiler
    PYTHONPATH=.gpu-compiler python -m bench.gpu_programs --mesh expert=8,exchange=ragged
    PYTHONPATH=.gpu-compiler python -m bench.gpu_programs --config v3_671b --nodes 256 \\
        --mesh pipe=16,data=2,expert=64,expert_nodes=8,schedule=dualpipe --micro-batches 32
    PYTHONPATH=.gpu-compiler python -m bench.gpu_programs --config v3_671b --per-node 1 \\
        --mesh data=1 --kernels mosaic --dense-layers 1 --moe-layers 4 --experts 16
    PYTHONPATH=.gpu-compiler python -m bench.gpu_programs --table layouts [--write]

The first ones compile one layout, with one sequence per device and micro batch, and print what the
compiled program says of itself. The last compiles every layout of the results, each in a process
of its own. Nothing is run or allocated, and no machine code is made unless --no-memory-only asks.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from typing import Any, NamedTuple, get_args

import jax

from bench.command import Command
from bench.report import ROOT
from configs import preset
from model.config import ModelConfig
from model.kernels import choose
from programs.absent_gpus import GPUS, absent_gpus, inspection_options
from programs.plan import plan_of
from programs.scheduled import until_scheduled
from programs.step import Report, lower, read, rows_of, scheduled
from runtime.outputs import check_outputs
from sharding.config import MeshConfig
from sharding.mesh import axis_sizes, make_layout, named_layout, resolve
from sharding.partition import batch_shards
from training.recipe import recipe_of
from training.step import Trainer

GIB = 2**30
FSDP = "--config v3_671b --nodes 256 --mesh fsdp=32,expert=64,expert_nodes=8"
V3 = "--config v3_671b --kernels mosaic --gpu h800"
PAPER = f"{V3} --layout deepseek --micro-batches"
FIT = {
    "V3, pipe 16, data 2, expert 64, dualpipe, 32 micro batches": f"{PAPER} 32",
    "the same, 120 micro batches": f"{PAPER} 120",
    "the same in FP8, 32": f"{PAPER} 32 --fp8",
    "the same in FP8, 120": f"{PAPER} 120 --fp8",
    "V3, pipe 16, data 2, expert 64, dualpipev, 32": f"{V3} --micro-batches 32 "
    "--mesh pipe=16,data=2,expert=64,expert_nodes=8,schedule=dualpipev",
    "V3, pipe 16, data 2, expert 64, interleaved by 3, 32": f"{V3} --micro-batches 32 "
    "--mesh pipe=16,data=2,expert=64,expert_nodes=8,schedule=interleaved,pipe_chunks=3",
    "V3 in FP8, pipe 8, expert 64, dualpipe, 32": f"{V3} --micro-batches 32 --fp8 "
    "--mesh pipe=8,expert=64,expert_nodes=8,schedule=dualpipe",
    "V3 in FP8, pipe 8, expert 32, dualpipev, 60": f"{V3} --micro-batches 60 --fp8 "
    "--mesh pipe=8,expert=32,expert_nodes=4,schedule=dualpipev",
    "V3 in FP8, no pipeline: fsdp 16, expert 32, 4": f"{V3} --micro-batches 4 --fp8 "
    "--mesh fsdp=16,expert=32,expert_nodes=4 --remat full",
    "V3 in FP8, no pipeline: fsdp 8, expert 32, 4": f"{V3} --micro-batches 4 --fp8 "
    "--mesh fsdp=8,expert=32,expert_nodes=4 --remat full",
    "V2-Lite, expert 8, 2 sequences a GPU, 2": "--config v2_lite --kernels mosaic --gpu h100 "
    "--mesh expert=8 --sequences 2",
}
STACK = (
    "--config v3_671b --per-node 1 --mesh data=1 --kernels mosaic --micro-batches 1 "
    "--dense-layers 1 --experts 16 --moe-layers"
)
THROUGH_KERNELS = {
    "small, one GPU": "--no-memory-only --config small --per-node 1 --mesh data=1 --kernels mosaic",
    "small, cube": "--no-memory-only --config small --mesh cube --kernels mosaic",
    "V3's widths, 1 + 7 layers, 16 experts, one GPU": f"--no-memory-only {STACK} 7",
}
LAYOUTS = {
    "tiny, cube": "--mesh cube",
    "tiny, expert 8": "--mesh expert=8",
    "tiny, expert 8, ragged": "--mesh expert=8,exchange=ragged",
    "tiny, expert 8 on 2 nodes": "--mesh expert=8,expert_nodes=2 --nodes 2 --per-node 4",
    "tiny, context 2, tensor 2, expert 2": "--mesh context=2,tensor=2,expert=2",
    "tiny, pipe 2 (dualpipe), expert 4": "--mesh pipe=2,expert=4,schedule=dualpipe "
    "--micro-batches 4",
    "the same, 4 times the micro batches": "--mesh pipe=2,expert=4,schedule=dualpipe "
    "--micro-batches 16",
    "tiny, expert 8, 58 MoE layers": "--mesh expert=8 --moe-layers 58",
    "tiny, fsdp 8": "--mesh fsdp=8",
    "tiny, tensor 4, expert 2, sequence": "--mesh tensor=4,expert=2,sequence=true",
    "v2_lite, expert 8, overlap": "--config v2_lite --mesh expert=8,overlap=true --micro-batches 4",
    "V3, fsdp 32, expert 64, 4 MoE layers": f"{FSDP} --moe-layers 4",
    "V3, fsdp 32, expert 64": FSDP,
}
TABLES = {
    "layouts": ("Train steps compiled for absent H200s", LAYOUTS),
    "kernels": ("Train steps through the kernels, compiled for absent H200s", THROUGH_KERNELS),
    "fit": ("What fits GPUs of 80 GB, compiled for absent ones", FIT),
}
"""Sections of the results: title, and of each row its name and options."""


class Seconds(NamedTuple):
    """Times of making a program."""

    lower: float
    compile: float
    processor: float
    """Of this process and the assemblers that it started, both together."""


def mesh_of(text: str) -> MeshConfig:
    """A named layout, or fields such as `expert=8,exchange=ragged`; ValueError for what is none."""
    if "=" not in text:
        return named_layout(text)
    fields = {field.name: field for field in dataclasses.fields(MeshConfig)}
    values: dict[str, Any] = {}
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        if name not in fields:
            raise ValueError(f"--mesh: no field {name!r}; there are {', '.join(fields)}")
        kind, choices = type(fields[name].default), get_args(fields[name].type)
        choices = ("true", "false") if kind is bool else choices
        if choices and value not in choices:
            raise ValueError(f"--mesh {name}={value}: there are {', '.join(filter(None, choices))}")
        try:
            values[name] = value == "true" if kind is bool else kind(value)
        except ValueError:
            raise ValueError(f"--mesh {name}={value}: give a number") from None
    return MeshConfig(**values)


def trainer_of(options: argparse.Namespace) -> Trainer:
    """The trainer of a preset on absent GPUs."""
    for name in ("nodes", "per_node", "micro_batches", "sequences"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is {getattr(options, name)}; it must be 1 or more")
    run = preset(options.config)
    model, train = resized(run.model, options), run.train
    mesh = mesh_of(options.mesh)
    if options.nodes is None:
        options.nodes = max(1, math.prod(axis_sizes(mesh).values()) // options.per_node)
    mesh = resolve(mesh, options.nodes * options.per_node)
    devices = absent_gpus(options.nodes, options.per_node, options.gpu)
    assert math.prod(axis_sizes(mesh).values()) == len(devices)
    layout = make_layout(mesh, devices)
    rows = batch_shards(layout) * options.sequences
    train = dataclasses.replace(
        train,
        fp8=options.fp8,
        remat=options.remat or train.remat,
        batch_size=rows * options.micro_batches,
        micro_batch_size=rows,
        batch_ramp_from=0,
        batch_ramp_tokens=0,
    )
    choice = choose(options.kernels, model, train.dtype, layout, train.fp8)
    for line in choice.describe():
        print(f"kernels: {line}", file=sys.stderr)
    return Trainer(model, train, recipe_of(train, choice.kernels), layout)


def resized(model: ModelConfig, options: argparse.Namespace) -> ModelConfig:
    """The preset with other numbers of layers and experts, widths as they are."""
    dense = options.dense_layers or model.num_dense_layers
    moe = options.moe_layers or model.num_moe_layers
    experts = options.experts or model.num_experts
    groups = math.gcd(model.num_expert_groups, experts)
    kept = min(model.groups_per_token, groups)
    return dataclasses.replace(
        model, num_layers=dense + moe, num_dense_layers=dense, num_experts=experts,
        num_expert_groups=groups, groups_per_token=kept,
    )  # fmt: skip


def inspect(options: argparse.Namespace) -> tuple[Report, Seconds]:
    """Compile one step and read it."""
    trainer = trainer_of(options)
    layout = trainer.layout
    start, processor = time.perf_counter(), processor_seconds()
    planned, left_out = plan_of(trainer) if options.plan else (trainer, 0)
    with working(f"lowering the step for {layout.mesh.size} GPUs"):
        lowered = lower(planned)
    lower_s = time.perf_counter() - start
    flags = inspection_options(layout.config)
    with working("compiling it until buffers are assigned, for V3 some minutes"):
        if options.memory_only:
            program = until_scheduled(lowered, flags)
        else:
            program = scheduled(lowered.compile(compiler_options=flags))
    program = program._replace(temporaries=program.temporaries + left_out)
    compile_s = time.perf_counter() - start - lower_s
    seconds = Seconds(lower_s, compile_s, processor_seconds() - processor)
    if options.text:
        pathlib.Path(options.text).write_text(program.text)
    return read(program, layout.mesh, rows_of(trainer)), seconds


@contextlib.contextmanager
def working(on: str) -> Generator[None]:
    """Say on stderr what is done now, and every half minute that it still is."""
    begin, done = time.perf_counter(), threading.Event()

    def speak() -> None:
        print(f"{on} …", file=sys.stderr, flush=True)
        while not done.wait(30):
            print(f"  {time.perf_counter() - begin:.0f} s …", file=sys.stderr, flush=True)

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def processor_seconds() -> float:
    """Processor time of this process and of those it started and that have ended."""
    return sum(os.times()[:4])


def show(report: Report, seconds: Seconds) -> None:
    """Print a report for a person."""
    print(
        f"{report.devices} GPUs; lowered in {seconds.lower:.0f} s, compiled in "
        f"{seconds.compile:.0f} s ({seconds.processor:.0f} s of processor time)\n"
        f"per device: {report.arguments / GIB:.2f} GiB of state and batch, "
        f"{report.temporaries / GIB:.2f} GiB of temporaries\n"
    )
    print("collectives of a step, per device:")
    for op, axes, times, size in report.collectives:
        print(f"{op:20} {axes:24} {times:8} x  {size / GIB:10.3f} GiB in all")
    for mark, meaning in MARKS.items():
        if any(mark in axes for _, axes, _, _ in report.collectives):
            print(f"  {mark}  {meaning}")
    print("\ncalls in the text, loops counted once:")
    for name, count in report.calls.items():
        print(f"{count:6}  {name}")
    print("\n".join(["", *overlap(report)]))


MARKS = {
    "?": "in a loop whose length the program does not tell, such as over tiles of experts: counted "
    "once",
    "~": "groups are parts of the axes, or no ring",
}
"""Marks at axes (programs/collectives.py:by_op_and_axes)."""


def overlap(report: Report) -> list[str]:
    """What runs beside the asynchronous collectives, a line per op, place and pass."""
    groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for op, source, products, others in report.spans:
        groups.setdefault((op, place(source)), []).append((products, others))
    spanning = sum(1 for span in report.spans if span[2])
    lines = [
        f"{spanning} of {len(report.spans)} asynchronous collectives have matrix products "
        "beside them:"
    ]
    for (op, where), spans in sorted(groups.items()):
        beside = [products for products, _ in spans if products]
        others = sum(1 for _, others in spans if others)
        lines.append(
            f"{op:20} {where:28} {len(beside)} of {len(spans)}, "
            f"{max(beside, default=0)} products at most; beside another micro batch's: {others}"
        )
    return lines


def place(source: str) -> str:
    """Pass and function of an op, from JAX's path to it: `backward: shard_map/all_to_all`."""
    backward = "transpose(" in source
    steps = [step for step in source.split("/") if not re.search(r"[()]", step)]
    skipped = {"while", "body", "cond", "eval_jaxpr", "closed_call", "checkpoint"}
    named = [step for step in steps if step not in skipped][-2:]
    return f"{'backward' if backward else 'forward'}: {'/'.join(named) or source or 'unnamed'}"


def in_figures(report: Report, seconds: Seconds) -> dict[str, Any]:
    """What --json writes: figures by name, and the report as it is."""
    names = "op", "axes", "times", "bytes"
    return {
        "devices": report.devices,
        "state_gib": report.arguments / GIB,
        "temporaries_gib": report.temporaries / GIB,
        "parts_gib": {name: size / GIB for name, size in report.parts.items()},
        "collectives": [dict(zip(names, one, strict=True)) for one in report.collectives],
        "processor_seconds": seconds.processor,
        "report": report._asdict(),
        "seconds": seconds._asdict(),
    }


def row(name: str, report: Report, seconds: Seconds) -> str:
    """A line of the table."""
    sent = ", ".join(f"{op} {axes} {times}" for op, axes, times, _ in report.collectives)
    called = ", ".join(f"{name} {count}" for name, count in report.calls.items())
    across = sum(1 for op, _, _, others in report.spans if others and "all-to-all" in op)
    return (
        f"| {name} | {report.devices} | {seconds.lower:.0f} | {seconds.compile:.0f} "
        f"| {seconds.processor:.0f} "
        f"| {report.arguments / GIB:.2f} | {report.temporaries / GIB:.2f} | {across} | {sent} "
        f"| {called} |"
    )


COLUMNS = (
    "layout | GPUs | lower, s | compile, s | processor, s | state, GiB | temporaries, GiB "
    "| exchanges beside the other's products | collectives: op, axes, executions "
    "| calls in the text"
)
PARTS = ("weights", "gradients", "optimizer", "stash", "workspace")
COLUMNS_OF_FIT = (
    "layout, micro batches | GPUs | state and batch, GiB | temporaries, GiB | together "
    f"| {' | '.join(PARTS)} | sums over expert and data, GB a step | processor, s"
)


def row_of_fit(name: str, report: Report, seconds: Seconds) -> str:
    """A line of the table of what fits."""
    sums = sum(
        size
        for op, axes, _, size in report.collectives
        if op in ("all-reduce", "reduce-scatter") and re.fullmatch(r"[^?~]*(data|expert)", axes)
    )
    both = (report.arguments, report.temporaries, report.arguments + report.temporaries)
    sizes = (*both, *(report.parts.get(part, 0) for part in PARTS))
    cells = [name, str(report.devices), *(f"{size / GIB:.2f}" for size in sizes)]
    return f"| {' | '.join([*cells, f'{sums / 1e9:.1f}', f'{seconds.processor:.0f}'])} |"


def table(cases: dict[str, str]) -> list[str]:
    """Every case, each in a process of its own."""
    columns, line = (COLUMNS_OF_FIT, row_of_fit) if cases is FIT else (COLUMNS, row)
    lines = [f"| {columns} |", "|---" * (1 + columns.count("|")) + "|"]
    for name, arguments in cases.items():
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, "-m", "bench.gpu_programs", *arguments.split()]
            subprocess.run([*command, "--json", file.name], cwd=ROOT, check=True)
            found = json.load(file)
        lines.append(line(name, Report(**found["report"]), Seconds(**found["seconds"])))
        print(lines[-1], flush=True)
    return lines


def parser() -> Command:
    """Options of the command."""
    found = Command(__doc__)
    found.add_argument("--config", default="tiny", help="preset")
    found.add_argument(
        "--mesh", "--layout", default="cube", help="layout: a name or FIELD=VALUE,..."
    )
    found.add_argument("--gpu", type=str.lower, choices=GPUS, default="h200", help="which one")
    found.add_argument("--nodes", type=int, help="hosts; by default as many as the layout fills")
    found.add_argument("--per-node", type=int, default=8, help="GPUs of a host")
    found.add_argument("--micro-batches", type=int, default=2, help="micro batches of a step")
    found.add_argument("--sequences", type=int, default=1, help="per batch shard and micro batch")
    found.add_argument("--moe-layers", type=int, default=0, help="0: the preset's")
    found.add_argument("--dense-layers", type=int, default=0, help="0: the preset's")
    found.add_argument("--experts", type=int, default=0, help="routed experts; 0: the preset's")
    found.add_argument("--kernels", default="portable", help="as of train.py")
    found.add_argument("--fp8", action="store_true", help="as of train.py")
    found.add_argument("--remat", choices=("none", "selective", "full"), help="recomputation")
    found.add_argument(
        "--memory-only",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile until buffers are assigned; to the end takes three times as long, and "
        "nothing more is read from it",
    )
    found.add_argument(
        "--plan",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="of a pipeline compile the kind of tick that needs most memory alone, and add what "
        "others carry (programs/plan.py); default: with --memory-only",
    )
    found.add_argument("--json", default="", help="write the report here instead of printing it")
    found.add_argument("--text", default="", help="write the compiled text here")
    found.add_argument(
        "--table",
        nargs="?",
        const="layouts",
        choices=TABLES,
        help="all rows of a section of results",
    )
    return found


def main(arguments: list[str] | None = None) -> None:
    """Compile one layout, or those of the table."""
    command = parser()
    options = command.options(arguments)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    if options.plan is None:
        options.plan = options.memory_only
    if options.table:
        title, cases = TABLES[options.table]
        return command.keep(title, table(cases))
    try:
        check_outputs({"--json": options.json, "--text": options.text})
        report, seconds = inspect(options)
    except ValueError as error:
        print(f"gpu_programs: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if options.json:
        found = in_figures(report, seconds)
        pathlib.Path(options.json).write_text(json.dumps(found))
    else:
        show(report, seconds)
    if options.memory_only:
        # The compiler is still at work for nobody (programs/scheduled.py).
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
