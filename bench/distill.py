"""Distillation against RL, for one small student: what a larger model's answers are worth.

    python -m bench.distill [--seeds 0] [--teacher runs/r1_bench] [--folder runs/distill_bench]
                            [--dense] [--teacher-seed 0] [--write]

The teacher is `r1_zero` after `r1_base` (made, or read where `bench.r1` has left it). The student,
0.2 M parameters, first reads a corpus with few chains (10%) for a short while; from there it learns
once from the teacher's rejection-sampled answers (stage distill) and once from rewards (stage rl),
for more processor time than distillation takes. With --dense the student is a dense model (grouped
attention, no experts); --teacher-seed lets all seeds of the student learn from one teacher.
"""

from pathlib import Path

import matplotlib.pyplot as plt

from bench.command import Command, numbers
from bench.runs import evaluations, train_once
from configs.r1 import student_model
from training.metrics import read_metrics

FEW_CHAINS = ("--task.options", "share_of_chains=0.1")
BASE_STEPS, RL_STEPS = ("--train.steps", "200"), ("--train.steps", "1000")


def rl_preset(student: str) -> list[str]:
    """Preset of RL on a student, and the options that give it the student's shape."""
    if student == "r1_student_dense":
        return ["r1_zero_dense"]
    shape = student_model()
    fields = ("hidden_size", "num_layers", "expert_ffn_size", "dense_ffn_size", "init_std")
    return [
        "r1_zero",
        *(
            part for name in fields
            for part in (f"--model.{name.replace('_', '-')}", str(getattr(shape, name)))
        ),
    ]  # fmt: skip


def run(
    seed: int, teachers: Path, folder: Path, student: str, by: int
) -> dict[str, dict[str, float]]:
    """Accuracy (T = 1, greedy), length and seconds of the student as it starts, after RL, and after
    distillation; and the teacher's, of seed `by`."""
    place, more = folder / f"student-{seed}", ("--seed", str(seed))
    base, teacher = (teachers / f"r1-{by}" / name for name in ("r1_base", "r1_zero"))
    its = "--seed", str(by)
    taught = [
        train_once(base, "r1_base", *its),
        train_once(teacher, "r1_zero", *its, "--init-from", str(base)),
    ]
    start = place / "base"
    few = (*BASE_STEPS, *FEW_CHAINS)
    train_once(start, student, "--stage", "pretrain", *more, *few)
    init = ("--init-from", str(start))
    distilled = train_once(place / "distilled", student, *more, *init, "--sft.policy", str(teacher))
    rewarded = train_once(
        place / "rl", *rl_preset(student), *more, *init, *FEW_CHAINS,
        "--train.eval-every", "50", *RL_STEPS,
    )  # fmt: skip
    first, last = (evaluations(read_metrics(place / "rl"))[i] for i in (0, -1))
    both = sum(stage["cpu_s"] for stage in taught)
    return {
        "teacher (base and RL)": evaluations(read_metrics(teacher))[-1] | {"cpu_s": both},
        "student": first | {"cpu_s": 0.0},
        "student after RL": last | rewarded,
        "student distilled": evaluations(read_metrics(place / "distilled"))[-1] | distilled,
    }


def figure(runs: dict[int, dict[str, dict[str, float]]], path: Path) -> None:
    """A bar per model and seed: accuracy, with the processor time that it took."""
    fig, axes = plt.subplots(figsize=(6, 3.5))
    width = 0.8 / len(runs)
    for i, found in enumerate(runs.values()):
        for x, (_, row) in enumerate(found.items()):
            bar = axes.bar(x + i * width, row["eval/accuracy"], width, color=f"C{x}")
            axes.bar_label(bar, [f"{row['cpu_s']:.0f} s"], fontsize=7)
    names = [name.replace(" (", "\n(") for name in next(iter(runs.values()))]
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(names))], names, fontsize=8)
    axes.set(ylabel="accuracy, held-out, T = 1", ylim=(0, 1.05))
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def report(runs: dict[int, dict[str, dict[str, float]]]) -> list[str]:
    """Markdown lines."""
    return [
        "256 held-out problems. Processor seconds of the stage alone, sampling of traces included.",
        "",
        "| seed, model | accuracy, T = 1 | greedy | length | processor s |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {seed}, {name} | {row['eval/accuracy']:.3f} | {row['eval/accuracy_greedy']:.3f} | "
            f"{row['eval/length']:.1f} | {row['cpu_s']:.0f} |"
            for seed, found in runs.items()
            for name, row in found.items()
        ),
    ]


def main() -> None:
    """Run what is asked for, print the report, draw it, and with --write put it into results.md."""
    parser = Command(__doc__)
    parser.add_argument("--seeds", type=numbers, default="0")
    parser.add_argument("--teacher", default="runs/r1_bench")
    parser.add_argument("--folder", default="runs/distill_bench")
    parser.add_argument("--dense", action="store_true", help="a dense student")
    parser.add_argument("--teacher-seed", type=int, help="of all students' teacher")
    options = parser.options()
    folder, teachers = Path(options.folder).absolute(), Path(options.teacher).absolute()
    student, title = "r1_student", "Distillation in small"
    if options.dense:
        student, title = "r1_student_dense", "Distillation in small, a dense student"
    one = options.teacher_seed
    runs = {
        seed: run(seed, teachers, folder, student, seed if one is None else one)
        for seed in options.seeds
    }
    figure(runs, folder / "distill.png")
    parser.show(title, report(runs))


if __name__ == "__main__":
    main()
