"""Plans from Python: a preset or a run, a kind of GPU and a number, and how they are laid out."""

import contextlib
import dataclasses
from typing import Any

from configs import preset
from configs.deepseek import v3_on_its_layout
from configs.schema import RunConfig
from planning.advice import advise
from planning.case import Case, make_case
from planning.hardware import Hardware, make_hardware
from planning.legal import describe_refusal
from planning.report import Report, report_of
from sharding.config import MeshConfig
from sharding.mesh import named_layout, resolve
from training.schedule import BatchPlan


def plan(
    run: RunConfig | str,
    *,
    gpu: str = "h100",
    gpus: int = 8,
    layout: str | MeshConfig | None = None,
    micro_batch_size: int | None = None,
    hardware: Hardware | None = None,
    with_advice: bool = True,
    **train: Any,
) -> Report:
    """What a run costs on `gpus` GPUs of a kind, in closed form.

    Args:
        run: a preset's name, or a run's configuration.
        gpu: a name of `runtime/gpus.py:GPUS`.
        gpus: how many.
        layout: a name of `sharding/config.py:LAYOUTS`, or the mesh itself. None: the run's own; of
            a preset, the published layout where it has as many GPUs.
        micro_batch_size: sequences per forward pass over all GPUs. None: the run's where it splits
            over the layout, else one sequence per device.
        hardware: instead of `gpu`, one with other networks or own measurements.
        with_advice: whether to look for changes that help, which takes a few plans more.
        **train: fields of `training/config.py:TrainConfig`, such as seq_len, batch_size, remat.

    Raises:
        ValueError: what cannot work, with the reason and the nearest that can.
    """
    name = run if isinstance(run, str) else "run"
    case = case_of(run, hardware or make_hardware(gpu), gpus, layout, micro_batch_size, **train)
    report = report_of(case, name)
    return dataclasses.replace(report, advice=advise(case, report)) if with_advice else report


def case_of(
    run: RunConfig | str,
    hardware: Hardware,
    gpus: int,
    layout: str | MeshConfig | None = None,
    micro_batch_size: int | None = None,
    **train: Any,
) -> Case:
    """The case of `plan`."""
    found, derived, tokens = settle(run, gpus, layout, micro_batch_size, **train)
    try:
        return make_case(found, hardware, gpus, derived, tokens)
    except ValueError as error:
        raise ValueError(describe_refusal(str(error), found, hardware, gpus)) from None


def settle(
    run: RunConfig | str,
    gpus: int,
    layout: str | MeshConfig | None = None,
    micro_batch_size: int | None = None,
    **train: Any,
) -> tuple[RunConfig, tuple[str, ...], float]:
    """The run as it is planned, what was chosen for it, and the tokens of its whole training."""
    if gpus < 1:
        raise ValueError(f"--gpus {gpus}: give 1 or more")
    derived = []
    name = run if isinstance(run, str) else ""
    run = preset(name) if name else run
    assert isinstance(run, RunConfig)
    tokens = float(BatchPlan(run.train).tokens_before(run.train.steps))
    if layout is None and name == "v3_671b" and gpus == 2048:
        layout = "deepseek"
        derived.append("layout deepseek: V3's own, of as many GPUs")
    if isinstance(layout, str):
        run = v3_on_its_layout(run) if (name, layout) == ("v3_671b", "deepseek") else run
        run = dataclasses.replace(run, mesh=named_layout(layout))
    elif layout is not None:
        run = dataclasses.replace(run, mesh=layout)
    given = dict(train)
    if micro_batch_size is not None:
        given["micro_batch_size"] = micro_batch_size
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, **given))
    if micro_batch_size is None and "micro_batch_size" not in train:
        with contextlib.suppress(ValueError):  # what the mesh's sizes contradict is said later
            run, lines = fitting_batch(run, gpus)
            derived += lines
    if run.stage != "pretrain":
        said = (
            "a training step on full rows; what is sampled, scored or read besides is not counted"
        )
        derived.append(f"stage {run.stage}: {said}")
    return run, tuple(derived), tokens


def fitting_batch(run: RunConfig, gpus: int) -> tuple[RunConfig, list[str]]:
    """The run with a micro batch that its layout takes: its own, or one sequence per device."""
    mesh, train = resolve(run.mesh, gpus), run.train
    shards = mesh.data * mesh.fsdp * mesh.expert
    micro = train.micro_batch_size or train.batch_size
    whole = micro % shards == 0 and train.batch_size % micro == 0
    if whole or shards > train.batch_size:  # then there are more devices than work, and no plan
        return run, []
    batch = -(-train.batch_size // shards) * shards
    derived = [f"micro_batch_size {shards}: one sequence per device, since {micro} sequences do "
               f"not split over {shards} parts of the batch"]  # fmt: skip
    if batch != train.batch_size:
        derived.append(f"batch_size {batch} instead of {train.batch_size}: whole micro batches")
    train = dataclasses.replace(
        train, micro_batch_size=shards, batch_size=batch, batch_ramp_from=0, batch_ramp_tokens=0.0
    )
    return dataclasses.replace(run, train=train), derived
