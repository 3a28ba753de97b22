"""A step's workspace: what XLA keeps alive at its peak besides what is carried.

XLA decides how many buffers of rows overlap and which copies live. Which terms there are is known
from the program (`Terms`); how often each counts is learned from compiled programs, once per kind
of step, by `python -m bench.plan --learn`; `learned.json` says when, and of which version.
"""

import json
import pathlib
from typing import Any, NamedTuple


class Terms(NamedTuple):
    """Sizes, bytes."""

    sorted_in: int
    """Rows sorted by expert, [M, D]."""
    sorted_hidden: int
    """The same inside of the experts, [M, F]."""
    received: int
    """Rows received from other devices, [Q, D]."""
    across: int
    """Rows received from other nodes."""
    stream: int
    """The residual stream of a micro batch, [N, D]."""
    heads: int
    """Queries and values of all heads."""
    layer: int
    """Weights of a MoE layer in the type of activations."""
    dense: int
    """Weights of a dense layer's MLP."""
    hidden: int
    """Activations inside of it."""
    vocabulary: int
    """The head or the embedding in fp32."""
    attention: int
    """Blocks of probabilities of portable attention, fp32."""
    kept: int
    """What one layer keeps."""
    gradients: int
    """A gradient of all weights as they are stored, fp32."""
    experts: int
    """Router scores, fp32."""
    alone: int
    """What stacks of one layer keep."""


class Workspace(NamedTuple):
    """A step's workspace and how sure it is."""

    exchange: float
    """Bytes of rows."""
    rest: float
    """Bytes besides."""
    kind: str
    """Class of layout that the counts belong to."""
    low: float
    """Closed form over compiled total, lowest of the class, minus 1."""
    high: float
    """The highest."""
    programs: int
    """Compiled programs of the class."""


GROUPS: dict[str, tuple[str, ...]] = {
    "rows": ("sorted_in", "sorted_hidden", "received", "across"),
    "activations": ("stream", "heads", "hidden", "kept", "experts"),
    "attention": ("attention",),
    "layers": ("layer", "dense"),
    "vocabulary": ("vocabulary",),
    "gradients": ("gradients",),
    "alone": ("alone",),
    "fixed": (),
}
"""Terms that are counted together: a class has too few programs to tell more apart."""
FIXED = 32 * 2**20
"""cuBLAS's own workspace, bytes (XLA's constant for Hopper)."""


def _learned() -> dict[str, Any]:
    path = pathlib.Path(__file__).with_name("learned.json")
    return json.loads(path.read_text()) if path.is_file() else {}


LEARNED = _learned()
"""When, of which version, the counts by class of layout, and the errors of the closed form."""
GUESS = {"rows": 3.0, "activations": 2.0, "attention": 1.0, "layers": 2.0, "vocabulary": 1.0,
         "gradients": 0.5, "alone": 1.0, "fixed": 1.0}  # fmt: skip
"""Counts where no program of a class was compiled."""


def kind_of(case: Any) -> str:
    """Class of a layout: how its step is built."""
    mesh, kernels = case.mesh, case.recipe.kernels
    way = "pipeline" if mesh.pipe > 1 else "sequential"
    by = "kernels" if kernels.attention == "mosaic" else "portable"
    again = "" if case.recipe.remat != "none" else ", nothing recomputed"
    return f"{way}, {by}{again}"


def sizes_of(terms: Terms) -> dict[str, float]:
    """Bytes of every group."""
    sizes = terms._asdict()
    found = {group: float(sum(sizes[name] for name in names)) for group, names in GROUPS.items()}
    return found | {"fixed": float(FIXED)}


def workspace_of(terms: Terms, case: Any) -> Workspace:
    """Workspace of a step with these sizes."""
    kind = kind_of(case)
    counts = LEARNED.get("counts", {}).get(kind, GUESS)
    parts = {group: counts[group] * size for group, size in sizes_of(terms).items()}
    low, high, programs = LEARNED.get("errors", {}).get(kind, (0.0, 0.0, 0))
    exchange = parts.pop("rows")
    return Workspace(exchange, sum(parts.values()), kind, low, high, programs)
