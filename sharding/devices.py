"""Devices of a layout: their kind, and what they can run."""

from typing import Any

import jax

from sharding.config import MeshConfig
from sharding.partition import Layout

OVERLAP = {
    "xla_gpu_dot_merger_threshold_mb": 0,
    "xla_disable_hlo_passes": "multi_output_fusion",
}
"""Options of a layout that computes two micro batches side by side. XLA joins what shares an
operand, such as a weight or a table of angles: products into one product, fusions into one kernel.
What it joins waits for both micro batches, and no exchange of one can then hide behind the other.
"""


def num_devices(layout: Layout) -> int:
    """Devices of all processes together."""
    return layout.mesh.size


def mesh_shape(layout: Layout) -> dict[str, int]:
    """Devices per mesh axis, as checkpoints record it."""
    return dict(layout.mesh.shape)


def device_kind(layout: Layout) -> str:
    """Kind of the devices in their maker's words, such as NVIDIA H200."""
    return layout.mesh.devices.flat[0].device_kind


def on_platform(layout: Layout, *names: str) -> bool:
    """Whether the devices are of one of these platforms: cpu, cuda, gpu, tpu."""
    return layout.mesh.devices.flat[0].platform in names


def schedule_options(config: MeshConfig) -> dict[str, Any]:
    """Compiler options that a layout needs on GPUs for its overlap."""
    in_pairs = config.overlap or (config.pipe > 1 and config.schedule.startswith("dualpipe"))
    return dict(OVERLAP) if in_pairs else {}


def not_hopper(layout: Layout) -> str | None:
    """Reason why kernels for NVIDIA's Hopper cannot run on a layout's devices; None: they can."""
    device = layout.mesh.devices.flat[0]
    if device.platform not in ("cuda", "gpu"):
        return f"the devices are {device.device_kind}, not NVIDIA Hopper GPUs"
    if not str(device.compute_capability).startswith("9."):
        return f"{device.device_kind} has compute capability {device.compute_capability}, not 9.0"
    return None


def no_cudnn(layout: Layout) -> str | None:
    """Reason why cuDNN's attention cannot run on a layout's devices; None: it can."""
    device = first_device(layout)
    if device.platform not in ("cuda", "gpu"):
        return f"the devices are {device.device_kind}"
    major = int(str(device.compute_capability).split(".")[0])
    return None if major >= 8 else f"{device.device_kind} is older than NVIDIA's Ampere"


def as_default(layout: Layout) -> Any:
    """Context in which one of a layout's devices is JAX's default, absent ones included.

    What asks for it when it is traced is then made for these devices; nothing may run inside.
    """
    devices = list(layout.mesh.devices.flat)
    own = (d for d in devices if d.process_index == jax.process_index())
    return jax.default_device(next(own, devices[0]))


def first_device(layout: Layout) -> Any:
    """The first of a layout's devices: all are of one kind."""
    return layout.mesh.devices.flat[0]


def no_emulator(layout: Layout) -> str | None:
    """Reason why kernels cannot be emulated on a layout's devices; None: they can."""
    device = layout.mesh.devices.flat[0]
    if device.platform != "cpu":
        return f"the emulator runs on CPU, not on {device.device_kind}"
    return None if layout.mesh.size == 1 else "the emulator runs on one device"
