"""Answers to a batch of prompts from the policy itself, on the trainer's devices.

Each prompt is read once and answered `group_size` times. A row whose answer has ended takes the
next one; when none is left and few go on, these go on in fewer rows. An answer's draws depend on
(seed, its number) alone, so results do not depend on the number of rows. Tokens come with what
training needs: their log-probabilities under the sampler, the tokens that top-k and top-p left to
draw from, and the experts that every token went to.

Letters: A answers (prompt after prompt, the group of each together), P prompts, T tokens of prompt
and answer, K tokens that top-k keeps, R experts of a token over all layers.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from generation.config import Sampling
from generation.engine import SLOT_BLOCK, Generator, padded_length
from generation.refill import RefillSteps
from generation.sampling import check_drawn
from generation.steps import CHUNK
from model.blueprint import Tree
from model.config import ModelConfig
from model.recipe import Recipe
from rl.stopping import RolloutStoppedError, Stop, never
from runtime.processes import fetch
from sharding.partition import Layout, batch_shards, replicated

NARROWER = 4
"""Factor by which rows shrink when the answers that go on fit into the smaller number."""
LONG = 2 * CHUNK
"""Tokens that one of these answers may still have to come for the smaller program to pay."""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Answers, in the prompts' order."""

    tokens: list[np.ndarray]
    """int32 [n] of each answer, its EOS included."""
    logps: list[np.ndarray]
    """Log-probabilities of the tokens in the distribution they were drawn from; fp32 [n]."""
    truncated: np.ndarray
    """True where an answer ended for want of room, bool [A]."""
    routes: list[np.ndarray] | None
    """Experts of the prompt's and the answer's tokens but the last, int16 [n - 1, R]."""
    seconds: float
    """Time of the rollout, compilation left out."""
    passes: int
    """Passes of the model, counted once per row that was writing."""
    kept: list[np.ndarray] | None = None
    """Tokens that each token was drawn from, where top-k cuts; -1 beyond them; int32 [n, K]."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(map(len, self.tokens))


Sampler = Callable[[Sequence[np.ndarray], int, int, Stop], Rollout]
"""`sampler(prompts, group_size, seed, stop)`: any way to get answers, an outside server's included.
RolloutStoppedError soon after `stop()` says true."""


class Publishable(Protocol):
    """A `Sampler` that a run can give its weights to."""

    def publish(self, params: Tree, router_bias: Tree, stop: Stop = ..., /) -> None:
        """Take the trainer's weights as they are now. RolloutStoppedError soon after `stop()` says
        true, where that takes time."""
        ...

    def borrow(self, other: Any) -> None:
        """Take the weights that were published to another of the same kind."""
        ...

    def __call__(
        self, prompts: Sequence[np.ndarray], group_size: int, seed: int, stop: Stop = ..., /
    ) -> Rollout: ...


class PolicySampler:
    """The sampler that shares model, mesh and weights with the trainer.

    Args:
      config, recipe, layout: the model; its recipe may differ from the trainer's.
      sampling: temperature and cuts of the draws; its seed is not used.
      rows: answers written at a time, rounded up to the shards of the batch.
      max_new_tokens: longest answer.
      eos_ids: tokens that end one.
      speculate: let the MTP module draft tokens.
      replay: record the experts of every token.
    """

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        layout: Layout,
        sampling: Sampling,
        *,
        rows: int,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        speculate: bool = False,
        replay: bool = False,
    ):
        recipe = dataclasses.replace(recipe, routes=replay and config.num_moe_layers > 0)
        self._generator = Generator(config, recipe, layout)
        self._layout, self._speculate = self._generator.layout, speculate
        sampling = dataclasses.replace(sampling, seed=0)
        self._steps = RefillSteps(config, recipe, self._layout, sampling, speculate)
        shards = batch_shards(self._layout)
        self._rows = -(-rows // shards) * shards
        self._budget = max_new_tokens
        self._place = functools.partial(jax.device_put, device=replicated(self._layout))
        self._eos = self._place(np.array(tuple(eos_ids) or (-1,), np.int32))
        self._chunk = self._place(np.array(CHUNK, np.int32))
        self._weights: Tree = {}

    def publish(self, params: Tree, router_bias: Tree, _stop: Stop = never) -> None:
        """Take the trainer's weights as they are now, from memory."""
        self._weights = self._generator.prepare({"params": params, "router_bias": router_bias})

    def borrow(self, other: "PolicySampler") -> None:
        """Take the weights that were published to a sampler of the same model, types and layout."""
        self._weights = other._weights

    def __call__(
        self, prompts: Sequence[np.ndarray], group_size: int, seed: int, stop: Stop = never
    ) -> Rollout:
        """Answer every prompt `group_size` times.

        Raises ValueError for prompts that the model cannot read (`Generator.check`),
        FloatingPointError for logits that are not numbers, and
        RolloutStoppedError soon after `stop()`, asked every few tokens, says true.
        """
        self._generator.check(prompts, self._budget, self._speculate)
        return _Session(self, prompts, group_size, seed).run(stop)


