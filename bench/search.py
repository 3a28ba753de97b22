"""More thinking pays after RL: 3-SUM by trial and error, base against policy, and how each fails.

    python -m bench.search [--seeds 0,1,2] [--folder runs/search_bench] [--write]

Every run is `train.py --config search_base`, then `train.py --config search_zero` from its weights;
a run that is complete is read and not repeated. Then both models answer every held-out problem
DRAWS times at temperature 1, and every answer is inspected.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from bench.answers import inspected
from bench.command import FEW_STEPS, Command, numbers
from bench.runs import evaluations, train_once
from configs import preset
from rl.tasks.search import FAILURES, Search, accuracy_by_tries, census
from rl.tasks.task import Inspection
from training.metrics import read_metrics

CONFIGS = ("search_base", "search_zero")
PROBLEMS, DRAWS = 160, 8


def inspections(place: Path, seed: int) -> list[Inspection]:
    """DRAWS answers at temperature 1 to each held-out problem, inspected; model in `place`."""
    run = preset("search_zero")
    return inspected(place, run.task, PROBLEMS, DRAWS, run.rl.max_new_tokens, seed)[0]


def figure(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Accuracy by number of tries, base and policy, a line per seed."""
    fig, axes = plt.subplots(figsize=(5, 3.5))
    for colour, (name, lines) in zip(("tab:gray", "tab:red"), curves.items(), strict=True):
        for i, line in enumerate(lines):
            label = name if i == 0 else None
            axes.plot(range(1, len(line) + 1), line, marker="o", color=colour, label=label)
    axes.set(xlabel="tries, at most", ylabel="accuracy, held-out, T = 1", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def report(
    rows: list[tuple[int, str, dict[str, float], list[float], dict[str, float]]],
) -> list[str]:
    """Markdown lines. rows: seed, model, census, accuracy by tries, seconds of its stage."""
    tries = range(1, len(rows[0][3]) + 1)
    shown = ("correct", *FAILURES, "duplicate_tries", "sum_accuracy", "check_accuracy")
    return [
        f"{PROBLEMS} held-out problems, {DRAWS} answers each at temperature 1. Shares of answers:",
        "correct, and every way to fail; then shares of tries. Seconds are of the stage, wall and",
        "processor.",
        "",
        "| seed, model | " + " | ".join(name.replace("_", " ") for name in shown)
        + " | wall s | processor s |",
        "|---|" + "---|" * (len(shown) + 2),
        *(
            f"| {seed}, {name} | " + " | ".join(f"{found[key]:.3f}" for key in shown)
            + f" | {spent['wall_s']:.0f} | {spent['cpu_s']:.0f} |"
            for seed, name, found, _, spent in rows
        ),
        "",
        "Accuracy with at most so many tries:",
        "",
        "| seed, model | " + " | ".join(map(str, tries)) + " |",
        "|---|" + "---|" * len(tries),
        *(
            f"| {seed}, {name} | " + " | ".join(f"{x:.2f}" for x in curve) + " |"
            for seed, name, _, curve, _ in rows
        ),
    ]  # fmt: skip


def main() -> None:
    """Run what is asked for, print the report, draw it, and with --write put it into results.md."""
    parser = Command(__doc__, seeds="0", steps=FEW_STEPS)
    parser.add_argument("--seeds", type=numbers, default="0,1,2")
    parser.add_argument("--folder", default="runs/search_bench")
    parser.set_defaults(steps=())
    options = parser.options()
    folder, rows = Path(options.folder).absolute(), []
    curves: dict[str, list[list[float]]] = {"base": [], "after RL": []}
    for seed in options.seeds:
        place = folder / f"search-{seed}"
        base, policy = (place / config for config in CONFIGS)
        more = ("--seed", str(seed), *options.steps)
        spent = [
            train_once(base, CONFIGS[0], *more),
            train_once(policy, CONFIGS[1], *more, "--init-from", str(base)),
        ]
        for name, model, seconds in zip(curves, (base, policy), spent, strict=True):
            found = inspections(model, seed)
            curve = accuracy_by_tries(found, Search().tries)
            curves[name].append(curve)
            rows.append((seed, name, census(found), curve, seconds))
        last = evaluations(read_metrics(policy))[-1]
        print(
            f"seed {seed}: greedy {last['eval/accuracy_greedy']:.3f}, length {last['eval/length']}"
        )
    figure(curves, folder / "search.png")
    gains = [
        after[-1] / before[-1] if before[-1] else np.nan
        for before, after in zip(*curves.values(), strict=True)
    ]
    found = ", ".join(f"{gain:.2f}x" for gain in gains)
    lines = [
        *report(rows),
        "",
        f"Accuracy after RL over before: {found}, mean {np.mean(gains):.2f}x.",
    ]
    parser.show("Search in small", lines)


if __name__ == "__main__":
    main()
