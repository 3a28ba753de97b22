"""Memory of a run in one line before it starts, and a refusal of what cannot fit."""

import math

from configs.schema import RunConfig
from planning.case import make_case
from planning.hardware import make_hardware
from planning.memory import GIB, Memory, memory_of
from runtime.gpus import GPUS


def gpu_of_kind(device_kind: str) -> str:
    """Name of a GPU by JAX's words for it, such as NVIDIA H100 80GB HBM3; '' if it is unknown."""
    words = device_kind.upper().replace("-", " ").split()
    return next((key for key, gpu in GPUS.items() if gpu.name in words), "")


def memory_line(run: RunConfig, gpu: str, gpus: int) -> tuple[str, str]:
    """What a step takes of a GPU's memory, and why it cannot fit; '' if it may.

    A run is refused where the closed form is above the limit by more than it was ever above a
    compiled program; without such programs, where the carried bytes alone are above it.
    """
    case = make_case(run, make_hardware(gpu), gpus)
    memory = memory_of(case)
    parts = ", ".join(
        f"{name} {size / GIB:.3g}" for name, size in memory.parts().items() if size > 0.005 * GIB
    )
    line = (
        f"memory       {memory.total / GIB:.3g} of {memory.limit / GIB:.3g} GiB per "
        f"{GPUS[gpu].name} by closed form ({parts}; {said_error(memory)})"
    )
    least = least_of(memory)
    if least <= memory.limit:
        return line, ""
    return line, (
        f"a step takes at least {least / GIB:.1f} GiB of each GPU, and {GPUS[gpu].name} has "
        f"{memory.limit / GIB:.1f} after context and NCCL. `plan.py` with the same options and "
        "--gpus says what helps; --no-memory-check goes on anyway"
    )


def least_of(memory: Memory) -> float:
    """Bytes that a step takes for certain."""
    error = memory.error
    if not error.programs:
        return memory.carried
    return max(memory.carried, memory.total / (1 + max(0.0, error.high)))


def said_error(memory: Memory) -> str:
    """How far the closed form was from compiled programs."""
    error = memory.error
    if not error.programs:
        return "carried bytes exact, workspace a guess"
    low, high = math.floor(error.low * 1000) / 10, math.ceil(error.high * 1000) / 10
    return f"{low:+.1f} to {high:+.1f}% against {error.programs} compiled programs"
