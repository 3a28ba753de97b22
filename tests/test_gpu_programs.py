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

import jax
import pytest

from bench.gpu_programs import FSDP, PAPER, Seconds, main, mesh_of, show
from programs.overlap import read_spans
from programs.scheduled import read_allocations, until_scheduled
from programs.step import Report, read_calls
from sharding.config import MeshConfig

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
    return Report(**json.loads(report.read_text())["report"])


def sent(report: Report) -> dict[str, set[str]]:
    """Axes by op, in loops of known length or not."""
    found: dict[str, set[str]] = {}
    for op, axes, _, _ in report.collectives:
        found.setdefault(op, set()).add(axes.removesuffix("?"))
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
    "fsdp": ("--mesh fsdp=8", {"all-gather": "fsdp", "reduce-scatter": "fsdp"}),
    "sequence": ("--mesh tensor=4,expert=2,sequence=true", {"reduce-scatter": "tensor"}),
}
"""Options, and of the collectives that must be there op and axis. `expert` is a slow test: the cube
has its exchange, and `ragged` its cut."""


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("cubee", "unknown layout 'cubee'"),
        ("experts=8", "no field 'experts'; there are pipe"),
        ("expert=eight", "--mesh expert=eight: give a number"),
        ("expert=8,exchange=raged", "exchange=raged: there are dense, ragged"),
        ("expert=8,overlap=ture", "overlap=ture: there are true, false"),
        ("pipe=2,expert=4,schedule=foo", "schedule=foo: there are gpipe"),
        ("expert=8 --nodes 0", "--nodes is 0; it must be 1 or more"),
    ],
)
def test_a_bad_layout_is_one_line(capsys, monkeypatch, mesh, message):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # other tests of this process
    with pytest.raises(SystemExit) as ended:
        main(["--mesh", *mesh.split()])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("gpu_programs: ")
    assert error.count("\n") == 1
    assert message in error


def test_what_a_report_says_is_explained_and_short(capsys):
    path = "jit(_step)/transpose(jvp())/while/body/eval_jaxpr/shard_map/all_to_all"
    spans = [("all-to-all", path, products, 0) for products in (0, 2, 5)] * 20
    spans.append(("all-gather", "jit(_step)/jvp()/while/body/dot_general", 3, 1))
    collectives = [("all-to-all", "expert?", 4, 2**30), ("all-reduce", "expert", 1, 2**20)]
    show(Report(8, 2**30, 2**31, collectives, spans, {"fusion kLoop": 3}, {}), Seconds(1, 2, 3))
    said = capsys.readouterr().out
    assert "?  in a loop whose length the program does not tell" in said
    assert "~" not in said
    assert "41 of 61 asynchronous collectives have matrix products" in said
    backward = next(line for line in said.splitlines() if "backward: shard_map/all_to_all" in line)
    assert "40 of 60, 5 products at most; beside another micro batch's: 0" in backward
    assert "jit(" not in said
    assert len(said.splitlines()) < 20


@needs_compiler
@pytest.mark.gpu_compile
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "expert" else n for n in LAYOUTS]
)
def test_compiles_for_eight_gpus(tmp_path, name):
    arguments, expected = LAYOUTS[name]
    report = compiled(tmp_path, arguments)
    assert report.devices == 8
    found = sent(report)
    for op, axis in expected.items():
        assert axis in found.get(op, set()), found
    assert report.spans, "no collective is asynchronous"


@needs_compiler
@pytest.mark.gpu_compile
def test_two_micro_batches_side_by_side_hide_the_exchange(tmp_path):
    """Forward and backward: an exchange that is under way while the other one is multiplied."""
    arguments = "--config v2_lite --mesh expert=8,overlap=true --micro-batches 4"
    report = compiled(tmp_path, arguments)
    assert passes_that_hide_the_exchange(report) == {"forward", "backward"}, report.spans


@needs_compiler
@pytest.mark.gpu_compile
def test_dualpipe_hides_the_exchange(tmp_path):
    """Where a forward and a backward pass share a tick, by each of them; every slot is taken."""
    arguments = "--mesh pipe=2,expert=4,schedule=dualpipe --micro-batches 4 --moe-layers 4"
    report = compiled(tmp_path, arguments)
    assert "pipe" in sent(report)["collective-permute"]
    assert passes_that_hide_the_exchange(report) == {"forward", "backward"}, report.spans


def passes_that_hide_the_exchange(report: Report) -> set[str]:
    """Whose all-to-all is under way while products of another micro batch are computed."""
    return {
        "backward" if "transpose" in source else "forward"
        for op, source, _, others in report.spans
        if op == "all-to-all" and others > 0
    }


@needs_compiler
@pytest.mark.gpu_compile
@pytest.mark.parametrize("mesh", ["data=1 --per-node 1", "cube"])
def test_small_trains_through_the_kernels(tmp_path, mesh):
    """Attention with both gradients, seven kernels of the experts, the head; on several GPUs each
    in a region of its own."""
    report = compiled(
        tmp_path,
        f"--no-memory-only --config small --kernels mosaic --mesh {mesh} --micro-batches 2",
    )
    # A dense stack, a MoE stack and an MTP module have attention; the last two have experts.
    assert report.calls["mosaic_gpu_v2"] >= 3 * 3 + 2 * 7 + 2, report.calls
    assert "__cublas$gemm" in report.calls or "__cublas$lt$matmul" in report.calls, report.calls


@needs_compiler
@pytest.mark.gpu_compile
def test_what_is_read_early_is_what_is_compiled(tmp_path):
    """Memory, collectives and spans do not wait for machine code."""
    early, whole = (
        compiled(tmp_path, f"--mesh data=1 --per-node 1 --moe-layers 1 {more}")
        for more in ("", "--no-memory-only")
    )
    assert early.parts
    assert not whole.parts  # told from what XLA writes on the way
    assert early._replace(parts={}) == whole


