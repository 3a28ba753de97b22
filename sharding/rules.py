"""Mesh axes of each logical axis: once as parameters are stored, once as math is done.

The difference of the two tables is ZeRO-3: `embed` is stored in shards over `fsdp` but computed
whole, so XLA all-gathers a weight where it is used and reduce-scatters its gradient.
"""

import math
from collections.abc import Mapping

from jax.sharding import Mesh, PartitionSpec

from sharding.config import MeshConfig

Rules = Mapping[str, tuple[str, ...]]

IMAGES = ("channels", "channels_out", "window", "patches", "codes", "code")
"""Axes of what reads and makes images, whole everywhere: their weights are small."""

STORED: Rules = {
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp", "pipe"),
    "embed_out": (),
    "embed_pair": ("fsdp", "pipe"),
    "norm": (),
    "latent": ("fsdp", "pipe"),
    "latent_out": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "ffn": ("tensor",),
    "router": (),
    "experts": ("expert_nodes", "expert"),
    "expert_ffn": ("tensor",),
    "blocks": (),
    **dict.fromkeys(IMAGES, ()),
}
"""Parameters, and gradients and optimizer state with them."""

COPIED = ("expert_nodes", "expert")
"""Mesh axes that also cut the stored matrices which the table leaves whole along them: all but the
experts' own (`sharding/partition.py:stored_spec`). Along `data`, moments are cut (ZeRO-1)."""

COMPUTED: Rules = {
    "batch": ("data", "fsdp", "expert_nodes", "expert"),
    "seq": ("context",),
    "stream": ("context",),
    "layers": (),
    "vocab": ("tensor",),
    "embed": (),
    "embed_out": (),
    "embed_pair": (),
    "norm": (),
    "latent": (),
    "latent_out": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "ffn": ("tensor",),
    "router": (),
    "experts": ("expert_nodes", "expert"),
    "nodes": ("expert_nodes",),
    "experts_of_node": ("expert",),
    "expert_ffn": ("tensor",),
    "choices": (),
    "blocks": (),
    **dict.fromkeys(IMAGES, ()),
}
"""Activations, and weights as a sharded region receives them.

`stream` is the sequence axis of the residual stream between the layers' inner parts."""


def computed_rules(config: MeshConfig) -> Rules:
    """The table of activations under a configuration's options."""
    if config.sequence:
        return {**COMPUTED, "stream": ("context", "tensor")}
    return COMPUTED


RESIDENT: Rules = {
    name: tuple(axis for axis in axes if axis != "fsdp") for name, axes in STORED.items()
}
"""Parameters while generating: whole over `fsdp`, since every token would gather them anew."""


def spec(names: tuple[str | None, ...], rules: Rules) -> PartitionSpec:
    """Partition spec of an array whose dimensions carry these logical names (None: whole).

    Raises ValueError for a name without a rule and for a mesh axis used twice.
    """
    used: dict[str, str] = {}
    entries: list[tuple[str, ...] | None] = []
    for name in names:
        if name is not None and name not in rules:
            raise ValueError(
                f"no sharding rule for logical axis {name!r} of {names}; known: {', '.join(rules)}"
            )
        axes = rules[name] if name is not None else ()
        for axis in axes:
            if axis in used:
                raise ValueError(
                    f"mesh axis {axis!r} would shard both {used[axis]!r} and {name!r} of an array "
                    f"with axes {names}; change one of their rules in sharding/rules.py"
                )
            used[axis] = str(name)
        entries.append(axes or None)
    return PartitionSpec(*entries)


WHOLE_IF_UNEVEN = ("kv_heads",)
"""Logical axes that every device holds whole where they do not split over their mesh axes: a model
has few heads of keys, and each is read by many of queries."""


def fitting(
    names: tuple[str | None, ...], shape: tuple[int, ...], rules: Rules, sizes: Mapping[str, int]
) -> tuple[str | None, ...]:
    """The logical axes of an array of this shape on a mesh of these sizes, None for what stays
    whole though its rule would cut it."""

    def fits(name: str | None, size: int) -> bool:
        shards = math.prod(sizes[axis] for axis in rules.get(name or "", ()))
        return name not in WHOLE_IF_UNEVEN or size % shards == 0

    pairs = zip(names, shape, strict=True)
    return tuple(name if fits(name, size) else None for name, size in pairs)


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes of one entry of a partition spec, which JAX shortens where it can."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def check_divides(what: str, shape: tuple[int, ...], names, mesh: Mesh, rules: Rules) -> None:
    """Raise ValueError unless every dimension of `what` splits evenly over its mesh axes."""
    if len(shape) != len(names):
        raise ValueError(f"{what}: shape {shape} has {len(shape)} dimensions, axes {names}")
    for size, name, entry in zip(shape, names, spec(names, rules), strict=True):
        axes = axes_of(entry)
        shards = math.prod(mesh.shape[axis] for axis in axes)
        if size % shards:
            product = " x ".join(
                f"{axis}={mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1
            )
            raise ValueError(
                f"{what}: axis {name!r} has size {size}, which does not split over {product}; "
                f"choose mesh sizes that divide {size}"
            )
