"""Train step on CPU against Hugging Face's DeepSeek-V3: tokens per second, share of the peak.

    python -m bench.step [--rounds 5] [--steps 3] [--write]

Both sides run forward, backward, clipping and AdamW in fp32 on the same shapes and may use every
core. Theirs runs under its own interpreter (`bench/hf_step.py`) with the defaults of transformers.
Rounds alternate between the two and a dense matrix product by XLA, the peak, so that a busy machine
slows all three; figures are medians over rounds. Processor seconds per step are shown too: they
say less about a program that waits, and suffer less from neighbours.

MTP is off, which transformers does not train; our step also computes the balance loss, updates
the router bias and skips non-finite updates.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

from runtime.host_memory import keep_freed_memory

keep_freed_memory()  # before jax starts threads, as train.py does

import jax  # noqa: E402
import numpy as np  # noqa: E402

from bench.command import Command  # noqa: E402
from bench.report import write_section  # noqa: E402
from configs import tiny  # noqa: E402
from model.config import ModelConfig  # noqa: E402
from model.costs import train_flops_per_token  # noqa: E402
from model.recipe import Recipe  # noqa: E402
from sharding.config import MeshConfig  # noqa: E402
from sharding.mesh import make_mesh  # noqa: E402
from sharding.partition import Layout  # noqa: E402
from training.config import OptimizerConfig, TrainConfig  # noqa: E402
from training.step import Trainer  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
SEQUENCES, LENGTH = 8, 256
PEAK_SIZE = 2048
PEAK_PRODUCTS = 2
"""Independent products at a time: XLA may run a single one on one core."""
KNOBS = {"learning_rate": 1e-3, "bias_update_rate": 1e-3, "mtp_weight": 0.0}


def cases() -> dict[str, ModelConfig]:
    """Models of the comparison."""
    shape = dataclasses.replace(tiny.model(), mtp_depth=0)
    return {
        "tiny: 16 experts, top-4": shape,
        "64 experts, top-6": dataclasses.replace(
            shape, num_experts=64, experts_per_token=6, num_expert_groups=8, groups_per_token=4
        ),
    }


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of one round."""

    wall: float
    """Seconds per step."""
    processor: float
    """Processor seconds per step, all threads."""


def timed(run, steps: int) -> Timing:
    """`run` called `steps` times; it returns when its work is done."""
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
        run()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return Timing(wall / steps, processor / steps)


class Ours:
    """Our step with its state, compiled and warm."""

    def __init__(self, config: ModelConfig):
        optimizer = OptimizerConfig(moment_dtype="float32")
        train = TrainConfig(steps=1, seq_len=LENGTH, batch_size=SEQUENCES, optimizer=optimizer)
        layout = Layout(make_mesh(MeshConfig(), jax.devices()[:1]))
        trainer = Trainer(config, train, Recipe(), layout)
        shape = (1, SEQUENCES, LENGTH + 1)
        rows = np.random.default_rng(0).integers(0, config.vocab_size, shape)
        self._batch = {"tokens": rows.astype(np.int32)}
        self._knobs = {name: np.float32(value) for name, value in KNOBS.items()}
        self._step = trainer.step
        self._state = trainer.init(jax.random.key(0))
        timed(self.run, 3)

    def run(self) -> None:
        """One step."""
        self._state, metrics = self._step(self._state, self._batch, self._knobs)
        jax.block_until_ready((self._state, metrics))


