"""Devices of a layout: their kind, and what they can run."""

import contextlib
from typing import Any, NamedTuple

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

EXACT = {"xla_allow_excess_precision": False}
"""Options of a program that rounds wherever its text says so. By default XLA leaves out a rounding
to bf16 and back where it fuses both, and which those are depends on the rest of the program: the
same layer recomputed then has other last bits, and a quantiser makes steps of them.
"""


class PlannedDevice(NamedTuple):
    """A device of a layout that is only planned, with JAX's names for what it is."""

    platform: str
    device_kind: str
    compute_capability: str


def device_of(layout: Layout) -> Any:
    """One of a layout's devices, which are all alike."""
    return layout.mesh.devices.flat[0] if layout.device is None else layout.device


def num_devices(layout: Layout) -> int:
    """Devices of all processes together."""
    return layout.mesh.size


def mesh_shape(layout: Layout) -> dict[str, int]:
    """Devices per mesh axis, as checkpoints record it."""
    return dict(layout.mesh.shape)


def device_kind(layout: Layout) -> str:
    """Kind of the devices in their maker's words, such as NVIDIA H200."""
    return device_of(layout).device_kind


def on_platform(layout: Layout, *names: str) -> bool:
    """Whether the devices are of one of these platforms: cpu, cuda, gpu, tpu."""
    return device_of(layout).platform in names


def schedule_options(config: MeshConfig) -> dict[str, Any]:
    """Compiler options that a layout needs on GPUs for its overlap."""
    in_pairs = config.overlap or (config.pipe > 1 and config.schedule.startswith("dualpipe"))
    return dict(OVERLAP) if in_pairs else {}


def not_hopper(layout: Layout) -> str | None:
    """Reason why kernels for NVIDIA's Hopper cannot run on a layout's devices; None: they can."""
    device = device_of(layout)
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
    if layout.device is not None:
        return contextlib.nullcontext()
    devices = list(layout.mesh.devices.flat)
    own = (d for d in devices if d.process_index == jax.process_index())
    return jax.default_device(next(own, devices[0]))


def first_device(layout: Layout) -> Any:
    """The first of a layout's devices: all are of one kind."""
    return device_of(layout)


def no_emulator(layout: Layout) -> str | None:
    """Reason why kernels cannot be emulated on a layout's devices; None: they can."""
    device = device_of(layout)
    if device.platform != "cpu":
        return f"the emulator runs on CPU, not on {device.device_kind}"
    return None if layout.mesh.size == 1 else "the emulator runs on one device"
