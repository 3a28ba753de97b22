"""Cross-entropy of the next token and of the tokens beyond, without ever holding all logits.

Letters: B batch, T sequence, D hidden width, V vocabulary (this device's part), C chunk of T.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.moe import MoEStats, Served
from model.recipe import Recipe
from model.transformer import DeepSeekV3, Output, Tokens
from pallas_kernels.cross_entropy import Parts, loss_and_gradients, loss_sum, merge
from pallas_kernels.mosaic import Backend
from sharding.context import balance, sequence_shards
from sharding.partition import constrain, max_over, on_shards, shard_index, sum_over

CHUNK_BYTES = 4 << 20
"""Logits a device holds at a time in `greedy_ids`, fp32."""

_HIDDEN, _KERNEL, _TOKENS = ("batch", "seq", "embed"), ("embed", "vocab"), ("batch", "seq")


def _on_shard(compute: Callable, backend: Backend, x_BTD, w_DV, targets_BT, weights_BT):
    """`compute` of this device's tokens as rows, over its part of the vocabulary."""
    rows = x_BTD.reshape(-1, x_BTD.shape[-1]), w_DV
    local_M = targets_BT.reshape(-1) - shard_index("vocab") * w_DV.shape[1]
    parts = (local_M, weights_BT.reshape(-1))
    return compute(*rows, *parts, combine=_whole_vocabulary, backend=backend)


def _whole_vocabulary(parts: Parts) -> Parts:
    """largest[M]{U_tp}, sum[M]{U_tp}, target[M]{U_tp} -> AllReduce over the vocabulary's shards."""
    return merge(parts, lambda x: max_over(x, "vocab"), lambda x: sum_over(x, "vocab"))


def _loss_on_shard(backend: Backend, *arrays: jax.Array) -> tuple[jax.Array]:
    """Weighted sum of -log p(target)."""
    total = _on_shard(loss_sum, backend, *arrays)
    return (max_over(sum_over(total, "batch", "seq"), "vocab"),)


def _loss_and_grads_on_shard(backend: Backend, *arrays: jax.Array):
    """The loss, and its gradients with respect to x and w while the logits are at hand."""
    total, dx_MD, dw_DV = _on_shard(loss_and_gradients, backend, *arrays)
    # dx[B, T, D]{U_vocab} -> AllReduce_tp ; dw[D, V_tp]{U_batch} -> AllReduce over the batch axes
    dx_BTD = sum_over(dx_MD.reshape(arrays[0].shape), "vocab")
    dw_DV = sum_over(dw_DV, "batch", "seq")
    return max_over(sum_over(total, "batch", "seq"), "vocab"), dx_BTD, dw_DV


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sum(
    x_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    backend: Backend = "portable",
) -> jax.Array:
    """sum(weights * -log softmax(x @ kernel)[target]), an fp32 scalar.

    Logits are made a chunk of the tokens at a time and used up at once: the forward pass computes
    the gradients too, so the backward pass only scales them and no logits are recomputed
    (`pallas_kernels/cross_entropy/linear.py`). Works with batch, sequence and vocabulary sharded.
    No gradient for the weights.
    """
    shard = partial(_loss_on_shard, backend)
    run = on_shards(shard, (_HIDDEN, _KERNEL, _TOKENS, _TOKENS), ((),))
    return run(x_BTD, kernel_DV.astype(x_BTD.dtype), targets_BT, weights_BT)[0]


def _forward(x_BTD, kernel_DV, targets_BT, weights_BT, backend: Backend):
    outs = ((), _HIDDEN, _KERNEL)
    shard = partial(_loss_and_grads_on_shard, backend)
    run = on_shards(shard, (_HIDDEN, _KERNEL, _TOKENS, _TOKENS), outs)
    loss, dx_BTD, dw_DV = run(x_BTD, kernel_DV.astype(x_BTD.dtype), targets_BT, weights_BT)
    return loss, (dx_BTD, dw_DV.astype(kernel_DV.dtype))


def _backward(backend: Backend, residuals, g):
    dx_BTD, dw_DV = residuals
    # g in bf16 would be a factor of up to 0.4% on every gradient of the model.
    return (g * dx_BTD).astype(dx_BTD.dtype), (g * dw_DV).astype(dw_DV.dtype), None, None


cross_entropy_sum.defvjp(_forward, _backward)


class Examples(NamedTuple):
    """A micro batch as the loss reads it; k = 0 is the main model, k > 0 MTP module k."""

    tokens: Tokens
    targets_KBT: jax.Array
    """The token k + 1 ahead: target of module k, and what module k + 1 reads."""
    weights_KBT: jax.Array
    """1.0 where that target counts, fp32."""


