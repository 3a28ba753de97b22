"""The train step: one jitted, donated function from state and batch to state and metrics.

Inside it: forward and backward over micro batches, clipping, optimizer, router-bias update, EMA and
the finite check. Everything it reduces is reduced over the whole global batch, so the result does
not depend on how the batch is cut into micro batches or laid over devices.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from model.blueprint import Tree, bind, blueprint, initialize
from model.config import ModelConfig
from model.loss import (
    LossParts,
    cross_entropy_sum,
    greedy_ids,
    inputs_and_targets,
    mtp_targets,
)
from model.recipe import Recipe
from model.router import load_max_over_mean, update_bias
from sharding.context import check_sequence, restore
from sharding.copies import reduces_once
from sharding.devices import EXACT, on_platform, schedule_options
from sharding.partition import (
    Layout,
    batch_sharding,
    check_batch,
    optimizer_shardings,
    pipeline_ranks,
    replicated,
    stored_shardings,
    use_layout,
    with_shardings,
)
from training.config import TrainConfig
from training.gradients import (
    accumulated_gradients,
    check_micro_batches,
    copies,
    gradients_of_shards,
    loss_weights,
    pipelined_gradients,
)
from training.optimizer import clip_by_global_norm, make_optimizer, state_axes
from training.schedule import BatchPlan

State = dict[str, Any]
Batch = dict[str, jax.Array]
Knobs = dict[str, jax.Array]
"""Scalars of a step, fp32: learning_rate, bias_update_rate, mtp_weight."""
ROWS = (None, "batch")
"""Logical axes of a batch array [micro batches, sequences, ..]."""


class Gradients(NamedTuple):
    """Result of a loss for the update, over the whole global batch."""

    loss: jax.Array
    """The minimised scalar."""
    grads: Tree
    """Gradients of the parameters, fp32."""
    counts_LE: jax.Array
    """Tokens per expert: main MoE layers, then MTP modules."""
    metrics: dict[str, Any]
    """Results of the step by name, in addition to those of `update`."""


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The functions of one run, all bound to its model, recipe and layout.

    Another loss is a subclass that overrides `gradients` and, if its state holds more,
    `initial_state` and `state_shardings`; the update is the same for all.
    """

    model: ModelConfig
    train: TrainConfig
    recipe: Recipe
    layout: Layout

    def __post_init__(self):
        train = self.train
        micro = train.micro_batch_size or train.batch_size
        check_batch(self.layout, micro)
        self._check_ramp()
        check_sequence(self.layout, self.train.seq_len)
        if train.unroll > 1 and pipeline_ranks(self.layout) > 1:
            raise ValueError(f"train.unroll={train.unroll} is not for pipelines; set it to 1")

    def _check_ramp(self) -> None:
        """Raise ValueError unless the layout takes every number of micro batches of the run."""

        def refused(train: TrainConfig) -> str:
            try:
                for count in BatchPlan(train).micro_batch_counts():  # the batch may grow
                    check_micro_batches(self.model, self.layout, count)
            except ValueError as error:
                return str(error)
            return ""

        train, why = self.train, refused(self.train)
        if not why:
            return
        micro = train.micro_batch_size or train.batch_size
        if not train.batch_ramp_from:
            raise ValueError(
                f"{why} (train.batch_size={train.batch_size} over train.micro_batch_size={micro})"
            )
        added = (train.batch_size - train.batch_ramp_from) // micro
        for step in (step for step in range(2, added + 1) if added % step == 0):
            if not refused(dataclasses.replace(train, batch_ramp_step=step)):
                remedy = f"--train.batch-ramp-step {step} adds {step} micro batches at a time"
                break
        else:
            remedy = "--train.batch-ramp-from 0 --train.batch-ramp-tokens 0 leaves the ramp out"
        raise ValueError(
            f"{why}. The batch ramp comes there: from train.batch_ramp_from="
            f"{train.batch_ramp_from} to batch_size={train.batch_size} in micro batches of {micro},"
            f" {train.batch_ramp_step} more at a time; {remedy}, or choose another "
            "--train.micro-batch-size"
        )

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Direction of the update, weight decay included, without the learning rate."""
        return make_optimizer(self.train.optimizer, blueprint(self.model).params_axes)

    @functools.cached_property
    def abstract_state(self) -> State:
        """ShapeDtypeStruct with its sharding for every array of the state."""
        shapes = jax.eval_shape(self.initial_state, jax.random.key(0))
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            self.state_shardings(shapes),
        )

    @property
    def shardings(self) -> State:
        """Placement of every array of the state."""
        return jax.tree.map(lambda x: x.sharding, self.abstract_state)

    @functools.cached_property
    def init(self):
        """`state = init(key)`, created in place, shard by shard."""
        # It runs once; on CPU, LLVM's optimisation of it takes four times as long as it saves.
        options = {"xla_backend_optimization_level": 0} if on_platform(self.layout, "cpu") else None
        return jax.jit(self.initial_state, out_shardings=self.shardings, compiler_options=options)

    @functools.cached_property
    def step(self):
        """`state, metrics = step(state, batch, knobs)`; the state passed in is consumed.

        batch: tokens (and segments) int32 [micro batches, sequences, T+1]. knobs: fp32 scalars
        learning_rate, bias_update_rate, mtp_weight. metrics: scalars by name, `skipped_in_row`,
        and `counts_LE`, tokens per expert and MoE layer.
        """
        rows = batch_sharding(self.layout, ROWS)
        whole = replicated(self.layout)
        on_gpu = on_platform(self.layout, "cuda", "gpu")
        options = EXACT | (schedule_options(self.layout.config) if on_gpu else {})
        return jax.jit(
            self._step,
            donate_argnums=0,
            in_shardings=(self.shardings, rows, whole),
            out_shardings=(self.shardings, whole),
            compiler_options=options,
        )

    @functools.cached_property
    def evaluate(self):
        """`sums = evaluate(params, router_bias, batch)` over one batch of rows [1, sequences, T+1].

        sums: nats, targets, and of MTP module 1 the drafts and those that the main model's own
        greedy choice agrees with.
        """
        state, rows = self.shardings, batch_sharding(self.layout, ROWS)
        placements = (state["params"], state["router_bias"], rows)
        return jax.jit(
            self._evaluate,
            in_shardings=placements,
            out_shardings=replicated(self.layout),
            compiler_options=EXACT,
        )

    def state_shardings(self, shapes: State) -> State:
        """Placement of every array of a state; a loss with a larger state adds its own."""
        plan, layout = blueprint(self.model), self.layout
        whole = replicated(layout)
        params = stored_shardings(layout, plan.params, plan.params_axes)
        moments = optimizer_shardings(layout, plan.params, plan.params_axes)
        shardings = jax.tree.map(lambda _: whole, shapes)
        shardings["params"] = params
        shardings["router_bias"] = stored_shardings(layout, plan.router_bias, plan.router_bias_axes)
        axes = state_axes(shapes["opt"], plan.params_axes)
        shardings["opt"] = optimizer_shardings(layout, shapes["opt"], axes)
        if "ema" in shapes:
            shardings["ema"] = moments
        return shardings

    def initial_state(self, key: jax.Array) -> State:
        """A new state, traced; a loss with a larger state adds its own."""
        return self.fresh_state(*initialize(self.model, key))

    def fresh_state(self, params: Tree, router_bias: Tree) -> State:
        """The state of step 0 with these weights, traced."""
        zero = jnp.zeros((), jnp.int32)
        state = {
            "step": zero,
            "params": params,
            "router_bias": router_bias,
            "opt": self.optimizer.init(params),
            "skipped": zero,
            "skipped_in_row": zero,
        }
        if self.train.ema_decay:
            state["ema"] = params
        return state

    def gradients(self, state: State, batch: Batch, knobs: Knobs) -> Gradients:
        """Gradient of the loss over all micro batches (fp32 sums), traced; a loss overrides it."""
        weights = loss_weights(batch, knobs["mtp_weight"], self.train.balance_weight)
        params, inputs = state["params"], (state["router_bias"], batch, weights)
        how, in_pairs = (self.model, self.recipe, self.layout), self.layout.config.overlap
        if pipeline_ranks(self.layout) > 1:
            found = self.gradients_in_pipeline(params, *inputs)
        elif reduces_once(self.layout):
            found = gradients_of_shards(*how, params, *inputs, in_pairs)
        else:
            held, _ = copies(*how, params)
            found = accumulated_gradients(self.model, self.recipe, held, *inputs, in_pairs)
        loss, parts, grads = found
        return Gradients(loss, grads, parts.counts_LE, loss_metrics(parts))

    def gradients_in_pipeline(self, *inputs: Any) -> tuple[jax.Array, LossParts, Tree]:
        """`pipelined_gradients` of a step's inputs; what only reads a program runs less of it."""
        return pipelined_gradients(self.model, self.recipe, self.layout, *inputs)

    def _step(self, state: State, batch: Batch, knobs: Knobs):
        with use_layout(self.layout):
            found = self.gradients(state, batch, knobs)
            new, metrics = update(self, state, found, knobs)
            return new, found.metrics | metrics

    def _evaluate(self, params, router_bias, batch: Batch) -> dict[str, jax.Array]:
        with use_layout(self.layout):
            model = bind(self.model, params, router_bias)
            assert batch["tokens"].shape[0] == 1, "an evaluation batch is one micro batch"
            batch = {name: rows[0] for name, rows in batch.items()}
            tokens, targets_BT, weights_BT = inputs_and_targets(batch)
            output = model(tokens, self.recipe, next_ids_BT=targets_BT)
            kernel = model.head_kernel()
            nats = cross_entropy_sum(
                output.hidden_BTD, kernel, targets_BT, weights_BT, self.recipe.kernels.loss
            )
            sums = {"nats": nats, "targets": weights_BT.sum()}
            if output.mtp_hidden:
                draft_weights = restore(mtp_targets(batch, 1)[1])
                draft_BT = restore(greedy_ids(output.mtp_hidden[0], kernel))
                own_BT = restore(greedy_ids(output.hidden_BTD, kernel))
                # The draft made at i for i + 2 against the main model's own choice at i + 1.
                agree = (draft_BT[:, :-1] == own_BT[:, 1:]) * draft_weights[:, :-1]
                sums |= {"accepted": agree.sum(), "drafts": draft_weights[:, :-1].sum()}
            return sums


