"""Expert exchange: the bytes that each way sends, and what it costs when rows exceed their room.

    python -m bench.expert_exchange [--write]

Bytes come from the compiled forward and backward pass on 8 emulated devices, at a ratio like V3's:
8 of 64 experts per token, from 4 of 8 groups. Counted is what a device sends to others, as if
straight to each of them, and how much of it goes to another node.

Shape letters: B batch, T sequence, N tokens of a device, K choices, D width, E experts, F inner
width, S shards.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.command import Command
from bench.timing import interleaved
from configs import preset
from model.config import ModelConfig
from model.moe import MoE
from model.recipe import Recipe
from model.router import select
from programs.collectives import collective_op, executed, parse, replica_groups
from runtime.devices import emulate_devices
from sharding.config import MeshConfig
from sharding.mesh import make_layout
from sharding.partition import use_layout

DEVICES, TOKENS, WIDTH = 8, 256, 128
"""Devices, and tokens and width of one; bytes are proportional to the latter two."""
MODEL = dataclasses.replace(
    preset("tiny").model,
    hidden_size=WIDTH,
    num_experts=64,
    experts_per_token=8,
    num_expert_groups=8,
    groups_per_token=4,
    expert_ffn_size=16,
    num_shared_experts=0,
)
SENDS: tuple[str, ...] = ("all-to-all", "all-gather", "reduce-scatter")
ROOM = {"exchange_capacity": 1.25}
WAYS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("gather", 2, {"exchange": "gather"}),
    ("dense", 2, {}),
    ("dense, capacity 1.25", 2, ROOM),
    ("2 levels", 2, {"expert_nodes": 2}),
    ("2 levels, capacity 1.25", 2, {"expert_nodes": 2} | ROOM),
    ("dense, capacity 1.25", 4, ROOM),
    ("2 levels", 4, {"expert_nodes": 4}),
    ("2 levels, capacity 1.25", 4, {"expert_nodes": 4} | ROOM),
)
"""Name, nodes that the devices are thought to stand in, and fields of the mesh."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a device sends in one kind of collective, and those of them to other nodes."""

    total: float
    across: float


def main() -> None:
    """Measure, print, and with `--write` record."""
    parser = Command(__doc__, repeats=1, ways=2)
    parser.add_argument("--ways", type=int, default=len(WAYS), help="exchanges, the first so many")
    parser.add_argument("--repeats", type=int, default=40, help="rounds of the timing")
    options = parser.options()
    emulate_devices(DEVICES)
    parser.show("Expert exchange", traffic_table(options.ways))
    parser.show("Rows of experts beyond their room", overflow_table(options.repeats))


def layer(config: ModelConfig, shape: tuple[int, int]):
    """A MoE layer, tokens [B, T, D], and a random choice of experts with weights."""
    rng = np.random.default_rng(0)
    x_BTD = rng.standard_normal((*shape, config.hidden_size)).astype(np.float32)
    scores_BTE = rng.uniform(size=(*shape, config.num_experts)).astype(np.float32)
    ids_BTK, weights_BTK = select(jnp.asarray(scores_BTE), None, config)
    return MoE(config, nnx.Rngs(0)), jnp.asarray(x_BTD), ids_BTK, weights_BTK


