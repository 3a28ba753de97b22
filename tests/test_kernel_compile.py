"""The kernels for Hopper as machine code for an absent H200: registers, spills, shared memory.

Needs `make gpu-compiler`; `make gpu-programs` runs it. What reads the assembler's messages is
tested without.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from bench.kernels import Compiled, with_shared_memory

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMPILER = ROOT / os.environ.get("GPU_COMPILER", ".gpu-compiler")
SHARED_KIB = 227

MESSAGES = """
Resources(smem_scratch_bytes=2048, tmem_scratch_cols=0)
Resources(smem_scratch_bytes=4096, tmem_scratch_cols=0)
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'forward_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for forward_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 1 bytes smem
ptxas info    : Compile time = 174.182 ms
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due
 to insufficient register resources in the function 'backward_mosaic_gpu_kernel'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'backward_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for backward_mosaic_gpu_kernel
    96 bytes stack frame, 84 bytes spill stores, 92 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 1 bytes smem
ptxas info    : Compile time = 274.182 ms
"""


def test_reads_the_assembler():
    assert with_shared_memory("case", MESSAGES) == [
        Compiled("case", "forward", 168, 0, 2.0, False),
        Compiled("case", "backward", 255, 84, 4.0, True),
    ]


def compiled(report: pathlib.Path) -> list[tuple[Compiled, bool]]:
    """Every case compiled, and whether it is part of a forward pass."""
    command = [sys.executable, "-m", "bench.kernels", "--compile", "--json", report]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
    environment |= {"PYTHONPATH": str(COMPILER), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [
        (Compiled(**{name: entry[name] for name in Compiled._fields}), entry["forward"])
        for entry in json.loads(report.read_text())
    ]


@pytest.mark.gpu_compile
def test_kernels_spill_nothing_wait_for_nothing_and_fit(tmp_path):
    """One test, because every case is compiled once for it: no register of a forward pass is
    spilled, no product is serialised, and each fits a multiprocessor."""
    if not (COMPILER / "jax_plugins").is_dir():
        pytest.skip(f"{COMPILER.name} holds no compiler for GPUs; make gpu-compiler installs it")
    kernels = compiled(tmp_path / "kernels.json")
    assert any(forward for _, forward in kernels)
    wrong = {
        "spilled": [k for k, forward in kernels if forward and k.spilled],
        "serialised": [k for k, _ in kernels if k.serialised],
        "too large": [k for k, _ in kernels if k.shared_kib > SHARED_KIB or k.registers > 255],
    }
    assert wrong == {"spilled": [], "serialised": [], "too large": []}
