"""The compiled programs of generation: prompts to a first token, then some steps at a time.

State (arrays of B rows): `cache`, per layer (`generation/decode.py:Cache`);
`lengths_B`, tokens in the cache; `pending_B`, the last token drawn, not in the cache yet; `left_B`,
tokens a row may still give; `finished_B`; `streams_B`, numbers that tell the rows' draws apart;
`key`. Speculation adds `mtp_cache`, `draft_B` (a guess for the token after pending) and, unless it
is greedy, `q_BV`, the distribution that was drawn from. Where experts' tokens are counted,
`prefill` adds `load_LE`, which is no part of the state of `advance`.

Letters: B rows, T prompt length, D hidden width, V vocabulary, S slots, N tokens of one call,
L MoE layers (the MTP module last), E experts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from generation.config import Sampling
from generation.decode import Decoder, expert_load, expert_routes, make_decoder
from generation.sampling import NO_TOKEN, draw, kept_tokens, probabilities, row_keys
from generation.speculate import accept_or_redraw
from model.blueprint import Tree
from model.config import ModelConfig
from model.grouped import CACHE
from model.mla import write_rows
from model.moe import MoEStats
from model.recipe import Recipe
from sharding.partition import Layout, batch_sharding, constrain, replicated, use_layout

CHUNK = 16
"""Steps of one call of `advance`: the host looks at the text, and for stop strings, in between."""

MAIN, ACCEPT, REDRAW, DRAFT, TRIAL = range(5)
"""Purposes of random keys: each is used once per row and position, and TRIAL by `Trial`."""

DRAFTS = ("mtp_cache", "draft_B", "q_BV")
"""What speculation adds to the state."""

BY_ROWS = ("cache", "mtp_cache", "routes_BSR")
"""What of the state lies on the devices of its rows; everything else is whole on each."""

State = dict[str, Any]


def without_drafts(state: State) -> State:
    """The state for going on without speculation; the pending draft is forgotten."""
    return {name: value for name, value in state.items() if name not in DRAFTS}


class Program:
    """A jitted function of (weights, ...), compiled ahead so that compilation is timed apart."""

    def __init__(self, fn: Callable, **options: Any):
        self._jitted = jax.jit(fn, **options)
        self._compiled: dict[Any, jax.stages.Compiled] = {}

    def compiled(self, weights: Tree, *arguments: Any) -> jax.stages.Compiled:
        """The program for arguments like these; called without those that are static.

        Weights count as always the same.
        """
        leaves = jax.tree.leaves(arguments)
        key = tuple((x.shape, x.dtype) if isinstance(x, jax.Array) else x for x in leaves)
        if key not in self._compiled:
            self._compiled[key] = self._jitted.lower(weights, *arguments).compile()
        return self._compiled[key]


class Steps:
    """`prefill` and `advance` for one model, layout and way of sampling."""

    def __init__(
        self, config: ModelConfig, recipe: Recipe, layout: Layout, sampling: Sampling,
        speculate: bool, count_load: bool = False,
    ):  # fmt: skip
        self._config, self._recipe, self._layout = config, recipe, layout
        self._sampling, self._speculate = sampling, speculate
        self._greedy, self._count = sampling.temperature == 0, count_load

    @functools.cached_property
    def prefill(self) -> Program:
        """`state = prefill(weights, ids_BT, lengths_B, budget_B, eos, seed, given, slots)`.

        given: None, or (vectors [B, T, D], mask [B, T]): what stands in place of the ids' vectors.
        """
        load = {"load_LE": replicated(self._layout)} if self._count else {}
        shardings = self._state_shardings | load
        return Program(self._prefill, static_argnums=7, out_shardings=shardings)

    @functools.cached_property
    def advance(self) -> Program:
        """`state, out = advance(weights, state, eos, steps)`; the state passed in is consumed.

        `steps` (int32, at most CHUNK) bounds the passes; fewer are run when every row has ended.
        out: `tokens_BN`, of which `counts_B` are new; `finished_B`; and counted in running rows,
        `passes_B` of the main model and `accepted_B` drafts; and `load_LE`, if it is counted.
        """
        whole = replicated(self._layout)
        return Program(
            self._advance, donate_argnums=1, out_shardings=(self._state_shardings, whole)
        )

    @property
    def _state_shardings(self) -> dict[str, Any]:
        """Caches by rows, the rest whole on every device, the host's own included."""
        rows, whole = batch_sharding(self._layout, ("batch",)), replicated(self._layout)
        cache, kv = rows, self._config.num_kv_heads
        if kv:  # its first axes alone are named
            cache = batch_sharding(self._layout, CACHE[:2], (0, kv))
        names = ["cache", "lengths_B", "pending_B", "left_B", "finished_B", "streams_B", "key"]
        if self._speculate:
            names += ["mtp_cache", "draft_B"] + ([] if self._greedy else ["q_BV"])
        placed = {name: rows if name in BY_ROWS else whole for name in names}
        return placed | {"cache": cache}

    def _decoder(self, weights: Tree) -> Decoder:
        return make_decoder(self._config, weights, self._recipe, self._speculate)

    def _prefill(self, weights, ids_BT, lengths_B, budget_B, eos, seed, given, slots: int) -> State:
        key = jax.random.key(seed)
        with use_layout(self._layout):
            decoder = self._decoder(weights)
            positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
            # Experts are counted for tokens of prompts only.
            valid_BT = (positions_BT < lengths_B[:, None]) & (budget_B > 0)[:, None]
            valid_BT = valid_BT.astype(jnp.float32)
            x_BTD = decoder.embed(ids_BT, self._recipe)
            if given is not None:
                x_BTD = jnp.where(given[1][..., None], given[0].astype(x_BTD.dtype), x_BTD)
            hidden_BTD, cache, stats = decoder.read_vectors(x_BTD, positions_BT, slots, valid_BT)
            p_BV = self._probabilities(decoder, at_index(hidden_BTD, lengths_B - 1))
            streams_B = jnp.arange(ids_BT.shape[0], dtype=jnp.int32)
            pending_B = draw(row_keys(key, streams_B, lengths_B, MAIN), p_BV, self._sampling)
            left_B = budget_B - 1
            state = {
                "cache": cache,
                "lengths_B": lengths_B,
                "streams_B": streams_B,
                "pending_B": pending_B,
                "left_B": left_B,
                "finished_B": (left_B <= 0) | jnp.isin(pending_B, eos),
                "key": key,
            }
            if self._speculate:
                next_ids_BT = jnp.roll(ids_BT, -1, axis=1)
                rows_B = jnp.arange(ids_BT.shape[0])
                next_ids_BT = next_ids_BT.at[rows_B, lengths_B - 1].set(pending_B)
                mtp_BTD, (state["mtp_cache"],), more = decoder.read_ahead(
                    hidden_BTD, next_ids_BT, positions_BT, slots, valid_BT
                )
                stats = [*stats, *more]
                state |= self._draft(
                    decoder, at_index(mtp_BTD, lengths_B - 1), lengths_B + 1, state
                )
            if self._count:
                state["load_LE"] = expert_load(stats)
            return place(state)

    def _advance(self, weights: Tree, state: State, eos: jax.Array, steps: jax.Array):
        with use_layout(self._layout):
            decoder = self._decoder(weights)
            step = self._speculative_step if self._speculate else self._plain_step
            out = self._outputs(jnp.zeros_like(state["lengths_B"]))

            def running(carry):
                i, state, _ = carry
                return (i < steps) & ~state["finished_B"].all()

            def body(carry):
                i, state, out = carry
                state, out = step(decoder, state, out, eos)
                return i + 1, place(state), out

            _, state, out = jax.lax.while_loop(running, body, (0, state, out))
            return state, {**out, "finished_B": state["finished_B"]}

    def _outputs(self, zeros_B: jax.Array) -> dict[str, jax.Array]:
        """What `advance` returns, before its first step."""
        width = CHUNK * (2 if self._speculate else 1)
        tokens_BN = jnp.zeros((zeros_B.shape[0], width), jnp.int32)
        out = {
            "tokens_BN": constrain(tokens_BN, None, None),
            "counts_B": zeros_B,
            "passes_B": zeros_B,
            "accepted_B": zeros_B,
        }
        if self._count:
            shape = self._config.num_moe_layers + self._speculate, self._config.num_experts
            out["load_LE"] = constrain(jnp.zeros(shape, jnp.float32), None, None)
        return out

    def _plain_step(self, decoder: Decoder, state: State, out, eos):
        lengths_B, pending_B = state["lengths_B"], state["pending_B"]
        running_B = ~state["finished_B"]
        hidden_BQD, cache, stats = decoder.read(
            pending_B[:, None], lengths_B[:, None], state["cache"], _valid(running_B, 1)
        )
        p_BV = self._probabilities(decoder, hidden_BQD[:, 0])
        keys_B = row_keys(state["key"], state["streams_B"], lengths_B + 1, MAIN)
        next_B = draw(keys_B, p_BV, self._sampling)
        out = self._counted({**out, "passes_B": out["passes_B"] + running_B}, stats)
        state = _with_routes(state, stats, lengths_B)
        state = {**state, "cache": cache, "lengths_B": lengths_B + running_B}
        return _emit(state, out, next_B, p_BV, running_B, eos)

    def _speculative_step(self, decoder: Decoder, state: State, out, eos):
        lengths_B, running_B = state["lengths_B"], ~state["finished_B"]
        keys = functools.partial(row_keys, state["key"], state["streams_B"])
        positions_B2 = lengths_B[:, None] + jnp.arange(2)
        ids_B2 = jnp.stack([state["pending_B"], state["draft_B"]], axis=1)
        valid_B2 = _valid(running_B, 2)
        hidden_B2D, cache, stats = decoder.read(ids_B2, positions_B2, state["cache"], valid_B2)
        # One product for both positions: the head is the largest weight that is read.
        rows_BD = hidden_B2D.reshape(-1, hidden_B2D.shape[-1])
        p_B2V = self._probabilities(decoder, rows_BD).reshape(*ids_B2.shape, -1)
        first_B, accepted_B = accept_or_redraw(
            keys(lengths_B + 1, ACCEPT),
            keys(lengths_B + 1, REDRAW),
            state["draft_B"],
            state.get("q_BV"),
            p_B2V[:, 0],
            self._sampling,
        )
        # A draft from logits that are not numbers is an error too.
        first_B = jnp.where(state["draft_B"] < 0, NO_TOKEN, first_B)
        second_B = draw(keys(lengths_B + 2, MAIN), p_B2V[:, 1], self._sampling)
        # Behind a refused draft the second entry is garbage; the next step writes it again.
        next_ids_B2 = jnp.stack([first_B, second_B], axis=1)
        mtp_B2D, (mtp_cache,), more = decoder.read_ahead(
            hidden_B2D, next_ids_B2, positions_B2, [state["mtp_cache"]], valid_B2
        )
        drafted = self._draft(
            decoder,
            at_index(mtp_B2D, accepted_B.astype(jnp.int32)),
            lengths_B + accepted_B + 2,
            state,
        )
        out = {
            **out,
            "passes_B": out["passes_B"] + running_B,
            "accepted_B": out["accepted_B"] + (running_B & accepted_B),
        }
        moved_B = jnp.where(running_B, 1 + accepted_B, 0)
        out, state = self._counted(out, stats + more), _with_routes(state, stats, lengths_B)
        state = {**state, "cache": cache, "mtp_cache": mtp_cache, "lengths_B": lengths_B + moved_B}
        state, out = _emit(state, out, first_B, p_B2V[:, 0], running_B, eos)
        give_B = accepted_B & ~state["finished_B"]
        state, out = _emit(state, out, second_B, p_B2V[:, 1], give_B, eos)
        return {**state, **drafted}, out

    def _counted(self, out: dict[str, jax.Array], stats: list[MoEStats]) -> dict[str, jax.Array]:
        """The outputs with the experts' tokens of a step added, if they are counted."""
        if not self._count:
            return out
        return {**out, "load_LE": constrain(out["load_LE"] + expert_load(stats), None, None)}

    def _draft(self, decoder: Decoder, mtp_BD, positions_B, state: State) -> State:
        q_BV = self._probabilities(decoder, mtp_BD)
        keys_B = row_keys(state["key"], state["streams_B"], positions_B, DRAFT)
        draft_B = draw(keys_B, q_BV, self._sampling)
        return {"draft_B": draft_B} | ({} if self._greedy else {"q_BV": q_BV})

    def _probabilities(self, decoder: Decoder, hidden_BD: jax.Array) -> jax.Array:
        # logits[B, V_tp] -> AllGather_tp -> logits[B, V]: sorting and drawing see whole rows.
        logits_BV = constrain(decoder.logits(hidden_BD), None, None)
        return probabilities(logits_BV, self._sampling)