def traffic_table(ways: int) -> list[str]:
    """Markdown rows: bytes by collective, in rows of D fp32 numbers per token."""
    moe, *inputs = layer(MODEL, (DEVICES, TOKENS))
    ids_SNK = np.asarray(inputs[1])
    params = nnx.split(moe)[1]
    row = TOKENS * WIDTH * 4
    lines = []
    for name, nodes, fields in WAYS[:ways]:
        program = compile_exchange(MeshConfig(expert=DEVICES, **fields), moe, *inputs)
        placed = jax.tree.map(jax.device_put, (params, *inputs), program.input_shardings[0])
        further = int(program(*placed)[1].further)
        if further:
            raise RuntimeError(f"{name} takes {further} further rounds; bytes are of the first")
        sent = traffic(program.as_text() or "", DEVICES // nodes)
        cells = " | ".join(f"{sent[kind].total / row:.2f}" for kind in SENDS)
        total, across = (
            sum(getattr(t, part) for t in sent.values()) for part in ("total", "across")
        )
        lines.append(f"| {nodes} | {name} | {cells} | {total / row:.2f} | {across / row:.2f} |")
    needed = np.mean([len(set(ids // (64 // DEVICES))) for ids in ids_SNK.reshape(-1, 8)])
    return [
        f"{DEVICES} devices, {TOKENS} tokens each, width {WIDTH} in fp32, 8 of 64 experts from 4 "
        f"of 8 groups, forward and backward, one round. Rows of that width sent per token; a token "
        f"needs {needed:.2f} devices on average, its own among them.",
        "",
        "| nodes | exchange | " + " | ".join(SENDS) + " | all | to other nodes |",
        "|---:|---|" + "---:|" * (len(SENDS) + 2),
        *lines,
    ]


def compile_exchange(mesh: MeshConfig, moe: MoE, *inputs) -> jax.stages.Compiled:
    """Compiled (params, x, ids, weights) to the experts' output, how it came about, gradients."""
    definition, params = nnx.split(moe)

    def run(params, x_BTD, ids_BTK, weights_BTK):
        def forward(params, x_BTD, weights_BTK):
            layer = nnx.merge(definition, params)
            return layer.routed(x_BTD, ids_BTK, weights_BTK, Recipe())

        with use_layout(make_layout(mesh, jax.devices()[:DEVICES])):
            y, vjp, served = jax.vjp(forward, params, x_BTD, weights_BTK, has_aux=True)
            return y, served, vjp(y)

    return jax.jit(run).lower(params, *inputs).compile()


def overflow_table(repeats: int) -> list[str]:
    """Markdown rows: further rounds, time and memory, by routing and room."""
    moe, x_BTD, even_BTK, weights_BTK = layer(MODEL, (DEVICES, TOKENS))
    K, params = MODEL.experts_per_token, nnx.split(moe)[1]
    one_BTK = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32), even_BTK.shape)
    routings = {"even": even_BTK, "all tokens to the same 8": one_BTK}
    found: dict[tuple[str, float], tuple[int, float]] = {}
    runs: dict[Any, Any] = {}
    for capacity in (math.inf, 2.0, 1.25):
        mesh = MeshConfig(expert=DEVICES, exchange_capacity=capacity)
        program = compile_exchange(mesh, moe, x_BTD, even_BTK, weights_BTK)
        analysis = program.memory_analysis()
        assert analysis is not None
        memory = analysis.temp_size_in_bytes / 2**20
        for name, ids_BTK in routings.items():
            inputs = params, x_BTD, ids_BTK, weights_BTK
            placed = jax.tree.map(jax.device_put, inputs, program.input_shardings[0])
            _, served, _ = program(*placed)
            assert served.dropped == 0
            found[name, capacity] = int(served.further), memory
            runs[name, capacity] = functools.partial(program, *placed)
    seconds: dict[Any, float] = interleaved(runs, repeats)
    lines = [
        f"| {name} | {'everything' if math.isinf(capacity) else capacity} | {further} "
        f"| {memory:.1f} | {seconds[name, capacity] / seconds['even', math.inf]:.2f} |"
        for (name, capacity), (further, memory) in found.items()
    ]
    return [
        "The routed experts of the section above, forward and backward, with less room than all "
        "tokens could need, one level. Rounds beyond the "
        "first, of the device with the most; memory of the program besides its arguments, per "
        "device; medians of time against even routing with room for everything. Emulated devices "
        "share cores, so that time shows work, not waiting.",
        "",
        "| routing | room, times even load | further rounds | memory, MiB | time |",
        "|---|---:|---:|---:|---:|",
        *lines,
    ]


def traffic(text: str, node_size: int) -> dict[str, Traffic]:
    """Bytes of each kind of collective, a mean over the devices."""
    sent = {kind: Traffic(0, 0) for kind in SENDS}
    for instruction, _, _, in_further_rounds in executed(parse(text)):
        if in_further_rounds:
            continue
        kind = collective_op(instruction)
        if kind not in sent:
            continue
        groups = replica_groups(instruction.attributes, DEVICES)
        size = sum(shape.bytes for shape in instruction.shapes)
        block = size if kind == "reduce-scatter" else size / len(groups[0])
        pairs = [(a, b) for group in groups for a in group for b in group if a != b]
        crossing = sum(a // node_size != b // node_size for a, b in pairs)
        devices = sum(map(len, groups))
        old = sent[kind]
        sent[kind] = Traffic(
            old.total + block * len(pairs) / devices, old.across + block * crossing / devices
        )
    return sent


if __name__ == "__main__":
    main()
