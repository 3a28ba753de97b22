"""A step's workspace: what XLA keeps alive at its peak besides what is carried.

XLA decides how many buffers of rows overlap and which copies live. Which terms there are is known
from the program (`terms_of`); how often each counts is learned from compiled programs, once per
kind of step, by `python -m bench.plan --learn`; `learned.json` says when, and of which version.
"""

import json
import math
import pathlib
from typing import Any, NamedTuple

import jax

from model.blueprint import blueprint
from planning.case import Case
from sharding.sizes import device_bytes


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


FIXED = 32 * 2**20
"""cuBLAS's own workspace, bytes (XLA's constant for Hopper)."""
_FILE = pathlib.Path(__file__).with_name("learned.json")
LEARNED: dict[str, Any] = json.loads(_FILE.read_text()) if _FILE.is_file() else {}
"""When, of which version, the counts by class of layout, the errors of the closed form, and the
programs that they are of."""
GUESS = {"rows": 3.0, "activations": 2.0, "attention": 1.0, "layers": 2.0, "vocabulary": 1.0,
         "gathered": 1.0, "gradients": 0.5, "alone": 1.0, "fixed": 1.0}  # fmt: skip
"""Counts where no program of a class was compiled."""


def kind_of(case: Case) -> str:
    """Class of a layout: how its step is built."""
    mesh, kernels = case.mesh, case.recipe.kernels
    way = "pipeline" if mesh.pipe > 1 else "sequential"
    by = "portable" if kernels.attention == "portable" else "kernels"
    again = "" if case.recipe.remat != "none" else ", nothing recomputed"
    dense = "" if case.model.has_experts else ", dense"
    return f"{way}, {by}{dense}{again}"


def terms_of(case: Case) -> dict[str, float]:
    """Bytes that a step's workspace is made of, by groups that are counted together: a class has
    too few programs to tell more apart."""
    model, mesh, rows = case.model, case.mesh, case.exchange
    item, d = case.recipe.activation_dtype.itemsize, model.hidden_size
    side_by_side = 1 + mesh.overlap
    tokens = case.tokens * side_by_side
    f, heads = model.expert_ffn_size // mesh.tensor, model.num_heads // mesh.tensor
    inner = model.dense_ffn_size // mesh.tensor * (model.num_dense_layers > 0)
    kept = sum(k.device_bytes(case.layout, case.rows * side_by_side) for k in case.kept())
    # Weights of a layer with experts, and of one without, in the type of activations.
    weights = _layer_parameters(case) + 3 * d * inner * (model.num_moe_layers > 0)
    square = case.train.seq_len**2 // mesh.context * heads * case.rows
    received = rows.received * (mesh.expert > 1)
    vocabulary = 4 * model.vocab_size // (mesh.tensor * mesh.pipe) * d
    return {
        # Sorted by expert, inside of the experts, and received from other devices and nodes.
        "rows": item * (rows.sorted * (d + f) + (received + rows.across) * d),
        # The stream, queries and values, insides of a dense layer, what a layer keeps, scores.
        "activations": item * tokens * (d + heads * (model.qk_head_dim + model.v_head_dim) + inner)
        + kept
        + 4 * model.num_experts * tokens,
        # Blocks of probabilities, fp32.
        "attention": square * 4 * (case.recipe.kernels.attention == "portable") * 17 // 32,
        "layers": item * weights,
        # The head or the embedding in fp32.
        "vocabulary": vocabulary,
        # The same where `fsdp` cuts it, and every micro batch gathers it.
        "gathered": vocabulary * (mesh.fsdp > 1 and mesh.pipe == 1),
        # A gradient of all weights as they are stored.
        "gradients": device_bytes(case.state["params"]),
        "alone": alone(case),
        "fixed": FIXED,
    }


GROUPS = tuple(GUESS)


def stacks(case: Case) -> tuple[tuple[str, int], ...]:
    """Stacks of layers and how many there are of each."""
    model = case.model
    return ("dense_layers", model.num_dense_layers), ("moe_layers", model.num_moe_layers)


def alone(case: Case) -> int:
    """Bytes that stacks of one layer keep, without a pipeline."""
    if case.mesh.pipe > 1:
        return 0
    rows = case.rows * (1 + case.mesh.overlap)
    single = [stack for stack, count in stacks(case) if count == 1]
    return sum(k.device_bytes(case.layout, rows) for stack in single for k in case.kept(stack))


def _layer_parameters(case: Case) -> int:
    """Parameters of a layer, with experts where there are any, that a device computes with."""
    model, mesh = case.model, case.mesh
    of_layer = blueprint(model).params[model.stack]
    total = sum(math.prod(x.shape[1:]) for x in jax.tree.leaves(of_layer))
    routed = model.num_experts * 3 * model.hidden_size * model.expert_ffn_size
    return (total - routed) // mesh.tensor + routed // (mesh.expert * mesh.tensor)


def workspace_of(case: Case) -> Workspace:
    """Workspace of a step."""
    kind = kind_of(case)
    counts = LEARNED.get("counts", {}).get(kind, GUESS)
    parts = {group: counts[group] * size for group, size in terms_of(case).items()}
    low, high, programs = LEARNED.get("errors", {}).get(kind, (0.0, 0.0, 0))
    exchange = parts.pop("rows")
    return Workspace(exchange, sum(parts.values()), kind, low, high, programs)
