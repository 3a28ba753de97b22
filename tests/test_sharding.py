"""Meshes and placements: what is refused, in which words, and what a rule means in shards."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import PRESETS, preset
from model.blueprint import blueprint
from runtime.devices import emulate_devices
from sharding.blocks import scale_names
from sharding.config import LAYOUTS, MESH_AXES, MeshConfig
from sharding.mesh import (
    axis_sizes,
    describe,
    make_layout,
    make_mesh,
    named_layout,
    resolve,
)
from sharding.partition import (
    Layout,
    batch_sharding,
    check_batch,
    constrain,
    gather,
    on_shards,
    optimizer_shardings,
    scatter_sum,
    shard_index,
    stored_shardings,
    stored_spec,
    sum_over,
    use_layout,
)
from sharding.rules import COMPUTED, COPIED, STORED, check_divides, spec

ROOT = pathlib.Path(__file__).resolve().parent.parent


def layout(**sizes) -> Layout:
    config = MeshConfig(**sizes)
    count = int(np.prod(list(axis_sizes(config).values())))
    return make_layout(config, jax.devices()[:count])


# Meshes


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (
            MeshConfig(fsdp=2, tensor=2),
            8,
            "mesh: fsdp=2 x tensor=2 = 4 devices, but 8 are present; change an axis, set one to "
            "-1, or emulate 4 devices on CPU with --emulate 4",
        ),
        (
            MeshConfig(fsdp=-1, tensor=3),
            8,
            "mesh: fsdp=-1 x tensor=3 leaves 8/3 devices for `fsdp`, not a whole number; the "
            "other axes must divide the 8 devices",
        ),
        (
            MeshConfig(fsdp=-1, tensor=-1),
            8,
            "mesh: only one axis may be -1, got ['fsdp', 'tensor']; give the others a size",
        ),
        (
            MeshConfig(data=0),
            8,
            "mesh: axis sizes must be positive, or -1 for one of them; got {'data': 0}",
        ),
        (
            MeshConfig(expert=-2),
            8,
            "mesh: axis sizes must be positive, or -1 for one of them; got {'expert': -2}",
        ),
        (
            MeshConfig(expert=4, fsdp=2, expert_nodes=3),
            8,
            "mesh: expert=4 does not split over expert_nodes=3; choose a number of nodes that "
            "divides it",
        ),
        (
            MeshConfig(expert=-1, exchange_capacity=-1.0),
            8,
            "mesh: exchange_capacity=-1.0; give 1 or more times the mean load, inf for a single "
            "round that holds everything, or 0 for what is derived",
        ),
    ],
    ids=["product", "open axis", "two open", "zero", "negative", "nodes", "capacity"],
)
def test_a_mesh_that_cannot_be_says_why(config, devices, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        resolve(config, devices)


@pytest.mark.parametrize("devices", [1, 8, 64, 2048])
def test_an_open_axis_takes_what_is_left(devices):
    assert resolve(MeshConfig(fsdp=-1), devices).fsdp == devices
    if devices >= 8:
        assert resolve(MeshConfig(expert=4, data=-1), devices).data == devices // 4


@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - {"deepseek"}))
def test_named_layouts_fit_8_devices(name):
    devices = 1 if name == "single" else 8
    mesh = make_mesh(named_layout(name), jax.devices()[:devices])
    assert mesh.size == devices
    assert mesh.axis_names == MESH_AXES


def test_unknown_layout_lists_the_known():
    with pytest.raises(ValueError, match=r"^unknown layout 'cubes'; known: single, replicas, "):
        named_layout("cubes")


def test_a_mesh_describes_itself():
    mesh = layout(fsdp=2, expert=2, tensor=2).mesh
    assert describe(Layout(mesh)) == "8 x cpu (emulated): fsdp 2 x expert 2 x tensor 2"
    assert describe(layout()) == "1 x cpu"


def test_emulation_makes_as_many_devices_as_asked():
    with pytest.raises(ValueError, match=r"--emulate 0: the number of devices must be positive"):
        emulate_devices(0)
    code = "from runtime.devices import emulate_devices; emulate_devices(3); import jax; "
    # Without the test session's own eight.
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, "-c", code + "print(jax.device_count(), jax.default_backend())"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["3", "cpu"]


# Rules


def test_a_name_without_a_rule_is_refused():
    with pytest.raises(
        ValueError, match=r"no sharding rule for logical axis 'wings' of .* known: "
    ):
        spec(("embed", "wings"), STORED)


def test_a_mesh_axis_cannot_cut_an_array_twice():
    message = r"mesh axis 'tensor' would shard both 'vocab' and 'heads' .* sharding/rules.py"
    with pytest.raises(ValueError, match=message):
        spec(("vocab", "heads"), STORED)


def test_a_size_that_does_not_divide_names_the_parameter():
    cube = layout(fsdp=2, expert=2, tensor=2)
    message = (
        "experts of layer 3: axis 'experts' has size 5, which does not split over expert=2; "
        "choose mesh sizes that divide 5"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_divides("experts of layer 3", (5, 4), ("experts", "embed"), cube.mesh, STORED)
    with pytest.raises(ValueError, match=r"^w: shape \(4,\) has 1 dimensions, axes "):
        check_divides("w", (4,), ("experts", "embed"), cube.mesh, STORED)
    shapes = {"mlp": {"w_up": jax.ShapeDtypeStruct((6, 7), jnp.float32)}}
    with pytest.raises(ValueError, match=r"^parameter mlp/w_up: axis 'ffn' has size 7"):
        stored_shardings(cube, shapes, {"mlp": {"w_up": ("embed", "ffn")}})


def test_a_batch_that_does_not_divide_is_refused():
    message = (
        "micro batch (sequences per forward pass): axis 'batch' has size 6, which does not split "
        "over fsdp=2 x expert=2; choose mesh sizes that divide 6"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_batch(layout(fsdp=2, expert=2, tensor=2), 6)


def test_every_name_of_every_model_has_both_rules():
    names = set()
    for name in PRESETS:
        plan = blueprint(preset(name).model)
        for tree in (plan.params_axes, plan.router_bias_axes):
            leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, tuple))
            names |= {axis for axes in leaves for axis in axes}
    names |= set(scale_names(("embed", "embed_out"), None))  # of scales that a step holds in FP8
    assert names <= STORED.keys() & COMPUTED.keys()
    assert names == set(STORED), "a rule nobody uses"


@pytest.mark.parametrize("name", ["v3_671b", "kimi_k2", "v2"])
def test_large_models_split_over_a_cluster(name):
    """Placed on an abstract mesh of 2,048 devices: bytes of one device, no array is made."""
    plan = blueprint(preset(name).model)
    sizes = dict(zip(MESH_AXES, (1, 2, 32, 8, 4, 1, 1), strict=True))
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    shapes, axes = plan.params["moe_layers"], plan.params_axes["moe_layers"]

    def held(shape, names) -> int:
        check_divides(name, shape.shape, names, mesh, STORED)
        placed = NamedSharding(mesh, spec(names, STORED)).shard_shape(shape.shape)
        return int(np.prod(placed))

    experts = shapes["moe"]["w_gate"]
    assert held(experts, axes["moe"]["w_gate"]) * 1024 == np.prod(experts.shape)
    jax.tree.map(held, shapes, axes)


def test_copies_of_matrices_are_stored_in_shards():
    """Over `expert`: the dimension that `fsdp` cuts, before `pipe`; else the first that divides.
    Not vectors, nor the vocabulary, of which a pipeline's ranks take parts; and not to generate."""
    cut = layout(pipe=2, fsdp=2, expert=2)
    cases = {
        (("layers", "embed", "ffn"), (3, 16, 6)): (None, ("fsdp", *COPIED, "pipe"), ("tensor",)),
        (("latent", "heads", "head_dim"), (4, 2, 6)): (("fsdp", "pipe"), ("tensor", *COPIED), None),
        (("vocab", "embed"), (32, 4)): (("tensor",), ("fsdp", "pipe")),
        (("layers", "norm"), (4, 8)): (None, None),
        (("layers", "experts", "embed", "expert_ffn"), (3, 4, 16, 6)): (
            None, COPIED, ("fsdp", "pipe"), ("tensor",)
        ),
    }  # fmt: skip
    for (names, shape), expected in cases.items():
        assert stored_spec(cut, shape, names) == PartitionSpec(*expected), names
        whole = dataclasses.replace(cut, copied=())
        assert stored_spec(whole, shape, names) == spec(names, STORED)


