"""What a layout costs, before the GPUs exist: `python plan.py v3_671b --gpu h800 --gpus 2048`.

Prints memory, traffic, time and advice of a training step on GPUs that nobody needs to have; with
`--json` and `--html` also as files. Two engines: closed form, in seconds, and `--compile`, the real
program. `--search` ranks layouts, `--fits-on` finds the fewest GPUs (docs/planning.md).
"""

from runtime.interpreter import check_interpreter

check_interpreter()  # in one line, before an import fails

import dataclasses
import gc
import json
import math
import os
import sys

from configs.planning import PlanCommand, parse_plan
from runtime.outputs import check_outputs
from sharding.config import AXES


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. 0: planned, whether it fits or not; 2: refused, reason on stderr."""
    command = parse_plan(arguments)
    gc.set_threshold(100_000, 20, 100)  # traces make many objects and few cycles
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        check(command)
        return run(command)
    except (ValueError, OSError) as error:
        print(f"plan.py: {error}", file=sys.stderr)
        return 2


def check(command: PlanCommand) -> None:
    """ValueError for numbers that are none, and for files that cannot be written."""
    for name in ("top", "max_tensor", "max_pipe", "max_sequences"):
        if getattr(command, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(command, name)}: give 1 or more")
    outputs = {"--json": command.json, "--html": command.html}
    check_outputs(outputs)
    for option, name in outputs.items():
        if name and (os.path.isdir(name) or not os.access(os.path.dirname(name) or ".", os.W_OK)):
            raise ValueError(f"{option} {name}: no file can be written there; name another")


def run(command: PlanCommand) -> int:
    """Do what the command asks."""
    if command.compare:
        from planning.compare import compare

        print("\n".join(compare(command.compare)))
        return 0
    if command.search or command.fits_on:
        return search(command)
    from planning.advice import advise
    from planning.api import case_of
    from planning.report import report_of, text_of

    hardware = hardware_of(command)
    case = case_of(command.run, hardware, gpus_of(command), command.run.mesh, micro_batch(command))
    report = report_of(case, name_of(command))
    if command.compile:
        from planning.compiled import with_compiled

        report = with_compiled(report, case, command.cache)
    if command.advice:
        report = dataclasses.replace(report, advice=advise(case, report))
    print("\n".join(text_of(report)))
    return keep(command, report.to_json())


def search(command: PlanCommand) -> int:
    """Rank layouts, or find the fewest GPUs."""
    from planning.search import Limits, compiled, fewest, ranked, table

    limits = Limits(command.max_tensor, command.max_pipe, command.max_sequences)
    hardware, name = hardware_of(command), name_of(command)
    if command.fits_on:
        found = fewest(command.run, hardware, limits, name)
    else:
        found = ranked(command.run, hardware, gpus_of(command), limits, name)
    if command.compile:
        found = compiled(found, command.top, command.cache)
    print("\n".join(table(found, command.top)))
    return keep(command, found.to_json())


def keep(command: PlanCommand, figures: dict) -> int:
    """Write the files that the command asks for."""
    if command.json:
        with open(command.json, "w") as file:
            json.dump(figures, file, indent=1)
    if command.html:
        from planning.page import write_page

        write_page(command.html, figures.get("best", [figures]))
    return 0


def hardware_of(command: PlanCommand):
    """The GPUs that the command names."""
    from planning.hardware import make_hardware

    return make_hardware(command.gpu, command.per_node, command.network, command.measured)


def gpus_of(command: PlanCommand) -> int:
    """How many GPUs: as said, or as the layout has."""
    sizes = [getattr(command.run.mesh, axis) for axis in AXES]
    used = math.prod(max(size, 1) for size in sizes)
    return command.gpus or (max(used, 8) if -1 in sizes else used)


def micro_batch(command: PlanCommand) -> int | None:
    """Sequences per micro batch, if the command says how many."""
    named = {"train.micro-batch-size", "train.batch-size"} & set(command.given)
    return command.run.train.micro_batch_size if named else None


def name_of(command: PlanCommand) -> str:
    """Preset and layout."""
    return f"{command.config}{f', layout {command.layout}' if command.layout else ''}"


if __name__ == "__main__":
    sys.exit(main())
