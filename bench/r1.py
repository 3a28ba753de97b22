"""R1-Zero in small: accuracy and length from a random model to the end of RL, and two controls.

    python -m bench.r1 [--seeds 0,1,2] [--controls no_chains,weak_base] [--folder runs/r1_bench]
                       [--write]

Every run is `train.py --config r1_base` and then `train.py --config r1_zero` from its weights, as
`make r1` does it, in processes of their own; a run that is complete is read and not repeated.
`no_chains` has no chain in the base corpus. `weak_base` has chains alone, of a harder task (sums
and products modulo ten), and starts RL when the base follows two of three steps: rewards for luck,
and a high rate, undo what it knows, and its answers get longer.
"""

from collections.abc import Sequence
from pathlib import Path

from bench.command import FEW_STEPS, Command, numbers
from bench.runs import evaluations, train_once
from training.metrics import read_metrics

BASE = ("r1_base", "r1_zero")
MOD10 = ("--task.options", "rules=mod10", "share_of_chains=1", "length=6")
CONTROLS: dict[str, dict[str, tuple[str, ...]]] = {
    "no_chains": dict.fromkeys(BASE, ("--task.options", "share_of_chains=0")),
    "weak_base": {
        "r1_base": (*MOD10, "--train.steps", "200"),
        "r1_zero": (
            *MOD10, "--rl.max-new-tokens", "48", "--train.seq-len", "64",
            "--train.learning-rate.0.value", "3e-4", "--train.steps", "60",
            "--train.eval-every", "10",
        ),
    },
}  # fmt: skip
"""Options of a control's runs."""
MARKS = (0, 10, 20, 30, 50, 100, 150)
"""Steps whose evaluation goes into the report."""


def run(
    name: str, seed: int, folder: Path, more: Sequence[str] = ()
) -> tuple[list[dict[str, float]], float]:
    """Records of the RL run, and the seconds that both processes took, now or when they ran."""
    place, seconds = folder / f"{name}-{seed}", 0.0
    for config in BASE:
        options = ["--seed", str(seed), *more]
        options += CONTROLS.get(name, {}).get(config, ())
        if config == "r1_zero":
            options += ["--init-from", str(place / "r1_base")]
        seconds += train_once(place / config, config, *options)["wall_s"]
    return read_metrics(place / "r1_zero"), seconds


def outcome(name: str, seed: int, records: list[dict[str, float]], seconds: float) -> str:
    """A row of the table of runs."""
    first, last = evaluations(records)[0], evaluations(records)[-1]
    shares = {
        phase: sum(r.get(f"perf/{phase}_share", 0.0) for r in records[1:-1]) / len(records[1:-1])
        for phase in ("rollout", "reward", "update")
    }

    def pair(metric: str, form: str) -> str:
        return f"{first[metric]:{form}} → {last[metric]:{form}}"

    return (
        f"| {name}, seed {seed} | {pair('eval/accuracy', '.3f')} | "
        f"{pair('eval/accuracy_greedy', '.3f')} | {pair('eval/length', '.1f')} | "
        f"{pair('eval/step_accuracy', '.3f')} | {pair('eval/format', '.3f')} | "
        f"{shares['rollout']:.0%}, {shares['reward']:.0%}, {shares['update']:.0%} | "
        f"{seconds:.0f} |"
    )


def curve(name: str, seed: int, records: list[dict[str, float]]) -> str:
    """A row of the table of curves: accuracy (length) at MARKS."""
    known = {int(record["step"]): record for record in evaluations(records)}
    cells = [
        f"{known[step]['eval/accuracy']:.2f} ({known[step]['eval/length']:.0f})"
        if step in known else "-"
        for step in MARKS
    ]  # fmt: skip
    return f"| {name}, seed {seed} | " + " | ".join(cells) + " |"


def report(runs: list[tuple[str, int, list[dict[str, float]], float]]) -> list[str]:
    """Markdown lines."""
    marks = " | ".join(f"step {step}" for step in MARKS)
    return [
        "256 held-out problems; accuracy at temperature 1 and greedy, before and after RL. Seconds",
        "are of both processes, from start to plot.",
        "",
        "| run | accuracy, T = 1 | greedy | length | steps right | form | rollout, reward, update "
        "| seconds |",
        "|---|---|---|---|---|---|---|---:|",
        *(outcome(*one) for one in runs),
        "",
        "Accuracy at temperature 1, and mean length in tokens:",
        "",
        f"| run | {marks} |",
        "|---|" + "---|" * len(MARKS),
        *(curve(*one[:3]) for one in runs),
    ]


def main() -> None:
    """Run what is asked for, print the report, and with --write put it into results.md."""
    parser = Command(__doc__, seeds="0", controls="", steps=FEW_STEPS)
    parser.add_argument("--seeds", type=numbers, default="0,1,2")
    parser.add_argument("--controls", default="no_chains,weak_base")
    parser.add_argument("--folder", default="runs/r1_bench")
    parser.set_defaults(steps=())
    options = parser.options()
    controls = [name for name in options.controls.split(",") if name]
    if unknown := [name for name in controls if name not in CONTROLS]:
        parser.error(f"--controls {', '.join(unknown)}: choose from {', '.join(CONTROLS)}")
    seeds = [("r1", seed) for seed in options.seeds]
    folder = Path(options.folder).absolute()
    for title, wanted in (
        ("R1-Zero in small", seeds),
        ("R1-Zero in small: controls", [(name, 0) for name in controls]),
    ):
        if not wanted:
            continue
        lines = report(
            [(name, seed, *run(name, seed, folder, options.steps)) for name, seed in wanted]
        )
        parser.show(title, lines)


if __name__ == "__main__":
    main()
