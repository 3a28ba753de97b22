"""`make janus` over seeds: how well held-out scenes are read and drawn, and what it takes.

    python -m bench.janus [--seeds 0,1,2] [--folder runs/janus_bench] [--write]

The image tokenizer and then the joint model, `train.py` in processes of their own; a run that is
complete is read and not repeated. With --write the contact sheets of the first seed go to
docs/figures.
"""

import json
import shutil
from pathlib import Path

from bench.command import Command, numbers
from bench.report import ROOT
from bench.runs import train_once

FIGURES = {"tokenizer": "janus_tokenizer.png", "model": "janus_scenes.png"}
"""Contact sheets in docs/figures, by run."""


def run(place: Path, seed: int) -> dict[str, float]:
    """What the two exams found, and wall and processor seconds of both runs together."""
    folders = {name: place / f"{name}-{seed}" for name in FIGURES}
    more = "--seed", str(seed)
    runs = [
        train_once(folders["tokenizer"], "janus_tiny_tokenizer", *more),
        train_once(folders["model"], "janus_tiny", *more, "--init-from", str(folders["tokenizer"])),
    ]
    found: dict[str, float] = {}
    for folder in folders.values():
        found |= json.loads((folder / "exam.json").read_text())
    return found | {key: sum(one[key] for one in runs) for key in ("wall_s", "cpu_s")}


def report(runs: dict[int, dict[str, float]]) -> list[str]:
    """Markdown lines."""
    exams = ("tokenizer", "understanding", "drawing")
    return [
        "Shares of 120 held-out scenes: told from the pixels of their codes; questions answered",
        "word by word; captions drawn right, greedily and without guidance. Seconds are of both",
        "runs, exams included.",
        "",
        "| seed | tokenizer | understanding | drawing | seconds | processor s |",
        "|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {seed} | {' | '.join(f'{found[exam]:.3f}' for exam in exams)} "
            f"| {found['wall_s']:.0f} | {found['cpu_s']:.0f} |"
            for seed, found in runs.items()
        ),
    ]


def main() -> None:
    """Run what is missing, and print the report; with --write keep it and the contact sheets."""
    parser = Command(__doc__)
    parser.add_argument("--seeds", type=numbers, default="0,1,2")
    parser.add_argument("--folder", default="runs/janus_bench")
    options = parser.options()
    folder = Path(options.folder).absolute()
    runs = {seed: run(folder, seed) for seed in options.seeds}
    parser.show("Janus in small: reading and drawing held-out scenes", report(runs))
    if options.write:
        for name, file in FIGURES.items():
            sheet = folder / f"{name}-{options.seeds[0]}" / "sheet.png"
            shutil.copyfile(sheet, ROOT / "docs" / "figures" / file)


if __name__ == "__main__":
    main()
