"""Main memory of `convert.py import` against the depth of the model.

    python -m bench.import_memory [--layers 8,16,61,122] [--write]

V3 at a seventh of its width with 64 experts, as an FP8 release of sparse files (every value zero),
is imported by `convert.py` in a process of its own, whose peak resident memory is reported beside
the bytes it wrote before compression. What does not grow with depth does not grow with the model.
"""

import dataclasses
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax

from bench.command import Command, numbers
from bench.import_share import write_sparse
from bench.report import ROOT
from checkpoint.hf_names import table
from configs import deepseek
from model.config import ModelConfig


def narrow(layers: int) -> ModelConfig:
    """V3's structure, small enough to be written in seconds."""
    return dataclasses.replace(
        deepseek.v3_model(),
        num_layers=layers,
        vocab_size=16384,
        hidden_size=1024,
        num_heads=16,
        q_lora_rank=256,
        kv_lora_rank=128,
        dense_ffn_size=2048,
        expert_ffn_size=256,
        num_experts=64,
    )


def measure(layers: int) -> tuple[int, float, float]:
    """(bytes of the arrays, peak resident MiB, seconds) of one import to bf16."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "hf").mkdir()
        config = narrow(layers)
        write_sparse(folder / "hf", config)
        command = [sys.executable, "convert.py", "import", str(folder / "hf"), str(folder / "run")]
        began = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--dtype", "bf16"], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"convert.py import ended with status {status}")
        size = 2 * sum(math.prod(entry.our_shape) for entry in table(config))
        return size, usage.ru_maxrss / 1024, time.perf_counter() - began


def main(arguments: list[str] | None = None) -> None:
    """Measure every depth and print the table."""
    parser = Command(__doc__, layers="4")
    parser.add_argument("--layers", type=numbers, default="8,16,61,122")
    options = parser.options(arguments)
    jax.config.update("jax_platforms", "cpu")
    lines = ["| layers | arrays, GB | peak resident memory, MiB | seconds |", "|---|---|---|---|"]
    for layers in options.layers:
        size, peak, seconds = measure(layers)
        lines.append(f"| {layers} + 1 | {size / 1e9:.2f} | {peak:,.0f} | {seconds:.0f} |")
        print(lines[-1], flush=True)
    parser.keep("Main memory of an import", lines)


if __name__ == "__main__":
    main()
