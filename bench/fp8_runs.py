"""FP8 against BF16 over whole runs: pairs of equal seed, their held-out losses, and the spread.

    python -m bench.fp8_runs --size mini --start scratch --seeds 0,1,2,3,4,5,6,7 [--write]
    python -m bench.fp8_runs --size tiny --start trained --seeds 0,1,2,3,4,5,6,7
    python -m bench.fp8_runs --size medium --seeds 0,1 --report

A pair has the same first weights, the same data in the same order and the same schedule; only the
recipe differs. Seeds differ in the first weights and in the data; with `--start trained` all start
from the same weights, a run in BF16, and differ in the data. Every run writes one file to
bench/measured/fp8_runs/ when it ends, and its state to the cache on the way, so that a run that was
ended goes on where it was, and what is there is not computed again. `--report` only reads files.

The held-out loss is that of a run's own recipe, on the same tokens for all. Portable products, one
device: FP8 quantises there as it does on a GPU, bit for bit, and multiplies in BF16.
"""

import argparse
import dataclasses
import json
import math
import pickle
import statistics
import time
from pathlib import Path
from typing import Any

from runtime.host_memory import keep_freed_memory

keep_freed_memory()  # before jax starts threads, as train.py does

import jax  # noqa: E402
import numpy as np  # noqa: E402

from bench.command import Command, numbers  # noqa: E402
from bench.report import ROOT, commit  # noqa: E402
from configs import tiny  # noqa: E402
from configs.schema import RunConfig  # noqa: E402
from data.evaluation import held_out_reader  # noqa: E402
from data.loader import train_loader  # noqa: E402
from data.prepare import Prepared, prepare  # noqa: E402
from model.recipe import Recipe  # noqa: E402
from sharding.config import MeshConfig  # noqa: E402
from sharding.mesh import make_layout  # noqa: E402
from training.config import Phase, TrainConfig  # noqa: E402
from training.evaluate import evaluate  # noqa: E402
from training.schedule import BatchPlan, knobs_at  # noqa: E402
from training.step import State, Trainer  # noqa: E402

FOLDER = ROOT / "bench" / "measured" / "fp8_runs"
RECIPES = {"bf16": Recipe("bfloat16"), "fp8": Recipe("bfloat16", fp8=True, stash="e5m6")}
SAVE_EVERY, MEAN_OF = 250, 50
"""Steps between saves of a run's state; steps of a point of the training curve."""
BEFORE = 400
"""Steps of the run in BF16 whose weights `--start trained` begins from; its seed is no other's."""
ITS_SEED = 1000


