"""What a pipeline asks of a model, and when its ranks at both ends are asked.

Letters: B sequences, T positions, D hidden width, K embeddings that the end of the model reads.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from sharding.pipeline.ticks import CODES, Table

Tree = Any


class Stages(NamedTuple):
    """The model as a pipeline sees it. `micro` is one micro batch, a tree of arrays.

    Objectives are terms of the loss, scalars; what else is returned is added up over micro batches.
    """

    prepare: Callable[[Tree], Tree]
    """Micro batches [N, ...] of a batch [N, ...]."""
    ids: Callable[[Tree], tuple[jax.Array, jax.Array]]
    """Tokens that a micro batch looks up: those of `first` [B, T], and K times those of `last`
    [K, B, T]."""
    embed: Callable[[Tree, jax.Array], jax.Array]
    """Their embeddings [B, T, D] = embed(vocab, ids); all ranks together."""
    first: Callable[[Tree, jax.Array, Tree], jax.Array]
    """Input of the first layer: x = first(weights, embedded, micro)."""
    layer: Callable[[Tree, Tree, jax.Array, Tree], tuple[tuple[jax.Array, jax.Array], Tree]]
    """One layer: (x, objective), stats = layer(weights, constants, x, micro)."""
    last: Callable[..., tuple[tuple[jax.Array, jax.Array], Tree]]
    """What follows the layers: (hidden, objective), parts = last(weights, constants, x,
    embedded, micro), with K+1 hidden states [K+1, B, T, D] for the head."""
    loss: Callable[[Tree, jax.Array, Tree, jax.Array], tuple[jax.Array, Tree]]
    """The loss of hidden state k: objective, parts = loss(vocab, hidden[k], micro, k); all ranks
    together."""
    place: Callable[[jax.Array], jax.Array]
    """x, laid out over the other axes as activations between layers are."""


class Ends(NamedTuple):
    """Ranks at the model's ends, and when they are there: numpy arrays.

    At an end are one rank, or two with DualPipe. Entries that a tick does not use are 0.
    """

    ranks: np.ndarray
    """Ranks of this end, int [E]."""
    is_forward: np.ndarray
    """Whether a forward pass is there: bool [ticks, E]."""
    f_micro: np.ndarray
    is_backward: np.ndarray
    b_micro: np.ndarray


def ends_of(table: Table, is_end: np.ndarray) -> Ends:
    """Passes at one end of the model; `is_end`, bool [ranks, chunks], says which chunks it has."""
    ranks = np.flatnonzero(is_end.any(1))
    code, here = table.code[:, ranks], is_end[ranks]
    at = np.arange(len(ranks))
    forward = np.isin(code, [CODES["F"], CODES["FB"]]) & here[at, table.f_chunk[:, ranks]]
    backward = np.isin(code, [CODES["B"], CODES["FB"], CODES["I"]])
    backward &= here[at, table.b_chunk[:, ranks]]
    return Ends(ranks, forward, table.f_micro[:, ranks], backward, table.b_micro[:, ranks])
