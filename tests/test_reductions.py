"""No sum over tokens, experts, micro batches or devices in less than fp32, but for those on a list.

The jaxpr of a whole step is walked: sums, scatter-adds, cumulative sums, sums over devices, and
matrix products whose contraction is over tokens. A product's own sum over a width is fp32 inside of
the product, whatever the type of its result.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import source_info_util

from model.recipe import Recipe
from sharding.config import MeshConfig
from tests.layout_helpers import KNOBS, LEAN, MODEL, layout_of, take_step
from training.config import TrainConfig
from training.step import Trainer

SMALL = {jnp.dtype(t) for t in (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn)}
COLLECTIVE = {
    "psum": "psum", "psum_invariant": "psum", "reduce_scatter": "reduce_scatter",
    "unreduced_psum": "psum", "unreduced_reduce_scatter": "reduce_scatter",
}  # fmt: skip
SUMS = {"reduce_sum", "cumsum", "cumlogsumexp", "scatter-add", "reduce_window_sum", *COLLECTIVE}
TOKENS = {29, 58, 116, 232}
"""Tokens of a row and of 2, 4 and 8 rows; no width is one of them."""
TRAIN = TrainConfig(steps=10, seq_len=29, batch_size=8, micro_batch_size=4, dtype="bfloat16")
LISTED = {
    ("dot_general", "portable.py"): "attention's weighted sum of values: one product, whose result "
    "nothing adds up",
    ("psum over tensor", ""): "parts of an activation, or of its gradient, have the activation's "
    "type on the wire (docs/numerics.md); of the embedding's rows one part is not 0",
    (
        "psum over pipe+tensor",
        "",
    ): "the same in a pipeline, whose ranks have parts of the vocabulary",
    ("psum over pipe", ""): "a broadcast: the parts of all ranks but one are 0",
    (
        "reduce_scatter over expert_nodes+expert",
        "",
    ): "exchange=gather adds up at most K activations "
    "of other devices in their type; the other exchanges add in fp32",
}
"""Sums in a small type that stay, by operation and file (sums over devices: any), with the
reason."""


def walk(jaxpr, visit) -> None:
    """Every equation, those of inner programs too."""
    for equation in jaxpr.eqns:
        visit(equation)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    walk(inner, visit)


def place(equation) -> str:
    """File and function of the project that an equation comes from."""
    for frame in source_info_util.user_frames(equation.source_info.traceback):
        return f"{frame.file_name.rsplit('/', 1)[-1]}:{frame.function_name.rsplit('.', 1)[-1]}"
    return "?"


def sums_of(jaxpr) -> collections.Counter[tuple[str, str]]:
    """Sums in less than fp32, by operation and place."""
    found: collections.Counter[tuple[str, str]] = collections.Counter()

    def visit(equation):
        name, shapes = equation.primitive.name, [v.aval for v in equation.invars]
        types = {getattr(v.aval, "dtype", None) for v in equation.outvars}
        if not types & SMALL:
            return
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            if not {shapes[0].shape[axis] for axis in contracted} & TOKENS:
                return
        elif name not in SUMS:
            return
        elif name == "reduce_sum" and shapes[0].size == equation.outvars[0].aval.size:
            return  # over an axis of one entry
        over = equation.params.get("axes", equation.params.get("axis_name", ()))
        if name in COLLECTIVE:
            name = f"{COLLECTIVE[name]} over {'+'.join((over,) if isinstance(over, str) else over)}"
        found[name, place(equation)] += 1

    walk(jaxpr, visit)
    return found


def small_sums(trainer: Trainer) -> collections.Counter[tuple[str, str]]:
    """Those of a step."""
    train = trainer.train
    rows = train.micro_batch_size
    shape = (train.batch_size // rows, rows, train.seq_len + 1)
    batch = {"tokens": jax.ShapeDtypeStruct(shape, np.int32)}
    return sums_of(trainer.step.trace(trainer.abstract_state, batch, KNOBS).jaxpr.jaxpr)


RECIPES = {
    "bf16": Recipe("bfloat16"),
    "bf16, selective": Recipe("bfloat16", "selective"),
    "fp8": Recipe("bfloat16", fp8=True, stash="e5m6"),
}
MESHES = {
    "one device": MeshConfig(),
    "cube": MeshConfig(fsdp=2, expert=2, tensor=2),
    "context": MeshConfig(data=2, context=2),
    "gathered": MeshConfig(expert=2, exchange="gather"),
    "pipe": MeshConfig(pipe=2, schedule="1f1b"),
}
WIDE = dataclasses.replace(LEAN, hidden_size=128, num_heads=8, q_lora_rank=64, kv_lora_rank=32)
"""Wide enough for tiles of 128 to be full."""
TRAIN_WIDE = dataclasses.replace(TRAIN, seq_len=32, micro_batch_size=0)
RECIPES_OF_TYPES = {
    "bf16": Recipe("bfloat16"),
    "bf16, e5m6": Recipe("bfloat16", stash="e5m6"),
    "fp8": Recipe("bfloat16", fp8=True, stash="e5m6"),
}
DEFAULT = {("bf16", "cube"), ("fp8", "one device")}
CASES = [
    pytest.param(r, m, marks=[] if (r, m) in DEFAULT else pytest.mark.slow)
    for r in RECIPES
    for m in MESHES
]


def of_case(recipe: str, mesh: str) -> collections.Counter[tuple[str, str]]:
    train = dataclasses.replace(TRAIN, seq_len=28 if mesh == "context" else TRAIN.seq_len)
    return small_sums(Trainer(MODEL, train, RECIPES[recipe], layout_of(MESHES[mesh])))


@pytest.mark.parametrize(("recipe", "mesh"), CASES)
def test_sums_are_fp32(recipe, mesh):
    found = of_case(recipe, mesh)
    wrong = [f"{n} x {op} in {at}" for (op, at), n in found.items() if named(op, at) not in LISTED]
    assert not wrong, "\n".join(wrong)


def named(operation: str, at: str) -> tuple[str, str]:
    return operation, "" if " over " in operation else at.partition(":")[0]


@pytest.mark.slow
def test_the_list_has_no_entry_that_nothing_needs():
    used = {named(*key) for mesh in MESHES for key in of_case("bf16", mesh)}
    assert used == set(LISTED)


def test_the_walk_sees_a_sum_in_bf16():
    """The embedding as it was: a table that is cast before the look-up gets its gradient in bf16.
    And a weight's gradient, a sum over positions, and one that is fp32."""

    def loss(table, w, ids, x):
        y = table.astype(jnp.bfloat16)[ids] @ w.astype(jnp.bfloat16)
        return (y.sum() + jnp.cumsum(x, dtype=jnp.bfloat16).sum() + x.sum()).astype(jnp.float32)

    arrays = jnp.zeros((50, 8)), jnp.zeros((8, 3)), jnp.zeros(29, int), jnp.zeros(29)
    found = sums_of(jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*arrays).jaxpr.jaxpr)
    # jnp.sum itself adds in fp32.
    assert {op for op, _ in found} == {"scatter-add", "dot_general", "cumsum"}


# ---- recomputation -------------------------------------------------------------------------------


@functools.cache
def gradients(recipe: Recipe):
    train = dataclasses.replace(TRAIN_WIDE, dtype=recipe.dtype)
    return jax.device_get(take_step(model=WIDE, recipe=recipe, train=train).state["opt"])


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["selective", "full"])
@pytest.mark.parametrize("recipe", RECIPES_OF_TYPES.values(), ids=RECIPES_OF_TYPES)
def test_recomputation_gives_the_same_bits(recipe, remat):
    """By XLA's default roundings differ from program to program, and FP8 gradients by 21%. The
    gate's products are fp32 throughout, and XLA orders what is around them as each program has it:
    a few of its gradient's entries differ in the last place."""
    again = gradients(dataclasses.replace(recipe, remat=remat))

    def compare(path, got, want):
        if "router" in jax.tree_util.keystr(path):
            np.testing.assert_allclose(got, want, rtol=3e-7, atol=3e-7 * np.abs(want).max())
        else:
            np.testing.assert_array_equal(got, want, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, again, gradients(recipe))
