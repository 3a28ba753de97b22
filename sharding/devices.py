"""Devices of a layout and what they can run: kernels for Hopper, the emulator, options of XLA."""

from typing import Any

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


def no_emulator(layout: Layout) -> str | None:
    """Reason why kernels cannot be emulated on a layout's devices; None: they can."""
    device = layout.mesh.devices.flat[0]
    if device.platform != "cpu":
        return f"the emulator runs on CPU, not on {device.device_kind}"
    return None if layout.mesh.size == 1 else "the emulator runs on one device"
