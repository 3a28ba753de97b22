"""Slots in shared memory, filled by one warpgroup and multiplied by two others, tile after tile.

The ring does not stop between tiles: while the products' warpgroups store a tile, the other loads
the first slots of the next. A slot is free again when both have multiplied it; each keeps its last
product in flight while it looks for the next slot, so that the tensor cores need not wait for it.

    load       | 0 | 1 | 2 | 3 |   0'  |   1'  | ...        (waits for `free`, arrives at `loaded`)
    multiply 0     | 0 | 1 | 2 | 3 | store | 0' | 1' | ...  (waits for `loaded`, arrives at `free`)
    multiply 1     | 0 | 1 | 2 | 3 | store | 0' | 1' | ...

Two blocks of a cluster may take neighbouring tiles. Of the operand that both read, each then copies
half, to both: L2 is read once for two, which is what bounds a product of tiles of 128 x 256. A slot
is free when the warpgroups of both blocks have multiplied it.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped.blocks import PRODUCT_WARPGROUPS
from pallas_kernels.mosaic import MEMORY_REGISTERS

PRODUCT_REGISTERS = 232
"""Registers per thread of a warpgroup that multiplies: 2 * 232 + 40 of 512 per four threads."""


class Copy(NamedTuple):
    """A copy from device memory to a slot of a buffer in shared memory."""

    source: Any
    target: Any
    shared: bool
    """Both blocks of the cluster read the same."""


class Ring(NamedTuple):
    """Barriers of the slots; steps are counted through all tiles of a program."""

    slots: int
    loaded: Any
    free: Any

    def fill(self, step: Array, copies: Iterable[Copy]) -> None:
        """Copy each source in device memory into the step's slot of its target, when it is free."""
        slot = lax.rem(step, self.slots)
        plgpu.barrier_wait(self.free.at[slot])
        for copy in copies:
            axes = "peer" if copy.shared else None
            target = copy.target.at[slot]
            plgpu.copy_gmem_to_smem(copy.source, target, self.loaded.at[slot], collective_axes=axes)

    def consume(self, first: Array, steps: Array, multiply: Callable[[Array, Array], None]) -> None:
        """multiply(slot, k) for k < steps, as slots arrive; all are released but the last."""

        def one(k, _):
            slot = lax.rem(first + k, self.slots)
            plgpu.barrier_wait(self.loaded.at[slot])
            multiply(slot, k)
            plgpu.wgmma_wait(1)

            @pl.when(k > 0)
            def _():
                self._release(first + k - 1)

        lax.fori_loop(0, steps, one, None)

    def release_last(self, first: Array, steps: Array) -> None:
        """After `consume` and the end of its products."""

        @pl.when(steps > 0)
        def _():
            self._release(first + steps - 1)

    def skip(self, first: Array, steps: Array) -> None:
        """Release slots without looking at them."""

        def one(k, _):
            plgpu.barrier_wait(self.loaded.at[lax.rem(first + k, self.slots)])
            self._release(first + k)

        lax.fori_loop(0, steps, one, None)

    def _release(self, step: Array) -> None:
        plgpu.barrier_arrive(self.free.at[lax.rem(step, self.slots)])

    def run(self, load: Callable[[], None], multiply: Callable[[Array], None]) -> None:
        """Run `load()` in the last warpgroup and `multiply(warpgroup)` in the others."""
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == PRODUCT_WARPGROUPS)
        def _():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
            load()
            # A barrier must not be left with an arrival that nobody saw, nor a block that its peer
            # may still write to.
            lax.fori_loop(0, self.slots, lambda s, _: plgpu.barrier_wait(self.free.at[s]), None)

        @pl.when(warpgroup < PRODUCT_WARPGROUPS)
        def _():
            plgpu.set_max_registers(PRODUCT_REGISTERS, action="increase")
            lax.fori_loop(0, self.slots, lambda s, _: plgpu.barrier_arrive(self.free.at[s]), None)
            multiply(warpgroup)
            plgpu.wait_smem_to_gmem(0)


def for_each_tile(programs: int, total: Array | int, do: Callable[[Array, Array], Array]) -> None:
    """step = do(tile, step) for every tile of `total` that falls to this of so many programs."""
    program = lax.axis_index("program")
    count = lax.div(total - program + programs - 1, programs)
    lax.fori_loop(0, count, lambda i, step: do(program + i * programs, step), jnp.int32(0))


def banded(index: Array, num_rows: Array | int, band: int) -> tuple[Array, Array]:
    """Row and column of a tile in an order that goes down bands of columns, row by row.

    Programs that run at the same time then share the rows of few tiles and the columns of one band,
    which stay in the L2 cache.
    """
    per_band = num_rows * band
    within = lax.rem(index, per_band)
    return lax.div(within, band), lax.div(index, per_band) * band + lax.rem(within, band)
