"""Options of every entry point that runs JAX: devices, compilation cache, processes."""

import dataclasses
from typing import Literal

from runtime.gpus import GPUS

GPU_NAMES = tuple(GPUS)
"""Values of `--gpu`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """Devices and processes of a run; entry points inherit these fields."""

    emulate: int = 0
    """Emulated CPU devices to run on; 0 takes the devices that are there."""
    compilation_cache: str = "cache/xla"
    """Folder that keeps compiled programs between runs; empty keeps none."""
    distributed: Literal["auto", "on", "off"] = "auto"
    """Several processes: auto when Slurm, Open MPI or --coordinator says so; on lets JAX detect the
    cluster, Kubernetes included. Every process is given the same command."""
    coordinator: str = ""
    """HOST:PORT of process 0, where no cluster manager is detected."""
    num_processes: int = 0
    """Number of processes of the run; with --coordinator."""
    process_id: int = -1
    """Number of this process, from 0; with --coordinator."""
    join_within: int = 300
    """Seconds to wait at the start for all processes to come."""
    lost_after: int = 20
    """Seconds without a heartbeat of a process after which the others end."""
