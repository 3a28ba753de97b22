"""R1's pipeline in small: every model of the recipe `r1` on the same held-out problems.

    python -m bench.recipe [--folder runs/recipe] [--write]

`train.py --recipe r1` is run, or read where it is complete. Then each model answers held-out
problems at temperature 1: chains of ten moves, as R1-Zero's are, and of two to ten moves, in two
scripts.
"""

from pathlib import Path

import numpy as np

from bench.answers import inspected
from bench.command import Command
from bench.report import write_section
from bench.runs import train_once
from rl.config import TaskConfig

STAGES = "base", "zero", "cold", "reasoning", "sft", "r1", "student"
"""Of `runs/r1.sh`."""
PROBLEMS = 512
BUDGET = 28
TASKS = {"ten moves": ("scripts=2",), "two to ten": ("scripts=2", "shortest=2")}


def measure(place: Path) -> dict[str, dict[str, float]]:
    """By task: correct, chains (share of answers), language and steps right (of chains), length."""
    found = {}
    for name, options in TASKS.items():
        task = TaskConfig("permutations", options)
        seen, tokens = inspected(place, task, PROBLEMS, 1, BUDGET, seed=0)
        chains = [one for one in seen if one["steps"]]
        steps = sum(one["steps"] for one in chains)
        found[name] = {
            "correct": float(np.mean([one["correct"] for one in seen])),
            "chains": len(chains) / len(seen),
            "language": float(np.mean([one["language"] for one in chains])) if chains else np.nan,
            "steps": sum(one["steps_right"] for one in chains) / steps if steps else np.nan,
            "length": float(tokens.mean()),
        }
    return found


def report(folder: Path, seconds: float) -> list[str]:
    """Markdown lines."""
    lines = [
        f"{PROBLEMS} held-out problems of each kind, answered once at temperature 1. The recipe",
        f"took {seconds:.0f} s from random weights to the student.",
        "",
        "| stage | ten moves: right | chains | in the prompt's script | steps right | tokens | "
        "two to ten moves: right |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for stage in STAGES:
        found = measure(folder / stage)
        ten, mixed = found["ten moves"], found["two to ten"]
        lines.append(
            f"| {stage} | {ten['correct']:.3f} | {ten['chains']:.0%} | {ten['language']:.0%} "
            f"| {ten['steps']:.3f} | {ten['length']:.1f} | {mixed['correct']:.3f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Run what is missing, print the report, and with --write put it into results.md."""
    parser = Command(__doc__)
    parser.add_argument("--folder", default="runs/recipe")
    options = parser.options()
    folder = Path(options.folder).absolute()
    lines = report(folder, train_once(folder, "", "--recipe", "r1")["wall_s"])
    print("\n".join(lines))
    if options.write:
        write_section("R1's pipeline in small", lines)


if __name__ == "__main__":
    main()
