"""What a run would be, in words, before anything is allocated."""

import math

import jax

from model.costs import cache_bytes_per_token, count_parameters, train_flops_per_token
from model.kernels import choose
from sharding.mesh import describe
from training.display import human
from training.run import Run
from training.schedule import BatchPlan, ends_elsewhere, schedules
from training.schedule import describe as describe_schedule
from training.step import Trainer


def summary(run: Run, trainer: Trainer) -> list[str]:
    """Devices, sizes, cost, kernels, memory and length of a run, a line each."""
    plan, train = BatchPlan(run.train), run.train
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
        f"cache        {cache_bytes_per_token(run.model):,} bytes/token in bf16",
        f"batch        {last.batch_size} x {train.seq_len} tokens in {last.micro_batches} micro "
        f"batches",
        f"length       {train.steps:,} steps, {human(plan.tokens_before(train.steps))} tokens",
        f"rate         {describe_schedule(schedules(train)['learning_rate'], plan)}",
        *(f"warning      {line}" for line in ends_elsewhere(train, plan)),
    ]
