"""Runs of train.py for a bench: each once, in a process of its own, with its seconds."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from bench.report import ROOT


def train_once(folder: Path, config: str, *options: str) -> dict[str, float]:
    """`train.py --config CONFIG --run-dir FOLDER`, unless it is complete; wall_s and cpu_s of when
    it ran, its children's processor time included. config: '' where the options name a recipe."""
    spent = folder / "seconds.json"
    if not spent.exists():
        command = [sys.executable, "train.py", "--run-dir", str(folder)]
        command += ["--config", config] if config else []
        print("+", *command[1:], *options, flush=True)
        began, before = time.monotonic(), _processor_seconds()
        subprocess.run([*command, *options], cwd=ROOT, check=True)
        seconds = {
            "wall_s": time.monotonic() - began,
            "cpu_s": _processor_seconds() - before,
        }
        spent.write_text(json.dumps(seconds))
    return json.loads(spent.read_text())


def evaluations(records: Iterable[dict[str, float]]) -> list[dict[str, float]]:
    """Records with held-out accuracy."""
    return [record for record in records if "eval/accuracy" in record]


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
