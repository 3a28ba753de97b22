"""Expert exchange: its price with one shard of experts, and the bytes that each way sends.

    python -m bench.expert_exchange [--write]

Price: the routed experts of one device through `sharding/experts/dispatch.py`, against the same
kernels called without it. Bytes: from the compiled forward and backward pass on 8 emulated devices,
at a ratio like V3's: 8 of 64 experts per token, from 4 of 8 groups. Counted is what a device sends
to others, as if straight to each of them, and how much of it goes to another node.

Shape letters: B batch, T sequence, N tokens of a device, K choices, D width, E experts, F inner
width, S shards, C slots of a shard.
"""

import dataclasses
import math

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
from pallas_kernels.grouped import expert_sums, sort_by_expert
from programs.collectives import Instruction, collective_op, parse, replica_groups
from runtime.devices import emulate_devices
from sharding.config import MeshConfig
from sharding.experts.room import even_share, room
from sharding.mesh import make_layout
from sharding.partition import use_layout

DEVICES, TOKENS, WIDTH = 8, 256, 128
"""Devices, and tokens and width of one; bytes are proportional to the latter two."""
SENDS: tuple[str, ...] = ("all-to-all", "all-gather", "reduce-scatter")
WAYS = (
    ("gather", 2, MeshConfig(expert=DEVICES, exchange="gather")),
    ("dense, room for all", 2, MeshConfig(expert=DEVICES, exchange_capacity=math.inf)),
    ("dense", 2, MeshConfig(expert=DEVICES)),
    ("dense, capacity 1.25", 2, MeshConfig(expert=DEVICES, exchange_capacity=1.25)),
    ("2 levels", 2, MeshConfig(expert=DEVICES, expert_nodes=2)),
    (
        "2 levels, capacity 1.25",
        2,
        MeshConfig(expert=DEVICES, expert_nodes=2, exchange_capacity=1.25),
    ),
    ("dense, capacity 1.25", 4, MeshConfig(expert=DEVICES, exchange_capacity=1.25)),
    ("2 levels", 4, MeshConfig(expert=DEVICES, expert_nodes=4)),
    (
        "2 levels, capacity 1.25",
        4,
        MeshConfig(expert=DEVICES, expert_nodes=4, exchange_capacity=1.25),
    ),
)
"""Name, nodes that the devices are thought to stand in, and the exchange."""


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
    lines = [*price(options.repeats), "", *traffic_table(options.ways)]
    parser.show("Expert exchange", lines)


def price(repeats: int) -> list[str]:
    """Time and compiled program of one device with and without the exchange."""
    config = preset("tiny").model
    moe, x_BTD, ids_BTK, weights_BTK = layer(config, (8, 256))
    definition, params = nnx.split(moe)

    def plain(params, x_BTD, weights_BTK, ids_BTK):
        rows_ND, K = x_BTD.reshape(-1, x_BTD.shape[-1]), ids_BTK.shape[-1]
        experts = tuple(params[name].get_value() for name in ("w_gate", "w_up", "w_down"))
        plan = sort_by_expert(ids_BTK.reshape(-1, K), config.num_experts)
        y_ND = expert_sums(rows_ND, weights_BTK.reshape(-1, K), experts, plan)
        return y_ND.reshape(x_BTD.shape)

    def exchanged(params, x_BTD, weights_BTK, ids_BTK):
        return nnx.merge(definition, params).routed(x_BTD, ids_BTK, weights_BTK, Recipe())[0]

    def compiled(function):
        def run(ids_BTK, *operands):
            y, vjp = jax.vjp(lambda *operands: function(*operands, ids_BTK), *operands)
            return y, vjp(y)

        return jax.jit(run).lower(ids_BTK, params, x_BTD, weights_BTK).compile()

    programs = {"plain": compiled(plain), "exchange": compiled(exchanged)}
    runs = {
        name: lambda program=program: program(ids_BTK, params, x_BTD, weights_BTK)
        for name, program in programs.items()
    }
    seconds = interleaved(runs, repeats)
    size = {name: len(instructions(program.as_text() or "")) for name, program in programs.items()}
    ratio = seconds["exchange"] / seconds["plain"]
    return [
        f"One device, forward and backward, {x_BTD.shape[0] * x_BTD.shape[1]} tokens of the tiny "
        f"model, medians: plain {seconds['plain'] * 1e3:.2f} ms, through the exchange "
        f"{seconds['exchange'] * 1e3:.2f} ms ({ratio - 1:+.1%}). Instructions of the compiled "
        f"programs: {size['plain']} and {size['exchange']}.",
    ]


