"""Sizes of the mesh axes, how work crosses them, and the named layouts that set both."""

import dataclasses
from typing import Literal

AXES = ("pipe", "data", "fsdp", "expert", "context", "tensor")
"""Axes as a person names them, outermost (slowest links) first."""

MESH_AXES = ("pipe", "data", "fsdp", "expert_nodes", "expert", "context", "tensor")
"""Axes of the mesh itself: `expert` is cut in two, between nodes and inside one."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per axis. One axis may be -1: it takes the devices that are left."""

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
    reduce: Literal["step", "micro"] = "step"
    """When the gradient of a weight that several devices hold is summed over them. step: once,
    after all micro batches, of fp32 sums that each device holds whole; micro: in every backward
    pass, so that a device holds its shard of them alone, and sends it as often."""
    expert_nodes: int = 1
    """Nodes that `expert` spans: a token crosses to a node once and fans out inside it."""
    exchange: Literal["dense", "ragged", "gather"] = "dense"
    """Exchange of tokens with their experts. dense: all-to-all of padded buffers; ragged: of exact
    sizes (GPU only); gather: an all-gather and a reduce-scatter."""
    exchange_capacity: float = 0.0
    """Room for rows of experts, sent and computed, as a multiple of the mean under even load; what
    does not fit goes in further rounds. 0: derived; inf: room for everything."""
    exchange_dtype: Literal["", "float8_e4m3fn"] = ""
    """Type that tokens travel to their experts in; empty is that of the activations."""
    context_exchange: Literal["ring", "gather"] = "ring"
    """Exchange of latents between shards of the sequence. ring: from neighbour to neighbour;
    gather: all at once."""
    overlap: bool = False
    """Compute micro batches in pairs, layer by layer, so that one's exchange with the experts can
    overlap the other's compute; without a pipeline (DualPipe does it by itself)."""
    sequence: bool = False
    """Cut the residual stream over `tensor` along the sequence (sequence parallelism)."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"] = "1f1b"
    """Order of forward and backward passes in the pipeline."""
    pipe_chunks: int = 1
    """Parts of the model per pipeline stage, with the interleaved schedule."""


LAYOUTS: dict[str, MeshConfig] = {
    "single": MeshConfig(),
    "replicas": MeshConfig(data=-1),
    "fsdp": MeshConfig(fsdp=-1),
    "expert": MeshConfig(expert=-1),
    "tensor": MeshConfig(tensor=-1),
    "cube": MeshConfig(fsdp=2, expert=2, tensor=2),
    "hybrid": MeshConfig(data=2, fsdp=2, expert=2),
    "deepseek": MeshConfig(
        pipe=16,
        data=2,
        expert=64,
        expert_nodes=8,
        exchange_dtype="float8_e4m3fn",
        schedule="dualpipe",
    ),
}
"""Layouts by name (`--layout NAME`); any axis can be overridden (`--mesh.AXIS N`). `deepseek` is
V3's own, of 2,048 devices (V3 report, sections 3.1 and 3.3.3)."""
