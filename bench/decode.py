"""Decoding on CPU against `generate` of transformers with its cache, in one run.

    python -m bench.decode [--rounds 3] [--tokens 32] [--cases tiny,v2_lite]
        [--batches 1,16] [--write]

Random weights in fp32, random prompts, greedy, every core on both sides. Each side is a process of
its own, theirs under its own interpreter (`bench/hf.py`); a round starts one, measures it,
ends it, and does the same with the other. Figures are medians. Compilation and prefill are left
out on both sides: the time is that of the tokens after the first. Bytes are those a step must read
once: weights of the layers, the experts that the batch chose on average, the head, and the cache;
their rate is compared with a reduction over an array of 1 GiB in the same run.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.command import REFERENCE, Command, Side, load, numbers, transformers_side
from checkpoint.hf_config import to_hf_config
from configs import deepseek, dense, tiny
from generation.config import Sampling
from generation.engine import Generator
from model.config import ModelConfig
from model.costs import cache_bytes_per_token, count_parameters
from model.recipe import Recipe
from sharding.config import MeshConfig
from sharding.mesh import make_layout

GREEDY = Sampling(temperature=0)


def cases() -> dict[str, ModelConfig]:
    """Models of the comparison."""
    small = dataclasses.replace(tiny.model(), max_position=8192, mtp_depth=0)
    wide = dataclasses.replace(
        deepseek.v2_lite_model(), num_layers=4, max_position=8192, yarn=None, init_std=0.02
    )
    grouped = dataclasses.replace(dense.tiny_dense().model, max_position=8192)
    return {"tiny": small, "v2_lite": wide, "dense": grouped}


def bandwidth(rounds: int = 5) -> float:
    """Bytes per second of reading an array of 1 GiB once: the best of some rounds, either axis."""
    x = jnp.ones((2**14, 2**14), jnp.float32)
    best = float("inf")
    for axis in (0, 1):
        largest = jax.jit(functools.partial(jnp.max, axis=axis))
        for _ in range(rounds):
            began = time.perf_counter()
            jax.block_until_ready(largest(x))
            best = min(best, time.perf_counter() - began)
    return x.nbytes / best


def bytes_per_step(c: ModelConfig, batch: int, context: int) -> float:
    """Bytes that one step must read, in fp32: see the head of this file."""
    d, E, K = c.hidden_size, c.num_experts, c.experts_per_token
    everything = count_parameters(c).total
    if not c.tie_embeddings:  # a step reads rows of the table
        everything -= c.vocab_size * d
    expert = 3 * d * c.expert_ffn_size
    chosen = E * (1 - (1 - K / max(E, 1)) ** batch)
    weights = everything - c.num_moe_layers * (E - chosen) * expert
    return 4.0 * weights + batch * context * cache_bytes_per_token(c, 4)


class Ours:
    """Our generator with random weights."""

    def __init__(self, config: ModelConfig):
        layout = make_layout(MeshConfig(), jax.devices()[:1])
        self._generator = Generator(config, Recipe(), layout)
        weights = random_weights(self._generator.abstract_weights)
        self._weights = self._generator.prepare(weights, consume=True)
        self._vocab = config.vocab_size

    def seconds(self, batch: int, context: int, tokens: int) -> float:
        """Time of `tokens` steps after the first token."""
        rng = np.random.default_rng(0)
        prompts = list(rng.integers(0, self._vocab, (batch, context)).astype(np.int32))
        session = self._generator.start(self._weights, prompts, GREEDY, 1 + tokens)
        while not session.done:
            session.advance()
        assert session.stats.decoded_tokens == batch * tokens
        return session.stats.decode_seconds


def random_weights(abstract: Any) -> Any:
    """Weights of the shapes asked for, norms at 1; one array at a time, for want of memory."""
    rng = np.random.default_rng(0)

    def make(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jax.tree_util.keystr(path).endswith("['scale']"):
            return jnp.ones(leaf.shape)
        return jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree_util.tree_map_with_path(make, abstract)


def serve(config: ModelConfig) -> None:
    """Our side of the comparison in a process of its own; speaks as `bench/hf.py` does."""
    ours = Ours(config)
    print("ready", flush=True)
    for line in sys.stdin:
        batch, context, tokens = map(int, line.split())
        print(json.dumps({"seconds": ours.seconds(batch, context, tokens)}), flush=True)


def our_side(name: str) -> Side:
    """Our side in a process of its own; one at a time, since two models would not fit memory."""
    return Side(sys.executable, "-m", "bench.decode", "--serve", name)


def compare(name: str, config: ModelConfig, options: argparse.Namespace) -> list[str]:
    """Rows of the table for one model: every round starts both sides anew, one after the other."""
    starts = {
        "ours": lambda: our_side(name),
        "theirs": lambda: transformers_side(
            options.interpreter, to_hf_config(config) | {"measure": "decode"}
        ),
    }
    times = {(side, batch): [] for side in starts for batch in options.batches}
    for _ in range(options.rounds):
        for name_of_side, start in starts.items():
            side = start()
            print(side.about, flush=True)
            for batch in options.batches:
                shape = (batch, options.context, options.tokens)
                side.ask(*shape)  # compiles
                times[name_of_side, batch].append(side.ask(*shape)["seconds"])
            side.close()
    rate, rows = bandwidth(), []
    for batch in options.batches:
        ours, theirs = times["ours", batch], times["theirs", batch]
        mine, other = statistics.median(ours), statistics.median(theirs)
        ratios = [t / o for o, t in zip(ours, theirs, strict=True)]
        read = bytes_per_step(config, batch, options.context) * options.tokens / mine
        count = batch * options.tokens
        rows.append(
            f"| {name} | {batch} | {count / mine:,.1f} | {count / other:,.1f} "
            f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} "
            f"| {read / 1e9:.1f} | {rate / 1e9:.1f} | {100 * read / rate:.0f}% |"
        )
        print(rows[-1], flush=True)
    return rows


def growth(name: str, config: ModelConfig, options: argparse.Namespace) -> list[str]:
    """Cost per token against context, ours."""
    side, lines = our_side(name), []
    for context in (options.context // 4, options.context, 4 * options.context):
        shape = (1, context, options.tokens)
        side.ask(*shape)
        times = [side.ask(*shape)["seconds"] for _ in range(options.rounds)]
        step = statistics.median(times) / options.tokens
        held = cache_bytes_per_token(config, 4) * context
        lines.append(f"| {context} | {1e3 * step:.2f} | {held / 2**20:.1f} |")
        print(lines[-1], flush=True)
    side.close()
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measure every case and print the tables."""
    parser = Command(__doc__, rounds=1, tokens=2, cases="tiny", batches="1", context=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="tokens per round")
    parser.add_argument("--context", type=int, default=1024, help="tokens before the first")
    parser.add_argument("--cases", default="tiny,v2_lite")
    parser.add_argument("--batches", type=numbers, default="1,16")
    parser.add_argument("--interpreter", default=str(REFERENCE), help="has torch, transformers")
    parser.add_argument("--serve", metavar="CASE", help="be our side; for the script itself")
    options = parser.options(arguments)
    jax.config.update("jax_platforms", "cpu")
    if options.serve:
        serve(cases()[options.serve])
        return
    chosen = {name: cases()[name] for name in options.cases.split(",")}
    lines = [
        f"Context {options.context}, fp32, greedy, {options.tokens} tokens a round.",
        "",
        "| model | batch | ours, tokens/s | HF, tokens/s | ratio | its rounds | read, GB/s "
        "| reduction, GB/s | share |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, config in chosen.items():
        lines += compare(name, config, options)
    for name, config in chosen.items():
        lines += ["", f"{name}, batch 1, ms per token against context:", ""]
        lines += ["| context | ms | cache, MiB |", "|---|---|---|", *growth(name, config, options)]
    lines += ["", f"Medians of {options.rounds} rounds; load averages at the end {load()}."]
    parser.show("Decoding on CPU against Hugging Face", lines)


if __name__ == "__main__":
    main()
