"""A recipe: stages one after the other, each a `train.py` of its own.

A stage that is complete says so and is passed over, one that was stopped goes on, so a recipe typed
again goes on where it stopped.
"""

import argparse
import difflib
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.recipes import RECIPES, Stage

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def run_recipe(arguments: Sequence[str]) -> int:
    """Run `--recipe NAME [--run-dir DIR] [options of every stage]`; the exit code of train.py.

    SIGTERM and SIGINT go to the running stage, which saves, and end the recipe.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--run-dir", default="")
    ours, others = parser.parse_known_args(list(arguments))
    if ours.recipe not in RECIPES:
        near = difflib.get_close_matches(ours.recipe, RECIPES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        print(f"--recipe {ours.recipe!r}: {hint}Known: {', '.join(RECIPES)}", file=sys.stderr)
        return 2
    if taken := [name for name in ("--config", "--init-from") if name in others]:
        print(
            f"--recipe names the {' and '.join(taken)} of every stage itself; leave it out, or run "
            "the stages one by one",
            file=sys.stderr,
        )
        return 2
    folder = Path(ours.run_dir or f"runs/{ours.recipe}")
    return _run_stages(ours.recipe, folder, others)


def stage_command(stage: Stage, folder: Path, others: Sequence[str]) -> list[str]:
    """Arguments of train.py; `others` come last, so they override the recipe's."""
    command = ["--config", stage.preset, "--run-dir", str(folder / stage.name)]
    if stage.init_from:
        command += ["--init-from", str(folder / stage.init_from)]
    if stage.policy:
        command += ["--sft.policy", str(folder / stage.policy)]
    return [*command, *stage.options, *others]


def _run_stages(name: str, folder: Path, others: Sequence[str]) -> int:
    running: list[subprocess.Popen] = []
    stopped: list[int] = []

    def forward(number: int, _) -> None:
        stopped.append(number)
        for process in running:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for at, stage in enumerate(RECIPES[name], 1):
            print(f"== {name}, stage {at} of {len(RECIPES[name])}: {stage.name}", flush=True)
            command = [sys.executable, str(TRAIN), *stage_command(stage, folder, others)]
            # A session of its own: a terminal's interrupt reaches the stage once, from here.
            running[:] = [subprocess.Popen(command, start_new_session=True)]
            code = running[0].wait()
            if code or stopped:
                why = "was stopped" if stopped else f"ended with {code}"
                print(
                    f"recipe {name}: stage {stage.name} {why}; run again to go on", file=sys.stderr
                )
                return code if code > 0 else int(code < 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0
