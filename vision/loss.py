"""The loss of mixed batches: plain next-token cross-entropy, of text on the language model's head
and of codes on the generation head, both over the count of all targets (Janus-Pro report).

Letters: B rows, T places, D hidden width, S codes, M images of a row, H W pixels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model.loss import cross_entropy_sum
from model.recipe import Recipe
from model.transformer import Tokens
from sharding.context import balance
from vision.janus import Brush, Janus, Sight

Batch = dict[str, jax.Array]


class MixedExamples(NamedTuple):
    """A micro batch as the loss reads it."""

    tokens: Tokens
    targets_BT: jax.Array
    """The next token."""
    text_BT: jax.Array
    """1.0 where that counts, fp32."""
    codes_BT: jax.Array
    """The next code."""
    drawn_BT: jax.Array
    """1.0 where that counts, fp32."""


class Counts(NamedTuple):
    """Targets of the whole global batch, fp32."""

    text: jax.Array
    drawn: jax.Array

    @property
    def total(self) -> jax.Array:
        """All targets, at least 1."""
        return jnp.maximum(self.text + self.drawn, 1.0)


class MixedParts(NamedTuple):
    """What a micro batch adds to the step's means."""

    text: jax.Array
    """Nats per text target."""
    drawn: jax.Array
    """Nats per code."""


def mixed_examples(batch: Batch) -> MixedExamples:
    """Inputs and targets of rows [B, T+1] (vision/batches.py)."""
    segments, codes = batch["segments"], batch["codes"]
    counts_BT = batch["learned"][:, 1:] * (segments[:, 1:] == segments[:, :-1])
    counts_BT = counts_BT * (segments[:, 1:] > 0)
    is_code_BT = codes[:, 1:] >= 0
    ids_BT = batch["tokens"][:, :-1]
    positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1], dtype=jnp.int32), ids_BT.shape)
    rows = (
        ids_BT, positions_BT, segments[:, :-1], batch["patches"][:, :-1], codes[:, :-1],
        batch["tokens"][:, 1:], counts_BT * ~is_code_BT, jnp.maximum(codes[:, 1:], 0),
        counts_BT * is_code_BT,
    )  # fmt: skip
    ids, positions, segments, patches, codes, *targets = map(balance, rows)
    sight = Sight(batch["pixels"], patches, codes)
    return MixedExamples(Tokens(ids, positions, segments, sight), *targets)


def count_targets(batch: Batch) -> Counts:
    """Targets of a whole batch [micro batches, B, T+1]."""
    rows = {k: v.reshape(-1, v.shape[-1]) for k, v in batch.items() if k != "pixels"}
    found = mixed_examples(rows | {"pixels": jnp.zeros((0,))})
    return Counts(found.text_BT.sum(), found.drawn_BT.sum())


def mixed_loss(
    model: Janus,
    examples: MixedExamples,
    counts: Counts,
    recipe: Recipe,
    x_BTD: jax.Array | None = None,
) -> tuple[jax.Array, MixedParts]:
    """This micro batch's share of the mean loss; with `x_BTD`, the result of the layers, these are
    not run."""
    tokens = examples.tokens
    if x_BTD is None:
        hidden_BTD = model.forward(tokens, recipe, None).hidden_BTD
    else:
        hidden_BTD = model.after(x_BTD, tokens, recipe, None).hidden_BTD
    text = text_loss(hidden_BTD, model.head_kernel(), examples, recipe)
    drawn = code_loss(model.brush, hidden_BTD, examples, recipe)
    return (text + drawn) / counts.total, mixed_parts(text, drawn, counts)


def mixed_parts(text: jax.Array, drawn: jax.Array, counts: Counts) -> MixedParts:
    """Sums of nats as shares of the step's means."""
    return MixedParts(text / jnp.maximum(counts.text, 1.0), drawn / jnp.maximum(counts.drawn, 1.0))


def text_loss(
    hidden_BTD: jax.Array, kernel_DV: jax.Array, examples: MixedExamples, recipe: Recipe
) -> jax.Array:
    """Sum of nats of the text."""
    found: Any = cross_entropy_sum(
        hidden_BTD, kernel_DV, examples.targets_BT, examples.text_BT, recipe.kernels.loss
    )
    return found


def code_loss(
    brush: Brush, hidden_BTD: jax.Array, examples: MixedExamples, recipe: Recipe
) -> jax.Array:
    """Sum of nats of the codes."""
    inner_BTD, kernel_DS = _with_bias(brush, hidden_BTD)
    found: Any = cross_entropy_sum(
        inner_BTD, kernel_DS, examples.codes_BT, examples.drawn_BT, recipe.kernels.loss
    )
    return found


def plain_code_loss(brush: Brush, hidden_BTD: jax.Array, examples: MixedExamples) -> jax.Array:
    """The same from all scores at once: no other device takes part, as on a pipeline's last stage,
    where the vocabulary's shards are the ranks."""
    logp_BTS = jax.nn.log_softmax(brush.logits(hidden_BTD))
    chosen_BT = jnp.take_along_axis(logp_BTS, examples.codes_BT[..., None], -1)[..., 0]
    return -(chosen_BT * examples.drawn_BT).sum()


def _with_bias(brush: Brush, hidden_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Input and kernel of the generation head, its bias as the weights of an input that is 1.

    The width grows by a block that kernels take, or by the one input.
    """
    inner_BTD = brush.before_head(hidden_BTD)
    kernel_DS, bias = brush.head.kernel[...], brush.head.bias
    assert bias is not None
    extra = 128 if inner_BTD.shape[-1] % 128 == 0 else 1
    ones = jnp.zeros((*inner_BTD.shape[:-1], extra), inner_BTD.dtype).at[..., 0].set(1)
    more_DS = jnp.zeros((extra, kernel_DS.shape[1]), kernel_DS.dtype).at[0].set(bias[...])
    return jnp.concatenate([inner_BTD, ones], -1), jnp.concatenate([kernel_DS, more_DS])