def at_index(x_BTD: jax.Array, index_B: jax.Array) -> jax.Array:
    """Row b's entry at index[b]: [B, D]."""
    return jnp.take_along_axis(x_BTD, index_B[:, None, None], axis=1)[:, 0]


def _valid(running_B: jax.Array, tokens: int) -> jax.Array:
    """1.0 for the tokens of running rows, whose experts are counted: [B, tokens]."""
    return jnp.broadcast_to(running_B[:, None], (len(running_B), tokens)).astype(jnp.float32)


def _emit(state: State, out, token_B: jax.Array, p_BV: jax.Array, give_B: jax.Array, eos):
    """Hand out one token in the rows of `give_B`, and see whether it was their last."""
    rows_B = jnp.arange(token_B.shape[0])
    # Rows that give nothing write beyond the end, which drops it.
    column_B = jnp.where(give_B, out["counts_B"], out["tokens_BN"].shape[1])
    tokens_BN = out["tokens_BN"].at[rows_B, column_B].set(token_B, mode="drop")
    if "logps_BN" in out:
        logps_BN = out["logps_BN"].at[rows_B, column_B].set(log_p(p_BV, token_B), mode="drop")
        out = {**out, "logps_BN": logps_BN}
    if "kept_BNK" in out:
        kept_BK = kept_tokens(p_BV, out["kept_BNK"].shape[-1])
        out = {**out, "kept_BNK": out["kept_BNK"].at[rows_B, column_B].set(kept_BK, mode="drop")}
    out = {**out, "tokens_BN": tokens_BN, "counts_B": out["counts_B"] + give_B}
    left_B = state["left_B"] - give_B
    ended_B = give_B & (jnp.isin(token_B, eos) | (left_B <= 0))
    state = {
        **state,
        "pending_B": jnp.where(give_B, token_B, state["pending_B"]),
        "left_B": left_B,
        "finished_B": state["finished_B"] | ended_B,
    }
    return state, out


def _with_routes(state: State, stats: list[MoEStats], start_B: jax.Array) -> State:
    """The state with the experts of the tokens just read, if they are recorded."""
    if "routes_BSR" not in state:
        return state
    return {**state, "routes_BSR": write_rows(state["routes_BSR"], expert_routes(stats), start_B)}


def log_p(p_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """Log-probability of each row's token under the distribution it was drawn from, fp32 [B]."""
    return jnp.log(jnp.take_along_axis(p_BV, token_B[:, None], axis=1)[:, 0])


def place(state: State) -> State:
    """The same placement on every way out: rows where their devices are, the rest whole."""

    def constrained(name: str, value: Any) -> Any:
        if name == "key":
            return value
        batch = "batch" if name in BY_ROWS else None
        names = lambda x: CACHE if x.ndim == len(CACHE) else (batch, *(None,) * (x.ndim - 1))  # noqa: E731
        return jax.tree.map(lambda x: constrain(x, *names(x)), value)

    return {name: constrained(name, value) for name, value in state.items()}
