"""GPUs that are not there: devices to compile for, on a machine without one.

XLA compiles for NVIDIA GPUs on any host that has JAX's CUDA wheels; no driver is needed. The
devices returned here make a mesh, and a step lowered and compiled on it is the program that such a
cluster would run, with its collectives and its memory. It cannot be run here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sharding.config import MeshConfig
from sharding.devices import schedule_options


class Gpu(NamedTuple):
    """What XLA must know of a device."""

    name: str
    capability: int
    cores: int
    """Streaming multiprocessors."""
    memory: int
    """Bytes that the driver reports."""
    bandwidth: int
    """Bytes a second of its memory."""
    l2_cache: int
    """Bytes."""
    clock_ghz: float


GPUS = {
    "h100": Gpu("H100", 9, 132, 85_520_809_984, 3_350_000_000_000, 52_428_800, 1.98),
    "h800": Gpu("H800", 9, 132, 85_520_809_984, 3_350_000_000_000, 52_428_800, 1.98),
    "h200": Gpu("H200", 9, 132, 150_000_000_000, 4_800_000_000_000, 52_428_800, 1.98),
    "b200": Gpu("B200", 10, 148, 191_000_000_000, 8_000_000_000_000, 132_644_864, 1.965),
}
"""SXM modules (NVIDIA data sheets). An H800 is an H100 with fewer links to its neighbours, which no
program shows."""


def description(gpu: Gpu) -> str:
    """A device as XLA's compiler reads it."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: {gpu.cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2_cache} clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory} cuda_compute_capability {{ major: {gpu.capability} }}
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
    options = schedule_options(config)
    passes = "xla_disable_hlo_passes"
    if config.pipe > 1:
        options[passes] = ",".join(filter(None, (options.get(passes), "triton-softmax-rewriter")))
    return INSPECTION | options


def absent_gpus(nodes: int, per_node: int = 8, gpu: str = "h200") -> Sequence[Any]:
    """Devices of a cluster that is described, not present: `nodes` hosts of `per_node` GPUs.

    gpu: a name of GPUS.

    Raises ValueError where JAX's CUDA wheels are missing.
    """
    from jax.experimental import topologies

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
