"""Closed forms against programs whose figures were recorded when the workspace was learned.

`python -m bench.plan --learn` keeps in `planning/learned.json`, of every layout of
`bench/plan.py:COMPILED` and `LARGE`, what its program takes and sends;
tests/test_planning_compiled.py compiles some of them again.
"""

import jax
import pytest

from bench.plan import CARRIED, COMPILED, LARGE
from planning.memory import carried_by, memory_of
from planning.workspace import LEARNED
from sharding.config import AXES
from sharding.pipeline.schedule import SCHEDULES

RECORDS, LAYOUTS = LEARNED.get("programs", {}), COMPILED | LARGE
pytestmark = pytest.mark.skipif(not RECORDS, reason="none are kept yet: bench.plan --learn")
CARRIED_WITHIN = 5e-3
WITHIN, PORTABLE_WITHIN, BELOW = 0.05, 0.10, 0.03
"""Of the total: with kernels, with XLA's own attention, and how far below the program at most."""


def test_records_are_of_this_compiler_and_of_all_axes_and_schedules():
    assert LEARNED["jax"] == jax.__version__, LEARNED["script"]
    assert RECORDS.keys() <= LAYOUTS.keys()
    assert len(RECORDS) >= 20
    meshes = [LAYOUTS[name].case().mesh for name in RECORDS]
    for axis in AXES:
        assert any(getattr(mesh, axis) > 1 for mesh in meshes), axis
    assert {mesh.schedule for mesh in meshes if mesh.pipe > 1} == set(SCHEDULES)


@pytest.mark.parametrize("name", RECORDS)
def test_memory_is_what_the_program_takes(name):
    """Carried within 0.5%, part by part; the total within 5% (10% with XLA's own attention), and
    never 3% below."""
    case, parts = LAYOUTS[name].case(), RECORDS[name]["parts"]
    closed, memory = carried_by(case), memory_of(case)
    assert sum(closed.values()) == pytest.approx(
        sum(parts[part] for part in CARRIED), rel=CARRIED_WITHIN
    ), (closed, parts)
    error = memory.total / sum(parts.values()) - 1
    portable = case.recipe.kernels.attention == "portable"
    assert -BELOW <= error <= (PORTABLE_WITHIN if portable else WITHIN), memory
