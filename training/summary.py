"""What a run would be, in words, before anything is allocated."""

import math

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.costs import cache_bytes_per_token, count_parameters, train_flops_per_token
from model.kernels import choose
from runtime.gpus import GPUS
from sharding.experts.room import buffers
from sharding.mesh import describe
from sharding.partition import num_shards, stored_shards, use_layout
from training.display import human
from training.run import Run, plan_of
from training.schedule import describe as describe_schedule
from training.schedule import ends_elsewhere, schedules
from training.step import Trainer


def summary(run: Run, trainer: Trainer, gpu: str = "") -> list[str]:
    """Devices, sizes, cost, kernels, memory and length of a run, a line each.

    gpu: the one that the run is meant for, of runtime/gpus.py; '' names those that are too small.
    """
    plan, train = plan_of(run), run.train
    choice = choose(run.kernels, run.model, train.dtype, trainer.layout, train.fp8)
    count = count_parameters(run.model)
    flops = train_flops_per_token(run.model, train.seq_len)
    leaves = jax.tree.leaves(trainer.abstract_state)
    held = sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves
    )
    last = plan.at(train.steps - 1)
    return [
        f"devices      {describe(trainer.layout)}",
        f"parameters   {count.total:,} total, {count.active:,} active, {count.mtp:,} in MTP",
        f"compute      {human(flops)}FLOP/token (causal, without MTP), "
        f"{train.dtype}{' with fp8 products' * train.fp8}, "
        f"remat {train.remat}",
        *(f"kernels      {line}" for line in choice.describe()),
        f"state        {held / 2**30:.3g} GiB per device: weights, moments, biases",
        *room(held, gpu),
        *key_heads(run.model, trainer),
        f"cache        {cache_bytes_per_token(run.model):,} bytes/token in bf16",
        f"batch        {last.batch_size} x {train.seq_len} tokens in {last.micro_batches} micro "
        f"batches",
        *(f"experts      {line}" for line in expert_buffers(run.model, trainer)),
        f"length       {train.steps:,} steps, {human(plan.tokens_before(train.steps))} tokens",
        f"rate         {describe_schedule(schedules(train)['learning_rate'], plan)}",
        *(f"warning      {line}" for line in ends_elsewhere(train, plan)),
    ]


def expert_buffers(model: ModelConfig, trainer: Trainer) -> list[str]:
    """Buffers of the routed experts' rows, where experts are cut over devices."""
    layout, train = trainer.layout, trainer.train
    with use_layout(layout):
        shards = num_shards("nodes"), num_shards("experts_of_node")
        rows = (train.micro_batch_size or train.batch_size) // num_shards("batch")
        tokens = rows * train.seq_len // num_shards("seq")
    if math.prod(shards) == 1 or not model.num_moe_layers + model.mtp_depth:
        return []
    row_bytes = model.hidden_size * jnp.dtype(train.dtype).itemsize
    found = buffers(
        model.num_experts,
        shards,
        tokens,
        model.experts_per_token,
        (model.num_expert_groups, model.groups_per_token),
        row_bytes,
        layout.config,
    )
    return found.describe(row_bytes)


def key_heads(model: ModelConfig, trainer: Trainer) -> list[str]:
    """A line that heads of keys are whole on every device, where `tensor` does not split them."""
    shards, held = stored_shards(trainer.layout, "kv_heads"), model.num_kv_heads
    if held % shards == 0:
        return []
    return [
        f"key heads    {held} do not split over tensor={shards}: every device holds all of them, "
        "and computes those that its heads of queries read"
    ]


def room(held: int, gpu: str = "") -> list[str]:
    """Whether the memory of GPUs holds `held` bytes of state: a line, or none."""
    small = [(key, known) for key, known in GPUS.items() if held > known.memory]
    # A GPU may have two names.
    named = dict.fromkeys(known for key, known in small if gpu in ("", key))
    if named:
        sizes = ", ".join(f"{known.name} ({known.memory / 1e9:.0f} GB)" for known in named)
        return [
            f"warning      the state alone is more than the memory of {sizes}; spread it over more "
            "devices: --mesh.fsdp, --mesh.expert, --mesh.pipe, --mesh.tensor"
        ]
    if not gpu:
        return []
    left = (GPUS[gpu].memory - held) / 2**30
    return [f"room         {left:.3g} GiB of an {GPUS[gpu].name} for gradients and activations"]
