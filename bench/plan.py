"""Plans against compiled programs and published runs.

    python -m bench.plan [--write]                      predictions beside published runs
    python -m bench.plan --memory [--write]             memory beside the programs learned from
    python -m bench.plan --learn                        compile them and learn workspace again

The last needs `make gpu-compiler`, and twenty minutes of two quiet cores; it writes
`planning/learned.json`, where `planning/workspace.py` and --memory find it.
"""

import dataclasses
import datetime
import functools
import json
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from bench.command import Command
from bench.report import ROOT
from configs import preset
from configs.schema import RunConfig
from planning.api import case_of
from planning.case import Case
from planning.compiled import figures
from planning.hardware import Hardware, make_hardware
from planning.memory import carried_by
from planning.report import GIB, Report, report_of
from planning.ways import DEEPSEEK, MEGATRON, OWN, TORCHTITAN, Ways
from planning.workspace import GROUPS, LEARNED, kind_of, terms_of
from sharding.config import LAYOUTS, MeshConfig

CACHE = "cache/plans"
CARRIED = ("weights", "gradients", "optimizer", "stash")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout whose program is compiled."""

    preset: str
    mesh: dict[str, Any]
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    micro_batches: int = 4
    kernels: str = "mosaic"
    gpu: str = "h200"

    def case(self) -> Case:
        """It as a plan, with one sequence per device and micro batch."""
        run = dataclasses.replace(preset(self.preset), kernels=self.kernels)
        mesh = MeshConfig(**self.mesh)
        shards = mesh.data * mesh.fsdp * mesh.expert
        gpus = shards * mesh.pipe * mesh.context * mesh.tensor
        settings: dict[str, Any] = {
            "batch_size": shards * self.micro_batches, "batch_ramp_from": 0,
            "batch_ramp_tokens": 0.0, "dtype": "bfloat16", "remat": "selective",
        }  # fmt: skip
        settings |= self.train
        return case_of(run, make_hardware(self.gpu), gpus, mesh, shards, **settings)


def small(**mesh: Any) -> Layout:
    """A layout of 8 GPUs through the kernels."""
    return Layout("small", mesh)


COMPILED: dict[str, Layout] = {
    "expert 8": small(expert=8),
    "data 2, expert 4": small(data=2, expert=4),
    "pipe 2, data 2, expert 2, dualpipe": small(pipe=2, data=2, expert=2, schedule="dualpipe"),
    "pipe 2, expert 4, 1f1b": small(pipe=2, expert=4),
    "fsdp 8": small(fsdp=8),
    "fsdp 2, expert 4": small(fsdp=2, expert=4),
    "pipe 4, expert 2, dualpipe": dataclasses.replace(
        small(pipe=4, expert=2, schedule="dualpipe"), micro_batches=8
    ),
    "pipe 2, expert 4, zb1p": small(pipe=2, expert=4, schedule="zb1p"),
    "tensor 2, expert 4, sequence": small(tensor=2, expert=4, sequence=True),
    "pipe 2, expert 4, dualpipev": small(pipe=2, expert=4, schedule="dualpipev"),
    "expert 8, remat full": dataclasses.replace(small(expert=8), train={"remat": "full"}),
    "data 2, fsdp 2, expert 2": small(data=2, fsdp=2, expert=2),
    "pipe 4, data 2, 1f1b": small(pipe=4, data=2),
    "expert 8, FP8": dataclasses.replace(small(expert=8), train={"fp8": True}),
    "expert 8 on 2 nodes, capacity 2": small(expert=8, expert_nodes=2, exchange_capacity=2.0),
    "pipe 2, expert 4, interleaved": small(pipe=2, expert=4, schedule="interleaved", pipe_chunks=2),
    "pipe 2, fsdp 4, gpipe": small(pipe=2, fsdp=4, schedule="gpipe"),
    "context 2, fsdp 4": Layout("small", {"context": 2, "fsdp": 4}, kernels="portable"),
    "context 2, expert 4": Layout("small", {"context": 2, "expert": 4}, kernels="portable"),
    "cube, portable": Layout("small", {"fsdp": 2, "expert": 2, "tensor": 2}, kernels="portable"),
    "data 8, portable": Layout("small", {"data": 8}, kernels="portable"),
    "pipe 2, expert 4, dualpipe, portable": Layout(
        "small", {"pipe": 2, "expert": 4, "schedule": "dualpipe"}, kernels="portable"
    ),
    "expert 8, in pairs": small(expert=8, overlap=True),
    "dense, fsdp 8": Layout("qwen25_1_5b", {"fsdp": 8}, kernels="auto"),
    "dense, tensor 2, fsdp 4": Layout("qwen25_1_5b", {"tensor": 2, "fsdp": 4}, kernels="auto"),
    "dense, pipe 2, fsdp 4": Layout("qwen25_1_5b", {"pipe": 2, "fsdp": 4}, kernels="auto"),
}
"""Over all axes and schedules, those of most worth first."""


def large(fp8: bool, micro_batches: int, remat: str = "selective", **mesh: Any) -> Layout:
    """V3 on H800s."""
    mesh |= {"expert_nodes": mesh["expert"] // 8}
    return Layout("v3_671b", mesh, {"fp8": fp8, "remat": remat}, micro_batches, gpu="h800")


PAPER: dict[str, Any] = {"pipe": 16, "data": 2, "expert": 64}
LARGE: dict[str, Layout] = {
    "V3, pipe 16, data 2, expert 64, dualpipe": large(False, 32, schedule="dualpipe", **PAPER),
    "the same, FP8": large(True, 32, schedule="dualpipe", **PAPER),
    "V3, pipe 16, data 2, expert 64, dualpipev": large(False, 32, schedule="dualpipev", **PAPER),
    "V3, pipe 16, data 2, expert 64, interleaved by 3": large(
        False, 32, schedule="interleaved", pipe_chunks=3, **PAPER
    ),
    "V3, FP8, pipe 8, expert 64, dualpipe": large(True, 32, pipe=8, expert=64, schedule="dualpipe"),
    "V3, FP8, pipe 8, expert 32, dualpipev": large(
        True, 60, pipe=8, expert=32, schedule="dualpipev"
    ),
    "V3, FP8, fsdp 16, expert 32": large(True, 4, "full", fsdp=16, expert=32),
    "V3, FP8, fsdp 8, expert 32": large(True, 4, "full", fsdp=8, expert=32),
    "V2-Lite, expert 8": Layout("v2_lite", {"expert": 8}, gpu="h100"),
}
"""At V3's size."""


