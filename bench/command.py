"""Options that every bench shares, one of them for its smallest size, and the report.

python -m bench.NAME [--quick] [--write] [options of its own]
"""

import argparse
import json
import os
import re
import subprocess
from collections.abc import Sequence
from typing import Any

from bench.report import ROOT, write_section

FEW_STEPS = ("--train.steps", "2", "--train.eval-every", "2", "--rl.eval-prompts", "8")
"""Options of train.py for runs that only show that a bench works."""
REFERENCE = ROOT / ".venv-reference" / "bin" / "python"


class Command(argparse.ArgumentParser):
    """Parser with --write and --quick, which also prints and keeps what was measured.

    Args:
      doc: docstring of the script; its first paragraph is shown by --help.
      quick: values of options at the smallest size, taken with --quick unless they are given.
    """

    def __init__(self, doc: str | None, **quick: Any):
        super().__init__(description=(doc or "").split("\n\n")[0])
        self.quick = quick
        self.kept = False
        self.add_argument("--write", action="store_true", help="write the section of results.md")
        self.add_argument("--quick", action="store_true", help="smallest size: does it run?")

    def options(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parsed options; exits with a message if figures of the smallest size were to be kept."""
        if self.parse_known_args(arguments)[0].quick:
            self.set_defaults(**self.quick)
        options = self.parse_args(arguments)
        if options.quick and options.write:
            self.error("--quick measures nothing worth keeping; leave --write or --quick out")
        self.kept = options.write
        return options

    def show(self, title: str, lines: Sequence[str]) -> None:
        """Print a section and, with --write, put it into results.md."""
        print("\n".join(lines))
        self.keep(title, lines)

    def keep(self, title: str, lines: Sequence[str]) -> None:
        """Put a section that is already printed into results.md, with --write."""
        if self.kept:
            write_section(title, lines)


def numbers(text: str) -> list[int]:
    """Type of an option that takes numbers with commas, or none."""
    if not re.fullmatch(r"(\d+(,\d+)*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers with commas, such as 0,1,2")
    return [int(number) for number in text.split(",") if number]


def load() -> str:
    """Load averages of the machine over 1, 5 and 15 minutes."""
    return ", ".join(f"{x:.1f}" for x in os.getloadavg())


class Side:
    """One side of a comparison, in a process of its own that is idle unless asked.

    It says what it is on its first line. Each further line is the answer, in JSON, to a line of
    numbers. `about` is the first line.
    """

    def __init__(self, *command: str):
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Threads that wait must not spin: they would slow each other down on a busy machine.
            env=os.environ | {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"},
        )
        self.about = self._read()

    def ask(self, *values: int) -> dict[str, float]:
        """The answer to `values`."""
        assert self._process.stdin is not None
        print(*values, file=self._process.stdin, flush=True)
        return json.loads(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")
        return line.strip()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def transformers_side(interpreter: str, options: dict[str, Any]) -> Side:
    """`bench/hf.py` under the interpreter that has torch and transformers.

    -I keeps bench/ off its path, where transformers would take `kernels.py` for a package.
    """
    return Side(interpreter, "-I", str(ROOT / "bench" / "hf.py"), json.dumps(options))
