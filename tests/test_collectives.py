"""The collectives of the compiled step are what the layout promises.

First the reader (`programs/collectives.py`), on text whose answer is known. Then whole train steps
with AdamW on 8 emulated devices: what must hold for every layout, and the table of each against
`tests/golden/collectives/`. To write those anew, and see in the diff what changed:

    UPDATE_GOLDEN=1 pytest tests/test_collectives.py -m "slow or not slow"
"""

import dataclasses
import difflib
import functools
import math
import os
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from model.blueprint import blueprint
from model.recipe import Recipe
from programs.collectives import (
    Collective,
    group_axes,
    permuted_axes,
    read_collectives,
    read_flops,
    replica_groups,
    table,
)
from programs.step import lower
from sharding.config import MeshConfig
from sharding.mesh import axis_sizes, make_mesh
from tests.layout_helpers import KNOBS, MODEL, TRAIN, layout_of
from training.config import OptimizerConfig
from training.step import Trainer

# ---- the reader ---------------------------------------------------------------------------------

CUBE = types.SimpleNamespace(shape={"data": 2, "fsdp": 2, "tensor": 2})
GOLDEN = pathlib.Path(__file__).parent / "golden" / "collectives"
HLO = (GOLDEN / "sample.hlo").read_text()
"""Written by hand: every kind of computation, and most spellings."""


def test_collectives_of_a_text():
    """Loops multiply, branches add, an asynchronous pair is one, single devices are none."""
    lines = table(read_collectives(HLO, CUBE)).splitlines()  # pyright: ignore[reportArgumentType]
    assert [line.split() for line in lines] == [
        ["op", "axes", "count", "bytes", "largest"],
        ["all-gather", "data+tensor", "1", str(4 * 4 * 16 * 4), "f32[16,16]"],
        ["all-reduce", "tensor", "5", str(5 * 4 * 16 * 4), "f32[4,16]"],
        ["all-reduce", "tensor?", "1", str(4 * 16 * 4), "f32[4,16]"],
        ["all-to-all", "tensor", "1", str(2 * 4 * 16 * 4), "f32[4,16]"],
        ["collective-permute", "fsdp", "1", str(4 * 16 * 4), "f32[4,16]"],
        ["reduce-scatter", "fsdp+tensor", "1", str(8 * 16 * 2), "bf16[8,16]"],
    ]
    sources = {c.instruction.source for c in read_collectives(HLO, CUBE)}  # pyright: ignore
    assert sources == {"", "jit(step)/psum"}


def test_flops_of_a_text():
    """Five times the product in the loop, once the call of cuBLAS; the open loop as asked."""
    product = 2 * 4 * 4 * 16
    assert read_flops(HLO) == 6 * product
    assert read_flops(HLO, open_trips=2.5) == 8.5 * product


@pytest.mark.parametrize(
    ("spelling", "axes", "whole"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",), True),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), True),
        ("{}", ("data", "fsdp", "tensor"), True),
        ("[4,2]<=[8]", ("tensor",), True),
        ("[4,2]<=[2,4]T(1,0)", ("data",), True),
        ("[4,2]<=[2,2,2]T(2,0,1)", ("fsdp",), True),
        ("[2,4]<=[2,2,2]T(2,1,0)", ("data", "fsdp"), True),
        ("[8,1]<=[8]", (), True),
        ("mesh['x'=2,'y'=2,'z'=2] {'x','z'}", ("data", "tensor"), True),
        ("mesh['x'=8] {'x':(2)2}", ("fsdp",), True),
        ("{{0,3},{1,2},{4,7},{5,6}}", ("fsdp", "tensor"), False),
    ],
)
def test_axes_of_replica_groups(spelling, axes, whole):
    groups = replica_groups(f", replica_groups={spelling}, dimensions={{0}}", 8)
    assert group_axes(groups, CUBE.shape) == (axes, whole)


def test_groups_in_an_unknown_spelling_are_refused():
    with pytest.raises(ValueError, match="unknown spelling"):
        replica_groups("replica_groups=@mesh", 8)
    with pytest.raises(ValueError, match="no ENTRY"):
        read_collectives("HloModule empty", CUBE)  # pyright: ignore[reportArgumentType]


def test_axes_of_permutes():
    sizes = {"pipe": 4, "tensor": 2}
    up = tuple((2 * p + t, 2 * ((p + 1) % 4) + t) for p in range(4) for t in range(2))
    assert permuted_axes(up, sizes) == (("pipe",), True)
    assert permuted_axes(up[:-2], sizes) == (("pipe",), True), "the last stage sends nothing"
    assert permuted_axes(((0, 5), (5, 3)), sizes) == (("pipe", "tensor"), False)


