"""Checkpoints between Hugging Face's format and ours: `convert.py import SRC DST`.

`convert.py export CKPT DST [--fp8]` goes the other way. Both stream: main memory does not grow with
the model. The destination appears when it is complete.
"""

from runtime.interpreter import check_interpreter

check_interpreter()  # in one line, before an import fails

import dataclasses
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Import:
    """A run folder, as `train.py --init-from` and `generate.py` read it, from Hugging Face's."""

    src: tyro.conf.Positional[Path]
    """Hugging Face folder: config.json and safetensors."""
    dst: tyro.conf.Positional[Path]
    """Run folder to make."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the stored weights."""


@dataclasses.dataclass(frozen=True)
class Export:
    """A Hugging Face folder from a run folder, or from another Hugging Face folder.

    MTP modules become layers after the last. transformers leaves them out, and lists their tensors
    as unexpected unless the model has V3's 61 layers.
    """

    src: tyro.conf.Positional[Path]
    """Run folder, or Hugging Face folder."""
    dst: tyro.conf.Positional[Path]
    """Folder to make."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of the weights; with --fp8, of those that are not FP8."""
    fp8: bool = False
    """Store matrices in FP8 with a factor per 128 x 128 block, as DeepSeek releases them."""


Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
)


def say(line: str) -> None:
    """A line for people."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def progress_bar() -> Generator[Any]:
    """`report(bytes done, bytes in all)`: a bar with rate and time left, or plain lines."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        shown = -1

        def lines(done: int, total: int) -> None:
            nonlocal shown
            tenth = 10 * done // max(total, 1)
            if tenth > shown:
                shown = tenth
                say(f"{done:,} of {total:,} bytes")

        yield lines
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def run(command: Import | Export) -> None:
    """Convert. Raises ValueError and OSError for people."""
    from checkpoint.hf_reader import HuggingFaceFolder
    from checkpoint.weights import open_weights
    from runtime.lock import hold

    if not command.dst.parent.is_dir():
        raise ValueError(f"{command.dst.parent} is no folder; make it first")
    lock = command.dst.with_name(f"{command.dst.name}.lock")
    with hold(lock, str(command.dst), say), progress_bar() as progress:
        if isinstance(command, Import):
            from checkpoint.hf_import import import_folder

            source = HuggingFaceFolder(command.src)
            import_folder(
                source, command.dst, dtype=command.dtype, say=say, progress=progress
            )  # fmt: skip
        else:
            from checkpoint.hf_writer import export

            export(
                open_weights(command.src), command.dst, dtype=command.dtype,
                fp8_blocks=command.fp8, say=say, progress=progress,
            )  # fmt: skip
    say(f"written: {command.dst}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when done, 2 for what cannot be done."""
    command = tyro.cli(Command, args=arguments, prog="convert.py", description=__doc__)
    try:
        run(command)
    except (ValueError, OSError) as error:
        say(f"convert.py: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
