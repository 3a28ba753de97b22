"""R1's pipeline in small: every model of the recipe `r1` on the same held-out problems.

    python -m bench.recipe [--folder runs/recipe] [--write]

`train.py --recipe r1` is run, or read where it is complete. Then each model answers held-out
problems at temperature 1: chains of ten moves, as R1-Zero's are, and of two to ten moves, in two
scripts.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.answers import inspected
from bench.command import FEW_STEPS, Command
from bench.runs import train_once
from rl.config import TaskConfig

STAGES = "base", "zero", "cold", "reasoning", "sft", "r1", "student"
"""Of `runs/r1.sh`."""
BUDGET = 28
TASKS = {"ten moves": ("scripts=2",), "two to ten": ("scripts=2", "shortest=2")}


def measure(place: Path, problems: int) -> dict[str, dict[str, float]]:
    """By task: correct, chains (share of answers), language and steps right (of chains), length."""
    found = {}
    for name, options in TASKS.items():
        task = TaskConfig("permutations", options)
        seen, tokens = inspected(place, task, problems, 1, BUDGET, seed=0)
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


def report(folder: Path, stages: Sequence[str], problems: int, seconds: float) -> list[str]:
    """Markdown lines."""
    lines = [
        f"{problems} held-out problems of each kind, answered once at temperature 1. The recipe",
        f"took {seconds:.0f} s from random weights to the student.",
        "",
        "| stage | ten moves: right | chains | in the prompt's script | steps right | tokens | "
        "two to ten moves: right |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for stage in stages:
        found = measure(folder / stage, problems)
        ten, mixed = found["ten moves"], found["two to ten"]
        lines.append(
            f"| {stage} | {ten['correct']:.3f} | {ten['chains']:.0%} | {ten['language']:.0%} "
            f"| {ten['steps']:.3f} | {ten['length']:.1f} | {mixed['correct']:.3f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Run what is missing, print the report, and with --write put it into results.md."""
    parser = Command(__doc__, stages=STAGES[:1], problems=8)
    parser.add_argument("--problems", type=int, default=512, help="of each kind")
    parser.set_defaults(stages=STAGES)
    parser.add_argument("--folder", default="runs/recipe")
    options = parser.options()
    folder = Path(options.folder).absolute()
    if options.quick:
        spent = train_once(folder / STAGES[0], "r1_base2", *FEW_STEPS)
    else:
        spent = train_once(folder, "", "--recipe", "r1")
    lines = report(folder, options.stages, options.problems, spent["wall_s"])
    parser.show("R1's pipeline in small", lines)


if __name__ == "__main__":
    main()