class LossWeights(NamedTuple):
    """Denominators and coefficients, the same for every micro batch of a step."""

    num_targets: jax.Array
    """Valid next-token targets of the whole global batch."""
    num_sequences: jax.Array
    """Sequences of the whole global batch."""
    mtp: jax.Array
    """lambda (eq. 25)."""
    balance: float
    """alpha (eq. 17)."""


class LossParts(NamedTuple):
    """What a micro batch adds to the step's means; already divided by the global counts."""

    main: jax.Array
    """Mean next-token loss, nats per target."""
    mtp: jax.Array
    """Mean multi-token-prediction loss over modules (eq. 24, before lambda)."""
    balance: jax.Array
    """Balance loss per sequence, summed over layers (before alpha)."""
    counts_LE: jax.Array
    """Tokens per expert and MoE layer."""
    served: Served
    """Counts over all layers: choices that no expert computed, and further rounds."""


def target_weights(
    targets_BT: jax.Array, segments_BT: jax.Array | None, target_segments_BT: jax.Array | None
) -> jax.Array:
    """1.0 where the target belongs to the same document as its input, else 0.0 (fp32).

    Without segments every target counts: pre-training predicts across document borders.
    """
    if segments_BT is None or target_segments_BT is None:
        return jnp.ones(targets_BT.shape, jnp.float32)
    return ((segments_BT == target_segments_BT) & (segments_BT > 0)).astype(jnp.float32)


def ahead(x_BT: jax.Array, k: int, fill: int = 0) -> jax.Array:
    """x shifted left by k along the sequence, `fill` entering at the end."""
    return jnp.pad(x_BT[:, k:], ((0, 0), (0, k)), constant_values=fill)


def training_loss(
    model: DeepSeekV3,
    examples: Examples,
    weights: LossWeights,
    recipe: Recipe,
    x_BTD: jax.Array | None = None,
) -> tuple[jax.Array, LossParts]:
    """This micro batch's share of L = L_main + lambda/D sum_k L_MTP^k + alpha sum_l L_bal.

    Summing over the micro batches of a step gives the loss of the whole batch exactly. With
    `x_BTD`, the result of the MoE layers, these are not run and their terms are left out.
    """
    tokens, targets_KBT, _ = examples
    if x_BTD is None:
        output = model.forward(tokens, recipe, targets_KBT[:-1])
    else:
        output = model.after(x_BTD, tokens, recipe, targets_KBT[:-1])
    return loss_of_output(model, output, examples, weights, recipe)


def balance_of_output(
    output: Output, weights: LossWeights, config: ModelConfig
) -> tuple[jax.Array, LossParts]:
    """The terms of `loss_of_output` that need no head."""
    zero = jnp.zeros((), jnp.float32)
    balance, counts_LE, served = _moe_parts(output.stats, weights, config)
    return weights.balance * balance, LossParts(zero, zero, balance, counts_LE, served)


def loss_of_hidden(
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    k: jax.Array,
    weights: LossWeights,
    config: ModelConfig,
    recipe: Recipe,
) -> tuple[jax.Array, LossParts]:
    """The others, of one hidden state: the main model's (k = 0) or that of MTP module k."""
    mean: Any = cross_entropy_sum(
        hidden_BTD, kernel_DV, targets_BT, weights_BT / weights.num_targets, recipe.kernels.loss
    )
    main, mtp = jnp.where(k == 0, mean, 0.0), jnp.where(k > 0, mean / max(config.mtp_depth, 1), 0.0)
    none, zero = jnp.zeros((config.mtp_depth, config.num_experts)), jnp.zeros(())
    return main + weights.mtp * mtp, LossParts(main, mtp, zero, none, Served(zero, zero))


def loss_of_output(
    model: DeepSeekV3, output: Output, examples: Examples, weights: LossWeights, recipe: Recipe
) -> tuple[jax.Array, LossParts]:
    """`training_loss` of what the model has computed for the examples."""
    _, targets_KBT, weights_KBT = examples
    hidden = (output.hidden_BTD, *output.mtp_hidden)
    # All are divided by the count of the main loss, not by T - k (eq. 24); the weights are, so that
    # the main loss is its own cotangent, 1, and its gradient in bf16 is rounded once.
    share_KBT = weights_KBT / weights.num_targets
    means: list[Any] = [
        cross_entropy_sum(
            hidden[k], model.head_kernel(), targets_KBT[k], share_KBT[k], recipe.kernels.loss
        )
        for k in range(len(hidden))
    ]
    main, *ahead = means
    mtp = sum(ahead, jnp.zeros((), jnp.float32)) / max(len(ahead), 1)
    balance, counts_LE, served = _moe_parts(output.stats, weights, model.config)
    loss = main + weights.mtp * mtp + weights.balance * balance
    return loss, LossParts(main, mtp, balance, counts_LE, served)


