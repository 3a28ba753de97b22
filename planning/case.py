"""What is planned: a model and its training on GPUs that are described, checked like a run.

A case holds what the program itself derives from a configuration: the layout (on an abstract mesh),
the trainer, kernels, schedule, tick table and places of layers. Nothing is allocated.
"""

import dataclasses
import functools
import math
from typing import Any

import jax

from configs.schema import RunConfig
from model.blueprint import blueprint
from model.config import ModelConfig
from model.kept import Kept, kept_by_layer
from model.kernels import choose, on_planned_host
from model.recipe import Kernels, Recipe
from model.stages import stage_costs
from planning.hardware import Hardware
from planning.stretch import planned_table
from planning.ways import OWN, Ways
from runtime.gpus import GPUS
from sharding.config import MeshConfig
from sharding.devices import PlannedDevice
from sharding.experts.sizes import Rows, exchange_rows
from sharding.mesh import axis_sizes, planned_layout, resolve
from sharding.partition import Layout, batch_shards, pipeline_ranks
from sharding.pipeline.schedule import Schedule
from sharding.pipeline.stage_weights import Placement, place_layers
from sharding.pipeline.ticks import Table
from training.config import TrainConfig
from training.gradients import make_pipeline_schedule
from training.recipe import recipe_of
from training.step import Trainer


@dataclasses.dataclass(frozen=True)
class Case:
    """A checked plan; `make_case` makes it."""

    run: RunConfig
    hardware: Hardware
    trainer: Trainer
    derived: tuple[str, ...] = ()
    """What was chosen because nobody said it, a line each."""
    total_tokens: float = 0.0
    """Of the whole training."""
    ways: Ways = OWN
    """Whose ways time and traffic are of."""

    @property
    def model(self) -> ModelConfig:
        """The model."""
        return self.trainer.model

    @property
    def train(self) -> TrainConfig:
        """Its training, without a ramp of the batch."""
        return self.trainer.train

    @property
    def layout(self) -> Layout:
        """The layout, on an abstract mesh."""
        return self.trainer.layout

    @property
    def mesh(self) -> MeshConfig:
        """Its options, sizes included."""
        return self.trainer.layout.config

    @property
    def recipe(self) -> Recipe:
        """Types, recomputation and kernels."""
        return self.trainer.recipe

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return math.prod(axis_sizes(self.mesh).values())

    @property
    def micro_batches(self) -> int:
        """Micro batches of a step."""
        return self.train.batch_size // (self.train.micro_batch_size or self.train.batch_size)

    @property
    def rows(self) -> int:
        """Sequences of a device and micro batch; with `overlap` two such are side by side."""
        micro = self.train.micro_batch_size or self.train.batch_size
        return micro // batch_shards(self.layout)

    @property
    def tokens(self) -> int:
        """Tokens of a device and micro batch."""
        return self.rows * self.train.seq_len // self.mesh.context

    @functools.cached_property
    def schedule(self) -> Schedule | None:
        """Order of passes; None without a pipeline."""
        if pipeline_ranks(self.layout) == 1:
            return None
        return make_pipeline_schedule(self.layout, self.micro_batches)

    @functools.cached_property
    def table(self) -> Table:
        """The schedule in ticks, with its slots."""
        assert self.schedule is not None
        mesh = self.mesh
        return planned_table(mesh.schedule, mesh.pipe, self.micro_batches, mesh.pipe_chunks)

    @functools.cached_property
    def placement(self) -> Placement:
        """Layers of every rank."""
        assert self.schedule is not None
        return place_layers(self.schedule, self.model.stack_size, *stage_costs(self.model))

    @functools.cached_property
    def state(self) -> Any:
        """ShapeDtypeStructs of the training state with their placements."""
        shapes = _state_shapes(
            self.trainer.model, self.trainer.train.optimizer, bool(self.train.ema_decay)
        )
        shardings = self.trainer.state_shardings(shapes)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )

    def kept(self, stack: str = "") -> tuple[Kept, ...]:
        """What a layer of a stack, else of the one that a pipeline cuts, leaves for its backward
        pass, per sequence."""
        # Backends that leave nothing, or nothing else, are taken where they are traced fastest.
        attention = self.recipe.kernels.attention
        experts = "portable" if self.recipe.remat == "none" else "reference"
        kernels = Kernels(attention, "reference", experts, "reference", "reference")
        recipe = dataclasses.replace(self.recipe, kernels=kernels, fp8=False)
        context = min(self.mesh.context, 2)
        config = MeshConfig(
            data=2,
            context=context,
            sequence=self.mesh.sequence,
            context_exchange=self.mesh.context_exchange,
        )
        if recipe.remat == "none" and self.mesh.expert > 1:
            config = dataclasses.replace(
                self.mesh, pipe=1, data=1, fsdp=1, context=context, tensor=1, overlap=False
            )
        devices = config.data * config.expert * context
        probe = _probe(config, devices, planned_device(self.hardware.gpu_name))
        return kept_by_layer(
            self.model, recipe, self.train.seq_len, probe, stack or self.model.stack
        )

    @functools.cached_property
    def exchange(self) -> Rows:
        """Rows of the expert exchange of a micro batch on a device."""
        model, mesh = self.model, self.mesh
        row_bytes = model.hidden_size * self.recipe.activation_dtype.itemsize
        return exchange_rows(
            self.tokens,
            model.experts_per_token,
            model.num_experts,
            mesh,
            (model.num_expert_groups, model.groups_per_token),
            row_bytes,
        )


