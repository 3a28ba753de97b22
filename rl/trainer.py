"""The policy trainer: the loss of RL and its gradient, in the step of pre-training.

A batch holds prompts with their answers, padded at the end. Position t of every array but `tokens`
belongs to the token t + 1: what the model predicts there.

Letters: N micro batches, B answers of one, T positions, D hidden width, R experts of a token over
all layers, L MoE layers, K experts of one layer, or tokens that the sampler kept.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from model.blueprint import Tree, bind
from model.transformer import DeepSeekV3, Output, Tokens
from rl.config import GRPOConfig
from rl.logps import chunked_logps_and_entropy
from rl.metrics import Metrics, masked_mean, merge
from rl.objective import Answers, loss_denominator, policy_loss
from sharding.partition import batch_sharding, pipeline_ranks, replicated, use_layout
from training.gradients import accumulated_gradients
from training.step import Gradients, Knobs, State, Trainer

Batch = dict[str, jax.Array]
"""tokens int32 [N, B, T+1]; lengths int32 [N, B], tokens of prompt and answer; mask [N, B, T], 1
for tokens of answers; advantages fp32 [N, B]; optional old_logp, sampler_logp, ref_logp fp32
[N, B, T]; kept int32 [N, B, T, K], the tokens that the sampler drew from and -1 beyond them; and
routes int16 [N, B, T, R], -1 where a token chooses anew."""

REFERENCE = "reference"
"""Key of the state where the objective has a KL term: params and router_bias of the policy that it
is compared with."""


@dataclasses.dataclass(frozen=True)
class PolicyTrainer(Trainer):
    """A trainer whose loss is `rl/objective.py`'s."""

    objective: GRPOConfig = GRPOConfig()
    temperature: float = 1.0
    """Temperature of the rollout: the policy is the distribution that was drawn from."""

    def __post_init__(self):
        super().__post_init__()
        if pipeline_ranks(self.layout) > 1 or self.layout.config.context > 1:
            raise ValueError(
                "reinforcement learning does not run over the mesh axes pipe and context; set both "
                "to 1 and use data, fsdp, expert and tensor"
            )

    def renew_reference(self, state: State) -> State:
        """The state with the policy as it is now for its reference, if the objective has one."""
        if REFERENCE not in state:
            return state
        policy = {tree: state[tree] for tree in state[REFERENCE]}
        return {**state, REFERENCE: jax.tree.map(lambda x: x.copy(), policy)}

    @functools.cached_property
    def logps(self):
        """`logp = logps(params, router_bias, batch)` [N, B, T] of the batch's tokens."""
        rows, whole = batch_sharding(self.layout, (None, "batch")), replicated(self.layout)
        state = self.shardings
        placements = (state["params"], state["router_bias"], rows)
        return jax.jit(self._logps, in_shardings=placements, out_shardings=whole)

    def initial_state(self, key: jax.Array) -> State:
        """A new state, with the reference where the objective has one."""
        state = super().initial_state(key)
        if self.objective.kl_coef:
            state[REFERENCE] = {tree: state[tree] for tree in ("params", "router_bias")}
        return state

    def state_shardings(self, shapes: State) -> State:
        """Placement of the state; the reference lies as the policy does."""
        shardings = super().state_shardings(shapes)
        if REFERENCE in shapes:
            shardings[REFERENCE] = {tree: shardings[tree] for tree in shapes[REFERENCE]}
        return shardings

    def _logps(self, params: Tree, router_bias: Tree, batch: Batch) -> jax.Array:
        with use_layout(self.layout):

            def one(micro: Batch) -> jax.Array:
                return self._score(bind(self.model, params, router_bias), micro)[1]

            return jax.lax.map(one, batch)

    def _score(self, model: DeepSeekV3, micro: Batch):
        """Output of the model, log-probabilities and entropies [B, T]."""
        ids_BT, targets_BT = micro["tokens"][:, :-1], micro["tokens"][:, 1:]
        positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
        segments_BT = (positions_BT < micro["lengths"][:, None]).astype(jnp.int32)
        tokens = Tokens(ids_BT, positions_BT, segments_BT)
        replayed = None
        if "routes" in micro:
            K = self.model.experts_per_token
            routes_BTLK = micro["routes"].reshape(*ids_BT.shape, -1, K).astype(jnp.int32)
            replayed = jnp.moveaxis(routes_BTLK, 2, 0)
        output: Output = model.forward(tokens, self.recipe, None, replayed)
        head_DV = model.head_kernel().astype(output.hidden_BTD.dtype)
        logp_BT, entropy_BT = chunked_logps_and_entropy(
            output.hidden_BTD, head_DV, targets_BT, self.temperature, kept_BTK=micro.get("kept")
        )
        return output, logp_BT, entropy_BT

    def gradients(self, state: State, batch: Batch, knobs: Knobs) -> Gradients:
        """Gradient of the policy's loss; metrics: `Metrics` of the objective, and the loss."""
        denominator: Any = loss_denominator(batch["mask"], self.objective)
        inputs = state["params"], state["router_bias"], batch, denominator
        loss, (metrics, counts_LE), grads = accumulated_gradients(
            self.model, self.recipe, *inputs, micro_loss=self._loss, add=_add
        )
        return Gradients(loss, grads, counts_LE, {"objective": metrics, "train/loss": loss})

    def _loss(self, model: DeepSeekV3, micro: Batch, denominator: Any):
        output, logp_BT, entropy_BT = self._score(model, micro)
        answers = Answers(
            micro["mask"],
            micro["advantages"],
            micro.get("old_logp"),
            micro.get("sampler_logp"),
            micro.get("ref_logp"),
        )
        loss, metrics = policy_loss(logp_BT, answers, denominator, self.objective)
        entropy_BT = jax.lax.stop_gradient(entropy_BT)
        metrics["entropy"] = masked_mean(entropy_BT, micro["mask"])
        stats = output.stats
        none = jnp.zeros((0, self.model.num_experts), jnp.float32)
        counts_LE = none if stats is None else jax.lax.stop_gradient(stats.counts_E)
        missing = self.model.num_moe_layers + self.model.mtp_depth - len(counts_LE)
        # MTP modules do not run; equal loads leave their biases where they are.
        counts_LE = jnp.concatenate([counts_LE, jnp.zeros((missing, self.model.num_experts))])
        return loss, (metrics, counts_LE)


def _add(left: tuple[Metrics, jax.Array], right: tuple[Metrics, jax.Array]) -> Any:
    """Metrics of two micro batches, merged as they say themselves, and sums of counts."""
    return merge(left[0], right[0]), left[1] + right[1]
