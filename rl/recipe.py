"""A recipe: stages one after the other, each a `train.py` of its own.

A stage that is complete says so and is passed over, one that was stopped goes on, so a recipe typed
again goes on where it stopped.
"""

import argparse
import ctypes
import difflib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from configs.recipes import RECIPES, Stage

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
FORWARDED = {
    signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGINT, signal.SIGHUP: signal.SIGTERM,
}  # fmt: skip
"""A signal to the recipe -> what the running stage gets; the stages know the first two."""
_PR_SET_PDEATHSIG = 1
"""Of prctl, Linux: the signal that a process gets when its parent ends."""


def run_recipe(arguments: Sequence[str]) -> int:
    """Run `--recipe NAME [--run-dir DIR] [options of every stage]`; the exit code of train.py.

    SIGTERM and SIGINT go to the running stage, which saves, and end the recipe; SIGHUP, a closed
    terminal's, goes there as SIGTERM.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--run-dir", "--run_dir", default="")
    ours, others = parser.parse_known_args(list(arguments))
    if ours.recipe not in RECIPES:
        near = difflib.get_close_matches(ours.recipe, RECIPES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        print(f"--recipe {ours.recipe!r}: {hint}Known: {', '.join(RECIPES)}", file=sys.stderr)
        return 2
    given = {argument.partition("=")[0].replace("_", "-") for argument in others}
    if taken := [name for name in ("--config", "--init-from") if name in given]:
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
    with _Stages() as stages:
        for at, stage in enumerate(RECIPES[name], 1):
            print(f"== {name}, stage {at} of {len(RECIPES[name])}: {stage.name}", flush=True)
            code = stages.run([sys.executable, str(TRAIN), *stage_command(stage, folder, others)])
            if code or stages.stopped:
                why = "was stopped" if stages.stopped else f"ended with {code}"
                print(
                    f"recipe {name}: stage {stage.name} {why}; run again to go on", file=sys.stderr
                )
                return code if code > 0 else int(code < 0)
    return 0


class _Stages:
    """Runs one process at a time, which gets the signals that this one gets."""

    def __init__(self):
        self.stopped = False
        self._process: subprocess.Popen | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Stages":
        for number in FORWARDED:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: to be left alone is what was asked for
            self._before[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> int:
        """The exit code; 0 without running it after a signal.

        In a session of its own: a terminal's interrupt reaches the stage once, from here.
        """
        if self.stopped:
            return 0
        end_with_us = _end_with(os.getpid())
        self._process = subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_us)
        if self.stopped:  # by a signal that came while the process was made
            self._process.send_signal(signal.SIGTERM)
        return self._process.wait()

    def _forward(self, number: int, _: object) -> None:
        self.stopped = True
        if self._process is not None:
            self._process.send_signal(FORWARDED[signal.Signals(number)])


def _end_with(parent: int) -> Callable[[], None] | None:
    """What a child runs first to get SIGTERM when `parent` is gone, killed for example.

    Otherwise it would go on, and a recipe typed again would write into the same folder. Linux has
    the means, elsewhere None.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: between fork and exec little may be done

    def end_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return end_with_parent
