"""What `make train` reaches: held-out bits per byte against gzip -9, and the time of its steps.

    python -m bench.tiny [--write] [--run-dir runs/tiny]

Runs the command of `make train`; a run that is complete is only evaluated again.
"""

import subprocess
import sys

from bench.command import Command
from bench.report import ROOT
from training.metrics import read_metrics

COMMAND = ["train.py", "--config", "tiny"]


def main() -> None:
    """Run, collect, print, and with --write record."""
    parser = Command(__doc__, steps=1, emulate=1, held_out_tokens=20_000)
    parser.add_argument("--emulate", type=int, default=8, help="devices, as a cube if 8")
    parser.add_argument("--steps", type=int, default=0, help="0: the preset's")
    parser.add_argument("--held-out-tokens", type=int, default=0, help="0: the preset's")
    parser.add_argument("--run-dir", default="runs/tiny")
    options = parser.options()
    command = [*COMMAND, "--emulate", str(options.emulate)]
    command += ["--layout", "cube"] * (options.emulate == 8)
    command += ["--train.steps", str(options.steps)] * (options.steps > 0)
    tokens = options.held_out_tokens
    command += ["--data.held-out-tokens", str(tokens)] * (tokens > 0)
    done = subprocess.run(
        [sys.executable, *command, "--run-dir", options.run_dir],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    held_out = next(line for line in done.stdout.splitlines() if line.startswith("held-out text:"))
    records = read_metrics(ROOT / options.run_dir)
    seconds = sum(record.get("perf/step_s", 0.0) for record in records)
    last = records[-1]
    lines = [
        f"`python {' '.join(command)}`, the command of `make train`: {held_out}.",
        "",
        f"{len(records)} steps, {last['train/tokens']:,.0f} tokens, {seconds:.0f} s in steps "
        f"(the first, which is compiled, and evaluation not included); busiest expert "
        f"{last['moe/load_max_over_mean']:.2f} times the mean in the last step; "
        f"{last['train/skipped_steps']:.0f} skipped steps; "
        f"{sum(record['moe/dropped_tokens'] for record in records):.0f} dropped tokens.",
    ]
    parser.show("Tiny after make train", lines)


if __name__ == "__main__":
    main()