# ---- the real model -----------------------------------------------------------------------------


@needs_compiler
@pytest.mark.slow
@pytest.mark.gpu_compile
def test_v3_compiles_for_2048_gpus(tmp_path):
    """Real widths, 4 of 58 MoE layers: memory is that of the whole one in bench/results.md."""
    report = compiled(tmp_path, f"{FSDP} --moe-layers 4")
    assert report.devices == 2048
    assert sent(report)["all-to-all"] >= {"expert", "expert_nodes"}
    assert report.arguments + report.temporaries < H200_BYTES, report


@needs_compiler
@pytest.mark.slow
@pytest.mark.gpu_compile
def test_v3_compiles_in_the_papers_layout(tmp_path):
    report = compiled(tmp_path, f"{PAPER} 32")
    assert report.devices == 2048
    assert {"pipe"} <= sent(report)["collective-permute"]
    assert sent(report)["all-to-all"] >= {"expert", "expert_nodes"}
    assert report.arguments + report.temporaries < H200_BYTES, report


# ---- what reads the text ------------------------------------------------------------------------

SCHEDULED = """\
HloModule jit_step, is_scheduled=true

%body (c: (s32[], f32[8,4], f32[8,4], f32[4,4])) -> (s32[], f32[8,4], f32[8,4], f32[4,4]) {
  %c = (s32[], f32[8,4]{1,0}, f32[8,4]{1,0}, f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %a = f32[8,4]{1,0} get-tuple-element(%c), index=1
  %b = f32[8,4]{1,0} get-tuple-element(%c), index=2
  %w = f32[4,4]{1,0} get-tuple-element(%c), index=3
  %start = ((f32[8,4]{1,0}), f32[8,4]{1,0}) all-to-all-start(%a), dimensions={0}
  %other = f32[8,4]{1,0} custom-call(%b, %w), custom_call_target="__cublas$gemm"
  %own = f32[8,4]{1,0} dot(%a, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %mixed = f32[8,4]{1,0} dot(%own, %other), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %done = f32[8,4]{1,0} all-to-all-done(%start)
  %late = f32[8,4]{1,0} dot(%b, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[8,4]{1,0}, f32[8,4]{1,0}, f32[4,4]{1,0}) tuple(%i, %done, %late, %w)
}

ENTRY %main (c: (s32[], f32[8,4], f32[8,4], f32[4,4])) -> (s32[]) {
  %c.1 = (s32[], f32[8,4]{1,0}, f32[8,4]{1,0}, f32[4,4]{1,0}) parameter(0)
  ROOT %loop = (s32[]) while(%c.1), body=%body
}
"""


def test_spans_tell_whose_products_they_hold():
    (span,) = read_spans(SCHEDULED)
    assert (span.op, span.products) == ("all-to-all", ("other", "own", "mixed"))
    assert span.of_others == ("other",), "weights, which pass through, tie nothing together"


def test_elements_of_tuples_may_be_folded_into_operands():
    """As XLA dumps a program: `%c#1` instead of a line for the second element of `%c`."""
    folded = [line for line in SCHEDULED.splitlines() if "get-tuple-element" not in line]
    text = "\n".join(folded)
    for index, name in enumerate(("i", "a", "b", "w")):
        text = text.replace(f"%{name})", f"%c#{index})").replace(f"%{name},", f"%c#{index},")
    assert read_spans(text) == read_spans(SCHEDULED)


def test_calls_of_libraries_kernels_and_fusions_are_counted():
    text = """
  %f = f32[4] fusion(%a), kind=kLoop, calls=%c
  %g = f32[4] fusion(%a), kind=kLoop, calls=%d
  %h = f32[4] fusion(%a), kind=kInput, calls=%e
  %k = f32[4] custom-call(%a), custom_call_target="mosaic_gpu_v2", backend_config={}
"""
    assert read_calls(text) == {"mosaic_gpu_v2": 1, "fusion kLoop": 2, "fusion kInput": 1}


def test_unscheduled_text_is_refused():
    with pytest.raises(ValueError, match="not scheduled"):
        read_spans(SCHEDULED.replace(", is_scheduled=true", ""))


ALLOCATIONS = """\
BufferAssignment:
allocation 0: size 4096, page 0, parameter 1, shape |f32[32,32]| at ShapeIndex {}:
 value: <7 p.1 @0> (size=4096,offset=0): f32[32,32]{1,0}
allocation 1: size 128, page 0, parameter 0, shape |f32[32]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 1, page 0, thread-local:
allocation 3: size 1000000, page 0, preallocated-temp:
"""


def test_allocations_are_read_by_their_kind():
    assert read_allocations(ALLOCATIONS) == (4096 + 128, 1_000_000)


def test_a_program_for_a_cpu_is_not_read_early():
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    with pytest.raises(ValueError, match="not a program for GPUs"):
        until_scheduled(lowered, {})


def test_mesh_options():
    mesh = mesh_of("expert=8,overlap=true,exchange=ragged,exchange_capacity=1.5")
    assert mesh == MeshConfig(expert=8, overlap=True, exchange="ragged", exchange_capacity=1.5)
    with pytest.raises(ValueError, match="no field 'depth'"):
        mesh_of("depth=2")


def test_compiler_is_that_of_the_locked_jax():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    locked = (ROOT / "requirements.lock").read_text().split()
    versions = dict(pin.split("==") for pin in [*extra["gpu-compiler"], *locked] if "==" in pin)
    assert versions["jax-cuda13-plugin"] == versions["jax-cuda13-pjrt"] == versions["jaxlib"]