def instructions(text: str) -> list[Instruction]:
    """Instructions of a compiled module, those of every computation."""
    return [one for found in parse(text).computations.values() for one in found.values()]


def layer(config: ModelConfig, shape: tuple[int, int]):
    """A MoE layer, tokens [B, T, D], and a random choice of experts with weights."""
    rng = np.random.default_rng(0)
    x_BTD = rng.standard_normal((*shape, config.hidden_size)).astype(np.float32)
    scores_BTE = rng.uniform(size=(*shape, config.num_experts)).astype(np.float32)
    ids_BTK, weights_BTK = select(jnp.asarray(scores_BTE), None, config)
    return MoE(config, nnx.Rngs(0)), jnp.asarray(x_BTD), ids_BTK, weights_BTK


def traffic_table(ways: int) -> list[str]:
    """Markdown rows: bytes by collective, in rows of D fp32 numbers per token."""
    config = dataclasses.replace(
        preset("tiny").model,
        hidden_size=WIDTH,
        num_experts=64,
        experts_per_token=8,
        num_expert_groups=8,
        groups_per_token=4,
        expert_ffn_size=16,
        num_shared_experts=0,
    )
    moe, *inputs = layer(config, (DEVICES, TOKENS))
    ids_SNK = np.asarray(inputs[1])
    row = TOKENS * WIDTH * 4
    lines = []
    for name, nodes, mesh in WAYS[:ways]:
        rounds = rounds_of(mesh, ids_SNK, config)
        if rounds != 1:
            raise RuntimeError(f"{name} takes {rounds} rounds; bytes are counted for one")
        sent = traffic(compile_exchange(mesh, moe, *inputs), DEVICES // nodes)
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


def rounds_of(mesh: MeshConfig, ids_SNK: np.ndarray, config: ModelConfig) -> int:
    """Rounds that the busiest level takes for these choices, each level's first for the second."""
    if mesh.exchange == "gather":
        return 1
    S, N, K = ids_SNK.shape
    nodes, inside = mesh.expert_nodes, S // mesh.expert_nodes
    num_experts, groups = config.num_experts, (config.num_expert_groups, config.groups_per_token)

    def needs(rows, experts):  # [rows, shards]
        return (rows[:, :, None] // experts == np.arange(num_experts // experts)).any(1)

    def rounds(rows: int, most: int, experts: int, tokens: int) -> int:
        mean = tokens * even_share(num_experts, experts, K, groups)
        return math.ceil(most / room(mean, rows, mesh.exchange_capacity))

    across = max(needs(ids, num_experts // nodes).sum(0).max() for ids in ids_SNK)
    slots = (
        N
        if nodes == 1
        else room(
            N * even_share(num_experts, num_experts // nodes, K, groups), N, mesh.exchange_capacity
        )
    )
    # A device of a node receives the tokens of the devices with its own index in all nodes.
    shared = ids_SNK.reshape(nodes, inside, N, K).swapaxes(0, 1).reshape(inside, nodes * N, K)
    fanned = max(needs(ids, num_experts // S).sum(0).max() for ids in shared)
    return max(
        1 if nodes == 1 else rounds(N, across, num_experts // nodes, N),
        rounds(nodes * slots, fanned, num_experts // S, nodes * N),
    )


def compile_exchange(mesh: MeshConfig, moe: MoE, x_BTD, ids_BTK, weights_BTK) -> str:
    """Optimised HLO of the routed experts' output and gradients."""
    definition, params = nnx.split(moe)

    def run(params, x_BTD, ids_BTK, weights_BTK):
        def forward(params, x_BTD, weights_BTK):
            layer = nnx.merge(definition, params)
            return layer.routed(x_BTD, ids_BTK, weights_BTK, Recipe())[0]

        with use_layout(make_layout(mesh, jax.devices()[:DEVICES])):
            y, vjp = jax.vjp(forward, params, x_BTD, weights_BTK)
            return y, vjp(y)

    return jax.jit(run).lower(params, x_BTD, ids_BTK, weights_BTK).compile().as_text() or ""


def traffic(text: str, node_size: int) -> dict[str, Traffic]:
    """Bytes of each kind of collective, a mean over the devices."""
    sent = {kind: Traffic(0, 0) for kind in SENDS}
    for instruction in instructions(text):
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
