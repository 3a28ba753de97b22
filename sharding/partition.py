"""Logical names to placements: what the model says (`constrain`, `on_shards`), where state lives.

The model names the axes of its arrays and never sees a mesh. Without an active layout, or on one
device, every function here is the identity, so the same model code is the one-device reference.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.config import MeshConfig
from sharding.rules import COMPUTED, COPIED, STORED, Rules, axes_of, check_divides, fitting, spec

Names = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, the two tables that map logical axes onto it, and how work crosses the axes."""

    mesh: Mesh
    stored: Rules = dataclasses.field(default_factory=lambda: STORED, hash=False)
    computed: Rules = dataclasses.field(default_factory=lambda: COMPUTED, hash=False)
    config: MeshConfig = MeshConfig()
    """Options of the collectives; the axes' sizes are the mesh's."""
    copied: tuple[str, ...] = COPIED
    """Mesh axes that also cut stored matrices which would be copies along them (`stored_spec`)."""
    device: Any = dataclasses.field(default=None, hash=False)
    """What all devices of an abstract mesh are like (`sharding/mesh.py:planned_layout`); None: the
    mesh has devices."""


_active: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)
_region: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("region", default=())
_outer: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("outer", default=())


@contextlib.contextmanager
def use_layout(layout: Layout | None) -> Generator[None]:
    """Make `layout` the one that `constrain` and `on_shards` act on while tracing."""
    token = _active.set(layout)
    try:
        yield
    finally:
        _active.reset(token)


def active_layout() -> Layout | None:
    """The layout that the functions here act on."""
    return _active.get()


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Tell XLA how an activation with these logical axes is laid out."""
    layout = _active.get()
    if layout is None or _is_whole(layout):
        return x
    mesh = jax.sharding.get_abstract_mesh() if _outer.get() else layout.mesh
    names = as_cut(names, x.shape)
    return lax.with_sharding_constraint(x, NamedSharding(mesh, _inner_spec(names, layout)))


def as_cut(names: Names, shape: tuple[int, ...]) -> Names:
    """Logical axes of an activation of this shape on the active layout; None for those that are
    whole there though their rule would cut them (sharding/rules.py:WHOLE_IF_UNEVEN)."""
    layout = _active.get()
    return names if layout is None else fitting(names, shape, layout.computed, layout.mesh.shape)


def along_axes(
    fn: Callable, axes: tuple[str, ...], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`fn` run once per device of some mesh axes, everything else laid out as outside of it.

    Within, arrays have the sizes of a device's own part along `axes`; `constrain` and `on_shards`
    act on the other axes, and collectives over `axes` may be used. Sums over the batch leave `axes`
    out: what `fn` adds up over the batch is this device's term of a sum. Specs are trees of
    PartitionSpec that name `axes` alone. Not differentiable: `fn` takes its own derivatives.
    """
    layout = _active.get()
    assert layout is not None
    assert not _outer.get(), "one such region at a time"
    mesh = layout.mesh
    # Axes of one device are given too: where no others are left, nothing is left to partition.
    outer = {axis for axis in mesh.axis_names if axis in axes or mesh.shape[axis] == 1}

    def body(*args):
        token = _outer.set(tuple(axis for axis in mesh.axis_names if axis in outer))
        try:
            return fn(*args)
        finally:
            _outer.reset(token)

    return jax.shard_map(
        body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=outer, check_vma=False
    )


def on_shards(
    fn: Callable, in_names: tuple[Names, ...], out_names: tuple[Names, ...]
) -> Callable[..., Any]:
    """`fn` run on every device on its own shards of arrays with these logical axes.

    Inside, every value counts as different on all devices of the axes that occur in `in_names`:
    the gradient of an input that was replicated is therefore summed over them, and an output must
    have been reduced (`sum_over`, `scatter_sum`) over every axis it does not mention. `fn` returns
    a tuple with one entry per element of `out_names`.
    """
    layout = _active.get()
    if layout is None or layout.mesh.size == 1:
        return fn
    in_specs = tuple(_inner_spec(names, layout) for names in in_names)
    out_specs = tuple(_inner_spec(names, layout) for names in out_names)
    axes = tuple(a for a in layout.mesh.axis_names if any(a in _flat(s) for s in in_specs))

    def body(*args):
        token = _region.set(axes + _outer.get())
        try:
            return fn(*jax.tree.map(vary, args))
        finally:
            _region.reset(token)

    if _is_whole(layout):
        return body
    if not _outer.get():
        return jax.shard_map(body, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs)
    # JAX 0.11 names the outer axis in the specs of an inner region's residuals when it tracks what
    # varies, and then refuses them; untracked, it sums gradients over all unmentioned axes itself.
    inner = set(layout.mesh.axis_names) - set(_outer.get())
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(
        body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=inner, check_vma=False
    )


