"""Whether speculation pays: a pass gives 1 + acceptance tokens and costs so many plain steps.

What a pass costs is measured once per shape, on a copy of a state (`measure`, `Trial`). Then counts
of accepted drafts decide between calls of `advance` (`pays`), from speculating to not, never back:
the MTP module's cache has holes from there on.

The distribution of the text stays exact. A decision looks at times and at drafts that have been
judged, never at the pending draft or at a random number of a token to come, so that the next token
is drawn from the model's distribution whichever way it goes. Which random numbers draw it differs,
and with it the text of a seed.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from generation.steps import CHUNK, TRIAL, State, without_drafts
from model.blueprint import Tree

FEWEST_DRAFTS = 32
"""Until so many were judged, all drafts count as accepted. With 85% right, a count of 32 is within
0.13 of it 19 times in 20."""
MARGIN = 1.05
"""A pass must bring more tokens than it costs steps by this factor: the cost is known to some
percent only, and a loss is worse than a gain of the same size missed. Drafts before the first count
then lose about a twentieth at most, if 80% of them are right."""
ROUNDS = 5
"""Timed calls of either program; their ratio is the median of the pairs'."""
CALL_SECONDS = 0.05
"""A timed call takes about this long, and at least one step."""


def pays(pass_steps: float, accepted: int, drafted: int) -> bool:
    """Whether to draft the next token.

    Args:
      pass_steps: cost of a speculative pass, in plain steps.
      accepted, drafted: counts of drafts so far, over all rows. Below FEWEST_DRAFTS all count as
        accepted, so that nothing is drafted where no acceptance repays a pass.
    """
    acceptance = accepted / drafted if drafted >= FEWEST_DRAFTS else 1.0
    return 1 + acceptance >= MARGIN * pass_steps


def agreed(value: float) -> float:
    """Process 0's value, in every process: times differ between hosts and decisions must not."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def measure(seconds: Callable[[bool, int], float]) -> float:
    """Cost of a speculative pass in plain steps.

    `seconds(drafts, steps)` runs that many passes with or without drafts, and says how long they
    took. All in all 6 plain steps and 6 passes, and up to CHUNK times as many where they are fast.
    """
    seconds(False, 1)  # A program's first call is slower.
    once = agreed(seconds(True, 1))
    steps = int(min(max(CALL_SECONDS / max(once, 1e-9), 1), CHUNK))
    ratios = []
    for _ in range(ROUNDS):
        plain = seconds(False, steps)
        ratios.append(seconds(True, steps) / plain)
    return agreed(statistics.median(ratios))


class Trial:
    """Steps on a copy of a state, for their time only.

    The copy has a key and a draft of its own, so that timings cannot bias the text. Every row runs,
    whatever ended it, from its prompt's end in each call.

    Args:
      advance: compiled programs by whether they draft.
      weights, eos: their arguments.
      state: of a speculative session; left as it is.
    """

    def __init__(
        self, advance: dict[bool, Callable], weights: Tree, state: State, eos: jax.Array,
        clock: Callable[[], float] = time.perf_counter,
    ):  # fmt: skip
        self._advance, self._weights, self._clock = advance, weights, clock
        self._whole = state["lengths_B"].sharding
        shardings = jax.tree.map(lambda x: x.sharding, state)
        self._state: State = jax.jit(_strange_copy, out_shardings=shardings)(state)
        self._eos = jax.device_put(np.full(eos.shape, -1, np.int32), self._whole)
        lengths_B = np.asarray(state["lengths_B"])
        self._start = {
            "lengths_B": lengths_B,
            "left_B": np.full_like(lengths_B, 4 * CHUNK),
            "finished_B": np.zeros(lengths_B.shape, bool),
        }

    def seconds(self, drafts: bool, steps: int) -> float:
        """Time of some steps (or passes, with drafts), at most CHUNK."""
        state = self._state | jax.device_put(self._start, self._whole)
        count = jax.device_put(np.array(steps, np.int32), self._whole)
        began = self._clock()
        done: Any = self._advance[drafts](
            self._weights, state if drafts else without_drafts(state), self._eos, count
        )
        state, _ = jax.block_until_ready(done)
        took = self._clock() - began
        # What plain steps know nothing of stays as it was.
        self._state |= state
        return took


def _strange_copy(state: State) -> State:
    copy = jax.tree.map(jnp.copy, state)
    return copy | {
        "key": jax.random.fold_in(state["key"], TRIAL),
        "draft_B": jnp.copy(state["pending_B"]),
    }