Row = tuple[Case, dict[str, int], list[Any]]
"""Case of a layout; parts of its compiled program, in bytes; and the program's collectives."""


def compiled_rows(names: list[str], cache: str) -> dict[str, Row]:
    """Every layout that compiles."""
    found, layouts = {}, COMPILED | LARGE
    for number, name in enumerate(names, 1):
        case = layouts[name].case()
        at = f"{number} of {len(names)}, {name}:"
        say = functools.partial(print, at, file=sys.stderr, flush=True)
        try:
            program = figures(case, cache, say, whole=name in COMPILED)
            found[name] = case, program["parts"], program["collectives"]
        except ValueError as error:
            say(str(error))
    return found


# ---- learning -----------------------------------------------------------------------------------


def learn(rows: dict[str, Row]) -> dict[str, Any]:
    """Counts of every group of terms by class of layout, the errors of the closed form, and the
    programs that both are of."""
    classes: dict[str, list[Row]] = {}
    for row in rows.values():
        classes.setdefault(kind_of(row[0]), []).append(row)
    found: dict[str, Any] = {"date": f"{datetime.date.today()}", "jax": jax.__version__}
    found |= {"script": "python -m bench.plan --learn", "counts": {}, "errors": {}}
    for kind, members in classes.items():
        counts = fit(members)
        found["counts"][kind] = counts
        ratios = []
        for case, parts, _ in members:
            sizes = terms_of(case)
            own = sum(carried_by(case).values())
            closed = own + sum(counts[group] * sizes[group] for group in GROUPS)
            ratios.append(closed / sum(parts.values()) - 1)
        found["errors"][kind] = [round(min(ratios), 4), round(max(ratios), 4), len(ratios)]
    found["programs"] = {
        name: {"parts": parts, "collectives": sent} for name, (_, parts, sent) in rows.items()
    }
    return found


ABOVE = 1.005
"""What the fit aims at, in totals of the programs: a plan that falls short costs more."""


def fit(members: list[Row]) -> dict[str, float]:
    """Counts, none negative, that bring the closed form's totals nearest to what is aimed at, as
    shares of the programs'; small counts are preferred where programs do not decide."""
    from scipy.optimize import nnls

    matrix, wanted = [], []
    for case, parts, _ in members:
        sizes, total = terms_of(case), sum(parts.values())
        own = sum(carried_by(case).values())
        matrix.append([sizes[group] / total for group in GROUPS])
        wanted.append((ABOVE * total - own) / total)
    ridge = 0.003 * np.eye(len(GROUPS))
    stacked = np.vstack([np.array(matrix), ridge])
    counts, _ = nnls(stacked, np.concatenate([wanted, 0.003 * np.ones(len(GROUPS))]))
    return {group: round(float(count), 3) for group, count in zip(GROUPS, counts, strict=True)}


