"""A step's workspace: what XLA keeps alive at its peak besides what is carried.

XLA decides how many buffers of rows overlap and which copies live. Which terms there are is known
from the program (`Terms`); how often each counts is learned from compiled programs, once per kind
of step, by `python -m bench.plan --learn`. COUNTS says when, and of which version.
"""

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


EXCHANGE = ("sorted_in", "sorted_hidden", "received", "across")

LEARNED = "not yet"
COUNTS: dict[str, dict[str, float]] = {}
ERRORS: dict[str, tuple[float, float, int]] = {}


def kind_of(case: Any) -> str:
    """Class of a layout: how its step is built."""
    mesh, kernels = case.mesh, case.recipe.kernels
    way = "pipeline" if mesh.pipe > 1 else "sequential"
    paired = " in pairs" if mesh.schedule.startswith("dualpipe") and mesh.pipe > 1 else ""
    return f"{way}{paired}, {'kernels' if kernels.attention == 'mosaic' else 'portable'}"


def workspace_of(terms: Terms, case: Any) -> Workspace:
    """Workspace of a step with these sizes."""
    kind = kind_of(case)
    counts = COUNTS.get(kind) or dict.fromkeys(Terms._fields, 1.0)
    sizes = terms._asdict()
    parts = {name: counts.get(name, 0.0) * size for name, size in sizes.items()}
    exchange = sum(parts[name] for name in EXCHANGE)
    low, high, programs = ERRORS.get(kind, (0.0, 0.0, 0))
    rest = sum(parts.values()) - exchange + counts.get("fixed", 0.0)
    return Workspace(exchange, rest, kind, low, high, programs)
