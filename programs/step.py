"""A train step compiled without an array, and what the program says of itself.

    report = read(until_scheduled(lower(trainer), INSPECTION), trainer.layout.mesh)

The trainer's devices may be absent (`programs/absent_gpus.py`); its machine code is not needed
(`programs/scheduled.py`).
"""

import collections
import re
from collections.abc import Collection
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from programs.buffers import alive_at_peak, parts
from programs.collectives import by_op_and_axes, parse, read_collectives
from programs.overlap import read_spans
from programs.scheduled import Scheduled
from sharding.devices import as_default
from sharding.experts.sizes import exchange_rows
from sharding.partition import batch_shards
from training.step import Trainer


class Report(NamedTuple):
    """What a compiled step says of itself."""

    devices: int
    arguments: int
    """Bytes per device: state and batch."""
    temporaries: int
    """Bytes per device besides."""
    collectives: list[tuple[str, str, int, int]]
    """Op, axes, executions, bytes."""
    spans: list[tuple[str, str, int, int]]
    """Of every asynchronous collective: op, origin, products beside it, those of other values."""
    calls: dict[str, int]
    """Calls in the program's text, loops counted once: libraries and kernels by name, and XLA's own
    fusions by kind."""
    parts: dict[str, int]
    """Bytes per device by what they are for (`programs/buffers.py:PARTS`); empty of a program that
    was compiled to its end."""


def lower(trainer: Trainer) -> jax.stages.Lowered:
    """The step of a trainer, traced on shapes, for batches of the size that its settings say."""
    train, scalar = trainer.train, jax.ShapeDtypeStruct((), np.float32)
    rows = train.micro_batch_size or train.batch_size
    shape = (train.batch_size // rows, rows, train.seq_len + 1)
    knobs = dict.fromkeys(("learning_rate", "bias_update_rate", "mtp_weight"), scalar)
    batch = {"tokens": jax.ShapeDtypeStruct(shape, np.int32)}
    state = trainer.abstract_state
    with as_default(trainer.layout):  # kernels of a library ask which GPU they are made for
        return trainer.step.lower(state, batch, knobs)


def scheduled(compiled: jax.stages.Compiled) -> Scheduled:
    """The same of a program that was compiled to its end."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return Scheduled(
        compiled.as_text() or "", memory.argument_size_in_bytes, memory.temp_size_in_bytes
    )


def rows_of(trainer: Trainer) -> list[tuple[int, int]]:
    """Numbers of rows, from and to, that the arrays of a trainer's expert exchange have."""
    train, model, mesh = trainer.train, trainer.model, trainer.layout.config
    sequences = (train.micro_batch_size or train.batch_size) // batch_shards(trainer.layout)
    row_bytes = model.hidden_size * trainer.recipe.activation_dtype.itemsize
    rows = exchange_rows(
        sequences * train.seq_len // mesh.context,
        model.experts_per_token,
        model.num_experts,
        mesh,
        (model.num_expert_groups, model.groups_per_token),
        row_bytes,
    )
    # Sorted rows begin every expert's at a tile.
    found = [(rows.sorted, rows.sorted + rows.sorted // 16 + 512)] if rows.sorted else []
    return found + [(n, n) for n in (rows.across, rows.inside) if n]


def read(program: Scheduled, mesh: Mesh, rows: Collection[tuple[int, int]] = ()) -> Report:
    """Memory, collectives, overlap and calls of a step.

    rows: see `programs/buffers.py:parts`.

    Raises:
        ValueError: the program is not scheduled, as XLA's are for GPUs.
    """
    groups = by_op_and_axes(read_collectives(program.text, mesh))
    sizes: dict[str, int] = {}
    if program.buffers:
        alive = alive_at_peak(program.buffers, program.live_ranges)
        held = program.arguments, program.temporaries
        sizes = parts(parse(program.text), *held, alive, rows, mesh.shape["pipe"] > 1)
    return Report(
        mesh.size,
        program.arguments,
        program.temporaries,
        [(op, axes, one.times, one.bytes) for (op, axes), one in groups.items()],
        [(s.op, s.source, len(s.products), len(s.of_others)) for s in read_spans(program.text)],
        read_calls(program.text),
        sizes,
    )


def read_calls(text: str) -> dict[str, int]:
    """How often a compiled program's text calls each library or kernel, and XLA's fusions."""
    kernels = re.findall(r'custom_call_target="([^"]+)"', text)
    fusions = re.findall(r" fusion\(.*?kind=(\w+)", text)
    found = collections.Counter([*kernels, *(f"fusion {kind}" for kind in fusions)])
    return dict(found.most_common())