def memory_table(rows: dict[str, Row]) -> list[str]:
    """Markdown: closed form beside the compiled program."""
    lines = [
        "| layout | class | carried, GiB: closed form | compiled | error | total: closed form "
        "| compiled | error |",
        "|---" * 8 + "|",
    ]
    errors: list[float] = []
    for name, (case, parts, _) in rows.items():
        report = report_of(case, name)
        own, total = report.memory.carried, report.memory.total
        theirs, whole = sum(parts[part] for part in CARRIED), sum(parts.values())
        errors.append(total / whole - 1)
        lines.append(
            f"| {name} | {report.memory.error.kind} | {own / GIB:.3f} | {theirs / GIB:.3f} "
            f"| {own / theirs - 1:+.2%} | {total / GIB:.3f} | {whole / GIB:.3f} "
            f"| {errors[-1]:+.1%} |"
        )
    lines += [
        "",
        f"Totals: {min(errors):+.1%} to {max(errors):+.1%}; "
        f"{sum(abs(e) <= 0.05 for e in errors)} of {len(errors)} within 5%. Learned "
        f"{LEARNED.get('date', 'never')} of jax {LEARNED.get('jax', '-')}.",
    ]
    return lines


# ---- published runs -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Published:
    """A run that somebody measured, and its layout as this code can express it."""

    what: str
    preset: str
    hardware: Hardware
    gpus: int
    mesh: MeshConfig
    micro_batch_size: int
    train: dict[str, Any]
    tokens_per_s_per_gpu: float
    source: str
    difference: str
    """What is not the same, and so the first reason of a miss."""
    ways: Ways

    def report(self, ways: Ways | None = None) -> Report:
        """Our prediction, with the ways of their system or others."""
        run: RunConfig = preset(self.preset)
        settings = {"batch_ramp_from": 0, "batch_ramp_tokens": 0.0} | self.train
        case = case_of(run, self.hardware, self.gpus, self.mesh, self.micro_batch_size, **settings)
        return report_of(dataclasses.replace(case, ways=ways or self.ways), self.what)


CARD = "Megatron-Bridge's model verification card, nemo 26.08"
PUBLISHED = (
    Published(
        "V3, 2,048 H800, its own layout, FP8", "v3_671b", make_hardware("h800"), 2048,
        LAYOUTS["deepseek"], 128, {"batch_size": 15360, "fp8": True}, 1541.7,
        "ISCA 2025 (arXiv 2505.09343), table 4",
        "their optimizer step holds more than its bytes; stages cut by hand", DEEPSEEK,
    ),
    Published(
        "V3, 1,024 H100, BF16", "v3_671b", make_hardware("h100"), 1024,
        MeshConfig(
            pipe=8, data=2, expert=64, expert_nodes=8, schedule="interleaved", pipe_chunks=4
        ),
        128, {"batch_size": 16384, "fp8": False}, 1061, CARD,
        "theirs cuts attention over tensor 2, which cuts experts here, and so is data 2",
        MEGATRON,
    ),
    Published(
        "V3, 256 GB200, MXFP8", "v3_671b", make_hardware("gb200"), 256,
        MeshConfig(pipe=4, expert=64, schedule="interleaved", pipe_chunks=4), 64,
        {"batch_size": 4096, "fp8": True}, 4735, CARD,
        "speeds of products are a Hopper's shares of the peak", MEGATRON,
    ),
    Published(
        "Moonlight, 16 H100, BF16", "moonlight_16b", make_hardware("h100"), 16,
        MeshConfig(data=2, expert=8), 32,
        {"batch_size": 1024, "seq_len": 4096, "fp8": False}, 22528, CARD,
        "two sequences a GPU and micro batch; what theirs recomputes is not published", MEGATRON,
    ),
    Published(
        "V3, 512 H100, BF16", "v3_671b", make_hardware("h100"), 512,
        MeshConfig(pipe=8, fsdp=2, expert=32, expert_nodes=4, schedule="interleaved",
                   pipe_chunks=2),
        64, {"batch_size": 4096, "fp8": False, "remat": "full"}, 579,
        "torchtitan #2107, DeepEP, FSDP 64, EP 32, PP 8, full recomputation",
        "theirs waits for the host at every layer, which one program does not", TORCHTITAN,
    ),
    Published(
        "16B, 8 H100, BF16", "v2_lite", make_hardware("h100"), 8, MeshConfig(expert=8), 32,
        {"batch_size": 256, "fp8": False}, 8667, "torchtitan #1610, FlexAttention, EP 8",
        "theirs waits for the host, and its attention is no kernel for these heads", TORCHTITAN,
    ),
    Published(
        "Llama 3.1 405B, 16,384 H100, BF16", "llama31_405b", make_hardware("h100"), 16384,
        MeshConfig(
            pipe=16, fsdp=128, tensor=8, sequence=True, schedule="interleaved", pipe_chunks=4
        ),
        128, {"batch_size": 2048}, 140.5,
        "model card: 30.84 M GPU hours for 15.6 T tokens",
        "the card's hours hold long contexts and lost time; chunks were of one layer", MEGATRON,
    ),
)  # fmt: skip


