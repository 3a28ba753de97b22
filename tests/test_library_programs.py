"""Train steps through the library, compiled for absent GPUs (`make library`)."""

import re

import pytest

from bench.kernels import Assembled, read_assembler
from tests.test_gpu_programs import compiled, needs_compiler

SMALL = "--config small --per-node 2 --mesh expert=2 --micro-batches 1 --kernels auto"
HEADS, TOKENS = 8, 1024
SAID = """
ptxas info    : Compiling entry function 'flash_attention_sm100' for 'sm_100a'
ptxas info    : Function properties for flash_attention_sm100
    96 bytes stack frame, 40 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 96 bytes cumulative stack size, 1 bytes smem
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'fusion' for 'sm_80'
ptxas info    : Function properties for fusion
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers, used 0 barriers
"""


@pytest.mark.library
@needs_compiler
@pytest.mark.parametrize(
    ("gpu", "kernels"),
    [("a100-80", {"__gpu$xla.gpu.triton"}), ("b200", {"mosaic_gpu_v2"})],
)
def test_a_step_goes_through_the_library(tmp_path, gpu, kernels):
    """Its kernels are in the program, over two devices, and no head has tokens by tokens."""
    text = tmp_path / "program"
    report = compiled(tmp_path, f"{SMALL} --gpu {gpu} --text {text}")
    assert kernels | {"triton_kernel_call_ffi"} <= report.calls.keys()
    assert not re.search(rf"\[(\d+,)?{HEADS},{TOKENS},{TOKENS}\]", text.read_text())


def test_reads_what_the_assembler_says():
    assert read_assembler(SAID) == [
        Assembled("flash_attention_sm100", 168, 40, False),
        Assembled("fusion", 16, 0, False),
    ]