def make_examples(batch: dict[str, jax.Array], mtp_depth: int) -> Examples:
    """Inputs and targets of rows: tokens [B, T+1] and, with documents kept apart, segments."""
    tokens, targets_BT, weights_BT = inputs_and_targets(batch)
    further = [mtp_targets(batch, k) for k in range(1, mtp_depth + 1)]
    pairs = [(targets_BT, weights_BT), *further]
    return Examples(tokens, *(jnp.stack(part) for part in zip(*pairs, strict=True)))


def inputs_and_targets(batch: dict[str, jax.Array]) -> tuple[Tokens, jax.Array, jax.Array]:
    """Inputs, next-token targets [B, T] and target weights [B, T] of a batch of rows [B, T+1].

    Tokens are in balanced order (sharding/context.py), which is the text's on one device.
    """
    rows, segments = batch["tokens"], batch.get("segments")
    ids_BT, targets_BT = rows[:, :-1], rows[:, 1:]
    positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1], dtype=jnp.int32), ids_BT.shape)
    if segments is None:
        weights_BT = target_weights(targets_BT, None, None)
        inputs = Tokens(ids_BT, positions_BT, None)
    else:
        # Positions may run on across documents: RoPE sees only differences within one.
        weights_BT = target_weights(targets_BT, segments[:, :-1], segments[:, 1:])
        inputs = Tokens(ids_BT, positions_BT, segments[:, :-1])
    if "mask" in batch:
        # Evaluation says itself what it scores: every held-out token once, first ones included.
        weights_BT = batch["mask"].astype(jnp.float32)
    return jax.tree.map(balance, (inputs, targets_BT, weights_BT))


def mtp_targets(batch: dict[str, jax.Array], k: int) -> tuple[jax.Array, jax.Array]:
    """Targets of MTP module k, the token k + 1 ahead, and their weights; in balanced order."""
    targets_BT = batch["tokens"][:, 1:]
    segments = batch.get("segments")
    if segments is None:
        weights_BT = jnp.broadcast_to(
            jnp.arange(targets_BT.shape[1]) < targets_BT.shape[1] - k, targets_BT.shape
        ).astype(jnp.float32)
    else:
        weights_BT = target_weights(targets_BT, segments[:, :-1], ahead(segments[:, 1:], k))
    if "mask" in batch:
        weights_BT = weights_BT * ahead(batch["mask"], k).astype(jnp.float32)
    return balance(ahead(targets_BT, k)), balance(weights_BT)


def _moe_parts(stats: MoEStats | None, weights: LossWeights, config: ModelConfig):
    """Balance loss per sequence summed over layers, expert counts, how experts served."""
    if stats is None:
        zero = jnp.zeros((), jnp.float32)
        return zero, jnp.zeros((0, config.num_experts), jnp.float32), Served(zero, zero)
    counts_LE = jax.lax.stop_gradient(stats.counts_E)
    served = jax.tree.map(jnp.sum, stats.served)
    return stats.balance.sum() / weights.num_sequences, counts_LE, served


def greedy_ids(x_BTD: jax.Array, kernel_DV: jax.Array) -> jax.Array:
    """Most likely token at every position, int32 [B, T]; a chunk of logits at a time.

    Each of the S shards of a sequence takes a chunk of its own tokens.
    """

    def best(x_BSCD):
        logits_BSCV = jnp.einsum(
            "BSCD,DV->BSCV", x_BSCD, kernel_DV.astype(x_BSCD.dtype),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return jnp.argmax(constrain(logits_BSCV, "batch", "seq", None, "vocab"), -1)

    B, T, D = x_BTD.shape
    S = sequence_shards()
    fits = CHUNK_BYTES // (4 * B * S * kernel_DV.shape[1])
    length = max(n for n in range(1, T // S + 1) if (T // S) % n == 0 and n <= max(fits, 1))
    chunks = jnp.moveaxis(x_BTD.reshape(B, S, -1, length, D), 2, 0)
    return jnp.moveaxis(jax.lax.map(best, chunks), 0, 2).reshape(B, T)