def test_a_program_whose_collectives_are_known():
    """Every primitive over its own axis, one of them in a loop."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])

    def on_device(x):  # [4, 16]
        x = lax.scan(lambda x, _: (lax.psum(x, "tensor") / 3, None), x, length=7)[0]
        x = lax.all_gather(x, "fsdp", axis=0, tiled=True)  # [8, 16]
        x = lax.psum_scatter(x, ("data", "fsdp"), scatter_dimension=0, tiled=True)  # [2, 16]
        x = lax.all_to_all(x, "tensor", 0, 0, tiled=True)
        return lax.ppermute(x, "data", [(0, 1), (1, 0)])

    run = jax.shard_map(
        on_device, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    text = jax.jit(run).lower(jax.ShapeDtypeStruct((8, 16), np.float32)).compile().as_text()
    got = {(c.op, c.axes): (c.times, c.bytes, c.is_open) for c in read_collectives(text, mesh)}
    assert got == {
        ("all-reduce", ("tensor",)): (7, 7 * 4 * 16 * 4, False),
        ("all-gather", ("fsdp",)): (1, 8 * 16 * 4, False),
        ("reduce-scatter", ("data", "fsdp")): (1, 8 * 16 * 4, False),
        ("all-to-all", ("tensor",)): (1, 2 * 16 * 4, False),
        ("collective-permute", ("data",)): (1, 2 * 16 * 4, False),
    }


def test_flops_of_a_program():
    """Products in a loop of known length, and in one whose length is an argument."""

    def run(x, w, n):
        x = lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0]
        return lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ w), x)

    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in ((32, 64), (64, 64))]
    count = jax.ShapeDtypeStruct((), np.int32)
    text = jax.jit(run).lower(*shapes, count).compile().as_text()
    product = 2 * 32 * 64 * 64
    assert (read_flops(text), read_flops(text, 10)) == (3 * product, 13 * product)


# ---- layouts ------------------------------------------------------------------------------------

DOC = pathlib.Path(__file__).parent.parent / "docs" / "collectives.md"
SMALL = dataclasses.replace(MODEL, vocab_size=96, expert_ffn_size=40, num_shared_experts=3)
"""No size of it is another's half, so that an array tells what it is."""
LEAN = dataclasses.replace(SMALL, num_layers=2, num_dense_layers=0, mtp_depth=0)
"""Half to compile, for layouts whose outer parts others show."""
WHOLE = ("cube", "expert", "pipe_2_data_4")
"""Layouts with a dense layer and the MTP module."""
ROWS = dataclasses.replace(TRAIN, seq_len=24, optimizer=OptimizerConfig())
"""Moments are bf16, and nothing else is."""

LAYOUTS = {
    "replicas": MeshConfig(data=8),
    "replicas_without_zero1": MeshConfig(data=8, zero1=False),
    "fsdp": MeshConfig(fsdp=8),
    "tensor_4_data_2": MeshConfig(tensor=4, data=2),
    "expert": MeshConfig(expert=8),
    "cube": MeshConfig(fsdp=2, expert=2, tensor=2),
    "context_2_fsdp_2_tensor_2": MeshConfig(context=2, fsdp=2, tensor=2),
    "sequence_tensor_2_fsdp_4": MeshConfig(tensor=2, fsdp=4, sequence=True),
    "pipe_2_data_4": MeshConfig(pipe=2, data=4),
    "dualpipe_2_expert_4": MeshConfig(pipe=2, expert=4, schedule="dualpipe"),
}


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS])
def name(request) -> str:
    return request.param


def case(name: str):
    """Model, training and micro batches of a layout."""
    model = SMALL if name in WHOLE else LEAN
    if LAYOUTS[name].pipe == 1:
        return model, ROWS, 1
    deep = dataclasses.replace(model, num_layers=model.num_dense_layers + 5)
    return deep, dataclasses.replace(ROWS, batch_size=16, micro_batch_size=4), 4


@functools.cache
def compiled(name: str) -> tuple[Collective, ...]:
    """The collectives of a layout's step."""
    mesh = LAYOUTS[name]
    model, train, micro = case(name)
    trainer = Trainer(model, train, Recipe(), layout_of(mesh))
    shape = micro, train.batch_size // micro, train.seq_len + 1
    batch = {"tokens": jax.ShapeDtypeStruct(shape, np.int32)}
    knobs = {name: jax.ShapeDtypeStruct((), np.float32) for name in KNOBS}
    text = trainer.step.lower(trainer.abstract_state, batch, knobs).compile().as_text() or ""
    return read_collectives(text, trainer.layout.mesh)


