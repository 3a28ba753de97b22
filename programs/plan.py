"""A pipeline's step cut down to the pass that decides its memory: an eighth of the code, as large.

A tick of DualPipe runs one of several kinds of passes. What is carried from tick to tick is the
same whichever it is; what a tick needs besides is most where a forward and a backward pass share
it. So a program whose ticks are all of that kind needs the memory of the whole one, but for what
only other kinds carry, which has a closed form. It has as many ticks as a rank has forward passes:
what is sent for the layers and their gradients is what the whole step sends for them.

Its results mean nothing; it is compiled to be read. Schedules without such pairs stay whole.
"""

import dataclasses
from typing import Any

import numpy as np

from model.stages import stage_costs
from sharding.partition import batch_shards, pipeline_ranks
from sharding.pipeline.stage_weights import place_layers
from sharding.pipeline.ticks import CODES, IDLE, Table, tick_table
from training.gradients import make_pipeline_schedule, pipelined_gradients
from training.step import Trainer


def deciding(table: Table) -> Table:
    """The table with nothing but pairs of a forward and a backward pass, a tick for each."""
    forward = np.isin(table.code, [CODES["F"], CODES["FB"]])
    ticks = int(forward.sum(0).max())
    columns: dict[str, Any] = {name: column[:ticks] for name, column in table.columns().items()}
    columns["code"] = np.full_like(columns["code"], CODES["FB"])
    return table._replace(**columns, codes=frozenset({IDLE, CODES["FB"]}))


class PlanTrainer(Trainer):
    """A trainer whose step is the plan of its pipeline's."""

    def gradients_in_pipeline(self, *inputs: Any):
        """Those of ticks that are all pairs."""
        return pipelined_gradients(
            self.model, self.recipe, self.layout, *inputs, change=deciding, every_slot=True
        )


def plan_of(trainer: Trainer) -> tuple[Trainer, int]:
    """A trainer with a shorter step of about the same memory, and bytes to add to its temporaries.

    The trainer itself and 0 where there is nothing to leave out.
    """
    if pipeline_ranks(trainer.layout) == 1:
        return trainer, 0
    train = trainer.train
    rows = train.micro_batch_size or train.batch_size
    schedule = make_pipeline_schedule(trainer.layout, train.batch_size // rows)
    table = tick_table(schedule)
    if CODES["FB"] not in table.codes:
        return trainer, 0
    fields = {field.name: getattr(trainer, field.name) for field in dataclasses.fields(Trainer)}
    placed = place_layers(schedule, trainer.model.stack_size, *stage_costs(trainer.model))
    return PlanTrainer(**fields), _cotangents(trainer, table, placed.layer_of.shape[-1])


def _cotangents(trainer: Trainer, table: Table, slots: int) -> int:
    """Bytes per device of the gradients of layers' outputs that wait for those of their weights."""
    if CODES["I"] not in table.codes:
        return 0
    train, mesh = trainer.train, trainer.layout.mesh
    rows = (train.micro_batch_size or train.batch_size) // batch_shards(trainer.layout)
    cut = mesh.shape["context"] * (mesh.shape["tensor"] if trainer.layout.config.sequence else 1)
    entries = rows * train.seq_len // cut * trainer.model.hidden_size
    return (table.num_cotangents + 1) * slots * entries * trainer.recipe.activation_dtype.itemsize
