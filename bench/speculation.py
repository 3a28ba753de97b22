"""What MTP speculation costs and brings at batch 1, with a draft that is right most of the time.

    python -m bench.speculation [--cases tiny,deep,v2_lite] [--rounds 5] [--tokens 128] [--write]

The models are those of `bench/decode.py` and one of V2-Lite's depth at a quarter of its width, each
with one MTP module. Every product is paid for, but layers add nothing to the residual stream, and
the head maps every token's embedding to a fixed successor. The MTP module sees some of the
embedding's channels only: enough to find the successor most of the time. Decoding without drafts,
with (`on`) and with them on trial (`auto`) take turns in one process, a call of `advance` each, so
that other load on the machine meets all three; figures are medians over rounds. Every round has a
trial of its own. Compilation, prefill and trials are left out.
"""

import collections
import dataclasses
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from bench.command import Command, load
from bench.decode import GREEDY, cases, random_weights
from generation.config import Speculation
from generation.engine import Generator
from generation.stats import Stats
from model.blueprint import Tree
from model.config import ModelConfig
from model.recipe import Recipe
from sharding.config import MeshConfig
from sharding.mesh import make_layout

SPARE_BITS = 2
"""Channels that the draft sees beyond log2 of the vocabulary: about 1 in 2^SPARE_BITS tokens then
has a rival that looks the same to it."""

LEAST_SECONDS = 1.0
"""A round lasts at least this long without drafts: a pause of 0.05 s is 5% of it."""
MODES: tuple[Speculation, ...] = (False, True, "auto")


def models() -> dict[str, ModelConfig]:
    """What is measured. An MTP module and its head are a third of a drafted pass at v2_lite's 4
    layers, and of a deep model's next to nothing."""
    known = cases()
    deep = dataclasses.replace(
        known["v2_lite"],
        num_layers=27,
        vocab_size=25600,
        hidden_size=512,
        num_heads=4,
        kv_lora_rank=128,
        dense_ffn_size=2736,
        expert_ffn_size=352,
    )
    return {"tiny": known["tiny"], "deep": deep, "v2_lite": known["v2_lite"]}


def predictable(config: ModelConfig, weights: Tree) -> Tree:
    """The same weights, made to give every token one successor and the MTP module most of them."""
    rng = np.random.default_rng(0)
    params, d, V = weights["params"], config.hidden_size, config.vocab_size
    for stack in (params["dense_layers"], params["moe_layers"], params["mtp"]["block"]):
        silence(stack)
    codes_VD = rng.choice(np.array([-1, 1], np.float32), (V, d))
    params["embed"]["table"] = jnp.asarray(codes_VD)
    head_DV = np.empty((d, V), np.float32)
    head_DV[:, rng.permutation(V)] = codes_VD.T
    params["head"]["kernel"] = jnp.asarray(head_DV)
    seen = np.arange(d) < math.ceil(math.log2(V)) + SPARE_BITS
    # Inputs are [embedding; hidden state]: the draft reads the embedding of the last token.
    kernel = np.concatenate([np.diag(seen.astype(np.float32)), np.zeros((d, d), np.float32)])
    params["mtp"]["proj"]["kernel"] = jnp.asarray(kernel[None])
    return weights


def silence(layers: Tree) -> None:
    """Make every layer of a stack add zeros to the residual stream."""
    outputs = [(layers["attn"], "w_o")]
    for ffn in (layers.get("mlp"), layers.get("moe"), layers.get("moe", {}).get("shared")):
        outputs += [(ffn, "w_down")] if ffn else []
    for tree, name in outputs:
        tree[name] = jnp.zeros_like(tree[name])


def measure(config: ModelConfig, rounds: int, tokens: int) -> dict[str, list[float]]:
    """Of every round: ms per token without drafts and with, their ratios, and what drafts did."""
    layout = make_layout(MeshConfig(), jax.devices()[:1])
    generator = Generator(config, Recipe(), layout)
    weights = predictable(config, random_weights(generator.abstract_weights))
    prepared = generator.prepare(weights, consume=True)

    def decode() -> list[Stats]:
        """One session without drafts, one with, one with drafts on trial, in turns."""
        prompt = np.arange(64, dtype=np.int32)
        sessions = [
            generator.start(prepared, [prompt], GREEDY, 1 + tokens, (), speculate)
            for speculate in MODES
        ]
        while not all(session.done for session in sessions):
            for session in sessions:
                if not session.done:
                    session.advance()
        return [session.stats for session in sessions]

    decode()  # compiles
    found: dict[str, list[float]] = collections.defaultdict(list)
    for _ in range(rounds):
        generator.pass_steps.clear()
        every = [decode()]
        while sum(stats[0].decode_seconds for stats in every) < LEAST_SECONDS:
            every.append(decode())
        plain, on, auto = (
            1e3 * sum(stats.decode_seconds for stats in column) / (tokens * len(every))
            for column in zip(*every, strict=True)
        )
        _, drafted, tried = every[0]
        figures = {
            "plain": plain,
            "drafted": on,
            "on": plain / on,
            "auto": plain / auto,
            "accepted": drafted.accepted / drafted.drafted,
            "tokens per pass": drafted.decoded_tokens / drafted.main_passes,
            "pass": tried.pass_steps,
            "trial": tried.trial_seconds,
            "drafts": tried.drafted,
            "stopped": tried.stopped,
        }
        print({name: round(value, 3) for name, value in figures.items()}, flush=True)
        for name, value in figures.items():
            found[name].append(value)
    return found


def table_row(name: str, found: dict[str, list[float]]) -> str:
    """A case's line of the table."""
    middle = {key: statistics.median(values) for key, values in found.items()}
    spread = {
        key: f"{middle[key]:.2f} ({min(values):.2f} to {max(values):.2f})"
        for key, values in found.items()
    }
    at_once = sum(s and not d for s, d in zip(found["stopped"], found["drafts"], strict=True))
    later = int(sum(found["stopped"])) - at_once
    return (
        f"| {name} | {middle['accepted']:.0%} | {middle['tokens per pass']:.2f} "
        f"| {middle['plain']:.2f} | {middle['drafted']:.2f} | {spread['on']} | {spread['auto']} "
        f"| {spread['pass']} | {at_once}, {later}, {len(found['stopped']) - at_once - later} "
        f"| {middle['trial']:.1f} |"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure every case and print the table."""
    parser = Command(__doc__, cases="tiny", rounds=1, tokens=2)
    parser.add_argument("--cases", default="tiny,deep,v2_lite")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a session")
    options = parser.options(arguments)
    jax.config.update("jax_platforms", "cpu")
    lines = [
        "Batch 1, context 64, fp32, greedy.",
        "",
        "`on` and `auto` are times as fast as without drafts. `auto` ends drafts that do not pay, "
        "before the first (off) or after some (stopped); the last but one column counts rounds.",
        "",
        "| model | drafts accepted | tokens per main pass | ms/token without drafts | with | on "
        "| auto | steps that a pass costs | off, stopped, kept | trial, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in options.cases.split(","):
        config = dataclasses.replace(models()[name], mtp_depth=1)
        lines.append(table_row(name, measure(config, options.rounds, options.tokens)))
        print(lines[-1], flush=True)
    lines += [
        "",
        f"Medians (least to most) of {options.rounds} rounds; load averages at the end {load()}.",
    ]
    parser.show("MTP speculation on CPU", lines)


if __name__ == "__main__":
    main()