def config(size: str, steps: int) -> RunConfig:
    """The run of a size. Router biases move fast enough for its length, as in `tiny`."""
    run, model = tiny.tiny(), tiny.model()
    shapes = {
        "mini": (4, 128, dataclasses.replace(
            model, hidden_size=128, num_layers=3, q_lora_rank=64, kv_lora_rank=32,
            dense_ffn_size=512, num_experts=8, experts_per_token=2,
        )),
        "tiny": (8, 256, model),
        "medium": (16, 256, dataclasses.replace(
            model, hidden_size=384, num_layers=8, num_heads=6, q_lora_rank=192, kv_lora_rank=96,
            dense_ffn_size=1536, expert_ffn_size=192,
        )),
    }  # fmt: skip
    batch, length, model = shapes[size]
    train = TrainConfig(
        steps=steps,
        seq_len=length,
        batch_size=batch,
        learning_rate=(
            Phase(steps // 20, 3e-3 if size != "medium" else 1e-3, "linear", "steps"),
            Phase(steps, 3e-4 if size != "medium" else 1e-4, "cosine", "steps"),
        ),
        bias_update_rate=(Phase(0.97 * steps, 0.01, unit="steps"), Phase(steps, 0, unit="steps")),
        dtype="bfloat16",
        eval_batches=64,
    )
    return dataclasses.replace(run, model=model, train=train)


class Bench:
    """Data, trainers and files of one size, start and length."""

    def __init__(self, size: str, start: str, steps: int, folder: Path):
        self.run, self.start = config(size, steps), start
        self.folder = folder / f"{size}_{start}_{steps}"
        self.cache = ROOT / "cache" / "fp8_runs" / f"{size}_{start}_{steps}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cache.mkdir(parents=True, exist_ok=True)

    def prepared(self, seed: int) -> Prepared:
        """The corpus in the order of a seed; the held-out part is always the same."""
        data = dataclasses.replace(self.run.data, cache_dir=str(ROOT / "cache"))
        return prepare(data, self.run.train.seq_len, seed)

    def trainer(self, recipe: str, train: TrainConfig) -> Trainer:
        """Trainer of a recipe on one device."""
        train = dataclasses.replace(train, fp8=RECIPES[recipe].fp8)
        layout = make_layout(MeshConfig(), jax.devices()[:1])
        return Trainer(self.run.model, train, RECIPES[recipe], layout)

    def first_state(self, trainer: Trainer, seed: int) -> State:
        """Random weights of the seed, or the common trained ones with a fresh optimizer."""
        state = trainer.init(jax.random.key(seed))
        if self.start == "trained":
            path = self.cache / "trained.pickle"
            if not path.exists():
                train = config_of_before(self.run.train)
                before = self.trainer("bf16", train)
                state = self.train(before, before.init(jax.random.key(ITS_SEED)), ITS_SEED, [])
                path.write_bytes(pickle.dumps(weights(state)))
                state = trainer.init(jax.random.key(seed))
            state |= jax.device_put(pickle.loads(path.read_bytes()))
        return state

    def train(self, trainer: Trainer, state: State, seed: int, losses: list, save=None) -> State:
        """`state` at the end of the run; means of the loss over MEAN_OF steps go to `losses`."""
        train, plan = trainer.train, BatchPlan(trainer.train)
        loader = train_loader(self.prepared(seed), train.batch_size)
        last: list[Any] = []
        for step in range(int(state["step"]), train.steps):
            at = plan.at(step)
            batch = loader.batch_at(at.first_sequence, at.batch_size)
            knobs = {name: np.float32(x) for name, x in knobs_at(train, plan, step).items()}
            state, metrics = trainer.step(state, batch, knobs)
            last.append(metrics["train/loss"])
            if (step + 1) % MEAN_OF == 0:
                losses.append(float(np.mean(jax.device_get(last))))
                last = []
            if save and (step + 1) % SAVE_EVERY == 0:
                save(state)
        return state

    def one(self, seed: int, recipe: str) -> None:
        """A run, unless its file is there; it goes on from its last saved state."""
        path, saved = (
            folder / f"seed{seed}_{recipe}.{kind}"
            for folder, kind in ((self.folder, "json"), (self.cache, "pickle"))
        )
        if path.exists():
            return
        trainer = self.trainer(recipe, self.run.train)
        began, spent, losses = time.process_time(), 0.0, []
        if saved.exists():
            state, losses, spent = pickle.loads(saved.read_bytes())
            state = jax.device_put(state)
        else:
            state = self.first_state(trainer, seed)

        def seconds() -> float:
            return spent + time.process_time() - began

        def save(state: State) -> None:
            beside = saved.with_suffix(".new")
            beside.write_bytes(pickle.dumps((jax.device_get(state), losses, seconds())))
            beside.replace(saved)
            print(f"{saved.stem}: step {int(state['step'])}, {losses[-1]:.4f}", flush=True)

        state = self.train(trainer, state, seed, losses, save)
        rows = trainer.train.batch_size
        reader = held_out_reader(self.prepared(seed), rows, trainer.train.eval_batches)
        found = evaluate(trainer, state, reader, range(rows), rows, print)
        record = {
            "commit": commit(), "seed": seed, "recipe": recipe, "steps": trainer.train.steps,
            "tokens_per_step": rows * trainer.train.seq_len, "processor_seconds": seconds(),
            "skipped_steps": int(state["skipped"]), "held_out_targets": reader.targets,
            "held_out_loss": found["eval/loss"], "mtp_acceptance": found["eval/mtp_acceptance"],
            "train_loss": losses, "train_loss_mean_of": MEAN_OF,
        }  # fmt: skip
        path.write_text(json.dumps(record, indent=1) + "\n")
        saved.unlink(missing_ok=True)


def config_of_before(train: TrainConfig) -> TrainConfig:
    """The run that `--start trained` begins from: the same, shorter."""
    rate = tuple(
        dataclasses.replace(phase, until=phase.until * BEFORE / train.steps)
        for phase in train.learning_rate
    )
    return dataclasses.replace(train, steps=BEFORE, learning_rate=rate)


def weights(state: State) -> dict[str, Any]:
    """What a run hands to another."""
    return jax.device_get({name: state[name] for name in ("params", "router_bias")})


def read(folder: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """Records of the pairs that are whole, by seed and recipe."""
    pairs: dict[int, dict[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("seed*.json")):
        record = json.loads(path.read_text())
        pairs.setdefault(record["seed"], {})[record["recipe"]] = record
    return {seed: pair for seed, pair in sorted(pairs.items()) if set(pair) == set(RECIPES)}


def summary(pairs: dict[int, dict[str, dict[str, Any]]], key: str = "held_out_loss"):
    """Mean difference of the pairs in %, its standard error (nan for one), and BF16's spread."""
    gaps = [100 * (pair["fp8"][key] / pair["bf16"][key] - 1) for pair in pairs.values()]
    plain = [pair["bf16"][key] for pair in pairs.values()]
    many = len(gaps) > 1
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if many else math.nan
    spread = 100 * statistics.stdev(plain) / statistics.mean(plain) if many else math.nan
    return statistics.mean(gaps), error, spread


def report(folder: Path) -> list[str]:
    """The table of a folder."""
    pairs = read(folder)
    if not pairs:
        return [f"{folder.name}: no pair of runs is complete."]
    lines = ["| seed | BF16, nats/token | FP8, nats/token | difference |", "|---|---|---|---|"]
    for seed, pair in pairs.items():
        plain, fp8 = (pair[recipe]["held_out_loss"] for recipe in ("bf16", "fp8"))
        lines.append(f"| {seed} | {plain:.4f} | {fp8:.4f} | {100 * (fp8 / plain - 1):+.2f}% |")
    gap, error, spread = summary(pairs)
    first = next(iter(pairs.values()))["bf16"]
    return [
        *lines,
        "",
        f"{folder.name}: {len(pairs)} pairs of {first['steps']} steps of "
        f"{first['tokens_per_step']} tokens; {first['held_out_targets']} held-out tokens. FP8 is "
        f"{gap:+.3f}% from BF16, standard error {error:.3f}%; BF16's own standard deviation "
        f"between seeds is {spread:.2f}%.",
    ]


def main(arguments: list[str] | None = None) -> None:
    """Make what is missing, then print the table."""
    parser = Command(__doc__, size="mini", seeds=[0], steps=2)
    parser.add_argument("--size", choices=("mini", "tiny", "medium"), default="tiny")
    parser.add_argument("--start", choices=("scratch", "trained"), default="scratch")
    parser.add_argument("--seeds", type=numbers, default=list(range(8)))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument(
        "--report", action=argparse.BooleanOptionalAction, default=False, help="only read files"
    )
    options = parser.options(arguments)
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: give at least 1")
    folder = ROOT / "cache" / "fp8_runs" / "quick" if options.quick else FOLDER
    bench = Bench(options.size, options.start, options.steps, folder)
    if not options.report:
        for seed in options.seeds:
            for recipe in RECIPES:
                bench.one(seed, recipe)
    parser.show(f"FP8 against BF16, {options.size} from {options.start}", report(bench.folder))


if __name__ == "__main__":
    main()
