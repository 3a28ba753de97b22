"""Devices of this process: a CPU that appears as several, for meshes without hardware."""

import collections
import os

import jax

THREADS_PER_DEVICE = 8
"""Threads of the common pool per emulated device: several programs may be in flight."""


def emulate_devices(count: int, idle: bool = False) -> None:
    """Make the CPU appear as `count` devices. Call before JAX is first used.

    `idle` devices are only looked at; they get no threads, of which 2,048 devices had 16,384.
    """
    if count < 1:
        raise ValueError(f"--emulate {count}: the number of devices must be positive")
    # A collective blocks its device's thread, which comes from the pool of all programs. Were
    # products split over threads, or were there only as many threads as devices, the one device
    # that all others wait for could be left without a thread forever.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
    os.environ["PJRT_NPROC"] = str(
        max(0 if idle else THREADS_PER_DEVICE * count, os.cpu_count() or 1)
    )
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def check_devices() -> None:
    """Raise ValueError, on every process, unless all processes have as many devices."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        most = max(counts.values())
        fewer = [f"process {i} has {counts[i]}" for i in sorted(counts) if counts[i] < most]
        more = f" and {len(fewer) - 8} processes more" if len(fewer) > 8 else ""
        raise ValueError(
            f"the processes have different numbers of devices: {', '.join(fewer[:8])}{more}, the "
            f"others {most}; give each as many (--emulate, CUDA_VISIBLE_DEVICES, the job's GPUs "
            "per task)"
        )
