"""FP8 against BF16 over whole runs: pairs of equal seed, their held-out losses, and the spread.

    python -m bench.fp8_runs --size mini --start scratch --seeds 0,1,2,3,4,5,6,7 [--write]
    python -m bench.fp8_runs --size tiny --start trained --seeds 0,1,2,3,4,5,6,7
    python -m bench.fp8_runs --size medium --seeds 0,1 --report

A pair has the same first weights, the same data in the same order and the same schedule; only the
recipe differs. Seeds differ in the first weights and in the data; with `--start trained` all start
from the same weights, a run in BF16, and differ in the data. Every run is one of train.py in the
cache, which resumes, and leaves one file in bench/measured/fp8_runs/ when it ends: what is there is
not computed again. `--report` only reads files.

The held-out loss is that of a run's own recipe, on the same tokens for all. Portable products, one
device: FP8 quantises there as it does on a GPU, bit for bit, and multiplies in BF16.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from bench.command import Command, numbers
from bench.report import ROOT, commit
from bench.runs import train_once
from training.metrics import read_metrics

FOLDER = ROOT / "bench" / "measured" / "fp8_runs"
RECIPES = {"bf16": (), "fp8": ("--train.fp8",)}
MEAN_OF = 50
"""Steps of a point of the training curve."""
BEFORE = 400
"""Steps of the run in BF16 whose weights `--start trained` begins from; its seed is no other's."""
ITS_SEED = "1000"
SIZES = {
    "mini": "--train.batch-size 4 --train.seq-len 128 --model.hidden-size 128 --model.num-layers 3 "
    "--model.q-lora-rank 64 --model.kv-lora-rank 32 --model.dense-ffn-size 512 "
    "--model.num-experts 8 --model.experts-per-token 2",
    "tiny": "",
    "medium": "--train.batch-size 16 --model.hidden-size 384 --model.num-layers 8 "
    "--model.num-heads 6 --model.q-lora-rank 192 --model.kv-lora-rank 96 "
    "--model.dense-ffn-size 1536 --model.expert-ffn-size 192 --train.peak-learning-rate 1e-3",
}
"""Options of train.py that make `tiny` a model of another size."""


def options_of(size: str, steps: int) -> list[str]:
    """Options of train.py for a run of a size, evaluated at its end.

    Up in a twentieth of the steps, then a cosine to a tenth. Router biases move fast enough for the
    length, as in `tiny`.
    """
    up = max(1, steps // 20)
    words = f"""--train.steps {steps} --train.learning-rate.0.until {up}
        --train.learning-rate.1.until {up + 1} --train.learning-rate.2.until {steps}
        --train.bias-update-rate.0.until {0.97 * steps} --train.bias-update-rate.0.value 0.01
        --train.bias-update-rate.1.until {steps} --train.mtp-weight.1.value 0.3
        --train.mtp-weight.0.until {steps / 2} --train.mtp-weight.1.until {steps}
        --train.eval-every {steps} --train.eval-batches {min(64, steps)} --kernels portable
        --checkpoint.every 250 --checkpoint.keep 1"""
    return [*words.split(), *SIZES[size].split()]


def record(size: str, start: str, steps: int, seed: int, recipe: str, path: Path) -> None:
    """Train, and write what came of it to `path`, unless that is there."""
    if path.exists():
        return
    place = ROOT / "cache" / "fp8_runs" / f"{size}_{start}_{steps}"
    run, more = place / path.stem, ["--train.dtype", "bfloat16", *RECIPES[recipe]]
    if start == "trained":
        before = place / "before"
        words = [*options_of(size, BEFORE), "--train.dtype", "bfloat16", "--seed", ITS_SEED]
        train_once(before, "tiny", *words)
        more += ["--init-from", str(before)]
    spent = train_once(run, "tiny", *options_of(size, steps), *more, "--seed", str(seed))
    lines = read_metrics(run)
    losses = [line["train/loss"] for line in lines]
    found = {
        "commit": commit(), "seed": seed, "recipe": recipe, "steps": steps,
        "tokens_per_step": int(lines[0]["train/tokens"]), "processor_seconds": spent["cpu_s"],
        "skipped_steps": int(lines[-1]["train/skipped_steps"]),
        "held_out_loss": lines[-1]["eval/loss"], "mtp_acceptance": lines[-1]["eval/mtp_acceptance"],
        "train_loss": [
            statistics.mean(losses[at : at + MEAN_OF]) for at in range(0, steps, MEAN_OF)
        ],
        "train_loss_mean_of": MEAN_OF,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def read(folder: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """Records of the pairs that are whole, by seed and recipe."""
    pairs: dict[int, dict[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("seed*.json")):
        found = json.loads(path.read_text())
        pairs.setdefault(found["seed"], {})[found["recipe"]] = found
    return {seed: pair for seed, pair in sorted(pairs.items()) if set(pair) == set(RECIPES)}


def summary(pairs: dict[int, dict[str, dict[str, Any]]]) -> tuple[float, float, float]:
    """Mean difference of the pairs in %, its standard error (nan for one), and BF16's spread."""
    plain = [pair["bf16"]["held_out_loss"] for pair in pairs.values()]
    gaps = [
        100 * (pair["fp8"]["held_out_loss"] / loss - 1)
        for pair, loss in zip(pairs.values(), plain, strict=True)
    ]
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
        f"{first['tokens_per_step']} tokens. FP8 is {gap:+.3f}% from BF16, standard error "
        f"{error:.3f}%; BF16's own standard deviation between seeds is {spread:.2f}%.",
    ]


def main(arguments: list[str] | None = None) -> None:
    """Make what is missing, then print the table."""
    parser = Command(__doc__, size="mini", seeds=[0], steps=4)
    parser.add_argument("--size", choices=("mini", "tiny", "medium"), default="tiny")
    parser.add_argument("--start", choices=("scratch", "trained"), default="scratch")
    parser.add_argument("--seeds", type=numbers, default=list(range(8)))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument(
        "--report", action=argparse.BooleanOptionalAction, default=False, help="only read files"
    )
    options = parser.options(arguments)
    if options.steps < 3:
        parser.error(f"--steps {options.steps}: give at least 3")
    of = options.size, options.start, options.steps
    folder = ROOT / "cache" / "fp8_runs" / "quick" if options.quick else FOLDER
    folder /= "{}_{}_{}".format(*of)
    if not options.report:
        for seed in options.seeds:
            for recipe in RECIPES:
                record(*of, seed, recipe, folder / f"seed{seed}_{recipe}.json")
    parser.show(f"FP8 against BF16, {options.size} from {options.start}", report(folder))


if __name__ == "__main__":
    main()
