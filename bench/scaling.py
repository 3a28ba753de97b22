"""Weak scaling from compiled train steps: FLOPs, and bytes sent by collective, of one device.

    python -m bench.scaling [--write] [--cache FOLDER]
    python -m bench.scaling --layout cube [--sources]

The first compiles a small model on 1, 2, 4 and 8 emulated devices along each axis. The second shows
the collectives of one layout of 8 devices: a named one, or sizes such as `fsdp=2,tensor=4`. Nothing
is run or allocated: an emulated device's time says nothing about an accelerator's.

Work per device stays the same where an axis can keep it: `GROWTH` says how.
"""

import dataclasses
import math
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax

from bench.command import Command, numbers
from bench.gpu_programs import mesh_of
from model.config import ModelConfig
from model.recipe import Recipe
from programs.collectives import Collective, read_collectives, read_flops, table
from programs.step import lower
from runtime.devices import emulate_devices
from sharding.config import MeshConfig
from sharding.mesh import axis_sizes, make_layout, resolve
from sharding.pipeline.ticks import tick_table
from training.config import TrainConfig
from training.gradients import make_pipeline_schedule
from training.step import Trainer

DEVICES = 8
MICRO = 8
"""Micro batches of a pipeline, so that 8 stages can be filled."""
MODEL = ModelConfig(
    vocab_size=512, hidden_size=128, num_layers=2, num_dense_layers=0, num_heads=4,
    q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
    dense_ffn_size=256, expert_ffn_size=64, num_experts=16, num_shared_experts=1,
    experts_per_token=4, num_expert_groups=4, groups_per_token=2, mtp_depth=0,
)  # fmt: skip
TRAIN = TrainConfig(steps=1, seq_len=64, batch_size=2)
"""The work of one device: 2 sequences of 64 tokens through 2 MoE layers."""
GROWTH = {
    "data": "batch",
    "fsdp": "batch",
    "expert": "batch",
    "tensor": "heads, inner widths, vocabulary",
    "context": "sequence (attention grows with its square)",
    "pipe": f"layers; {MICRO} micro batches",
}
"""Sizes that grow with each axis."""
OPS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""The program is not run, so its machine code need not be good."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A layout and the model and batch on it."""

    mesh: MeshConfig
    model: ModelConfig
    train: TrainConfig


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of one device in a step."""

    dense_flops: float
    expert_flops: float
    collectives: tuple[Collective, ...]
    temporaries: int
    """Bytes that the program needs besides its arguments and results."""


def case(axis: str, count: int) -> Case:
    """The model on `count` devices of one axis, grown as `GROWTH` says."""
    sizes: dict[str, Any] = {axis: count}
    mesh, model, train = MeshConfig(**sizes), MODEL, TRAIN
    if axis in ("data", "fsdp", "expert"):
        train = dataclasses.replace(train, batch_size=train.batch_size * count)
    elif axis == "context":
        train = dataclasses.replace(train, seq_len=train.seq_len * count)
    elif axis == "tensor":
        names = ("num_heads", "expert_ffn_size", "vocab_size")
        grown: dict[str, Any] = {name: getattr(model, name) * count for name in names}
        model = dataclasses.replace(model, **grown)
    else:
        model = dataclasses.replace(model, num_layers=model.num_layers * count)
        batch = train.batch_size * MICRO
        train = dataclasses.replace(train, batch_size=batch, micro_batch_size=train.batch_size)
    return Case(mesh, model, train)


def compile_step(case: Case) -> tuple[Trainer, Any]:
    """The trainer of a case and its compiled step."""
    devices = jax.devices()[: math.prod(axis_sizes(case.mesh).values())]
    trainer = Trainer(case.model, case.train, Recipe(), make_layout(case.mesh, devices))
    return trainer, lower(trainer).compile(compiler_options=COMPILE)


def measure(case: Case) -> Work:
    """Compile a case and read its work."""
    trainer, compiled = compile_step(case)
    text = compiled.as_text() or ""
    memory = compiled.memory_analysis()
    return Work(
        read_flops(text) * share_of_ticks(trainer),
        expert_flops(case) / trainer.layout.mesh.size,
        read_collectives(text, trainer.layout.mesh),
        memory.temp_size_in_bytes,
    )


def share_of_ticks(trainer: Trainer) -> float:
    """Share of a pipeline's ticks in which a rank runs one given kind of pass.

    The text counts every branch of every tick: a forward and a backward pass. Without a pipeline 1.
    """
    layout, train = trainer.layout, trainer.train
    if layout.config.pipe == 1:
        return 1.0
    micro = train.batch_size // train.micro_batch_size
    return micro / len(tick_table(make_pipeline_schedule(layout, micro)).code)


def expert_flops(case: Case) -> float:
    """FLOPs of all routed experts: three products forward, twice as many backward, per choice."""
    c = case.model
    choices = case.train.batch_size * case.train.seq_len * c.experts_per_token * c.num_moe_layers
    return choices * 9 * 2.0 * c.hidden_size * c.expert_ffn_size


def row(axis: str, count: int, work: Work) -> str:
    """A line of the table."""
    cells = [f"{axis} {count}", f"{work.dense_flops / 1e6:.1f}", f"{work.expert_flops / 1e6:.1f}"]
    for op in OPS:
        size = sum(one.bytes for one in work.collectives if one.op == op)
        cells.append(f"{size / 1e3:,.1f}" if size else "-")
    cells.append(f"{work.temporaries / 2**20:.2f}")
    return "| " + " | ".join(cells) + " |"


def scaling(axes: Sequence[str], counts: Sequence[int]) -> list[str]:
    """The section's lines; compiles a program per axis and number of devices."""
    lines = [
        "One device's part of a train step (AdamW, fp32, nothing recomputed), from the compiled "
        f"program. One device: {TRAIN.batch_size} sequences of {TRAIN.seq_len} tokens, "
        f"{MODEL.num_layers} MoE layers of width {MODEL.hidden_size}. With the axis grow:",
        "",
        *(f"- `{axis}`: {what}" for axis, what in GROWTH.items()),
        "",
        "Dense: products in the program's text; in a pipeline by the passes that a rank runs, with "
        "the loss counted on every rank. Experts: their share at even load. Bytes are of whole "
        "arrays, all over the row's axis (`docs/collectives.md`); in a pipeline each tick of every "
        "kind counts.",
        "",
        "| devices | MFLOP, dense | MFLOP, experts | "
        + " | ".join(f"{op}, kB" for op in OPS)
        + " | temporaries, MiB |",
        "|---" + "|---:" * (len(OPS) + 3) + "|",
    ]
    print("\n".join(lines), flush=True)
    alone = measure(case("data", 1))
    for axis in axes:
        for count in counts:
            fresh = count > 1 or axis == "pipe"
            work = measure(case(axis, count)) if fresh else alone
            lines.append(row(axis, count, work))
            print(lines[-1], flush=True)
    return lines


