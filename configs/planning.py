"""The command line of plan.py: a preset, GPUs, a layout, and any field of RunConfig."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from configs import PRESETS
from configs.command import OTHER_NAMES, laid_out, list_of_presets, lower_gpu
from configs.options import parse_options
from configs.schema import RunConfig
from runtime.config import GPU_NAMES
from sharding.config import AXES, LAYOUTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """What a layout costs, before the GPUs exist: plan.py PRESET --gpu h100 --gpus 64."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    """The run; every field of the preset can be overridden."""
    config: Literal[tuple(PRESETS)] = "tiny"  # pyright: ignore[reportInvalidTypeForm]
    """Preset; also the first word of the command."""
    layout: Literal[("", *LAYOUTS)] = ""  # pyright: ignore[reportInvalidTypeForm]
    """Layout by name, instead of the preset's; single axes: --mesh.AXIS."""
    gpu: Literal[GPU_NAMES] = "h100"  # pyright: ignore[reportInvalidTypeForm]
    """Kind of GPU."""
    gpus: int = 0
    """How many; 0: as many as the layout has, or one node."""
    per_node: int = 0
    """GPUs that NVLink connects; 0: the data sheet's."""
    network: float = 0.0
    """Gb/s of a GPU to other nodes; 0: the data sheet's."""
    measured: str = ""
    """File of own measurements, JSON, which override the published ones (docs/planning.md)."""
    compile: bool = False
    """Compile the program for GPUs that are not there, and show its memory and collectives beside
    the closed form's. Needs `make gpu-compiler`."""
    search: bool = False
    """All legal layouts of the GPUs, by closed form: a ranked table and the Pareto front of memory
    and speed. With --compile the best are compiled."""
    fits_on: bool = False
    """The fewest GPUs on which this trains."""
    top: int = 8
    """Layouts of a search that are shown, and compiled."""
    max_tensor: int = 8
    """Largest `tensor` of a search."""
    max_pipe: int = 64
    """Largest `pipe` of a search."""
    max_sequences: int = 4
    """Most sequences per GPU and micro batch in a search."""
    compare: tuple[str, ...] = ()
    """Two JSON files of earlier plans, to show side by side instead of a plan."""
    json: str = ""
    """Write the report here."""
    html: str = ""
    """Write the page here: one file, opens without a network."""
    cache: str = "cache/plans"
    """Folder that keeps compiled plans; empty keeps none."""
    advice: bool = True
    """Look for changes that help."""
    given: tuple[str, ...] = ()
    """Names of the options of the command line (filled in)."""


def parse_plan(arguments: Sequence[str] | None = None) -> PlanCommand:
    """Read the command line; exits with near matches on an unknown option."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    arguments = lower_gpu(arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default="tiny")
    first.add_argument("--layout", default="")
    first.add_argument("--gpus", type=int, default=0)
    chosen, _ = first.parse_known_args(arguments)
    named = chosen.layout
    of_mesh = bool(_names(arguments) & {f"mesh.{axis}" for axis in AXES})
    if not named and not of_mesh and chosen.config == "v3_671b" and chosen.gpus in (0, 2048):
        named = "deepseek"
    run = laid_out(chosen.config, named, "plan.py")
    if of_mesh and not named:
        # Axes that are named say what the layout is; the rest of the GPUs are replicas.
        sizes = dict.fromkeys(AXES, 1)
        open_axis = "data" if _names(arguments) & {"mesh.fsdp"} else "fsdp"
        run = dataclasses.replace(
            run, mesh=dataclasses.replace(run.mesh, **sizes | {open_axis: -1})
        )
    given = tuple(sorted(_names(arguments)))
    default = PlanCommand(run=run, config=chosen.config, layout=named, given=given)
    about = f"{PlanCommand.__doc__}\n\nPresets:\n{list_of_presets()}"
    return parse_options(default, arguments, "plan.py", about, OTHER_NAMES)


def _names(arguments: Sequence[str]) -> set[str]:
    words = (word for word in arguments if word.startswith("--"))
    return {word.partition("=")[0].lstrip("-").replace("_", "-") for word in words}