def complaint(one: Collective, reason: str) -> str:
    arrays = " ".join(map(str, one.arrays))
    where = one.instruction.source
    return f"{reason}: {one.op} over {'+'.join(one.axes)}, x{one.times}: {arrays} from {where}"


def local_experts(mesh: MeshConfig) -> int:
    """Entries of a routed expert weight of one layer on one device."""
    sizes = (
        SMALL.num_experts // mesh.expert,
        SMALL.hidden_size,
        SMALL.expert_ffn_size // mesh.tensor,
    )
    return math.prod(sizes)


def is_expert_weight(sizes: tuple[int, ...], mesh: MeshConfig) -> bool:
    """Whether an array holds routed experts: their inner width, whole or cut, and experts."""
    inner = {SMALL.expert_ffn_size, SMALL.expert_ffn_size // mesh.tensor}
    return bool(inner & set(sizes)) and len([n for n in sizes if n > 1]) > 2


def test_experts_are_gathered_only_where_they_are_stored_in_shards(name):
    """Over `fsdp` one layer's, over `data` what ZeRO-1 updated, over `pipe` the stages' own and the
    MTP module's.

    Never over `expert`, `tensor` or `context`; and always only the device's share of experts and of
    inner width. Gradients are summed over the axes that cut the batch and do not cut the experts.
    """
    mesh = LAYOUTS[name]
    one_layer = local_experts(mesh)
    stacked = one_layer * case(name)[0].num_moe_layers
    slots = math.prod((2, mesh.pipe)) * stacked  # DualPipe holds every layer twice
    most = {
        ("all-gather", "fsdp"): one_layer,
        ("all-gather", "data"): stacked,
        ("all-gather", "pipe"): one_layer,
        ("all-to-all", "pipe"): slots,
    }
    gradient = {"data", "fsdp", "context"} | ({"pipe"} if mesh.pipe > 1 else set())
    wrong = []
    for one in compiled(name):
        for array in one.arrays:
            if not is_expert_weight(array.sizes, mesh):
                continue
            if one.op in ("all-reduce", "reduce-scatter"):
                allowed = stacked if set(one.axes) <= gradient else 0
            else:
                allowed = most.get((one.op, "+".join(one.axes)), 0)
            if math.prod(array.sizes) > allowed:
                wrong.append(complaint(one, f"{array} has more than {allowed} entries"))
    assert not wrong, "\n".join(wrong)


def is_of_experts(array) -> bool:
    """Whether an array of the step without `tensor` holds routed experts of several layers."""
    return SMALL.expert_ffn_size in array.sizes and len([n for n in array.sizes if n > 1]) > 3


def sent_for_dense_gradients(collectives, axes: set[str]) -> int:
    """Bytes of sums over axes that copy weights, of more than a number per token or expert."""
    return sum(
        one.bytes
        for one in collectives
        if one.op in ("all-reduce", "reduce-scatter") and set(one.axes) & axes
        if any(len([n for n in array.sizes if n > 1]) > 1 for array in one.arrays)
        if not any(map(is_of_experts, one.arrays))
    )


@pytest.mark.parametrize("micro", [2, 8])
def test_gradients_of_copies_are_sent_once_a_step(micro):
    """In fp32, and as many bytes whatever the number of micro batches; with `reduce` micro more."""
    mesh, train = MeshConfig(data=2, expert=4), dataclasses.replace(ROWS, batch_size=8 * micro)
    train = dataclasses.replace(train, micro_batch_size=8, seq_len=8)
    sent = {}
    for when in ("step", "micro"):
        layout = layout_of(dataclasses.replace(mesh, reduce=when))
        trainer = Trainer(LEAN, train, Recipe(), layout)
        text = lower(trainer).compile().as_text() or ""
        sent[when] = sent_for_dense_gradients(
            read_collectives(text, layout.mesh), {"data", "expert"}
        )
    axes = jax.tree.leaves(blueprint(LEAN).params_axes, is_leaf=lambda x: isinstance(x, tuple))
    params = jax.tree.leaves(blueprint(LEAN).params)
    dense = 4 * sum(p.size for p, names in zip(params, axes, strict=True) if "experts" not in names)
    assert 0.9 * dense < sent["step"] <= 1.1 * dense
    assert sent["micro"] > micro / 2 * dense


def test_logits_are_never_moved(name):
    """An array as wide as the vocabulary, whole or cut, is an embedding or a head: [V, D]."""
    mesh = LAYOUTS[name]
    wrong = []
    for one in compiled(name):
        for array in one.arrays:
            entries, last = math.prod(array.sizes), (array.sizes or (1,))[-1]
            if last == SMALL.hidden_size:
                continue  # an embedding, or tokens, which happen to be as many
            wide = SMALL.vocab_size in array.sizes or last == SMALL.vocab_size // mesh.tensor
            if wide and entries > SMALL.vocab_size * SMALL.hidden_size // mesh.tensor:
                wrong.append(complaint(one, str(array)))
    assert not wrong, "\n".join(wrong)


def test_moments_are_never_moved(name):
    """They are bf16, and nothing else is. ZeRO-1 gathers every parameter once, and no more."""
    mesh = LAYOUTS[name]
    moved = [complaint(c, "bf16") for c in compiled(name) for a in c.arrays if a.dtype == "bf16"]
    assert not moved, "\n".join(moved)
    model, train, _ = case(name)
    params = jax.tree.leaves(
        Trainer(model, train, Recipe(), layout_of(mesh)).abstract_state["params"]
    )
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in params)
    updated = [
        c for c in compiled(name) if c.op == "all-gather" and "select_n" in c.instruction.source
    ]
    if mesh.data == 1 or not mesh.zero1:
        assert not updated
    else:
        assert sum(c.bytes for c in updated) <= 4 * held


