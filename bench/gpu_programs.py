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
of its own. Nothing is run or allocated.
"""

import argparse
import collections
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from bench.command import Command
from bench.report import ROOT, write_section
from configs import preset
from model.config import ModelConfig
from model.kernels import choose
from model.recipe import Recipe
from programs.absent_gpus import INSPECTION, absent_gpus
from programs.collectives import by_op_and_axes, read_collectives
from programs.overlap import read_spans
from sharding.config import MeshConfig
from sharding.devices import schedule_options
from sharding.mesh import axis_sizes, make_layout, named_layout, resolve
from sharding.partition import batch_shards
from training.step import Trainer

GIB = 2**30
V3 = "--config v3_671b --nodes 256"
FSDP = f"{V3} --mesh fsdp=32,expert=64,expert_nodes=8,exchange_capacity=2"
PAPER = (
    f"{V3} --mesh pipe=16,data=2,expert=64,expert_nodes=8,exchange_capacity=2,schedule=dualpipe "
    "--micro-batches"
)
STACK = (
    "--config v3_671b --per-node 1 --mesh data=1 --kernels mosaic --micro-batches 1 "
    "--dense-layers 1 --experts 16 --moe-layers"
)
THROUGH_KERNELS = {
    "small, one GPU": "--config small --per-node 1 --mesh data=1 --kernels mosaic",
    "small, cube": "--config small --mesh cube --kernels mosaic",
    "V3's widths, 1 + 7 layers, 16 experts, one GPU": f"{STACK} 7",
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
    "V3, pipe 16, data 2, expert 64, 32 micro batches": f"{PAPER} 32",
    "V3, the same, 128 micro batches": f"{PAPER} 128",
    "V3, fsdp 32, expert 64, 4 MoE layers": f"{FSDP} --moe-layers 4",
    "V3, fsdp 32, expert 64": FSDP,
}
TABLES = {
    "layouts": ("Train steps compiled for absent H200s", LAYOUTS),
    "kernels": ("Train steps through the kernels, compiled for absent H200s", THROUGH_KERNELS),
}
"""Sections of the results: title, and of each row its name and options."""


class Report(NamedTuple):
    """What a compiled step says of itself."""

    devices: int
    lower_s: float
    compile_s: float
    processor_s: float
    """Of this process and the assemblers that it started, both together."""
    arguments: int
    """Bytes per device: state and batch."""
    temporaries: int
    """Bytes per device besides."""
    collectives: list[tuple[str, str, int, int]]
    """Op, axes, executions, bytes."""
    spans: list[tuple[str, str, int, int]]
    """Of every asynchronous collective: op, its origin, products beside it, of other values."""
    calls: dict[str, int]
    """Calls in the program's text, loops counted once: libraries and kernels by name, and XLA's own
    fusions by kind."""


def mesh_of(text: str) -> MeshConfig:
    """A named layout, or fields such as `expert=8,exchange=ragged`."""
    if "=" not in text:
        return named_layout(text)
    types = {field.name: type(field.default) for field in dataclasses.fields(MeshConfig)}
    values: dict[str, Any] = {}
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        if name not in types:
            raise ValueError(f"mesh: no field {name!r}; there are {', '.join(types)}")
        values[name] = value.lower() == "true" if types[name] is bool else types[name](value)
    return MeshConfig(**values)


def trainer_of(options: argparse.Namespace) -> tuple[Trainer, dict[str, Any]]:
    """The trainer of a preset on absent GPUs, and the shape of its batch."""
    run = preset(options.config)
    model, train = run.model, run.train
    model = resized(model, options)
    devices = absent_gpus(options.nodes, options.per_node)
    mesh = resolve(mesh_of(options.mesh), len(devices))
    assert math.prod(axis_sizes(mesh).values()) == len(devices)
    layout = make_layout(mesh, devices)
    rows = batch_shards(layout) * options.sequences
    train = dataclasses.replace(
        train,
        batch_size=rows * options.micro_batches,
        micro_batch_size=rows,
        batch_ramp_from=0,
        batch_ramp_tokens=0,
    )
    shape = (options.micro_batches, rows, train.seq_len + 1)
    batch = {"tokens": jax.ShapeDtypeStruct(shape, np.int32)}
    choice = choose(options.kernels, model, train.dtype, layout)
    return Trainer(model, train, Recipe(train.dtype, train.remat, choice.kernels), layout), batch


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


def read_calls(text: str) -> dict[str, int]:
    """How often a compiled program's text calls each library or kernel, and XLA's fusions."""
    kernels = re.findall(r'custom_call_target="([^"]+)"', text)
    fusions = re.findall(r" fusion\(.*?kind=(\w+)", text)
    found = collections.Counter([*kernels, *(f"fusion {kind}" for kind in fusions)])
    return dict(found.most_common())


def processor_seconds() -> float:
    """Processor time of this process and of those it started and that have ended."""
    return sum(os.times()[:4])


def inspect(options: argparse.Namespace) -> Report:
    """Compile one step and read it."""
    trainer, batch = trainer_of(options)
    layout = trainer.layout
    scalar = jax.ShapeDtypeStruct((), np.float32)
    knobs = dict.fromkeys(("learning_rate", "bias_update_rate", "mtp_weight"), scalar)
    compiler_options = INSPECTION | schedule_options(layout.config)
    start, processor = time.perf_counter(), processor_seconds()
    lowered = trainer.step.lower(trainer.abstract_state, batch, knobs)
    lower_s = time.perf_counter() - start
    compiled = lowered.compile(compiler_options=compiler_options)
    compile_s = time.perf_counter() - start - lower_s
    processor_s = processor_seconds() - processor
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    assert memory is not None
    if options.text:
        with open(options.text, "w") as file:
            file.write(text)
    groups = by_op_and_axes(read_collectives(text, layout.mesh))
    return Report(
        layout.mesh.size,
        lower_s,
        compile_s,
        processor_s,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        [(op, axes, one.times, one.bytes) for (op, axes), one in groups.items()],
        [(s.op, s.source, len(s.products), len(s.of_others)) for s in read_spans(text)],
        read_calls(text),
    )


def show(report: Report) -> None:
    """Print a report for a person."""
    print(
        f"{report.devices} GPUs; lowered in {report.lower_s:.0f} s, compiled in "
        f"{report.compile_s:.0f} s ({report.processor_s:.0f} s of processor time)\n"
        f"per device: {report.arguments / GIB:.2f} GiB of state and batch, "
        f"{report.temporaries / GIB:.2f} GiB of temporaries\n"
    )
    for op, axes, times, size in report.collectives:
        print(f"{op:20} {axes:24} {times:8} x  {size / GIB:10.3f} GiB in all")
    print("\ncalls in the text, loops counted once:")
    for name, count in report.calls.items():
        print(f"{count:6}  {name}")
    spanning = [span for span in report.spans if span[2]]
    print(f"\n{len(spanning)} of {len(report.spans)} asynchronous collectives span products:")
    for op, source, products, others in spanning:
        print(f"{op:20} {products:3} products, {others:3} of other values  {source}")


def row(name: str, report: Report) -> str:
    """A line of the table."""
    sent = ", ".join(f"{op} {axes} {times}" for op, axes, times, _ in report.collectives)
    called = ", ".join(f"{name} {count}" for name, count in report.calls.items())
    across = sum(1 for op, _, _, others in report.spans if others and "all-to-all" in op)
    return (
        f"| {name} | {report.devices} | {report.lower_s:.0f} | {report.compile_s:.0f} "
        f"| {report.processor_s:.0f} "
        f"| {report.arguments / GIB:.2f} | {report.temporaries / GIB:.2f} | {across} | {sent} "
        f"| {called} |"
    )


def table(cases: dict[str, str]) -> list[str]:
    """Every case, each in a process of its own."""
    columns = ("layout", "GPUs", "lower, s", "compile, s", "processor, s")
    columns += ("state, GiB", "temporaries, GiB")
    columns += ("exchanges beside the other's products", "collectives: op, axes, executions")
    columns += ("calls in the text",)
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, arguments in cases.items():
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, "-m", "bench.gpu_programs", *arguments.split()]
            subprocess.run([*command, "--json", file.name], cwd=ROOT, check=True)
            lines.append(row(name, Report(**json.load(file))))
        print(lines[-1], flush=True)
    return lines


def parser() -> Command:
    """Options of the command."""
    found = Command(__doc__)
    found.add_argument("--config", default="tiny", help="preset")
    found.add_argument("--mesh", default="cube", help="layout: a name or FIELD=VALUE,...")
    found.add_argument("--nodes", type=int, default=1, help="hosts")
    found.add_argument("--per-node", type=int, default=8, help="GPUs of a host")
    found.add_argument("--micro-batches", type=int, default=2, help="micro batches of a step")
    found.add_argument("--sequences", type=int, default=1, help="per batch shard and micro batch")
    found.add_argument("--moe-layers", type=int, default=0, help="0: the preset's")
    found.add_argument("--dense-layers", type=int, default=0, help="0: the preset's")
    found.add_argument("--experts", type=int, default=0, help="routed experts; 0: the preset's")
    found.add_argument("--kernels", default="portable", help="as of train.py")
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
    options = parser().options(arguments)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    if options.table:
        title, cases = TABLES[options.table]
        lines = table(cases)
        if options.write:
            write_section(title, lines)
        return
    report = inspect(options)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report._asdict(), file)
    else:
        show(report)


if __name__ == "__main__":
    main(sys.argv[1:])
