"""The command line: a preset, a layout by name, and any field of RunConfig."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from configs import PRESETS, preset, summary
from configs.deepseek import v3_on_its_layout
from configs.options import parse_options
from configs.r1 import RL_RATE, SFT_RATE, tuning_rate
from configs.schema import RunConfig
from rl.config import PUBLISHED
from runtime.config import GPU_NAMES, RuntimeOptions
from sharding.config import LAYOUTS

OTHER_NAMES = {
    **dict.fromkeys(
        ("lr", "max-lr", "peak-lr", "learning-rate", "max-learning-rate"),
        "train.peak-learning-rate",
    ),
    **dict.fromkeys(("max-steps", "num-steps", "iterations", "total-steps"), "train.steps"),
    **dict.fromkeys(("max-seq-len", "seq-length"), "train.seq-len"),
    "output-dir": "run-dir",
}
"""Names of options in other programs -> the option here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(RuntimeOptions):
    """Train a model of the DeepSeek-V3 family, on one device or a mesh."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    """The run; every field of the preset can be overridden."""
    config: Literal[tuple(PRESETS)] = "tiny"  # pyright: ignore[reportInvalidTypeForm]
    """Preset; see the list below."""
    layout: Literal[("", *LAYOUTS)] = ""  # pyright: ignore[reportInvalidTypeForm]
    """Layout by name, instead of the preset's; single axes: --mesh.AXIS."""
    init_from: str = ""
    """Weights that a new run starts from, with fresh optimizer state: a run folder or a Hugging
    Face folder of the same model. A run that has a checkpoint goes on from that."""
    print_config: bool = False
    """Print what follows from the configuration, what differs from the preset, and every field that
    the stage reads, then stop."""
    gpu: Literal[("", *GPU_NAMES)] = ""  # pyright: ignore[reportInvalidTypeForm]
    """GPU that the run is meant for: the summary says how much of its memory a step takes; what
    cannot fit is refused."""
    memory_check: bool = True
    """Refuse a run whose memory, by closed form, is more than the GPUs have."""
    profile: str = ""
    """Steps to trace, FIRST:LAST (counted from the step that runs first), into RUN/profile."""
    recipe: str = ""
    """Run a chain of stages instead, r1_zero or r1 (runs/NAME.sh), in folders below --run-dir;
    other options go to every stage."""

    @property
    def profile_steps(self) -> range:
        """`profile` as numbers; ValueError if it is none."""
        if not self.profile:
            return range(0)
        first, _, last = self.profile.partition(":")
        if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
            raise ValueError(
                f"--profile {self.profile!r}: give FIRST:LAST, two step numbers, such as 5:7"
            )
        return range(int(first), int(last) + 1)


def parse(arguments: Sequence[str] | None = None) -> Command:
    """Read the command line; exits with near matches on an unknown option."""
    arguments = lower_gpu(list(sys.argv[1:] if arguments is None else arguments))
    # Preset, layout and published objective decide the defaults of the rest: they are read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default="tiny")
    first.add_argument("--layout", default="")
    first.add_argument("--stage", default="")
    first.add_argument("--init-from", "--init_from", default="")
    first.add_argument("--rl.objective-of", "--rl.objective_of", dest="objective_of", default="")
    chosen, _ = first.parse_known_args(arguments)
    run = laid_out(chosen.config, chosen.layout, "train.py")
    if chosen.stage == "rl" != run.stage:
        run = dataclasses.replace(run, train=tuning_rate(run.train, RL_RATE))
    tunes = chosen.stage in ("sft", "distill") and chosen.init_from
    if tunes and run.stage == "pretrain":
        run = dataclasses.replace(run, train=tuning_rate(run.train, SFT_RATE))
    if chosen.objective_of in PUBLISHED:
        run = dataclasses.replace(run, rl=run.rl.following(chosen.objective_of))
    default = Command(run=run, config=chosen.config, layout=chosen.layout)
    about = f"{Command.__doc__}\n\nPresets (--config):\n{list_of_presets()}"
    command = parse_options(default, arguments, "train.py", about, OTHER_NAMES)
    run = command.run
    if not run.run_dir:
        run = dataclasses.replace(run, run_dir=f"runs/{command.config}")
    return dataclasses.replace(command, run=run)


def laid_out(config: str, layout: str, prog: str) -> RunConfig:
    """A preset on a layout by name, '' for its own; exits with status 2 for an unknown preset."""
    try:
        run = preset(config)
    except ValueError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if layout in LAYOUTS:
        run = dataclasses.replace(run, mesh=LAYOUTS[layout])
    return v3_on_its_layout(run) if (config, layout) == ("v3_671b", "deepseek") else run


def list_of_presets() -> str:
    """A line for each, for --help."""
    return "\n".join(f"  {name:14} {summary(name)}" for name in PRESETS)


def lower_gpu(arguments: list[str]) -> list[str]:
    """The words of a command line with the name of a GPU in small letters."""
    words = []
    for word in arguments:
        name, is_pair, value = word.partition("=")
        if name == "--gpu" and is_pair:
            word = f"{name}={value.lower()}"
        words.append(word.lower() if words and words[-1] == "--gpu" else word)
    return words


def print_config(command: Command, derived: list[str]) -> None:
    """What follows from a run, what differs from its preset, and its fields as key=value."""
    run, before = command.run, fields_of(preset(command.config))
    now = fields_of(run)
    unread = {"pretrain": ("rl.", "sft."), "rl": ("sft.",), "images": ("rl.", "sft.")}.get(
        run.stage, ()
    )
    unread = unread if run.stage == "images" else (*unread, "images.")
    lines = [*derived, "", f"differs from the preset {command.config}:"]
    for key, value in now.items():
        if before.get(key) != value and (key, value) != ("run_dir", f"'runs/{command.config}'"):
            note = f", which stage {run.stage} does not read" * key.startswith(unread)
            lines.append(f"  {key}={value} (preset: {before.get(key, 'none')}){note}")
    lines += ["", f"every field that stage {run.stage} reads:"]
    lines += [f"{key}={value}" for key, value in now.items() if not key.startswith(unread)]
    print("\n".join(lines))


def fields_of(value: Any, name: str = "") -> dict[str, str]:
    """Every field of a tree of dataclasses as text, by its path."""
    if dataclasses.is_dataclass(value):
        parts = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        parts = list(enumerate(value))
    else:
        return {name: repr(value)}
    named = ((f"{name}.{part}" if name else str(part), inner) for part, inner in parts)
    return {k: v for path, inner in named for k, v in fields_of(inner, path).items()}
