"""Speed and memory: what the hardware gives, measured and compared with its peak."""

import contextlib
import re
import resource
import sys
import time
from collections.abc import Callable, Generator

import jax

PEAK_BF16_TFLOPS: dict[str, float] = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "H800": 989,
    "GH200": 989,
    "A100": 312,
    "A800": 312,
    "B200": 2250,
    "GB200": 2500,
    "GB300": 2500,
    "H20": 148,
    "L40S": 362,
}
"""Dense BF16 peak in TFLOP/s by words of the device kind (NVIDIA data sheets); the first counts."""


def peak_bf16_tflops(device_kind: str) -> float | None:
    """Dense BF16 peak in TFLOP/s of a JAX device kind; None when it is not in the table."""
    for words, peak in PEAK_BF16_TFLOPS.items():
        if re.search(rf"\b{words}\b", device_kind):  # whole words: H20 is not H200
            return peak
    return None


def peak_memory_gib() -> float:
    """Peak memory in GiB: of the fullest local device, as its allocator counts it, where it counts.

    Backends without memory statistics (CPU) report the peak resident set of this process instead,
    which includes Python, the compiler and every emulated device.
    """
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Throughput:
    """Measures training steps between log records, without what happens in between.

    Args:
      flops_per_token: model FLOPs to train on one token, causal attention counted as half
        (6 * active parameters + attention; MTP and recomputation excluded).
      num_devices: devices that share the work.
      device_kind: for the peak; MFU is left out when the peak is unknown.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        flops_per_token: float,
        num_devices: int,
        device_kind: str,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._flops_per_token = flops_per_token
        self._num_devices = num_devices
        self._peak = peak_bf16_tflops(device_kind)
        self._clock = clock
        self._start, self._steps, self._tokens, self._paused = clock(), 0, 0, 0.0

    def add(self, tokens: int) -> None:
        """Count one finished step of `tokens` tokens."""
        self._steps += 1
        self._tokens += tokens

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """Time spent inside (evaluation, checkpoints) is not training time."""
        begin = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - begin

    def lap(self) -> dict[str, float]:
        """`perf/*` metrics of the steps since the last lap (none without a step), and a new lap.

        JAX runs ahead of Python: call this after the last step's result has been read.
        """
        now = self._clock()
        seconds = now - self._start - self._paused
        steps, tokens = self._steps, self._tokens
        self._start, self._steps, self._tokens, self._paused = now, 0, 0, 0.0
        if not steps or seconds <= 0:
            return {}
        tokens_per_s = tokens / seconds
        per_device = tokens_per_s / self._num_devices
        tflops = per_device * self._flops_per_token / 1e12
        lap = {
            "perf/step_s": seconds / steps,
            "perf/tokens_per_s": tokens_per_s,
            "perf/tokens_per_s_per_device": per_device,
            "perf/tflops_per_device": tflops,
        }
        return lap if self._peak is None else lap | {"perf/mfu": tflops / self._peak}
