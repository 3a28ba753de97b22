"""Sizes of the mesh axes, and the named layouts that set them."""

import dataclasses

AXES = ("pipe", "data", "fsdp", "expert", "context", "tensor")
"""Mesh axes, outermost (slowest links) first."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis takes. One axis may be -1: it takes the devices that are left."""

    pipe: int = 1
    """Pipeline stages (layers)."""
    data: int = 1
    """Replicas of the weights (batch)."""
    fsdp: int = 1
    """Shards of the stored weights, ZeRO-3 (batch)."""
    expert: int = 1
    """Shards of the routed experts (batch)."""
    context: int = 1
    """Shards of the sequence."""
    tensor: int = 1
    """Shards of heads, MLP width and vocabulary."""
    zero1: bool = True
    """Shard optimizer state over `data` where weights are replicated (ZeRO-1)."""


LAYOUTS: dict[str, MeshConfig] = {
    "single": MeshConfig(),
    "replicas": MeshConfig(data=-1),
    "fsdp": MeshConfig(fsdp=-1),
    "expert": MeshConfig(expert=-1),
    "tensor": MeshConfig(tensor=-1),
    "cube": MeshConfig(fsdp=2, expert=2, tensor=2),
    "hybrid": MeshConfig(data=2, fsdp=2, expert=2),
}
"""Layouts by name (`--layout NAME`); any axis can be overridden (`--mesh.AXIS N`)."""
