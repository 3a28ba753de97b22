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


def merge(left: Metrics, right: Metrics) -> Metrics:
    """The metrics of two parts of a batch taken together; both have the same names.

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
    """What to write down: a number by name; a mean over nothing is NaN."""
    read = {}
    for name, metric in metrics.items():
        if isinstance(metric, Largest):
            read[name] = float(metric.value)
        else:
            terms = float(metric.terms)
            read[name] = float(metric.total) / terms if terms else float("nan")
    return read