def test_zero1_takes_the_first_dimension_that_divides():
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in
              {"norm": (3, 8), "odd": (3, 5), "expert": (3, 4, 6, 8)}.items()}  # fmt: skip
    axes = {"norm": ("layers", "norm"), "odd": ("layers", "norm"),
            "expert": ("layers", "experts", "embed", "expert_ffn")}  # fmt: skip
    placed = optimizer_shardings(layout(data=2, fsdp=2, expert=2), shapes, axes)
    shard = {name: s.shard_shape(shapes[name].shape) for name, s in placed.items()}
    assert shard == {"norm": (3, 4), "odd": (3, 5), "expert": (3, 1, 3, 8)}
    for same in (layout(data=2, fsdp=2, expert=2, zero1=False), layout(fsdp=2, expert=2)):
        kept = optimizer_shardings(same, shapes, axes)
        assert kept == stored_shardings(same, shapes, axes)


# Regions


def test_without_a_layout_everything_is_the_identity():
    x = jnp.arange(4.0)
    assert constrain(x, "wings") is x
    for fn in (sum_over, gather, scatter_sum):
        assert fn(x, "experts") is x
    assert shard_index("experts") == 0

    def fn(x):
        return (x,)

    assert on_shards(fn, ((),), ((),)) is fn
    with use_layout(layout()):
        assert on_shards(fn, ((),), ((),)) is fn


