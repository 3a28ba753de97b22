"""A program as XLA has scheduled it, read before its machine code is made.

Buffers are assigned and collectives placed when a third of the work is done; what is left, code for
every fusion and one assembler process per kernel, changes neither. XLA has no option that stops
there, so it is asked to write down what it has decided, and compiles on in a thread that nobody
waits for.
"""

import pathlib
import re
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

TEXT = "*_gpu_after_optimizations.txt"
"""The largest of XLA's files on a scheduled program, and the last to be whole."""


class Scheduled(NamedTuple):
    """What is decided before machine code."""

    text: str
    """HLO after optimisation, in the order in which it will run."""
    arguments: int
    """Bytes per device: parameters of the program."""
    temporaries: int
    """Bytes per device besides, all of which the program allocates at its start."""
    buffers: str = ""
    """XLA's list of buffers, and when each is alive; "" of a program compiled to its end."""
    live_ranges: str = ""


def until_scheduled(lowered: jax.stages.Lowered, options: Mapping[str, Any]) -> Scheduled:
    """Compile for GPUs until buffers are assigned.

    XLA goes on compiling in the background and cannot be stopped: end the process with `os._exit`
    when all is said, or wait minutes for what nobody reads.

    Raises:
        Whatever the compiler raises.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        ended: list[BaseException | None] = []

        def compile_all() -> None:
            try:
                lowered.compile(compiler_options={**options, **dump})
                ended.append(None)
            except BaseException as error:
                ended.append(error)

        threading.Thread(target=compile_all, daemon=True).start()
        stem = _written(pathlib.Path(folder), ended)
        names = ("", "-buffer-assignment", "-live-range")
        text, buffers, lives = (pathlib.Path(f"{stem}{n}.txt").read_text() for n in names)
    return Scheduled(text, *read_allocations(buffers), buffers, lives)


def _written(folder: pathlib.Path, ended: list[BaseException | None]) -> str:
    """What the names of its files begin with, once all are whole. On a busy machine a file ceases
    to grow and goes on; the text ends with the program's entry, and nothing else tells."""
    while True:
        if ended and ended[0] is not None:
            raise ended[0]
        for path in folder.glob(TEXT):
            text = path.read_text()
            if ended or ("\nENTRY " in text and text.endswith("}\n\n")):
                return str(path).removesuffix(".txt")
        if ended:
            raise ValueError(f"XLA wrote no {TEXT}: this is not a program for GPUs")
        time.sleep(0.2)


def read_allocations(text: str) -> tuple[int, int]:
    """Bytes of parameters and of temporaries, from XLA's own list of allocations."""
    lines = re.findall(r"^allocation \d+: size (\d+), (.*)$", text, re.MULTILINE)
    arguments = sum(int(size) for size, kind in lines if " parameter " in kind)
    temporaries = sum(int(size) for size, kind in lines if "preallocated-temp" in kind)
    return arguments, temporaries
