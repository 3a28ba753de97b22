"""Generation on a mesh: weights in place, a batch of prompts in, tokens out a few steps at a time.

    generator = Generator(config, recipe, layout)
    weights = generator.prepare(loaded)               # as `generator.abstract_weights` asks for
    session = generator.start(weights, prompts, Sampling(temperature=0.6), 256, eos_ids)
    while not session.done:
        new_ids = session.advance()                   # one array per row

Two compiled programs: `prefill` reads all prompts and draws the first token, `advance` runs up to
CHUNK steps. Where speculation is on trial there is an `advance` with drafts and one without.

Letters: B rows, T prompt length, V vocabulary, S slots, N tokens of one call.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from generation.config import Sampling, Speculation
from generation.decode import unstack
from generation.payoff import Trial, measure, pays
from generation.replicas import Copies
from generation.sampling import check_drawn
from generation.stats import Stats
from generation.steps import CHUNK, Program, State, Steps, without_drafts
from model.blueprint import Tree, blueprint
from model.config import ModelConfig
from model.recipe import Recipe
from sharding.context import whole_sequences
from sharding.devices import on_platform
from sharding.experts.eplb import ExpertPlacement
from sharding.partition import (
    Layout,
    batch_shards,
    replicated,
    stored_shardings,
    stored_shards,
)
from sharding.rules import RESIDENT

SLOT_BLOCK = 64
"""Slots of a cache come in multiples of it: fewer programs to compile."""


def padded_length(longest: int) -> int:
    """The length that prompts of at most `longest` tokens are padded to: a multiple of 16, and from
    64 on one of four to each power of two. So few programs are compiled, and from there on at most
    a fifth of what they compute is for nothing."""
    block = max(16, 1 << (longest - 1).bit_length() >> 3)
    return -(-longest // block) * block


class Generator:
    """A model's generation programs on one layout; holds no weights.

    Args:
      config, recipe, layout: the model, its types, and the devices.
      placement: redundant experts of every MoE layer, MTP modules last, for as many devices as
        the layout has shards of experts; None: every expert once.
      count_load: whether sessions count the tokens of each expert.
    """

    def __init__(
        self, config: ModelConfig, recipe: Recipe, layout: Layout,
        placement: ExpertPlacement | None = None, count_load: bool = False,
    ):  # fmt: skip
        self.config, self.recipe, self.count_load = config, recipe, count_load
        self.layout = dataclasses.replace(whole_sequences(layout), stored=RESIDENT, copied=())
        self.pass_steps: dict[Any, float] = {}
        """Cost of a speculative pass in plain steps, by sampling and shape, once measured."""
        self._copies = None if placement is None else Copies(placement, self.layout)

    @functools.cached_property
    def abstract_weights(self) -> Tree:
        """Shapes, types (fp32) and placement of the weights to load, stacked as in a checkpoint."""
        plan = blueprint(self.config)

        def describe(shapes: Tree, axes: Tree) -> Tree:
            shardings = stored_shardings(self.layout, shapes, axes)
            return jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
            )

        return {
            "params": describe(plan.params, plan.params_axes),
            "router_bias": describe(plan.router_bias, plan.router_bias_axes),
        }

    def prepare(self, weights: Tree, consume: bool = False) -> Tree:
        """What the programs read: layers apart, and matrices in the recipe's type.

        `consume` frees the arrays of `weights` one by one as they are converted; without it the
        result is a second copy beside them.
        """
        # A GPU multiplies stacked experts where they lie.
        apart = on_platform(self.layout, "cpu")
        return unstack(
            self.config,
            weights["params"],
            weights["router_bias"],
            self.recipe.activation_dtype,
            consume,
            expert_shards=stored_shards(self.layout, "experts") if apart else None,
            copies=self._copies,
        )

    def start(
        self,
        weights: Tree,
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        max_new_tokens: int,
        eos_ids: Sequence[int] = (),
        speculate: Speculation = False,
        given: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> "Session":
        """Read the prompts (int32 [n] each, of any lengths) and draw every row's first token.

        A row ends with one of `eos_ids`, which is part of its tokens, or after `max_new_tokens`.
        `speculate` lets the first MTP module draft a token for every pass of the main model; the
        distribution of the text is the same, and greedy text is identical. With "auto" the first
        batch of a shape also times some steps, and drafting ends where it does not pay
        (`generation/payoff.py`): unless it is greedy, the text of a seed may then differ from run
        to run. `given` has for every prompt places (int32 [n]) and vectors (float [n, D]) that are
        read there instead of the ids'.

        Raises ValueError for an empty batch or prompt, an id outside the vocabulary, a text longer
        than `max_position`, and speculation without an MTP module.
        """
        self.check(prompts, max_new_tokens, speculate)
        limits = max_new_tokens, tuple(eos_ids), speculate
        return Session(self, weights, prompts, sampling, *limits, given)

    def check(
        self, prompts: Sequence[np.ndarray], max_new_tokens: int, speculate: Speculation
    ) -> None:
        """Raise what `start` would raise; needs no weights."""
        _check(self.config, prompts, max_new_tokens, speculate)

    @functools.cache  # noqa: B019 - a generator lives as long as its programs
    def steps(self, sampling: Sampling, speculate: bool) -> Steps:
        """The compiled programs for one way of sampling."""
        return Steps(self.config, self.recipe, self.layout, sampling, speculate, self.count_load)


def _check(config: ModelConfig, prompts, max_new_tokens: int, speculate: Speculation) -> None:
    if not len(prompts):
        raise ValueError("no prompts; give at least one")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; give at least 1")
    if speculate and not config.mtp_depth:
        raise ValueError(
            "speculation needs an MTP module and this model has none; generate without it"
        )
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty; give at least one token, such as bos")
        low, high = int(np.min(prompt)), int(np.max(prompt))
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"prompt {row} holds token {low if low < 0 else high}; the vocabulary has ids "
                f"0..{config.vocab_size - 1}"
            )
        if len(prompt) + max_new_tokens > config.max_position:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens, with {max_new_tokens} new ones "
                f"{len(prompt) + max_new_tokens}; the model's max_position is "
                f"{config.max_position}. Shorten the prompt or max_new_tokens"
            )


def _vectors(given, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [B, T, D] of the places that are given, and where these are [B, T]."""
    width = next(vectors_ND.shape[1] for _, vectors_ND in given)
    x_BTD, mask_BT = np.zeros((*shape, width), np.float32), np.zeros(shape, bool)
    for row, (places, vectors_ND) in enumerate(given):
        x_BTD[row, places], mask_BT[row, places] = vectors_ND, True
    return x_BTD, mask_BT