def test_collectives_of_a_region():
    """Gather, sum and scatter over the expert axis of a 2 x 2 x 2 mesh, against numpy."""
    cube = layout(fsdp=2, expert=2, tensor=2)
    x = np.arange(32.0).reshape(8, 4)
    rows, whole = ("batch", None), (None, None)

    def body(x_local):
        everything = gather(x_local, "batch")
        total = sum_over(x_local.sum(0, keepdims=True), "batch")
        # Every device contributes all rows once; each keeps the sum of its own.
        mine = scatter_sum(everything, "batch")
        index = jnp.full((x_local.shape[0], 1), shard_index("batch"))
        return total, mine, index

    @jax.jit
    def run(x):
        with use_layout(cube):
            return on_shards(body, (rows,), (whole, rows, rows))(x)

    total, mine, index = run(jax.device_put(x, batch_sharding(cube, rows)))
    np.testing.assert_array_equal(total, x.sum(0, keepdims=True))
    np.testing.assert_array_equal(mine, 4 * x)
    np.testing.assert_array_equal(index[:, 0], [0, 0, 1, 1, 2, 2, 3, 3])


def test_the_gradient_of_a_replicated_weight_is_summed_over_the_batch():
    """And not over tensor shards of which each saw the whole batch."""
    cube = layout(fsdp=2, expert=2, tensor=2)
    x, w = np.arange(16.0).reshape(8, 2), np.ones(2)

    def body(x_local, w):
        return (sum_over((x_local * w).sum(), "batch"),)

    @jax.jit
    def gradient(w):
        with use_layout(cube):
            run = on_shards(body, (("batch", None), (None,)), ((),))
            return jax.grad(lambda w: run(x, w)[0])(w)

    np.testing.assert_array_equal(gradient(w), x.sum(0))


def test_constrain_places_by_logical_names():
    cube = layout(fsdp=2, expert=2, tensor=2)

    @jax.jit
    def place(x):
        with use_layout(cube):
            return constrain(x, "batch", "seq", "heads", "head_dim")

    placed = place(jnp.zeros((4, 3, 2, 5))).sharding
    assert placed.shard_shape((4, 3, 2, 5)) == (1, 3, 1, 5)
    batch = ("data", "fsdp", "expert_nodes", "expert")
    expected = PartitionSpec(batch, ("context",), ("tensor",))
    assert placed.is_equivalent_to(NamedSharding(cube.mesh, expected), 4)


def test_layouts_compare_by_what_they_do():
    """A Trainer is compared by its layout; equal meshes and rules are one layout."""
    assert layout(fsdp=2) == layout(fsdp=2)
    assert hash(layout(fsdp=2)) == hash(layout(fsdp=2))
    assert layout(fsdp=2) != layout(data=2)
    assert layout(data=2) != layout(data=2, zero1=False)