def published_table() -> list[str]:
    """Markdown: predictions beside what was published."""
    lines = [
        "| run | published, tokens/s/GPU | predicted of their system | error | MFU causal | of "
        "this program | what differs still | source |",
        "|---" * 8 + "|",
    ]
    errors = []
    for run in PUBLISHED:
        report, own = run.report(), run.report(OWN)
        error = report.tokens_per_s_per_gpu / run.tokens_per_s_per_gpu - 1
        errors.append(abs(error))
        lines.append(
            f"| {run.what} | {run.tokens_per_s_per_gpu:,.1f} | {report.tokens_per_s_per_gpu:,.1f} "
            f"| {error:+.1%} | {report.mfu[0]:.2%} | {own.tokens_per_s_per_gpu:,.1f} "
            f"| {run.difference} | {run.source} |"
        )
    lines += [
        "",
        f"Median error {statistics.median(errors):.1%}; the tables of `planning/hardware.py` were "
        "fixed before, ways of systems completed after a first comparison, no number fitted.",
    ]
    return [*lines, "", *breakdown()]


ISCA = {
    "1F": 1.13, "bubble": 2.06, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, "optimizer": 0.29
}  # fmt: skip
"""Seconds of V3's step (arXiv 2505.09343, table 4); they add up to 19.926."""


def breakdown() -> list[str]:
    """V3's step beside the published one, part by part."""
    report = PUBLISHED[0].report()
    names = {"F": "1F", "B": "1B", "I": "1B", "W": "1W", "FB": "1F1B"}
    own = dict.fromkeys(ISCA, 0.0)
    for tick in report.timeline:
        own[names[tick.kind]] += tick.end - tick.start
    own["bubble"] = report.parts_seconds["bubble"]
    own["optimizer"] = report.parts_seconds["optimizer"]
    rest = report.step_seconds - sum(own.values())
    lines = ["| V3's step, s | published | predicted of their system |", "|---|---|---|"]
    lines += [f"| {name} | {ISCA[name]:.2f} | {own[name]:.2f} |" for name in ISCA]
    lines += [f"| weights, gradients and messages between ranks | - | {rest:.2f} |"]
    lines.append(f"| step | {sum(ISCA.values()):.2f} | {report.step_seconds:.2f} |")
    return [*lines, "", *differences()]


def differences() -> list[str]:
    """What each way of their system would be worth to this program on V3's layout."""
    run = PUBLISHED[0]
    ways, before = OWN, run.report(OWN).tokens_per_s_per_gpu
    lines = ["| way of DeepSeek's system, one after the other | tokens/s/GPU |", "|---|---|"]
    lines.append(f"| this program | {before:,.1f} |")
    for name in Ways._fields[1:]:
        if getattr(DEEPSEEK, name) != getattr(OWN, name):
            ways = ways._replace(**{name: getattr(DEEPSEEK, name)})
            found = run.report(ways).tokens_per_s_per_gpu
            lines.append(f"| {name} = {getattr(DEEPSEEK, name)} | {found:,.1f} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Print one of the tables, or learn."""
    command = Command(__doc__)
    command.add_argument("--memory", action="store_true", help="memory beside compiled programs")
    command.add_argument("--learn", action="store_true", help="learn the workspace again")
    command.add_argument("--cases", default="", help="only those whose names have this in them")
    command.add_argument("--small", action="store_true", help="none of V3's size")
    command.add_argument("--cache", default=CACHE, help="folder of compiled plans")
    command.add_argument("--out", default=str(ROOT / "planning" / "learned.json"))
    options = command.options(arguments)
    started = time.monotonic()
    if not (options.memory or options.learn):
        return command.show("Plans beside published runs", published_table())
    layouts = COMPILED | ({} if options.small else LARGE)
    names = [name for name in layouts if options.cases in name]
    if options.learn:
        rows = compiled_rows(names, options.cache)
        pathlib.Path(options.out).write_text(json.dumps(learn(rows), indent=1) + "\n")
        print(f"{len(rows)} programs, {time.monotonic() - started:.0f} s: {options.out}")
        return None
    kept = {name: LEARNED["programs"][name] for name in names if name in LEARNED["programs"]}
    rows = {name: (layouts[name].case(), *found.values()) for name, found in kept.items()}
    return command.show("Memory of plans beside compiled programs", memory_table(rows))


if __name__ == "__main__":
    main()