class Theirs:
    """Hugging Face's step in a process of its own, warm; idle unless asked."""

    def __init__(self, config: ModelConfig, interpreter: str, compiled: bool):
        shape = {"batch": SEQUENCES, "length": LENGTH, "compile": compiled}
        options = json.dumps(hf_options(config) | shape)
        # Threads that wait must not spin, or they slow each other down on a busy machine.
        environment = os.environ | {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [interpreter, "-I", str(HERE / "hf_step.py"), options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.about = self._read()
        self.steps(3)

    def steps(self, count: int) -> Timing:
        """`count` steps in a row."""
        assert self._process.stdin is not None
        print(count, file=self._process.stdin, flush=True)
        return Timing(**json.loads(self._read()))

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")
        return line.strip()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def hf_options(config: ModelConfig) -> dict:
    """Our model in the words of transformers' DeepseekV3Config."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "first_k_dense_replace": config.num_dense_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "intermediate_size": config.dense_ffn_size,
        "moe_intermediate_size": config.expert_ffn_size,
        "n_routed_experts": config.num_experts,
        "n_shared_experts": config.num_shared_experts,
        "num_experts_per_tok": config.experts_per_token,
        "n_group": config.num_expert_groups,
        "topk_group": config.groups_per_token,
        "routed_scaling_factor": config.routed_scaling_factor,
        "norm_topk_prob": config.normalize_topk,
        "max_position_embeddings": config.max_position,
        "use_cache": False,
    }


def peak_product():
    """A call that multiplies fp32 matrices: what the processor can do with XLA."""
    shape = (PEAK_PRODUCTS, PEAK_SIZE, PEAK_SIZE)
    a = jax.random.normal(jax.random.key(0), shape)
    products = jax.jit(lambda a, b: [x @ y for x, y in zip(a, b, strict=True)])
    operands = list(a), list(a[::-1])
    return lambda: jax.block_until_ready(products(*operands))


def measure(name: str, config: ModelConfig, options: argparse.Namespace) -> str:
    """One row of the table."""
    ours, theirs, peak = Ours(config), Theirs(config, options.interpreter, False), peak_product()
    compiled = Theirs(config, options.interpreter, True) if options.compile else None
    timed(peak, 1)
    rounds, with_compiler = [], []
    for _ in range(options.rounds):
        rounds.append((timed(ours.run, options.steps), theirs.steps(options.steps), timed(peak, 2)))
        if compiled is not None:
            with_compiler.append(compiled.steps(options.steps).wall)
    for side in filter(None, (theirs, compiled)):
        side.close()
        print(side.about, flush=True)
    tokens = SEQUENCES * LENGTH
    flops = tokens * train_flops_per_token(config, LENGTH)
    peak_flops = 2 * PEAK_SIZE**3 * PEAK_PRODUCTS

    def median(value) -> float:
        return statistics.median(value(*r) for r in rounds)

    row = (
        name,
        f"{tokens / median(lambda o, t, p: o.wall):,.0f}",
        f"{tokens / median(lambda o, t, p: t.wall):,.0f}",
        f"{median(lambda o, t, p: t.wall / o.wall):.2f}",
        f"{tokens / statistics.median(with_compiler):,.0f}" if with_compiler else "not run",
        f"{median(lambda o, t, p: t.processor / o.processor):.2f}",
        f"{flops / tokens / 1e6:.1f}",
        f"{peak_flops / median(lambda o, t, p: p.wall) / 1e9:.0f}",
        f"{100 * median(lambda o, t, p: flops / o.wall / (peak_flops / p.wall)):.0f}%",
        f"{100 * median(lambda o, t, p: flops / o.processor / (peak_flops / p.processor)):.0f}%",
    )
    return "| " + " | ".join(row) + " |"


def main(arguments: list[str] | None = None) -> None:
    """Measure every case and print the table."""
    reference = HERE.parent / ".venv-reference" / "bin" / "python"
    parser = Command(__doc__, rounds=1, steps=1, cases=1)
    parser.add_argument("--cases", type=int, default=2, help="models, the first so many")
    parser.add_argument("--compile", action="store_true", help="torch.compile too: needs g++")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps per round")
    parser.add_argument("--interpreter", default=str(reference), help="has torch, transformers")
    options = parser.options(arguments)
    jax.config.update("jax_platforms", "cpu")
    lines = [
        "| model | ours, tokens/s | HF, tokens/s | ratio "
        "| HF with torch.compile, tokens/s | by processor time | MFLOP/token "
        "| dense product by XLA, GFLOP/s | share of peak | by processor time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        measure(name, config, options) for name, config in list(cases().items())[: options.cases]
    ]
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    lines += ["", f"Medians of {options.rounds} rounds; load averages at the end {load}."]
    print("\n".join(lines))
    if options.write:
        write_section("Train step on CPU against Hugging Face", lines)


if __name__ == "__main__":
    main(sys.argv[1:])