def _is_whole(layout: Layout) -> bool:
    """Whether a device sees whole arrays: no axis is left to cut them."""
    return layout.mesh.size == math.prod(layout.mesh.shape[a] for a in _outer.get())


def _inner_spec(names: Names, layout: Layout) -> PartitionSpec:
    """Spec of an activation over the axes that the region around does not give."""
    outer = _outer.get()
    inner = (tuple(a for a in axes_of(e) if a not in outer) for e in spec(names, layout.computed))
    return PartitionSpec(*(entry or None for entry in inner))


def _flat(partition: PartitionSpec) -> list[str]:
    return [axis for entry in partition for axis in axes_of(entry)]


def _axes(*names: str, whole: bool = False) -> tuple[str, ...]:
    """Mesh axes behind logical names inside the current region; none outside of one.

    Unless `whole`, those of the batch leave out what a region around gives: it adds up itself
    (`along_axes`).
    """
    layout = _active.get()
    if layout is None or not _region.get():
        return ()
    given = {} if whole else {"batch": _outer.get()}
    return tuple(a for name in names for a in layout.computed[name] if a not in given.get(name, ()))


def vary(x: jax.Array) -> jax.Array:
    """Mark a value as different on every device of the current region (fresh loop carries)."""
    if _outer.get():  # nothing is tracked
        return x
    missing = tuple(a for a in _region.get() if a not in jax.typeof(x).manual_axis_type.varying)
    return lax.pcast(x, missing, to="varying") if missing else x


