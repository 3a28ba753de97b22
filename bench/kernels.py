"""The kernels for Hopper, compiled for an absent H200: registers, spills, shared memory.

    make gpu-compiler
    PYTHONPATH=.gpu-compiler python -m bench.kernels --compile [--cases attention] [--write]
    python -m bench.kernels --time [--write]                   (on a GPU, see bench/kernel_times.py)
    PYTHONPATH=.gpu-compiler python -m bench.kernels --tune    (on a GPU)

What is compiled are the shapes of DeepSeek-V3 and of smaller presets (`bench/cases`). Nothing is
run. A kernel whose products the assembler serialises is marked: it waits for the tensor cores after
each of them.
"""

import contextlib
import ctypes
import importlib
import json
import os
import pkgutil
import re
import sys
import tempfile
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

# Read when the compiler starts: it then says what it made of each kernel.
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
os.environ["MOSAIC_GPU_DUMP_RESOURCES"] = "1"

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import bench.cases
from bench.cases import Case
from bench.command import Command
from bench.kernel_times import roofline, times, tune
from programs.absent_gpus import absent_gpus

MOSAIC = "_mosaic_gpu_kernel"
SERIALISED = re.compile(r"\(C751[02]\)[^']*'(\S+)'")
"""Warnings of the assembler, C7510 and C7512: it could not keep a kernel's products in flight."""


class Assembled(NamedTuple):
    """One kernel, by what the assembler says of it."""

    name: str
    registers: int
    """Per CUDA thread, at launch; warpgroups then trade them."""
    spilled: int
    """Bytes per thread stored to memory for want of registers."""
    serialised: bool


class Compiled(NamedTuple):
    """One kernel of a case, as machine code."""

    case: str
    kernel: str
    registers: int
    spilled: int
    shared_kib: float
    """Shared memory of a block."""
    serialised: bool


def all_cases() -> dict[str, Case]:
    """Every case of `bench/cases`, named `<file>: <case>`."""
    found = {}
    for module in pkgutil.iter_modules(bench.cases.__path__):
        cases = importlib.import_module(f"bench.cases.{module.name}").CASES
        found |= {f"{module.name}: {name}": case for name, case in cases.items()}
    return found


@contextlib.contextmanager
def output_of_process() -> Generator[list[str]]:
    """Collects what the process writes to its outputs, compiled code included, as one text."""
    text: list[str] = []
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield text
        finally:
            sys.stdout.flush()
            libc.fflush(None)
            for to, fd in enumerate(saved, start=1):
                os.dup2(fd, to)
                os.close(fd)
            file.seek(0)
            text.append(file.read().decode(errors="replace"))


def compile_case(name: str, case: Case) -> list[Compiled]:
    """Compile a case for one H200 and read what the assembler says of each kernel."""
    mesh = Mesh(np.array(absent_gpus(1, 1)), ("device",))
    here = NamedSharding(mesh, PartitionSpec())

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

    arguments = jax.tree.map(placed, case.arguments)
    jax.clear_caches()
    with output_of_process() as output:
        jax.jit(case.run).lower(*arguments).compile()
    return with_shared_memory(name, output[0])


def with_shared_memory(case: str, text: str) -> list[Compiled]:
    """Kernels in the compiler's messages: resources when it lowers, then ptxas for each kernel."""
    shared = [int(n) for n in re.findall(r"Resources\(smem_scratch_bytes=(\d+)", text)]
    kernels = read_assembler(text)
    # Resources are printed in the order of lowering, which is that of the kernels.
    assert len(shared) == len(kernels), (case, shared, kernels, text[-2000:])
    return [
        Compiled(
            case, k.name.removesuffix(MOSAIC), k.registers, k.spilled, size / 1024, k.serialised
        )
        for k, size in zip(kernels, shared, strict=True)
    ]


def read_assembler(text: str) -> list[Assembled]:
    """Kernels that an assembler reports, in its order."""
    found, serialised = [], set(SERIALISED.findall(text))
    for part in re.split(r"(?=ptxas info\s*: Compiling entry function)", text):
        entry = re.search(r"entry function '(\S+)'", part)
        spills = re.search(r"(\d+) bytes spill stores", part)
        used = re.search(r"Used (\d+) registers", part)
        if entry and spills and used:
            name = entry[1]
            found.append(Assembled(name, int(used[1]), int(spills[1]), name in serialised))
    return found


def table(kernels: list[Compiled], cases: dict[str, Case]) -> list[str]:
    """Markdown, one line per kernel."""
    lines = [
        "| case | kernel | registers | spilled bytes | shared memory, KiB | serialised "
        "| roofline of the call, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for k in kernels:
        lines.append(
            f"| {k.case} | {k.kernel} | {k.registers} | {k.spilled} | {k.shared_kib:.0f} | "
            f"{'yes' if k.serialised else 'no'} | {roofline(cases[k.case]) * 1e3:.3f} |"
        )
    return lines


def compiles_without_spills(function: Callable[..., Any], case: Case) -> bool:
    """Whether the assembler keeps a case's function in registers and shared memory."""
    try:
        kernels = compile_case("", case._replace(run=function))
    except ValueError as error:
        if "shared memory" in str(error):
            return False
        raise
    return not any(kernel.spilled or kernel.serialised for kernel in kernels)


def tune_all(cases: dict[str, Case]) -> None:
    """Tune every case that has a choice, and say what was found."""
    for name, case in cases.items():
        best = tune(case, compiles_without_spills)
        if best is not None:
            print(f"{name}: {best[0]}, {best[1] * 1e3:.3f} ms", flush=True)


def main() -> None:
    """Compile, time or tune the chosen cases and print what was found."""
    parser = Command(__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--compile", action="store_true", help="compile for an absent H200")
    mode.add_argument("--time", action="store_true", help="time on this machine's GPU")
    mode.add_argument("--tune", action="store_true", help="find the best blocks on this GPU")
    parser.add_argument("--cases", default="", help="only cases whose name holds this")
    parser.add_argument("--json", default="", help="also write the figures to this file")
    options = parser.options()
    chosen = {name: case for name, case in all_cases().items() if options.cases in name}
    if not chosen:
        parser.error(f"no case holds {options.cases!r}; there are {', '.join(all_cases())}")
    if not options.compile:
        if jax.default_backend() != "gpu":
            parser.error("--time and --tune need a GPU; --compile does not")
        if options.tune:
            return tune_all(chosen)
        lines = times(chosen)
        return parser.keep("Kernels on a GPU", lines)
    kernels = [kernel for name, case in chosen.items() for kernel in compile_case(name, case)]
    lines = table(kernels, chosen)
    print("\n".join(lines))
    if options.json:
        with open(options.json, "w") as file:
            entries = [k._asdict() | {"forward": chosen[k.case].forward} for k in kernels]
            json.dump(entries, file)
    parser.keep("Kernels for an absent H200", lines)


if __name__ == "__main__":
    main()
