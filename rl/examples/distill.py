"""Distillation: a student learns what a teacher would write.

R1 distils by sequences (R1 report, 2.4): supervised fine-tuning on the teacher's correct answers,
without a term of its own in the loss. That is `write_traces` followed by `sft_batches`. Where
teacher and student share a vocabulary, the student can also be pulled towards the teacher's whole
distribution at every token that it learns: KL(teacher, student), below.

A teacher's distribution is kept as its k most probable tokens and one more outcome, anything else.
The KL of these k + 1 outcomes is a lower bound of the KL over the vocabulary, and equal to it for
k = V; with k = 0 it is 0.

Letters: B rows, T positions, C positions of a chunk, D hidden width, V vocabulary, K kept tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rl.logps import chunks


class TopK(NamedTuple):
    """A distribution over the vocabulary at every position, in K + 1 outcomes."""

    ids_BTK: jax.Array
    """The most probable tokens, int32."""
    logp_BTK: jax.Array
    """Their log-probabilities, nats, fp32."""
    rest_BT: jax.Array
    """Log-probability of all other tokens together, nats, fp32; -inf if there are none."""


def top_k(logits_BTV: jax.Array, k: int) -> TopK:
    """The k most probable tokens of softmax(logits) and the rest. ValueError unless k is 1..V."""
    if not 1 <= k <= logits_BTV.shape[-1]:
        raise ValueError(
            f"distillation keeps k={k} tokens of the teacher; give 1..{logits_BTV.shape[-1]}, the "
            "size of the vocabulary"
        )
    logits_BTV = logits_BTV.astype(jnp.float32)
    _, ids_BTK = jax.lax.top_k(logits_BTV, k)
    return TopK(ids_BTK, *_outcomes(logits_BTV, ids_BTK))


def lumped_kl(teacher: TopK, logits_BTV: jax.Array) -> jax.Array:
    """KL(teacher, softmax(logits)) over the teacher's k + 1 outcomes, nats, fp32 [B, T].

    The student's logits are at the same position as the teacher's. Gradients go to the student
    alone, and are those of the softmax: p_student(v) - p_teacher(v) for a kept token v.
    """
    teacher = jax.lax.stop_gradient(teacher)
    logp_BTK, rest_BT = _outcomes(logits_BTV.astype(jnp.float32), teacher.ids_BTK)
    kl_BT = _p_times_gap(teacher.logp_BTK, logp_BTK).sum(-1)
    if teacher.ids_BTK.shape[-1] == logits_BTV.shape[-1]:
        return kl_BT
    return kl_BT + _p_times_gap(teacher.rest_BT, rest_BT)


def chunked_top_k(hidden_BTD: jax.Array, head_DV: jax.Array, k: int, chunk: int = 128) -> TopK:
    """`top_k` of a teacher's hidden states, with the logits of `chunk` positions at a time."""
    cut, join = chunks(hidden_BTD.shape[1], chunk)

    def one(hidden_BCD: jax.Array) -> TopK:
        return top_k(_logits(hidden_BCD, head_DV), k)

    return jax.tree.map(join, jax.lax.map(one, cut(hidden_BTD)))


def distillation_loss(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    teacher: TopK,
    mask_BT: jax.Array,
    denominator: jax.Array,
    chunk: int = 128,
) -> jax.Array:
    """This micro batch's share of the mean KL(teacher, student) over learned tokens, fp32 scalar.

    Args:
      hidden_BTD: the student's states; position t of all arrays speaks of token t + 1.
      head_DV: the student's head.
      teacher: from `chunked_top_k`, over the same vocabulary.
      mask_BT: 1 where the token is learned (a batch's "mask"); prompts and padding are 0, and what
        the arrays hold there is not read.
      denominator: learned tokens of the whole global batch, at least 1; the shares of all
        micro batches then sum to the mean over that batch.
      chunk: positions whose logits exist at a time, and once more in the backward pass, which
        computes them again; no [B, T, V] array exists.
    """
    cut, _ = chunks(hidden_BTD.shape[1], chunk)

    @jax.checkpoint
    def one(hidden_BCD: jax.Array, teacher_BC: TopK, mask_BC: jax.Array) -> jax.Array:
        kl_BC = lumped_kl(teacher_BC, _logits(hidden_BCD, head_DV))
        return (kl_BC * mask_BC).sum()

    # Set before the KL, so that a NaN of the padding cannot reach a gradient as 0 * NaN.
    learned_BT = mask_BT > 0
    hidden_BTD = jnp.where(learned_BT[..., None], hidden_BTD, 0)
    teacher = jax.tree.map(lambda x: _where(learned_BT, x), teacher)
    xs = cut(hidden_BTD), jax.tree.map(cut, teacher), cut(mask_BT.astype(jnp.float32))
    zero = jnp.zeros((), jnp.float32)
    total, _ = jax.lax.scan(lambda sum_, x: (sum_ + one(*x), None), zero, xs)
    return total / denominator


def _outcomes(logits_BTV: jax.Array, ids_BTK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the tokens `ids_BTK`, and of all others together."""
    log_sum_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    logp_BTK = jnp.take_along_axis(logits_BTV, ids_BTK, axis=-1) - log_sum_BT[..., None]
    if ids_BTK.shape[-1] == logits_BTV.shape[-1]:
        return logp_BTK, jnp.full(log_sum_BT.shape, -jnp.inf)
    # Summed over the others themselves: 1 - sum(p) has no digits left where the kept ones win.
    others_BTV = jnp.put_along_axis(logits_BTV, ids_BTK, -jnp.inf, axis=-1, inplace=False)
    return logp_BTK, jax.nn.logsumexp(others_BTV, axis=-1) - log_sum_BT


def _p_times_gap(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """p (log p - log q) from logarithms; 0 where p is 0."""
    p = jnp.exp(teacher)
    return jnp.where(p > 0, p * (jnp.where(p > 0, teacher, 0.0) - student), 0.0)


def _where(learned_BT: jax.Array, x: jax.Array) -> jax.Array:
    learned = learned_BT.reshape(*learned_BT.shape, *[1] * (x.ndim - 2))
    return jnp.where(learned, x, jnp.zeros((), x.dtype))


def _logits(hidden_BCD: jax.Array, head_DV: jax.Array) -> jax.Array:
    head_DV = head_DV.astype(hidden_BCD.dtype)
    return jnp.einsum("BCD,DV->BCV", hidden_BCD, head_DV, preferred_element_type=jnp.float32)