def reduced(reduce: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`reduce(x)`, a sum or a maximum over devices.

    XLA's compiler for CPUs ends the process on one of 16-bit numbers inside a region that leaves
    other axes to it ("Invalid binary instruction opcode copy", jax 0.11.2). It computes in fp32
    what it does compile, so there x is fp32 on the way.
    """
    layout, mesh = _active.get(), jax.sharding.get_abstract_mesh()
    automatic = any(n > 1 and axis not in mesh.manual_axes for axis, n in mesh.shape.items())
    if layout is None or not automatic or x.dtype.itemsize != 2:
        return reduce(x)
    device = layout.mesh.devices.flat[0] if layout.device is None else layout.device
    if device.platform != "cpu":
        return reduce(x)
    return reduce(x.astype(jnp.float32)).astype(x.dtype)


def sum_over(x: jax.Array, *names: str) -> jax.Array:
    """Sum over the devices that share these logical axes: x{U_names} -> AllReduce -> x."""
    axes = _axes(*names)
    return reduced(lambda x: lax.psum(x, axes), x) if axes else x


def max_over(x: jax.Array, *names: str) -> jax.Array:
    """Largest value over the devices that share these logical axes, in a region around too."""
    axes = _axes(*names, whole=True)
    return reduced(lambda x: lax.pmax(x, axes), x) if axes else x


def as_term(x: jax.Array) -> jax.Array:
    """This device's term of a sum over the batch whose value, x, all have (`along_axes`)."""
    layout = _active.get()
    if layout is None:
        return x
    outer = (axis for axis in layout.computed["batch"] if axis in _outer.get())
    return x / math.prod(layout.mesh.shape[axis] for axis in outer)


def gather(x: jax.Array, name: str) -> jax.Array:
    """Concatenate dimension 0 over the devices of `name`: x[N_name] -> AllGather -> x[N]."""
    axes = _axes(name)
    return lax.all_gather(x, axes, axis=0, tiled=True) if axes else x


def scatter_sum(x: jax.Array, name: str) -> jax.Array:
    """Sum over the devices of `name`, each keeping its part of dimension 0 (ReduceScatter)."""
    axes = _axes(name)
    scatter = partial(lax.psum_scatter, axis_name=axes, scatter_dimension=0, tiled=True)
    return reduced(scatter, x) if axes else x


def all_to_all(x: jax.Array, name: str) -> jax.Array:
    """Block s of dimension 0 goes to shard s of `name`; block s of the result came from there."""
    axes = _axes(name)
    return lax.all_to_all(x, axes, 0, 0, tiled=True) if axes else x


def ragged_all_to_all(x: jax.Array, out: jax.Array, name: str, *blocks: jax.Array) -> jax.Array:
    """`out` with what the shards of `name` sent written over it.

    `blocks` are first row here, size, first row there, and size of what comes, one entry per shard.
    """
    return lax.ragged_all_to_all(x, out, *blocks, axis_name=_axes(name))


def bound(fn: Callable) -> Callable[..., Any]:
    """`fn` that always sees the layout and region of now: derivatives are traced later."""
    layout, outer, region = _active.get(), _outer.get(), _region.get()

    def call(*args):
        tokens = _outer.set(outer), _region.set(region)
        try:
            with use_layout(layout):
                return fn(*args)
        finally:
            _outer.reset(tokens[0])
            _region.reset(tokens[1])

    return call


def shard_index(name: str) -> jax.Array | int:
    """Number of this device's shard of logical axis `name`, counted from 0."""
    axes = _axes(name)
    return lax.axis_index(axes) if axes else 0


def rotate(x: jax.Array, name: str) -> jax.Array:
    """The previous shard's value along `name`; the first receives from the last."""
    axes, count = _axes(name), num_shards(name)
    if not axes or count == 1:
        return x
    if not ("pipe" in _outer.get() and on_cpu()):
        return lax.ppermute(x, axes, [(i, (i + 1) % count) for i in range(count)])
    # XLA:CPU's permute waits for every device of the program, also for pipeline ranks that are in
    # another branch. An all-to-all waits for its own group only.
    index = lax.axis_index(axes)
    slots = jnp.zeros((count, *x.shape), x.dtype)
    slots = lax.dynamic_update_index_in_dim(slots, x, (index + 1) % count, 0)
    slots = lax.all_to_all(slots, axes, split_axis=0, concat_axis=0, tiled=True)
    return lax.dynamic_index_in_dim(slots, (index - 1) % count, keepdims=False)


def on_cpu() -> bool:
    """Whether the active layout lies on (emulated) CPU devices."""
    layout = _active.get()
    if layout is None:
        return True
    return (layout.device or layout.mesh.devices.flat[0]).platform == "cpu"


def num_shards(name: str) -> int:
    """Into how many parts the active layout cuts activations along a logical axis."""
    layout = _active.get()
    if layout is None:
        return 1
    return math.prod(layout.mesh.shape[axis] for axis in layout.computed[name])


def options() -> MeshConfig:
    """The active layout's ways across the axes; the defaults without one."""
    layout = _active.get()
    return MeshConfig() if layout is None else layout.config


def stored_spec(layout: Layout, shape: tuple[int, ...], names: Names) -> PartitionSpec:
    """Placement of a parameter: by the table, and a matrix also over the axes that would copy it.

    ZeRO: of `layout.copied`, the axes that do not cut the matrix yet go to a dimension that they
    divide: one that the table cuts over `fsdp`, or else the first. In it they stand before `pipe`,
    so that the shards of a pipeline's ranks are neighbours. A matrix without one, a vector per
    layer, and scales of blocks stay copies.
    """
    names = fitting(names, shape, layout.stored, layout.mesh.shape)
    cut = [axes_of(entry) for entry in spec(names, layout.stored)]
    extra = tuple(axis for axis in layout.copied if all(axis not in axes for axes in cut))
    ways = math.prod(layout.mesh.shape[axis] for axis in extra)
    own = [dim for dim, name in enumerate(names) if name not in ("layers", "blocks")]
    if ways > 1 and len(own) > 1:
        takers = (dim for dim in own if names[dim] != "vocab")  # a pipeline's ranks cut that
        for dim in sorted(takers, key=lambda dim: "fsdp" not in cut[dim]):
            taken = math.prod(layout.mesh.shape[axis] for axis in cut[dim])
            if shape[dim] % (taken * ways) == 0:
                at = cut[dim].index("pipe") if "pipe" in cut[dim] else len(cut[dim])
                cut[dim] = cut[dim][:at] + extra + cut[dim][at:]
                break
    return PartitionSpec(*(axes or None for axes in cut))


def stored_shardings(layout: Layout, shapes: Any, axes: Any) -> Any:
    """Placement of every parameter: a tree of NamedSharding like `shapes`.

    `shapes` is a tree of arrays or ShapeDtypeStructs, `axes` one of logical-name tuples.
    Raises ValueError naming the first parameter that does not divide.
    """

    def place(name: str, shape: tuple[int, ...], names: Names) -> NamedSharding:
        names = fitting(names, shape, layout.stored, layout.mesh.shape)
        check_divides(name, shape, names, layout.mesh, layout.stored)
        return NamedSharding(layout.mesh, stored_spec(layout, shape, names))

    return _map_named(place, shapes, axes)


def moment_spec(layout: Layout, shape: tuple[int, ...], names: Names) -> PartitionSpec:
    """Placement of what belongs to a parameter: as stored, and with ZeRO-1 also over `data`.

    The first dimension that `data` still divides takes it; a parameter without one stays whole. The
    dimension that other copies cut comes first, beside them: one reduction then serves both.
    """
    stored, data = stored_spec(layout, shape, names), layout.mesh.shape["data"]
    if not layout.config.zero1 or data == 1:
        return stored
    entries = [axes_of(entry) for entry in stored]
    names = fitting(names, shape, layout.stored, layout.mesh.shape)
    cut_anyway = [axes_of(entry) for entry in spec(names, layout.stored)]
    extra = [set(now) - set(before) for now, before in zip(entries, cut_anyway, strict=True)]
    for i in sorted(range(len(shape)), key=lambda i: not extra[i]):
        taken = math.prod(layout.mesh.shape[axis] for axis in entries[i])
        if shape[i] % (taken * data) == 0:
            at = len(entries[i]) - bool(extra[i] and entries[i][-1] == "pipe")
            entries[i] = (*entries[i][:at], "data", *entries[i][at:])
            break
    return PartitionSpec(*(entry or None for entry in entries))


def optimizer_shardings(layout: Layout, shapes: Any, axes: Any) -> Any:
    """Placement of per-parameter optimizer state: `moment_spec` of every parameter."""

    def place(name: str, shape: tuple[int, ...], names: Names) -> NamedSharding:
        names = fitting(names, shape, layout.stored, layout.mesh.shape)
        check_divides(name, shape, names, layout.mesh, layout.stored)
        return NamedSharding(layout.mesh, moment_spec(layout, shape, names))

    return _map_named(place, shapes, axes)


def stored_axes(layout: Layout, shapes: Any, axes: Any) -> Any:
    """Logical axes of every parameter as it is stored: None for those that stay whole."""
    leaves, structure = jax.tree.flatten(shapes)
    held = [
        fitting(names, leaf.shape, layout.stored, layout.mesh.shape)
        for leaf, names in zip(leaves, structure.flatten_up_to(axes), strict=True)
    ]
    return structure.unflatten(held)


def _map_named(fn: Callable, shapes: Any, axes: Any) -> Any:
    """fn(path, shape, logical axes) over a tree and its equal of logical-axes tuples."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    names = structure.flatten_up_to(axes)
    placed = [
        fn("parameter " + jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, axes)
        for (path, leaf), axes in zip(leaves, names, strict=True)
    ]
    return structure.unflatten(placed)


def with_shardings(tree: Any, shardings: Any) -> Any:
    """The tree, traced, with every array placed as the shardings of the same structure say."""
    return jax.lax.with_sharding_constraint(tree, shardings)


def batch_sharding(
    layout: Layout, names: Names, shape: tuple[int, ...] | None = None
) -> NamedSharding:
    """Placement of a batch array with these logical axes; of this shape, where one of them may stay
    whole for its size."""
    if shape is not None:
        names = fitting(names, shape, layout.computed, layout.mesh.shape)
    return NamedSharding(layout.mesh, spec(names, layout.computed))


def local_rows(layout: Layout, num_rows: int) -> range:
    """Rows of a batch dimension of `num_rows` that this process's devices hold."""
    sharding = batch_sharding(layout, ("batch",))
    slices = sharding.addressable_devices_indices_map((num_rows,)).values()
    bounds = [index[0].indices(num_rows)[:2] for index in slices if index is not None]
    return range(min(low for low, _ in bounds), max(high for _, high in bounds))


def place_rows(
    layout: Layout, batch: dict[str, np.ndarray], rows: range, num_rows: int
) -> dict[str, jax.Array]:
    """Global arrays [micro batches, num_rows, ...] from this process's part of the rows.

    `batch` holds rows `rows` of every micro batch; each device receives only its own.
    """
    sharding = batch_sharding(layout, (None, "batch"))

    def place(local: np.ndarray) -> jax.Array:
        def part(index):
            low, high, _ = index[1].indices(num_rows)
            return local[index[0], low - rows.start : high - rows.start]

        shape = (local.shape[0], num_rows, *local.shape[2:])
        return jax.make_array_from_callback(shape, sharding, part)

    return {name: place(local) for name, local in batch.items()}


def batch_shards(layout: Layout) -> int:
    """Into how many parts the batch is cut."""
    return math.prod(layout.mesh.shape[axis] for axis in layout.computed["batch"])


def stored_shards(layout: Layout, name: str) -> int:
    """Into how many parts parameters are cut along a logical axis."""
    return math.prod(layout.mesh.shape[axis] for axis in layout.stored[name])


def pipeline_ranks(layout: Layout) -> int:
    """Stages that micro batches pass through at the same time; 1: there is no pipeline."""
    return layout.mesh.shape["pipe"]


def replicated(layout: Layout) -> NamedSharding:
    """Placement of a value that every device holds whole."""
    return NamedSharding(layout.mesh, PartitionSpec())


def check_batch(layout: Layout, micro_batch_size: int) -> None:
    """Raise ValueError unless a micro batch splits over the batch axes."""
    check_divides(
        "micro batch (sequences per forward pass)",
        (micro_batch_size,), ("batch",), layout.mesh, layout.computed,
    )  # fmt: skip
