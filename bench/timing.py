"""Times of functions: one alone, or several in turns so that they share the machine's moods."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import jax


def interleaved(
    functions: Mapping[str, Callable[[], object]], repeats: int = 20
) -> dict[str, float]:
    """Median seconds of each function over `repeats` rounds; each round runs every function once.

    A function takes no argument and returns arrays, which are waited for. Two calls of each before
    the first round compile it and warm the caches.
    """
    for function in functions.values():
        for _ in range(2):
            jax.block_until_ready(function())
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of one round."""

    wall: float
    """Seconds per step."""
    processor: float
    """Processor seconds per step, all threads."""


def timed(run: Callable[[], object], steps: int) -> Timing:
    """`run` called `steps` times; it returns when its work is done."""
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
        run()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return Timing(wall / steps, processor / steps)
