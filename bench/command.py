"""Options that every bench has, so that each can be tried at its smallest size.

python -m bench.NAME [--quick] [--write] [options of its own]
"""

import argparse
from collections.abc import Sequence
from typing import Any

FEW_STEPS = ("--train.steps", "2", "--train.eval-every", "2")
"""Options of train.py for runs that only show that a bench works."""


class Command(argparse.ArgumentParser):
    """Parser with --write and --quick.

    Args:
      doc: docstring of the script; its first paragraph is shown by --help.
      quick: values of options at the smallest size, taken with --quick unless they are given.
    """

    def __init__(self, doc: str | None, **quick: Any):
        super().__init__(description=(doc or "").split("\n\n")[0])
        self.quick = quick
        self.add_argument("--write", action="store_true", help="write the section of results.md")
        self.add_argument("--quick", action="store_true", help="smallest size: does it run?")

    def options(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parsed options; exits with a message if figures of the smallest size were to be kept."""
        if self.parse_known_args(arguments)[0].quick:
            self.set_defaults(**self.quick)
        options = self.parse_args(arguments)
        if options.quick and options.write:
            self.error("--quick measures nothing worth keeping; leave --write or --quick out")
        return options
