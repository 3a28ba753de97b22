"""GPUs that are not there: devices to compile for, on a machine without one.

XLA compiles for NVIDIA GPUs on any host that has JAX's CUDA wheels; no driver is needed. The
devices returned here make a mesh, and a step lowered and compiled on it is the program that such a
cluster would run, with its collectives and its memory. It cannot be run here.
"""

import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from sharding.config import MeshConfig
from sharding.devices import EXACT, schedule_options


class Gpu(NamedTuple):
    """What XLA must know of a device."""

    name: str
    """As the driver gives it, after the maker's."""
    capability: tuple[int, int]
    """Compute capability, major and minor."""
    cores: int
    """Streaming multiprocessors."""
    memory: int
    """Bytes that the driver reports."""
    bandwidth: int
    """Bytes a second of its memory."""
    l2_cache: int
    """Bytes."""
    clock_ghz: float
    shared: int = 233_472
    """Bytes of shared memory of a multiprocessor; a block can have 1 KiB less."""


# fmt: off
GPUS = {
    "a100-80": Gpu("A100-SXM4-80GB", (8, 0), 108, 85_100_068_864, 2_039_040_000_000, 41_943_040,
                   1.41, 167_936),
    "l40s": Gpu("L40S", (8, 9), 142, 47_800_000_000, 864_000_000_000, 50_331_648, 2.52, 102_400),
    "h100": Gpu("H100", (9, 0), 132, 85_520_809_984, 3_350_000_000_000, 52_428_800, 1.98),
    "h800": Gpu("H800", (9, 0), 132, 85_520_809_984, 3_350_000_000_000, 52_428_800, 1.98),
    "h200": Gpu("H200", (9, 0), 132, 150_000_000_000, 4_800_000_000_000, 52_428_800, 1.98),
    "b200": Gpu("B200", (10, 0), 148, 191_514_411_008, 7_672_320_000_000, 132_644_864, 1.965),
    "gb200": Gpu("GB200", (10, 0), 152, 197_897_748_480, 7_928_064_000_000, 135_528_448, 2.062),
    "gb300": Gpu("GB300", (10, 3), 152, 297_021_079_552, 7_928_064_000_000, 135_528_448, 2.07),
}
# fmt: on
GPUS["a100"] = GPUS["a100-80"]
"""SXM modules, but for the L40S, a card.

H100, H800 and H200 from NVIDIA's data sheets; an H800 is an H100 with fewer links to its
neighbours, which no program shows. A100, B200, GB200 and GB300 as XLA's own descriptions have them,
read from devices (xla/backends/gpu/target_config/specs). L40S: NVIDIA's data sheet (142
multiprocessors, 864 GB/s, 2.52 GHz); of its 48 GB some 44.5 GiB are reported with error correction
on; L2 of 48 MB by resellers' sheets. Shared memory by NVIDIA's table of compute capabilities: 164
KB for 8.0, 100 KB for 8.9, 228 KB after."""


def description(gpu: Gpu) -> str:
    """A device as XLA's compiler reads it."""
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared}
  shared_memory_per_block_optin: {gpu.shared - 1024}
  threads_per_core_limit: {1536 if gpu.capability == (8, 9) else 2048} core_count: {gpu.cores}
  fpus_per_core: {64 if gpu.capability == (8, 0) else 128}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2_cache} clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory} cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {gpu.name}"
"""


INSPECTION = {
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_triton_gemm": False,
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
"""Options that compile in less than half the time. Collectives and their order stay; products go
to cuBLAS instead of Triton, and the machine code is slow: for reading, not for running."""


def inspection_options(config: MeshConfig) -> dict[str, Any]:
    """Options to compile a layout's step for reading: its own, and `INSPECTION`.

    In a pipeline also without fusions around softmax: XLA spends a third of its time on finding
    tiles for them, and they change its memory by 1 %. Elsewhere they may save a tenth of it.
    """
    options = EXACT | schedule_options(config)
    passes = "xla_disable_hlo_passes"
    if config.pipe > 1:
        others = [str(options[passes])] if options.get(passes) else []
        options[passes] = ",".join([*others, "triton-softmax-rewriter"])
    return INSPECTION | options


def absent_gpus(nodes: int, per_node: int = 8, gpu: str = "h200") -> Sequence[Any]:
    """Devices of a cluster that is described, not present: `nodes` hosts of `per_node` GPUs.

    gpu: a name of GPUS. Kernels in Mosaic compile for one generation per process: the compiler
    keeps the first that it meets.

    Raises ValueError where JAX's CUDA wheels are missing.
    """
    from jax.experimental import topologies

    own_assembler_first()
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=description(GPUS[gpu]), topology=f"{nodes}x1x{per_node}"
        )
    except Exception as error:
        raise ValueError(
            f"cannot compile for GPUs here ({error}); install the compiler's wheels: "
            "make gpu-compiler"
        ) from None
    return topology.devices


def own_assembler_first() -> None:
    """Put the assembler of the compiler's wheels before any other on the path.

    XLA takes the first `ptxas` that it finds, and an older one, of a CUDA toolkit of the system,
    refuses what a newer Triton writes for Blackwell.
    """
    for folder in sys.path:
        assembler = pathlib.Path(folder or ".") / "nvidia" / "cu13" / "bin"
        if (assembler / "ptxas").exists():
            path = os.environ.get("PATH", "").split(os.pathsep)
            if str(assembler) not in path:
                os.environ["PATH"] = os.pathsep.join([str(assembler), *path])
            return
