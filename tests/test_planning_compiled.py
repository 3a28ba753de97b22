# ruff: noqa: E501
"""Closed-form memory against compiled programs: what is carried within 0.5%, on ten layouts.

Programs are compiled for GPUs that are not there, each in a process of its own (`make gpu-compiler`).
How a compiled program's text is read is tested without it.
"""

import os
import pathlib

import pytest

from bench.plan import CARRIED, COMPILED
from planning.compiled import figures
from planning.memory import carried_by, memory_of
from programs.buffers import Buffer, alive_at_peak, carried, parameters, parts
from programs.collectives import Shape, parse

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMPILER = ROOT / os.environ.get("GPU_COMPILER", ".gpu-compiler")
TOTAL = 0.10
"""Of the total, between the closed form and the program; bench/results.md has every layout's."""

needs_compiler = pytest.mark.skipif(
    not (COMPILER / "jax_plugins").is_dir(),
    reason=f"{COMPILER.name} holds no compiler for GPUs; make gpu-compiler installs it",
)
TEN = tuple(name for name in COMPILED if "portable" not in name and "context" not in name)[:10]
QUICK = TEN[:2]


@needs_compiler
@pytest.mark.gpu_compile
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TEN]
)
def test_what_is_carried_is_what_the_program_carries(name, tmp_path):
    case = COMPILED[name].case()
    found = figures(case, str(tmp_path), print, whole=True)["parts"]
    closed = carried_by(case)
    theirs = sum(found[part] for part in CARRIED)
    assert sum(closed.values()) == pytest.approx(theirs, rel=5e-3), (closed, found)
    for part in ("weights", "gradients", "optimizer"):
        assert closed[part] == pytest.approx(found[part], rel=5e-3), part
    total = sum(found.values())
    assert memory_of(case).total == pytest.approx(total, rel=TOTAL)


# ---- reading a program --------------------------------------------------------------------------

STEP = """\
HloModule jit__step, is_scheduled=true

%layers (p: (s32[], f32[8,4], f32[3,8,4], f32[3,4,4])) -> (s32[], f32[8,4], f32[3,8,4], f32[3,4,4]) {
  %p = (s32[], f32[8,4]{1,0}, f32[3,8,4]{2,1,0}, f32[3,4,4]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %kept = f32[3,8,4]{2,1,0} get-tuple-element(%p), index=2
  %w = f32[3,4,4]{2,1,0} get-tuple-element(%p), index=3
  %y = f32[8,4]{1,0} fusion(%x, %w), kind=kLoop, calls=%f
  %new = f32[3,8,4]{2,1,0} fusion(%kept, %x), kind=kLoop, calls=%g
  ROOT %t = (s32[], f32[8,4]{1,0}, f32[3,8,4]{2,1,0}, f32[3,4,4]{2,1,0}) tuple(%i, %y, %new, %w)
}

%micro (q: (s32[], f32[3,4,4], f32[3,4,4], bf16[3,4,4])) -> (s32[], f32[3,4,4], f32[3,4,4], bf16[3,4,4]) {
  %q = (s32[], f32[3,4,4]{2,1,0}, f32[3,4,4]{2,1,0}, bf16[3,4,4]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %sum = f32[3,4,4]{2,1,0} get-tuple-element(%q), index=1
  %v = f32[3,4,4]{2,1,0} get-tuple-element(%q), index=2
  %half = bf16[3,4,4]{2,1,0} get-tuple-element(%q), index=3
  %z = f32[8,4]{1,0} constant({...})
  %empty = f32[3,8,4]{2,1,0} constant({...})
  %in = (s32[], f32[8,4]{1,0}, f32[3,8,4]{2,1,0}, f32[3,4,4]{2,1,0}) tuple(%j, %z, %empty, %v)
  %forward = (s32[], f32[8,4]{1,0}, f32[3,8,4]{2,1,0}, f32[3,4,4]{2,1,0}) while(%in), condition=%c, body=%layers, metadata={op_name="jit(_step)/while/body/jvp()/while"}, backend_config={"known_trip_count":{"n":"3"}}
  %add = f32[3,4,4]{2,1,0} fusion(%sum, %forward), kind=kLoop, calls=%h
  ROOT %u = (s32[], f32[3,4,4]{2,1,0}, f32[3,4,4]{2,1,0}, bf16[3,4,4]{2,1,0}) tuple(%j, %add, %v, %half)
}

ENTRY %main (a: f32[3,4,4], m: bf16[3,4,4], t: s32[2,8]) -> f32[3,4,4] {
  %a = f32[3,4,4]{2,1,0} parameter(0), metadata={op_name="state[\\'params\\'][\\'w\\']"}
  %m = bf16[3,4,4]{2,1,0} parameter(1), metadata={op_name="state[\\'opt\\'][0].mu[\\'w\\']"}
  %t = s32[2,8]{1,0} parameter(2), metadata={op_name="batch[\\'tokens\\']"}
  %zero = s32[] constant(0)
  %zeros = f32[3,4,4]{2,1,0} broadcast(%zero), dimensions={}
  %copy = bf16[3,4,4]{2,1,0} convert(%a)
  %start = (s32[], f32[3,4,4]{2,1,0}, f32[3,4,4]{2,1,0}, bf16[3,4,4]{2,1,0}) tuple(%zero, %zeros, %a, %copy)
  %loop = (s32[], f32[3,4,4]{2,1,0}, f32[3,4,4]{2,1,0}, bf16[3,4,4]{2,1,0}) while(%start), condition=%c, body=%micro, backend_config={"known_trip_count":{"n":"2"}}
  ROOT %r = f32[3,4,4]{2,1,0} get-tuple-element(%loop), index=1
}
"""
WEIGHT, KEPT = 3 * 4 * 4 * 4, 3 * 8 * 4 * 4


