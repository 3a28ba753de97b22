"""The device mesh: named axes, checked before any array exists."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from sharding.config import AXES, LAYOUTS, MeshConfig

THREADS_PER_DEVICE = 8
"""Threads of the common pool per emulated device: several programs may be in flight."""


def axis_sizes(config: MeshConfig) -> dict[str, int]:
    """Devices per axis, outermost axis first."""
    return {axis: getattr(config, axis) for axis in AXES}


def resolve(config: MeshConfig, num_devices: int) -> MeshConfig:
    """Fill the axis that is -1 and check that the axes use exactly `num_devices` devices.

    Raises ValueError with the equation that fails and what would mend it.
    """
    sizes = axis_sizes(config)
    equation = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "1"
    wrong = {axis: size for axis, size in sizes.items() if size < 1 and size != -1}
    if wrong:
        raise ValueError(f"mesh: axis sizes must be positive, or -1 for one of them; got {wrong}")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"mesh: only one axis may be -1, got {open_axes}; give the others a size")
    for axis in ("pipe", "context"):
        if sizes[axis] != 1:
            raise ValueError(
                f"mesh: {axis}={sizes[axis]}, but the model is not cut along `{axis}` in this "
                f"version; set mesh.{axis} to 1 and use data, fsdp, expert or tensor"
            )
    used = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        if num_devices % used:
            raise ValueError(
                f"mesh: {equation} leaves {num_devices}/{used} devices for `{open_axes[0]}`, not a "
                f"whole number; the other axes must divide the {num_devices} devices"
            )
        return dataclasses.replace(config, **{open_axes[0]: num_devices // used})
    if used != num_devices:
        raise ValueError(
            f"mesh: {equation} = {used} devices, but {num_devices} are present; change an axis, "
            f"set one to -1, or emulate {used} devices on CPU with --emulate {used}"
        )
    return config


def named_layout(name: str) -> MeshConfig:
    """The layout called `name`; ValueError lists the known ones."""
    if name not in LAYOUTS:
        raise ValueError(f"unknown layout {name!r}; known: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all (or the given) devices with the axes of `sharding.config.AXES`."""
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(resolve(config, len(devices)))
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def describe(mesh: Mesh) -> str:
    """One line: device count, kind, and the axes larger than one."""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}" + (f": {axes}" if axes else "")


def emulate_devices(count: int) -> None:
    """Make the CPU appear as `count` devices. Call before JAX is first used."""
    if count < 1:
        raise ValueError(f"--emulate {count}: the number of devices must be positive")
    # A collective blocks its device's thread, which comes from the pool of all programs. Were
    # products split over threads, or were there only as many threads as devices, the one device
    # that all others wait for could be left without a thread, for ever.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
    os.environ["PJRT_NPROC"] = str(max(THREADS_PER_DEVICE * count, os.cpu_count() or 1))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def join_processes(mode: str, coordinator: str, num_processes: int, process_id: int) -> None:
    """Meet the other processes of the program, if there are any. Call before JAX is first used.

    `mode` is "off", "on" (JAX detects the cluster) or "auto": on under Slurm and Open MPI, and with
    a `coordinator`, HOST:PORT of process 0, which the other two arguments belong to.

    Raises ValueError for a coordinator without them.
    """
    launched = any(name in os.environ for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    if mode == "off" or not (coordinator or launched or mode == "on"):
        return
    if coordinator and (num_processes < 1 or process_id < 0):
        raise ValueError(
            f"--coordinator {coordinator} needs --num-processes (is {num_processes}) and "
            f"--process-id (is {process_id})"
        )
    if coordinator:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    else:
        jax.distributed.initialize()