def test_tokens_of_other_sequences_are_never_gathered(name):
    """What is computed for a token stays with its sequence: no array of the whole micro batch."""
    model, train, micro = case(name)
    rows, tokens = train.batch_size // micro, train.seq_len
    vocabulary = (model.vocab_size,)  # of embedding and head, which is as long in some layouts
    wrong = [
        complaint(one, str(array))
        for one in compiled(name)
        for array in one.arrays
        if one.op == "all-gather" and len(array.sizes) > 1
        if array.sizes[:2] == (rows, tokens) or array.sizes[0] == rows * tokens
        if array.sizes[:1] != vocabulary
    ]
    assert not wrong, "\n".join(wrong)


def test_only_neighbours_are_permuted(name):
    """Rings over `context` and `pipe`. Another permute is a detour of a weight between layouts; of
    the batch's ids alone, where devices add up their own rows, the rows come in another order."""
    wrong = [
        complaint(one, "no ring")
        for one in compiled(name)
        if one.op == "collective-permute"
        if not one.whole or one.axes not in (("context",), ("pipe",))
        if any(array.dtype != "s32" or len(array.sizes) > 3 for array in one.arrays)
    ]
    assert not wrong, "\n".join(wrong)


def test_bytes_of_the_exchange(name):
    """docs/expert_exchange.md: there and back, forward and backward, S blocks of C rows each; and
    ids once, weights there and back."""
    mesh = LAYOUTS[name]
    sent = sum(c.bytes for c in compiled(name) if c.op == "all-to-all" and c.axes == ("expert",))
    model, train, _ = case(name)
    layers = model.num_moe_layers + model.mtp_depth
    rows = train.batch_size * train.seq_len // (mesh.data * mesh.fsdp * mesh.expert * mesh.context)
    row = 4 * model.hidden_size + 3 * model.experts_per_token
    want = layers * mesh.expert * rows * row * 4 if mesh.expert > 1 else 0
    if mesh.pipe == 1:
        assert want <= sent <= 1.1 * want
    else:  # every kind of pass counts in every tick
        assert want / mesh.pipe <= sent


def test_collectives_are_those_on_record(name):
    """Count and bytes by op and axes, as `tests/golden/collectives/` holds them."""
    path = GOLDEN / f"{name}.txt"
    got = f"jax {jax.__version__}\n{table(compiled(name))}"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(got)
        if name == "cube":
            shown = table(compiled(name))
            text = re.sub(
                r"(?<=```text\n)(op .*?)?(?=```)", shown, DOC.read_text(), flags=re.DOTALL
            )
            DOC.write_text(text)
        return
    assert path.exists(), f"{path} is missing; write it with UPDATE_GOLDEN=1"
    diff = list(difflib.unified_diff(path.read_text().splitlines(), got.splitlines(), lineterm=""))
    assert not diff, (
        "the step's collectives changed:\n" + "\n".join(diff[2:]) + "\nIf that is meant: "
        'UPDATE_GOLDEN=1 pytest tests/test_collectives.py -m "slow or not slow"'
    )


def test_the_table_in_the_docs_is_on_record():
    record = (GOLDEN / "cube.txt").read_text().partition("\n")[2]
    assert record in DOC.read_text(), "written with UPDATE_GOLDEN=1"


def test_every_record_has_a_layout():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == LAYOUTS.keys()
    assert all(math.prod(axis_sizes(mesh).values()) == 8 for mesh in LAYOUTS.values())