def test_loops_say_what_a_step_carries():
    program = parse(STEP)
    assert parameters(program) == {"weights": WEIGHT, "optimizer": WEIGHT // 2, "other": 64}
    found = carried(program, pipeline=False)
    assert found.weights == WEIGHT // 2, "held in bf16 beside the parameter"
    assert found.gradients == WEIGHT
    assert found.stash == KEPT


def test_the_loop_of_the_loss_over_blocks_leaves_nothing_for_the_backward_pass():
    """It writes an entry per block of tokens, as a loop over layers writes one per layer."""
    loop = next(line for line in STEP.splitlines() if "%forward = " in line)
    blocks = loop.replace("%forward", "%blocks")
    both = STEP.replace(loop, f"{loop}\n{blocks}")
    loss = STEP.replace(loop, f"{loop}\n{blocks.replace('jvp()/while', 'jvp()/shard_map/while')}")
    assert carried(parse(both), pipeline=False).stash == 2 * KEPT
    assert carried(parse(loss), pipeline=False) == carried(parse(STEP), pipeline=False)


BUFFERS = """\
allocation 0: size 192, page 0, parameter 0, shape |f32[3,4,4]| at ShapeIndex {}:
 value: <1 a @0> (size=192,offset=0): f32[3,4,4]{2,1,0}
allocation 1: size 600, page 0, preallocated-temp:
 value: <2 rows @0> (size=256,offset=0): f32[16,4]{1,0}
 value: <3 same @0> (size=256,offset=0): f32[16,4]{1,0}
 value: <4 late @0> (size=300,offset=0): f32[75]{0}
 value: <5 loop{1} (phi) @0> (size=192,offset=300): f32[3,4,4]{2,1,0}
"""
LIVE = """\
  BufferLiveRange:
    a{}:0-9
    rows{}:1-2
    same{}:2-3
    late{}:5-6
    loop{1}:0-4
"""


def test_what_is_alive_at_the_peak_is_counted_once_per_place():
    alive = alive_at_peak(BUFFERS, LIVE)
    assert sorted(place.size for place in alive) == [192, 256]
    assert Buffer(0, 256, Shape("f32", (16, 4))) in alive


def test_parts_add_up_and_rows_belong_to_the_exchange():
    found = parts(parse(STEP), 352, 1500, alive_at_peak(BUFFERS, LIVE), [(16, 20)], False)
    assert sum(found.values()) == 352 + 1500
    assert found["exchange"] == 256
    assert found["weights"] == WEIGHT + WEIGHT // 2
