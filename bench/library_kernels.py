"""Kernels of the library as machine code for absent GPUs: registers, spills, shared memory.

    make library
    PYTHONPATH=.gpu-compiler .venv-kernels/bin/python -m bench.library_kernels [--write]

V3's widths, forward with gradients; beside them stand ours in "Kernels for an absent H200". The
assembler speaks for itself: one that notes what it says stands first on the path, for Mosaic's and
Triton's kernels and XLA's own alike. Each GPU has a process of its own, because Mosaic keeps the
first generation that it meets. Kernels of XLA are left out; shared memory of
Triton's is known when they are started.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.command import Command
from bench.hot_paths import Work, works
from bench.kernels import MOSAIC, output_of_process, read_assembler
from bench.report import ROOT
from configs import preset
from programs.absent_gpus import absent_gpus

GPUS = ("a100-80", "h200", "b200")
TOKENS = 4096
OURS = re.compile(r"mosaic_gpu|attention|triton_|ragged|_kernel\b|dkv|dq")
"""Names of kernels that are not XLA's fusions."""


def noting_assembler(folder: pathlib.Path) -> pathlib.Path:
    """Put an assembler first on the path that appends what it says to the file returned."""
    real, notes = shutil.which("ptxas"), folder / "notes"
    if real is None:
        raise ValueError("no ptxas on the path; make gpu-compiler installs one")
    script = folder / "ptxas"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) exec {real} "$@";; esac\n'
        f'{real} -v "$@" >"{folder}/said" 2>&1; code=$?\n'
        f'cat "{folder}/said" >>"{notes}"; cat "{folder}/said" >&2; exit $code\n'
    )
    script.chmod(0o755)
    notes.touch()
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    return notes


def compile_all(gpu: str, only: str) -> list[str]:
    """A line of the table per kernel of each hot path, for one GPU."""
    (device,) = absent_gpus(1, 1, gpu=gpu)
    here = NamedSharding(Mesh(np.array([device]), ("device",)), PartitionSpec())
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        notes = noting_assembler(pathlib.Path(folder))
        for work in works(preset("v3_671b").model, TOKENS, 128, fp8=True):
            if only not in work.path or work.path not in ("attention", "experts", "experts, FP8"):
                continue
            notes.write_text("")
            lines += compile_one(gpu, device, here, work, notes)
            print("\n".join(lines[-8:]), file=sys.stderr, flush=True)
    return lines


def compile_one(gpu: str, device: Any, here: Any, work: Work, notes: pathlib.Path) -> list[str]:
    """Lines of one hot path; one that says why if the library refuses it."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in work.shapes]
    try:
        with jax.default_device(device), output_of_process() as said:
            program = jax.jit(work.call("library")).lower(*shapes).compile()
    except Exception as error:  # whatever the library or a compiler raises
        return [f"| {gpu} | {work.path} | refused: {str(error).splitlines()[0][:150]} | | | | |"]
    memory = program.memory_analysis()
    temporaries = memory.temp_size_in_bytes / 2**20 if memory else 0
    # Mosaic says what shared memory it asks for when it lowers, in the order of its kernels.
    asked = iter(re.findall(r"Resources\(smem_scratch_bytes=(\d+)", said[0]))
    lines = []
    for k in read_assembler(notes.read_text()):
        mosaic = k.name.endswith(MOSAIC)
        shared = f"{int(next(asked)) / 1024:.0f}" if mosaic else "-"
        if OURS.search(k.name):
            lines.append(
                f"| {gpu} | {work.path} | {k.name.removesuffix(MOSAIC)} | {k.registers} "
                f"| {k.spilled} | {shared} | {temporaries:,.0f} |"
            )
    silent = f"| {gpu} | {work.path} | compiled by XLA in its own process | - | - | - "
    return list(dict.fromkeys(lines)) or [f"{silent}| {temporaries:,.0f} |"]


def main() -> None:
    """Compile for one GPU, or for each in a process of its own."""
    parser = Command(__doc__, gpu="b200", only="attention")
    parser.add_argument("--gpu", default="", help=f"one of {', '.join(GPUS)}; all by default")
    parser.add_argument("--only", default="", help="hot paths whose name holds this")
    options = parser.options()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    if options.gpu:
        return print("\n".join(compile_all(options.gpu, options.only)))
    lines = [
        "| GPU | hot path | kernel | registers | spilled bytes | shared memory, KiB "
        "| temporaries of the call, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for gpu in GPUS:
        command = [sys.executable, "-m", "bench.library_kernels", "--gpu", gpu]
        command += ["--only", options.only]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        lines += done.stdout.splitlines()
    parser.show("Kernels of the library for absent GPUs", lines)


if __name__ == "__main__":
    main()
