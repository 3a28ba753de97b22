"""Distillation by distributions: a trainer whose loss also pulls a student towards a teacher.

The teacher reads every batch first and leaves its k most probable tokens at every position
(`rl/examples/distill.py`); it lies on the student's mesh, takes no gradient and has no optimizer
state. The loss of the main head is (1 - w) cross-entropy + w KL(teacher, student), over learned
tokens.

The two may have different numbers of logits beyond the tokenizer's ids, as padding: what the
teacher has more than the student belongs to no token, and is left out of its distribution.

Letters: N micro batches, B rows, T positions, K kept tokens, D hidden width, V vocabulary.
"""

import dataclasses
import functools
from pathlib import Path

import jax

from checkpoint.folder import step_of
from checkpoint.weights import RunFolder, open_weights, weights_version
from model.blueprint import Tree, bind
from model.config import ModelConfig
from model.loss import LossParts, LossWeights, inputs_and_targets, loss_of_output, make_examples
from model.recipe import Recipe
from model.transformer import DeepSeekV3
from rl.examples.distill import TopK, chunked_top_k, distillation_loss
from sharding.partition import Layout, batch_sharding, pipeline_ranks, use_layout
from training.config import TrainConfig
from training.gradients import Batch, accumulated_gradients, loss_weights
from training.step import Gradients, Knobs, State, Trainer, loss_metrics

TEACHER = tuple(f"teacher_{name}" for name in TopK._fields)
"""Arrays of a batch that hold the teacher's distribution, as TopK has them."""


def load_policy(path: str, train: TrainConfig, recipe: Recipe, layout: Layout):
    """`(model, params, router_bias)` of a run folder or a Hugging Face folder, on the mesh.

    Its shape is its own. Raises ValueError if there are no weights, or if they do not divide over
    the mesh.
    """
    weights = open_weights(Path(path))
    abstract = Trainer(weights.config, train, recipe, layout).abstract_state
    loaded = weights.load({tree: abstract[tree] for tree in ("params", "router_bias")})
    return weights.config, loaded["params"], loaded["router_bias"]


def policy_version(path: str) -> dict[str, int | str]:
    """What tells the weights in a folder from others that have been or will be there.

    {"policy_step": the newest checkpoint's} of a run folder, {"policy_files": a digest} of a
    Hugging Face folder: see `weights_version`.
    """
    weights = open_weights(Path(path))
    if isinstance(weights, RunFolder):
        return {"policy_step": step_of(weights.step_folder)}
    return {"policy_files": weights_version(weights)}


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model that reads what a student learns."""

    model: ModelConfig
    params: Tree
    router_bias: Tree
    recipe: Recipe
    layout: Layout
    k: int
    vocab_size: int = 0
    """Logits that count, the first ones, at least k; 0: all. At most the student's, whose ids the
    tokenizer stays below."""

    @functools.cached_property
    def _read(self):
        rows = batch_sharding(self.layout, (None, "batch", None))
        placed = jax.tree.map(lambda x: x.sharding, (self.params, self.router_bias))
        return jax.jit(self._top_k, in_shardings=(*placed, rows), out_shardings=rows)

    def read(self, batch: Batch) -> Batch:
        """The batch with the teacher's distribution: arrays TEACHER, [N, B, T, K] or [N, B, T]."""
        found = self._read(self.params, self.router_bias, batch)
        return batch | dict(zip(TEACHER, found, strict=True))

    def _top_k(self, params: Tree, router_bias: Tree, batch: Batch) -> TopK:
        with use_layout(self.layout):

            def one(micro: Batch) -> TopK:
                model = bind(self.model, params, router_bias)
                output = model.forward(inputs_and_targets(micro)[0], self.recipe, None)
                head_DV = model.head_kernel()[:, : self.vocab_size or None]
                return chunked_top_k(output.hidden_BTD, head_DV, self.k)

            return jax.lax.map(one, batch)


@dataclasses.dataclass(frozen=True)
class StudentTrainer(Trainer):
    """A trainer of stage distill with a KL term; its batches have been read by a `Teacher`."""

    kl_weight: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        mesh = self.layout.config
        if pipeline_ranks(self.layout) > 1 or mesh.context > 1 or mesh.overlap:
            raise ValueError(
                "sft.kl_weight does not work over the mesh axes pipe and context, nor with "
                "mesh.overlap; use data, fsdp, expert and tensor, or kl_weight 0"
            )

    def gradients(self, state: State, batch: Batch, knobs: Knobs) -> Gradients:
        """Gradient of the loss with its KL term, whose mean is a metric."""
        rows = {name: batch[name] for name in batch if name not in TEACHER}
        weights = loss_weights(rows, knobs["mtp_weight"], self.train.balance_weight)
        loss, (parts, kl), grads = accumulated_gradients(
            self.model, self.recipe, state["params"], state["router_bias"], batch, weights,
            micro_loss=self._loss,
        )  # fmt: skip
        return Gradients(loss, grads, parts.counts_LE, loss_metrics(parts) | {"train/kl": kl})

    def _loss(
        self, model: DeepSeekV3, micro: Batch, weights: LossWeights
    ) -> tuple[jax.Array, tuple[LossParts, jax.Array]]:
        """Loss of a micro batch, its parts and KL; the KL takes the place of kl_weight of the main
        loss."""
        examples = make_examples(micro, self.model.mtp_depth)
        tokens, targets_KBT, weights_KBT = examples
        output = model.forward(tokens, self.recipe, targets_KBT[:-1])
        loss, parts = loss_of_output(model, output, examples, weights, self.recipe)
        kl = distillation_loss(
            output.hidden_BTD, model.head_kernel(), TopK(*(micro[name] for name in TEACHER)),
            weights_KBT[0], weights.num_targets,
        )  # fmt: skip
        return loss + self.kl_weight * (kl - parts.main), (parts, kl)