@functools.cache
def _probe(config: MeshConfig, devices: int, device: PlannedDevice) -> Layout:
    return planned_layout(config, devices, device)


@functools.cache
def _state_shapes(model: ModelConfig, optimizer: Any, averaged: bool) -> Any:
    """Shapes of a state, which no layout changes."""
    train = TrainConfig(1, 2 * 64, 2, optimizer=optimizer, ema_decay=0.5 * averaged)
    layout = planned_layout(MeshConfig(), 1, planned_device("h100"))
    trainer = Trainer(model, train, Recipe(), layout)
    plan = blueprint(model)
    return jax.eval_shape(trainer.fresh_state, plan.params, plan.router_bias)


def whole_state(model: ModelConfig, train: TrainConfig) -> int:
    """Bytes of a training state on all devices together."""
    leaves = jax.tree.leaves(_state_shapes(model, train.optimizer, bool(train.ema_decay)))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def planned_device(gpu: str) -> PlannedDevice:
    """A GPU by name as a layout sees it."""
    name = GPUS[gpu].name
    capability = {"A100": "8.0", "L40S": "8.9", "B200": "10.0", "GB200": "10.0", "GB300": "10.3"}
    return PlannedDevice("cuda", f"NVIDIA {name}", capability.get(name, "9.0"))


def make_case(
    run: RunConfig,
    hardware: Hardware,
    gpus: int,
    derived: tuple[str, ...] = (),
    total_tokens: float = 0.0,
) -> Case:
    """The case of a run on `gpus` GPUs.

    Raises:
        ValueError: the layout, the batch or the kernels cannot work, with the reason.
    """
    if run.stage == "images":
        raise ValueError(
            "plans are of language models; what reads and draws images has parts that they lack"
        )
    sizes = axis_sizes(run.mesh).values()
    if min(sizes) > 0 and math.prod(sizes) != gpus:
        raise ValueError(f"the layout has {math.prod(sizes)} GPUs, and --gpus says {gpus}")
    mesh = resolve(run.mesh, gpus)
    layout = planned_layout(mesh, gpus, planned_device(hardware.gpu_name))
    micro = run.train.micro_batch_size or run.train.batch_size
    if run.train.batch_size % micro:
        raise ValueError(
            f"train.batch_size={run.train.batch_size} is no multiple of micro_batch_size={micro}; "
            f"take {run.train.batch_size // micro * micro or micro}"
        )
    train = dataclasses.replace(run.train, batch_ramp_from=0, batch_ramp_tokens=0)
    choice = choose(run.kernels, run.model, train.dtype, layout, train.fp8)
    kernels = on_planned_host(run.kernels, choice, run.model, train.dtype, layout)
    recipe = recipe_of(train, kernels)
    trainer = Trainer(run.model, train, recipe, layout)
    run = dataclasses.replace(run, train=train, mesh=mesh)
    case = Case(run, hardware, trainer, derived, total_tokens)
    _ = case.state  # names any weight that does not divide over the mesh
    return case
