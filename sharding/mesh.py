"""The device mesh: named axes, checked before any array exists."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from sharding.config import AXES, LAYOUTS, MESH_AXES, MeshConfig
from sharding.partition import Layout
from sharding.rules import computed_rules


def axis_sizes(config: MeshConfig) -> dict[str, int]:
    """Devices per axis, outermost axis first."""
    return {axis: getattr(config, axis) for axis in AXES}


def mesh_sizes(config: MeshConfig) -> dict[str, int]:
    """Devices per axis of the mesh, where `expert` is cut into nodes and what one holds."""
    sizes = axis_sizes(config)
    parts = {"expert_nodes": config.expert_nodes, "expert": config.expert // config.expert_nodes}
    return {axis: (sizes | parts)[axis] for axis in MESH_AXES}


def resolve(config: MeshConfig, num_devices: int) -> MeshConfig:
    """Fill the axis that is -1 and check that the axes use exactly `num_devices` devices.

    Raises ValueError with the equation that fails and the remedy.
    """
    sizes = axis_sizes(config)
    equation = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "1"
    wrong = {axis: size for axis, size in sizes.items() if size < 1 and size != -1}
    if wrong:
        raise ValueError(f"mesh: axis sizes must be positive, or -1 for one of them; got {wrong}")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"mesh: only one axis may be -1, got {open_axes}; give the others a size")
    used = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        if num_devices % used:
            raise ValueError(
                f"mesh: {equation} leaves {num_devices}/{used} devices for `{open_axes[0]}`, not a "
                f"whole number; the other axes must divide the {num_devices} devices"
            )
        return _checked(dataclasses.replace(config, **{open_axes[0]: num_devices // used}))
    if used != num_devices:
        raise ValueError(
            f"mesh: {equation} = {used} devices, but {num_devices} are present; change an axis, "
            f"set one to -1, or emulate {used} devices on CPU with --emulate {used}"
        )
    return _checked(config)


def _checked(config: MeshConfig) -> MeshConfig:
    """Raise ValueError for options that contradict the sizes."""
    if config.expert_nodes < 1 or config.expert % config.expert_nodes:
        raise ValueError(
            f"mesh: expert={config.expert} does not split over expert_nodes="
            f"{config.expert_nodes}; choose a number of nodes that divides it"
        )
    if config.reduce == "micro" and config.pipe > 1:
        raise ValueError(
            f"mesh: reduce=micro with pipe={config.pipe}; the ranks of a pipeline keep whole sums "
            "and reduce them once a step: leave reduce at step, or set pipe to 1"
        )
    if not config.exchange_capacity >= 0:
        raise ValueError(
            f"mesh: exchange_capacity={config.exchange_capacity}; give 1 or more times the mean "
            "load, inf for a single round that holds everything, or 0 for what is derived"
        )
    return config


def named_layout(name: str) -> MeshConfig:
    """The layout called `name`; ValueError lists the known ones."""
    if name not in LAYOUTS:
        raise ValueError(f"unknown layout {name!r}; known: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all (or the given) devices with the axes of `sharding.config.MESH_AXES`."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(resolve(config, len(devices)))
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


def make_layout(config: MeshConfig, devices: Sequence[Any] | None = None) -> Layout:
    """The layout of a configuration on all (or the given) devices.

    Raises ValueError for sizes that do not fit, and for an exchange that the devices cannot do.
    """
    devices = jax.devices() if devices is None else devices
    config = resolve(config, len(devices))
    _check_platform(config, devices[0].platform)
    return Layout(make_mesh(config, devices), computed=computed_rules(config), config=config)


def _check_platform(config: MeshConfig, platform: str) -> None:
    """Raise ValueError for options that the devices cannot carry out."""
    if config.exchange == "ragged" and config.expert > 1 and platform == "cpu":
        raise ValueError(
            "mesh: exchange=ragged needs GPUs, since XLA has no ragged all-to-all on CPU; set "
            "mesh.exchange to dense"
        )


def describe(layout: Layout) -> str:
    """One line: device count, kind, and the axes larger than one."""
    mesh, local = layout.mesh, layout.mesh.local_devices
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    kind = local[0].device_kind if local else mesh.devices.flat[0].device_kind
    emulated = " (emulated)" * (kind == "cpu" and len(local) > 1)
    return f"{mesh.size} x {kind}{emulated}" + (f": {axes}" if axes else "")