class _Session:
    """One rollout under way."""

    def __init__(self, sampler: PolicySampler, prompts, group_size: int, seed: int):
        self._s, self._group = sampler, group_size
        self._lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        self._answers = len(prompts) * group_size
        T = padded_length(int(self._lengths.max()))
        self._slots = -(-(T + sampler._budget + 2) // SLOT_BLOCK) * SLOT_BLOCK
        shards = batch_shards(sampler._layout)
        P = -(-len(prompts) // shards) * shards
        self._ids_PT = np.zeros((P, T), np.int32)
        for row, prompt in enumerate(prompts):
            self._ids_PT[row, : len(prompt)] = prompt
        self._lengths_P = np.pad(self._lengths, (0, P - len(prompts)), constant_values=1)
        self._seed, self._compiling = seed, 0.0
        self._tokens: list[list[np.ndarray]] = [[] for _ in range(self._answers)]
        self._logps: list[list[np.ndarray]] = [[] for _ in range(self._answers)]
        self._kept: list[list[np.ndarray]] = [[] for _ in range(self._answers)]
        self._routes: list[np.ndarray] = [np.zeros(0)] * self._answers
        self._passes = 0

    def run(self, stop: Stop) -> Rollout:
        began, s = time.perf_counter(), self._s
        place = s._place
        lengths_P = place(self._lengths_P)
        prefix = self._call(s._steps.prefix, place(self._ids_PT), lengths_P, static=(self._slots,))
        state = s._steps.empty(prefix, self._seed, rows=s._rows)
        writing = np.full(s._rows, -1)  # the answer of every row
        waiting = 0
        while waiting < self._answers or (writing >= 0).any():
            if stop():
                raise RolloutStoppedError
            free = np.flatnonzero(writing < 0)[: self._answers - waiting]
            if len(free):
                writing[free] = np.arange(waiting, waiting + len(free))
                waiting += len(free)
                state = self._admit(state, prefix, free, writing)
            else:
                state, writing = self._narrow(state, writing)
                state = self._advance(state, writing)
            self._collect(state, writing)
        tokens = [np.concatenate(parts) for parts in self._tokens]
        eos = np.asarray(s._eos)
        ended = np.array([answer[-1] in eos for answer in tokens])
        return Rollout(
            tokens=tokens,
            logps=[np.concatenate(parts) for parts in self._logps],
            truncated=~ended,
            routes=self._routes if "routes_BSR" in state else None,
            kept=[np.concatenate(parts) for parts in self._kept] if any(self._kept) else None,
            seconds=time.perf_counter() - began - self._compiling,
            passes=self._passes,
        )

    def _call(self, program, *arguments: Any, static: tuple = ()) -> Any:
        began = time.perf_counter()
        compiled = program.compiled(self._s._weights, *arguments, *static)
        self._compiling += time.perf_counter() - began
        return compiled(self._s._weights, *arguments)

    def _admit(self, state, prefix, free: np.ndarray, writing: np.ndarray):
        """Let the free rows begin their answers, and keep the first token of each."""
        place = self._s._place
        source_B = np.full(len(writing), -1, np.int32)
        source_B[free] = writing[free] // self._group
        streams_B = np.maximum(writing, 0).astype(np.int32)
        budget = place(np.array(self._s._budget, np.int32))
        rows = place(source_B), place(streams_B)
        state = self._call(self._s._steps.admit, state, prefix, *rows, budget, self._s._eos)
        names = ("pending_B", "pending_logp_B", "pending_kept_BK")
        first = jax.device_get([state[name] for name in names if name in state])
        for row in free:
            self._append(int(writing[row]), *(x[row : row + 1] for x in first))
        return state

    def _append(self, answer: int, tokens, logps, kept=None) -> None:
        self._tokens[answer].append(check_drawn(tokens))
        self._logps[answer].append(logps)
        if kept is not None:
            self._kept[answer].append(kept)

    def _narrow(self, state, writing: np.ndarray):
        """State and answers by row, in a quarter of the rows once these hold all that go on and one
        may go on for long, which pays for the program that is compiled for them."""
        going, shards = np.flatnonzero(writing >= 0), batch_shards(self._s._layout)
        rows = -(-len(writing) // (NARROWER * shards)) * shards
        written = min(sum(map(len, self._tokens[writing[row]])) for row in going)
        if len(going) > rows or rows == len(writing) or self._s._budget - written < LONG:
            return state, writing
        order = np.concatenate([going, np.flatnonzero(writing < 0)])[:rows].astype(np.int32)
        return self._call(self._s._steps.keep, state, self._s._place(order)), writing[order]

    def _advance(self, state, writing: np.ndarray):
        state, out = self._call(self._s._steps.advance, state, self._s._eos, self._s._chunk)
        out = jax.device_get(out)
        self._passes += int(out["passes_B"].sum())
        found = [out[name] for name in ("tokens_BN", "logps_BN", "kept_BNK") if name in out]
        for row in np.flatnonzero(writing >= 0):
            self._append(int(writing[row]), *(x[row, : out["counts_B"][row]] for x in found))
        return state

    def _collect(self, state, writing: np.ndarray) -> None:
        """Take the routes of answers that have ended, and free their rows."""
        ended = np.flatnonzero(np.asarray(state["finished_B"]) & (writing >= 0))
        if len(ended) and "routes_BSR" in state:
            routes_BSR = fetch(state["routes_BSR"])
            for row in ended:
                answer = writing[row]
                written = sum(map(len, self._tokens[answer]))
                # The last token is not read; a draft behind an end may have been.
                read = self._lengths[answer // self._group] + written - 1
                self._routes[answer] = routes_BSR[row, :read].copy()
        writing[ended] = -1
