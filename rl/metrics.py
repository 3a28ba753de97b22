"""Metrics that add up: over micro batches, and so over any cut of a batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mean(NamedTuple):
    """A mean, kept as its sum and the number of things summed; fp32 scalars."""

    total: jax.Array
    terms: jax.Array


class Largest(NamedTuple):
    """The largest of numbers that are 0 or more; fp32 scalar, 0 for none."""

    value: jax.Array


Metrics = dict[str, Mean | Largest]


def masked_mean(x: jax.Array, mask: jax.Array) -> Mean:
    """Mean of `x` where `mask` (0 or 1, same shape) is 1; what `x` holds elsewhere is not read."""
    return Mean(jnp.where(mask > 0, x, 0.0).sum(), mask.astype(jnp.float32).sum())


def answer_mean(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean over the tokens of each answer, [B, 1]; 0 for an answer without tokens."""
    lengths_B1 = jnp.maximum(mask_BT.sum(-1, keepdims=True), 1.0)
    return (x_BT * mask_BT).sum(-1, keepdims=True) / lengths_B1


def merge(left: Metrics, right: Metrics) -> Metrics:
    """The metrics of two parts of a batch together; both parts have the same names.

    Zeros are the neutral element, so `jax.lax.scan` can start from them.
    """
    assert left.keys() == right.keys(), (sorted(left), sorted(right))
    merged: Metrics = {}
    for name, metric in left.items():
        other = right[name]
        if isinstance(metric, Mean):
            assert isinstance(other, Mean), name
            merged[name] = Mean(metric.total + other.total, metric.terms + other.terms)
        else:
            assert isinstance(other, Largest), name
            merged[name] = Largest(jnp.maximum(metric.value, other.value))
    return merged


def numbers(metrics: Metrics) -> dict[str, float]:
    """A number by name, as metrics.jsonl has it; a mean over nothing is NaN."""
    read = {}
    for name, metric in metrics.items():
        if isinstance(metric, Largest):
            read[name] = float(metric.value)
        else:
            terms = float(metric.terms)
            read[name] = float(metric.total) / terms if terms else float("nan")
    return read
