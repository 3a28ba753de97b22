"""Train steps compiled for H200s that are not there: they compile, and do what their layout says.

Each is compiled in a process of its own, which alone sees XLA's compiler for GPUs; `make
gpu-programs` runs the tests. What reads the compiled text is tested without it.
"""

import json
import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

from bench.gpu_programs import PAPER, V3, Report, mesh_of
from sharding.config import MeshConfig
from sharding.overlap import read_spans

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMPILER = ROOT / os.environ.get("GPU_COMPILER", ".gpu-compiler")
SECONDS = 1500
"""Limit of one compilation: far above what it takes on two cores."""
H200_BYTES = 141e9

needs_compiler = pytest.mark.skipif(
    not (COMPILER / "jax_plugins").is_dir(),
    reason=f"{COMPILER.name} holds no compiler for GPUs; make gpu-compiler installs it",
)


def compiled(path: pathlib.Path, arguments: str) -> Report:
    """What the step of a layout says of itself once compiled."""
    report = path / "report.json"
    command = [sys.executable, "-m", "bench.gpu_programs", *arguments.split(), "--json", report]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
    environment |= {"PYTHONPATH": str(COMPILER), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return Report(**json.loads(report.read_text()))


def sent(report: Report) -> dict[str, set[str]]:
    """Axes by op."""
    found: dict[str, set[str]] = {}
    for op, axes, _, _ in report.collectives:
        found.setdefault(op, set()).add(axes)
    return found


# ---- layouts ------------------------------------------------------------------------------------

LAYOUTS = {
    "cube": ("--mesh cube", {"all-to-all": "expert", "all-gather": "fsdp"}),
    "expert": ("--mesh expert=8", {"all-to-all": "expert"}),
    "ragged": ("--mesh expert=8,exchange=ragged", {"ragged-all-to-all": "expert"}),
    "two-nodes": (
        "--mesh expert=8,expert_nodes=2 --nodes 2 --per-node 4",
        {"all-to-all": "expert_nodes"},
    ),
    "context": ("--mesh context=2,tensor=2,expert=2", {"collective-permute": "context"}),
    "dualpipe": (
        "--mesh pipe=2,expert=4,schedule=dualpipe --micro-batches 4",
        {"collective-permute": "pipe", "all-to-all": "expert"},
    ),
    "fsdp": ("--mesh fsdp=8", {"all-gather": "fsdp"}),
    "sequence": ("--mesh tensor=8,sequence=true", {"all-gather": "tensor"}),
}
"""Options, and of the collectives that must be there op and axis."""


@needs_compiler
@pytest.mark.gpu_compile
@pytest.mark.parametrize("name", LAYOUTS)
def test_compiles_for_eight_gpus(tmp_path, name):
    arguments, expected = LAYOUTS[name]
    report = compiled(tmp_path, arguments)
    assert report.devices == 8
    found = sent(report)
    for op, axis in expected.items():
        assert axis in found.get(op, set()), found
    assert report.spans, "no collective is asynchronous"