class Session:
    """One batch under way."""

    def __init__(
        self, generator: Generator, weights: Tree, prompts, sampling: Sampling,
        max_new_tokens: int, eos_ids: tuple[int, ...], speculate: Speculation, given=None,
    ):  # fmt: skip
        self.stats = Stats(prefill_tokens=sum(len(prompt) for prompt in prompts))
        # The seed is an argument of the programs, not a part of them.
        unseeded = dataclasses.replace(sampling, seed=0)
        self._programs = generator.steps(unseeded, bool(speculate))
        self._weights, self._speculate = weights, bool(speculate)
        self._fallback = generator.steps(unseeded, False) if speculate == "auto" else None
        """What a session goes on with when its drafts do not pay."""
        self._rows = len(prompts)
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        shards = batch_shards(generator.layout)
        batch = -(-len(prompts) // shards) * shards
        T = padded_length(int(lengths.max()))
        ids_BT = np.zeros((batch, T), np.int32)
        for row, prompt in enumerate(prompts):
            ids_BT[row, : len(prompt)] = prompt
        lengths_B = np.pad(lengths, (0, batch - len(prompts)), constant_values=1)
        # A draft may be written one slot beyond the last token.
        slots = -(-(T + max_new_tokens + 2) // SLOT_BLOCK) * SLOT_BLOCK
        budget_B = np.where(np.arange(batch) < len(prompts), max_new_tokens, 0).astype(np.int32)
        place = functools.partial(jax.device_put, device=replicated(generator.layout))
        self._eos = place(np.array(eos_ids or (-1,), np.int32))
        self._chunk = place(np.array(CHUNK, np.int32))
        seed = place(np.array(sampling.seed % 2**32, np.uint32))
        vectors = None if given is None else _vectors(given, ids_BT.shape)
        arguments = (
            weights, place(ids_BT), place(lengths_B), place(budget_B), self._eos, seed,
            None if vectors is None else tuple(map(place, vectors)),
        )  # fmt: skip
        prefill = self._compiled(self._programs.prefill, *arguments, slots)
        began = time.perf_counter()
        self._state: State = prefill(*arguments)
        self.expert_load: np.ndarray | None = None
        """Tokens of each expert [MoE layers, the MTP module last, E] so far, if they are counted:
        of prompts, and in running rows all that was computed, refused drafts too."""
        if generator.count_load:
            self.expert_load = np.asarray(self._state.pop("load_LE")).astype(np.int64)
        self._fresh: np.ndarray | None = np.asarray(self._state["pending_B"])
        self.finished = np.asarray(self._state["finished_B"])[: self._rows].copy()
        self.stats.prefill_seconds = time.perf_counter() - began
        if self._fallback and not self.finished.all():
            shape = unseeded, batch, slots, len(self._eos)
            if shape not in generator.pass_steps:
                generator.pass_steps[shape] = self._measure(self._fallback)
            self.stats.pass_steps = generator.pass_steps[shape]
            self._judge(self._fallback)

    def _measure(self, fallback: Steps) -> float:
        """What a pass costs in steps, from a trial that leaves the session as it is."""
        rest = self._eos, self._chunk
        with_drafts = self._programs.advance, self._weights, self._state, *rest
        without = fallback.advance, self._weights, without_drafts(self._state), *rest
        advance = {True: self._compiled(*with_drafts), False: self._compiled(*without)}
        began = time.perf_counter()
        cost = measure(Trial(advance, self._weights, self._state, self._eos).seconds)
        self.stats.trial_seconds = time.perf_counter() - began
        return cost

    def _judge(self, fallback: Steps) -> None:
        """Go on without drafts if they do not pay."""
        stats = self.stats
        if not pays(stats.pass_steps, stats.accepted, stats.drafted):
            self._state = without_drafts(self._state)
            self._programs, self._speculate, stats.stopped = fallback, False, True

    def _compiled(self, program: Program, *arguments: Any) -> Any:
        began = time.perf_counter()
        compiled = program.compiled(*arguments)
        self.stats.compile_seconds += time.perf_counter() - began
        return compiled

    @property
    def done(self) -> bool:
        """True when every row has ended and its tokens were handed out."""
        return self._fresh is None and bool(self.finished.all())

    def finish(self, row: int) -> None:
        """End a row from outside, at a stop string say."""
        self.finished[row] = True
        ended = np.pad(self.finished, (0, len(self._state["finished_B"]) - self._rows))
        finished_B = self._state["finished_B"]
        self._state["finished_B"] = finished_B | jax.device_put(ended, finished_B.sharding)

    def advance(self) -> list[np.ndarray]:
        """New ids of every row, int32 [n] each: first those of the prefill, then up to CHUNK steps.

        Rows that have ended give none; `done` says when all have. FloatingPointError for logits
        that are not numbers.
        """
        if self._fresh is not None:
            first, self._fresh = self._fresh, None
            return [check_drawn(first[row : row + 1]) for row in range(self._rows)]
        running = ~self.finished
        arguments = self._weights, self._state, self._eos, self._chunk
        advance = self._compiled(self._programs.advance, *arguments)
        began = time.perf_counter()
        self._state, out = advance(*arguments)
        out = jax.device_get(out)
        if self.expert_load is not None:
            load_LE = out["load_LE"].astype(np.int64)
            self.expert_load[: len(load_LE)] += load_LE  # without drafts no MTP module
        stats = self.stats
        stats.decode_seconds += time.perf_counter() - began
        self.finished |= out["finished_B"][: self._rows]
        tokens = [
            check_drawn(out["tokens_BN"][row, : out["counts_B"][row] * running[row]])
            for row in range(self._rows)
        ]
        stats.decoded_tokens += sum(len(row) for row in tokens)
        stats.main_passes += int(out["passes_B"][: self._rows].sum())
        if self._speculate:
            stats.drafted += int(out["passes_B"][: self._rows].sum())
            stats.accepted += int(out["accepted_B"][: self._rows].sum())
            if self._fallback and not self.finished.all():
                self._judge(self._fallback)
        return tokens
