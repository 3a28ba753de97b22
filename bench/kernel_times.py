"""Kernels on a Hopper GPU: times against the roofline and against other ways, and tuning.

    python -m bench.kernels --time [--cases attention] [--write]
    PYTHONPATH=.gpu-compiler python -m bench.kernels --tune [--cases decode]

Times are of the kernels on the device, by CUPTI, medians over calls. The tuner leaves out blocks
that spill registers or overflow shared memory, then times the rest and keeps the fastest in
`pallas_kernels/tuned.py`'s files.
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import Case, Tunable
from pallas_kernels.tuned import device_name, record

PEAK = {"bf16": 989e12, "fp8": 1979e12}
"""FLOP/s of the dense tensor cores of an H100 or H200 SXM."""
BYTES_PER_SECOND = {"nvidia_h200": 4.8e12, "nvidia_h100_80gb_hbm3": 3.35e12}
CALLS = 20

Timer = Callable[[Callable[..., Any], tuple[Any, ...]], float]
"""`timer(function, arguments)`: seconds of one call on the device."""


def roofline(case: Case, bytes_per_second: float = 4.8e12) -> float:
    """Least seconds of a case: its FLOPs at the peak or its bytes at full bandwidth."""
    return max(case.flops / PEAK[case.peak], case.bytes / bytes_per_second)


def inputs(case: Case) -> tuple[Any, ...]:
    """Arrays for a case: its own integers, normal numbers elsewhere."""
    rng, integers = np.random.default_rng(0), iter(case.integers())

    def make(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(next(integers), leaf.dtype).reshape(leaf.shape)
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32), leaf.dtype)

    arguments = jax.tree.map(make, case.arguments)
    assert not list(integers), "a case gives more integers than it takes"
    return arguments


def on_device(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Median seconds that the GPU spends on a call, gaps between its kernels left out."""
    from jax.experimental.mosaic.gpu import profiler

    milliseconds: Any = profiler.measure(jax.jit(function), iterations=CALLS)(*arguments)[1]
    return statistics.median(milliseconds) / 1e3


def time_case(case: Case, timer: Timer = on_device) -> dict[str, float]:
    """Seconds of a case's kernel and of each of its baselines."""
    arguments = inputs(case)
    functions = {"kernel": case.run} | dict(case.baselines)
    return {name: timer(function, arguments) for name, function in functions.items()}


def times(cases: dict[str, Case]) -> list[str]:
    """Markdown: every case, its share of the roofline, and its ratio to the best other way."""
    bandwidth = BYTES_PER_SECOND.get(device_name(), 4.8e12)
    lines = [
        "| case | ms | TFLOP/s | TB/s | of the roofline | best other way, ms | times as fast |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        seconds = time_case(case)
        own = seconds.pop("kernel")
        best = min(seconds, key=lambda key: seconds[key], default="")
        other = f"{best} {seconds[best] * 1e3:.3f}" if best else "-"
        ratio = f"{seconds[best] / own:.2f}" if best else "-"
        lines.append(
            f"| {name} | {own * 1e3:.3f} | {case.flops / own / 1e12:.0f} "
            f"| {case.bytes / own / 1e12:.2f} | {roofline(case, bandwidth) / own:.0%} "
            f"| {other} | {ratio} |"
        )
        print(lines[-1], flush=True)
    return lines


def tune(
    case: Case,
    fits: Callable[[Callable[..., Any], Case], bool],
    timer: Timer = on_device,
    device: str = "",
) -> tuple[Any, float] | None:
    """Best blocks of a case and their seconds, kept for the device; None if it has no choice.

    `fits` says whether a function compiles without spills; candidates that do not are left out.
    """
    tunable: Tunable | None = case.tunable
    if tunable is None:
        return None
    functions = {blocks: tunable.run(blocks) for blocks in tunable.candidates}
    kept = {blocks: fn for blocks, fn in functions.items() if fits(fn, case)}
    if not kept:
        raise ValueError(
            f"none of {len(functions)} blocks for {tunable.kernel} {tunable.shapes} compiles "
            "without spills"
        )
    arguments = inputs(case)
    seconds = {blocks: timer(fn, arguments) for blocks, fn in kept.items()}
    best = min(seconds, key=lambda blocks: seconds[blocks])
    entry = {"blocks": best._asdict(), "ms": seconds[best] * 1e3, "jax": jax.__version__}
    record(device or device_name(), tunable.kernel, tunable.shapes, entry)
    return best, seconds[best]
