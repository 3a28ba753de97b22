"""Redundant experts: several copies of busy experts, for serving (V3 report, section 3.4).

`sharding/experts/eplb.py` decides which experts get copies and which device holds which. Here the
weights are laid out as copies, and every token gets one copy of each of its experts. Copies are
equal, so results are those without any.

Letters: B batch, T sequence, K choices per token, E experts, C most copies of one expert, R copies
in all, L layers, S shards of the experts. Of one weight, X and Y are input and output width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.grouped import separate_experts
from sharding.experts.eplb import ExpertPlacement
from sharding.partition import (
    Layout,
    Names,
    num_shards,
    on_shards,
    replicated,
    rotate,
    shard_index,
    use_layout,
    vary,
)


class Replicas(NamedTuple):
    """Copies of the experts of one layer, int32. Shard s holds R / S copies from s * R / S on."""

    copies_EC: Array
    """Copies of each expert; only the first `counts_E` of a row are read."""
    counts_E: Array
    """Number of copies of each expert."""

    def choose(self, ids_BTK: Array) -> Array:
        """The copy that computes each choice [B, T, K].

        Tokens take copies in turn. The sum of a token's experts shifts its turn, so that a row that
        decodes alone does not meet the same copy at every step.
        """
        B, T, _ = ids_BTK.shape
        turn_BT = jnp.arange(B * T, dtype=jnp.int32).reshape(B, T) + ids_BTK.sum(-1)
        copy_BTK = turn_BT[..., None] % self.counts_E[ids_BTK]
        return self.copies_EC[ids_BTK, copy_BTK]


class Copies(NamedTuple):
    """Copies of experts in all layers, MTP modules last, and their layout."""

    placement: ExpertPlacement
    layout: Layout

    def replicas(self, layer: int) -> Replicas:
        """Table from which the layer's tokens choose copies, replicated on all devices."""
        tables = Replicas(self.placement.copies_LEC[layer], self.placement.counts_LE[layer])
        place = functools.partial(jax.device_put, device=replicated(self.layout))
        return jax.tree.map(lambda table: place(table.astype(np.int32)), tables)

    def weights(
        self, w_EXY: Array, layer: int, names: Names, expert_shards: int | None
    ) -> Array | tuple[Array, ...]:
        """One weight of all copies [R, X, Y] from that of all experts, sharded alike.

        With `expert_shards` they are arrays of their own, as `separate_experts` makes them. A copy
        in the only shard is then the same array again and takes no memory.
        """
        expert_of_R = self.placement.expert_of_LR[layer]
        if expert_shards == 1:
            experts = _separate(w_EXY, 1)
            return tuple(experts[expert] for expert in expert_of_R)
        w_RXY = _lay_out(w_EXY, expert_of_R.astype(np.int32), self.layout, names)
        return w_RXY if expert_shards is None else _separate(w_RXY, expert_shards)


_separate = jax.jit(separate_experts, static_argnums=1)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _lay_out(w_EXY: Array, expert_of_R: Array, layout: Layout, names: Names) -> Array:
    with use_layout(layout):
        return on_shards(_from_ring, (names, ("experts",)), (names,))(w_EXY, expert_of_R)[0]


def _from_ring(part_EXY: Array, expert_of_R: Array) -> tuple[Array]:
    """This shard's copies, picked from the parts of all shards as they pass by.

    A device holds a few parts at a time, never a whole layer. E and R are those of one shard.
    """
    S, E = num_shards("experts"), part_EXY.shape[0]
    shard_R, row_R = expert_of_R // E, expert_of_R % E

    def step(i, carry):
        part_EXY, copies_RXY = carry
        passing = (shard_index("experts") - i) % S
        found_R = shard_R == passing
        copies_RXY = jnp.where(found_R[:, None, None], part_EXY[row_R], copies_RXY)
        return rotate(part_EXY, "experts"), copies_RXY

    shape = expert_of_R.shape[0], *part_EXY.shape[1:]
    start = part_EXY, vary(jnp.zeros(shape, part_EXY.dtype))
    return (jax.lax.fori_loop(0, S, step, start)[1],)