def loss_metrics(parts: LossParts) -> dict[str, jax.Array]:
    """Metrics of the pre-training loss."""
    return {
        "train/loss": parts.main,
        "train/mtp_loss": parts.mtp,
        "train/balance_loss": parts.balance,
        "moe/dropped_tokens": parts.served.dropped,
        "moe/further_rounds": parts.served.further,
        "counts_LE": parts.counts_LE,
    }


def update(
    trainer: Trainer, state: State, found: Gradients, knobs: Knobs
) -> tuple[State, dict[str, jax.Array]]:
    """The state after one update, and its norms; traced, for every loss.

    Clips, updates parameters, router bias and EMA, or skips all of it where the loss or the norm of
    its gradient is not finite. The step advances either way.
    """
    train, plan = trainer.train, blueprint(trainer.model)
    moments = optimizer_shardings(trainer.layout, plan.params, plan.params_axes)
    grads, norm = clip_by_global_norm(
        with_shardings(found.grads, moments), train.optimizer.clip_norm
    )
    finite = jnp.isfinite(found.loss) & jnp.isfinite(norm)
    direction, opt = trainer.optimizer.update(grads, state["opt"], state["params"])
    updates = jax.tree.map(lambda d: -knobs["learning_rate"] * d, direction)
    params = optax.apply_updates(state["params"], updates)
    bias = _update_router_bias(state["router_bias"], found.counts_LE, knobs["bias_update_rate"])
    new = {**state, "step": state["step"] + 1, "params": params, "opt": opt, "router_bias": bias}
    if "ema" in state:
        new["ema"] = optax.incremental_update(params, state["ema"], 1 - train.ema_decay)
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    skipped = jnp.where(finite, 0, 1)
    new["step"] = state["step"] + 1
    new["skipped"] = state["skipped"] + skipped
    new["skipped_in_row"] = (state["skipped_in_row"] + skipped) * skipped
    return new, {
        "train/skipped_steps": new["skipped"],
        "skipped_in_row": new["skipped_in_row"],
        "train/grad_norm": norm,
        "train/param_norm": optax.tree.norm(new["params"]),
        "train/update_norm": optax.tree.norm(updates),
        "moe/load_max_over_mean": load_max_over_mean(found.counts_LE).max(initial=0.0),
    }


def _update_router_bias(router_bias, counts_LE: jax.Array, rate: jax.Array):
    """Every MoE layer's bias by its own row of counts: main layers first, then MTP modules."""
    leaves, structure = jax.tree.flatten(router_bias)
    row = 0
    updated = []
    for bias_LE in leaves:
        counts = counts_LE[row : row + bias_LE.shape[0]]
        updated.append(update_bias(bias_LE, counts, rate))
        row += bias_LE.shape[0]
    assert not leaves or row == counts_LE.shape[0]
    return jax.tree.unflatten(structure, updated)
