"""Every bench runs, at its smallest size: a figure that cannot be made again is worth nothing."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

from tests.xla_flags import QUICK_XLA

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMPILER = ROOT / os.environ.get("GPU_COMPILER", ".gpu-compiler")
SECONDS = 600
"""Limit of one script: far above what it takes on two cores."""

slow = pytest.mark.slow
SCRIPTS = {
    "decode": pytest.mark.reference,
    "expert_exchange": slow,
    "expert_memory": pytest.mark.gpu_compile,
    "gpu_programs": pytest.mark.gpu_compile,
    "import_memory": slow,
    "library_kernels": pytest.mark.library,
    "numerics": slow,
    "plan": slow,
    "scaling": slow,
    "speculation": slow,
    "step": pytest.mark.reference,
}
"""Scripts and the suite that runs each."""
OPTIONS = {
    "numerics": "--steps 4 --variants 1",
}
SCRIPTS_OF_RUNS = (
    "distill",
    "fp8_runs",
    "janus",
    "kernels",
    "r1",
    "recipe",
    "routing_replay",
    "search",
    "tiny",
)
"""Scripts that take minutes at any size: here they only start."""
ELSEWHERE = {"hf", "import_share", "gpu_proof"}
"""Run by `step` and `decode` under PyTorch's interpreter; by tests/test_import_share.py; and by
`make gpu-proof`, a phase of CI."""


def test_every_script_has_its_run():
    def has_main(path: pathlib.Path) -> bool:
        body = ast.parse(path.read_text()).body
        return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node) for node in body)

    scripts = {path.stem for path in (ROOT / "bench").glob("*.py") if has_main(path)}
    assert scripts == SCRIPTS.keys() | ELSEWHERE | set(SCRIPTS_OF_RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS_OF_RUNS)
def test_a_bench_of_whole_runs_starts(name):
    command = [sys.executable, "-m", f"bench.{name}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout


@pytest.mark.parametrize("name", [pytest.param(name, marks=SCRIPTS[name]) for name in SCRIPTS])
def test_a_bench_runs_at_its_smallest_size(name, tmp_path, request):
    options = OPTIONS.get(name, "").format(*[tmp_path] * 2).split()
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
    environment["XLA_FLAGS"] = QUICK_XLA
    if SCRIPTS[name].name == "reference":
        options += ["--interpreter", request.getfixturevalue("reference_python")]
    if SCRIPTS[name].name in ("gpu_compile", "library"):
        environment |= {"PYTHONPATH": str(COMPILER), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{name}", "--quick", *options], cwd=ROOT, env=environment,
        capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert any(
        line.startswith("|") or "GiB" in line or "bits/byte" in line
        for line in done.stdout.splitlines()
    )