def show(text: str, sources: bool) -> None:
    """Print the collectives of one layout; with `sources` each one and where it comes from."""
    mesh = resolve(mesh_of(text), DEVICES)
    train = dataclasses.replace(TRAIN, batch_size=DEVICES * MICRO, micro_batch_size=DEVICES)
    if mesh.pipe == 1:
        train = dataclasses.replace(TRAIN, batch_size=DEVICES)
    model = dataclasses.replace(MODEL, num_layers=MODEL.num_layers * mesh.pipe)
    trainer, compiled = compile_step(Case(mesh, model, train))
    found = read_collectives(compiled.as_text() or "", trainer.layout.mesh)
    print(table(found), end="")
    for one in found if sources else ():
        arrays = " ".join(map(str, one.arrays))
        print(f"{one.op} {'+'.join(one.axes)} x{one.times} {arrays}  {one.instruction.source}")


def main(arguments: list[str] | None = None) -> None:
    """Measure and print; with `--write` record in bench/results.md."""
    parser = Command(__doc__, axes="data", counts="1,2")
    parser.add_argument("--axes", default=",".join(GROWTH), help="axes that grow")
    parser.add_argument("--counts", type=numbers, default="1,2,4,8", help="devices along the axis")
    parser.add_argument("--cache", type=pathlib.Path, help="folder that keeps compiled programs")
    parser.add_argument("--layout", help="show the collectives of this layout instead")
    parser.add_argument("--sources", action="store_true", help="with --layout: where each is from")
    options = parser.options(arguments)
    emulate_devices(DEVICES)
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", str(options.cache or folder))
        if options.layout:
            return show(options.layout, options.sources)
        lines = scaling(options.axes.split(","), options.counts)
    parser.keep("Weak scaling of the compiled step", lines)


if __name__ == "__main__":
    main()
