"""Time to the first step, and how compile time grows with depth.

    python -m bench.compile [--runs 1] [--write]

First step: seconds from the start of `train.py --config tiny --emulate 8 --layout cube` (fsdp 2,
expert 2, tensor 2; one MTP module) to the end of its first step, as it says itself; with an empty
compilation cache, then with the one this left behind. Depth: tracing and compiling the train step
of the tiny widths with 6 and with 60 MoE layers on one device; nothing is run or allocated.
"""

import dataclasses
import re
import statistics
import subprocess
import sys
import tempfile

import jax

from bench.command import Command
from bench.report import ROOT
from bench.timing import Timing, timed
from configs import tiny
from model.recipe import Recipe
from programs.step import lower
from sharding.config import MeshConfig
from sharding.mesh import make_layout
from training.config import TrainConfig
from training.step import Trainer

SHALLOW = 6
FIRST_STEP = re.compile(r"first step: ([\d.]+) s after start")


def first_step_seconds(cache: str, devices: int) -> float:
    """A training run of one step with this compilation cache."""
    with tempfile.TemporaryDirectory() as run_dir:
        command = [sys.executable, "train.py", "--config", "tiny", "--emulate", str(devices)]
        command += ["--layout", "cube"] * (devices == 8)
        command += ["--train.steps", "1", "--train.eval_every", "0"]
        command += ["--compilation-cache", cache, "--run_dir", run_dir]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = FIRST_STEP.search(done.stdout)
    if said is None:
        raise RuntimeError(f"{' '.join(command)} says no first step:\n{done.stdout}{done.stderr}")
    return float(said.group(1))


def compile_time(moe_layers: int) -> Timing:
    """Compile the train step of a model of this depth; the compilation cache is off."""
    shape = tiny.model()
    model = dataclasses.replace(shape, num_layers=shape.num_dense_layers + moe_layers)
    train = TrainConfig(steps=1, seq_len=256, batch_size=8)
    layout = make_layout(MeshConfig(), jax.devices()[:1])
    trainer = Trainer(model, train, Recipe(), layout)
    return timed(lambda: lower(trainer).compile(), 1)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and, if asked, write a section of the results."""
    parser = Command(__doc__, deep=7, emulate=1)
    parser.add_argument("--emulate", type=int, default=8, help="devices of the first step")
    parser.add_argument("--deep", type=int, default=60, help="MoE layers of the deep model")
    parser.add_argument("--runs", type=int, default=1, help="repetitions; medians are shown")
    options = parser.options(arguments)
    cold, warm, shallow, deep = [], [], [], []
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(first_step_seconds(cache, options.emulate))
            warm.append(first_step_seconds(cache, options.emulate))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    compile_time(1)  # what only the first compilation of a process does
    for _ in range(options.runs):
        shallow.append(compile_time(SHALLOW))
        deep.append(compile_time(options.deep))
    median = statistics.median
    lines = [
        "| | seconds |",
        "|---|---|",
        f"| first step after process start, empty cache | {median(cold):.1f} |",
        f"| first step after process start, warm cache | {median(warm):.1f} |",
        f"| compile, {SHALLOW} MoE layers | {median(t.wall for t in shallow):.1f} |",
        f"| compile, {options.deep} MoE layers | {median(t.wall for t in deep):.1f} |",
        "",
        f"{options.deep} against {SHALLOW} layers: "
        f"{median(d.wall / s.wall for d, s in zip(deep, shallow, strict=True)):.2f} times, by "
        "processor time "
        f"{median(d.processor / s.processor for d, s in zip(deep, shallow, strict=True)):.2f}.",
    ]
    parser.show("First step and compile time", lines)


if __name__ == "__main__":
    main()
