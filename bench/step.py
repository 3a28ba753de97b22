"""Train step on CPU against Hugging Face's models: tokens per second, share of the peak.

    python -m bench.step [--rounds 5] [--steps 3] [--unroll 4] [--write]

Both sides run forward, backward, clipping and AdamW in fp32 on the same shapes and may use every
core. Theirs runs under its own interpreter (`bench/hf.py`) with the defaults of transformers, eager
and, where a C++ compiler is found, through torch.compile. Rounds alternate between the sides and a
dense matrix product by XLA, the peak, so that a busy machine slows them all; figures are medians
over rounds. Processor seconds per step are shown too: they say less about a program that waits, and
suffer less from neighbours.

MTP is off, which transformers does not train; our step also computes the balance loss, updates
the router bias and skips non-finite updates.
"""

import argparse
import dataclasses
import statistics

from runtime.host_memory import keep_freed_memory

keep_freed_memory()  # before jax starts threads, as train.py does

import jax  # noqa: E402
import numpy as np  # noqa: E402

from bench.command import REFERENCE, Command, Side, load, transformers_side  # noqa: E402
from bench.report import device  # noqa: E402
from bench.timing import Timing, timed  # noqa: E402
from checkpoint.hf_config import to_hf_config  # noqa: E402
from configs import dense, tiny  # noqa: E402
from model.config import ModelConfig  # noqa: E402
from model.costs import train_flops_per_token  # noqa: E402
from model.recipe import Recipe  # noqa: E402
from sharding.config import MeshConfig  # noqa: E402
from sharding.mesh import make_layout  # noqa: E402
from training.config import OptimizerConfig, TrainConfig  # noqa: E402
from training.step import Trainer  # noqa: E402

ABSENT = "not available"
"""How the first line of a side begins that cannot run here; the reason follows."""
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
        "dense: 8 heads on 2, tied": dense.tiny_dense().model,
        "dense: the student of permutations": dense.small_student(),
    }


class Ours:
    """Our step with its state, compiled and warm."""

    def __init__(self, config: ModelConfig, unroll: int):
        optimizer = OptimizerConfig(moment_dtype="float32")
        train = TrainConfig(steps=1, seq_len=LENGTH, batch_size=SEQUENCES, optimizer=optimizer)
        layout = make_layout(MeshConfig(), jax.devices()[:1])
        trainer = Trainer(config, train, Recipe(unroll=unroll), layout)
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


def theirs(config: ModelConfig, interpreter: str, compiled: bool) -> Side:
    """Hugging Face's step, warm if it runs; `about` says why if it does not."""
    shape = {"batch": SEQUENCES, "length": LENGTH, "compile": compiled, "use_cache": False}
    return transformers_side(interpreter, to_hf_config(config) | shape | {"measure": "step"})


def peak_product():
    """A call that multiplies fp32 matrices: what the processor can do with XLA."""
    shape = (PEAK_PRODUCTS, PEAK_SIZE, PEAK_SIZE)
    a = jax.random.normal(jax.random.key(0), shape)
    products = jax.jit(lambda a, b: [x @ y for x, y in zip(a, b, strict=True)])
    operands = list(a), list(a[::-1])
    return lambda: jax.block_until_ready(products(*operands))


def measure(name: str, config: ModelConfig, options: argparse.Namespace) -> str:
    """One row of the table."""
    ours, peak = Ours(config, options.unroll), peak_product()
    eager = theirs(config, options.interpreter, False)
    compiled = theirs(config, options.interpreter, True) if options.compile else None
    if compiled is not None and compiled.about.startswith(ABSENT):
        print(compiled.about, flush=True)
        compiled = None
    timed(peak, 1)
    rounds, ratios = [], []
    for _ in range(options.rounds):
        rounds.append(
            (timed(ours.run, options.steps), Timing(**eager.ask(options.steps)), timed(peak, 2))
        )
        if compiled is not None:
            ratios.append(rounds[-1][1].wall / Timing(**compiled.ask(options.steps)).wall)
    for side in filter(None, (eager, compiled)):
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
        f"{statistics.median(ratios):.2f}"
        if ratios
        else "not available"
        if options.compile
        else "-",
        f"{median(lambda o, t, p: t.processor / o.processor):.2f}",
        f"{flops / tokens / 1e6:.1f}",
        f"{peak_flops / median(lambda o, t, p: p.wall) / 1e9:.0f}",
        f"{100 * median(lambda o, t, p: flops / o.wall / (peak_flops / p.wall)):.0f}%",
        f"{100 * median(lambda o, t, p: flops / o.processor / (peak_flops / p.processor)):.0f}%",
    )
    return "| " + " | ".join(row) + " |"


def main(arguments: list[str] | None = None) -> None:
    """Measure every case and print the table."""
    parser = Command(__doc__, rounds=1, steps=1, cases=1, compile=False)
    parser.add_argument("--cases", type=int, default=4, help="models, the first so many")
    parser.add_argument("--first", type=int, default=0, help="models to pass over")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True,
        help="torch.compile too, which needs g++",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps per round")
    parser.add_argument("--unroll", type=int, default=1, help="ours, as --train.unroll")
    parser.add_argument("--interpreter", default=str(REFERENCE), help="has torch, transformers")
    options = parser.options(arguments)
    jax.config.update("jax_platforms", "cpu")
    lines = [
        "| model | ours, tokens/s | HF, tokens/s | ratio "
        "| HF with torch.compile, times its eager | by processor time | MFLOP/token "
        "| dense product by XLA, GFLOP/s | share of peak | by processor time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        measure(name, config, options)
        for name, config in list(cases().items())[options.first : options.cases]
    ]
    lines += ["", f"Medians of {options.rounds} rounds on {device()}; load at the ends {load()}."]
    title = "Train step on CPU against Hugging Face" + ", layers unrolled" * (options.unroll > 1)
    parser.show(title, lines)


if __name__ == "__main__":
    main()
