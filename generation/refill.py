"""Many answers through few rows: a row whose answer has ended takes the next prompt at once.

    prefix = program.prefix(weights, ids_PT, lengths_P)          # every prompt once
    state = program.admit(weights, state, prefix, source_B, ...)  # rows start from some prompt
    state, out = program.advance(weights, state, eos, steps)      # as in `generation/steps.py`
    state = program.keep(weights, state, rows_B)                  # fewer rows for the last answers

Answers to one prompt share its pass through the model: rows copy the cache of the prompt that they
start from. An answer's draws depend on its own number and no other, so its text is the same in
whichever row and company it is written. Beside tokens, `advance` gives `logps_BN`, the
log-probabilities under the distribution that was drawn from, and where top-k cuts that, `kept_BNK`,
what it left; and the state holds, where the recipe reports routes, `routes_BSR`, the experts of
every token that was read.

Letters: P prompts, B rows, N tokens of one call, T prompt length, V vocabulary, S slots, K tokens
that top-k keeps, R experts of a token over all layers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from generation.decode import expert_routes
from generation.sampling import draw, kept_tokens, row_keys
from generation.steps import BY_ROWS, MAIN, Program, State, Steps, at_index, log_p, place
from model.blueprint import Tree
from sharding.partition import batch_sharding, constrain, replicated, use_layout


class RefillSteps(Steps):
    """The programs for one model, layout and way of sampling."""

    @property
    def _kept(self) -> int:
        """Tokens that top-k keeps, K; 0 where it cuts nothing."""
        return 0 if self._greedy else min(self._sampling.top_k, self._config.vocab_size)

    @functools.cached_property
    def prefix(self) -> Program:
        """`prefix = prefix(weights, ids_PT, lengths_P, slots)`: prompts, read once."""
        return Program(self._prefix, static_argnums=3, out_shardings=replicated(self._layout))

    @functools.cached_property
    def admit(self) -> Program:
        """`state = admit(weights, state, prefix, source_B, streams_B, budget, eos)`.

        Rows whose source is not negative begin an answer to that prompt of `prefix`, of at most
        `budget` tokens, and draw its first token; the others go on. The state is consumed.
        """
        return Program(self._admit, donate_argnums=1, out_shardings=self._state_shardings)

    @functools.cached_property
    def keep(self) -> Program:
        """`state = keep(weights, state, rows_B)`: these rows alone, in this order."""
        return Program(self._keep, out_shardings=self._state_shardings)

    @functools.cached_property
    def empty(self):
        """`state = empty(prefix, seed, rows=)`: rows with nothing to do, in shapes of `prefix`."""
        return jax.jit(self._empty, static_argnames="rows", out_shardings=self._state_shardings)

    @property
    def _state_shardings(self) -> dict[str, Any]:
        rows, whole = batch_sharding(self._layout, ("batch",)), replicated(self._layout)
        shardings = super()._state_shardings | {"pending_logp_B": whole}
        shardings |= {"pending_kept_BK": whole} if self._kept else {}
        return shardings | ({"routes_BSR": rows} if self._recipe.routes else {})

    def _prefix(self, weights: Tree, ids_PT, lengths_P, slots: int) -> State:
        with use_layout(self._layout):
            decoder = self._decoder(weights)
            positions_PT = jnp.broadcast_to(jnp.arange(ids_PT.shape[1]), ids_PT.shape)
            hidden_PTD, cache, stats = decoder.read(ids_PT, positions_PT, slots)
            last_PD = at_index(hidden_PTD, lengths_P - 1)
            prefix: State = {"cache": cache, "lengths_P": lengths_P, "hidden_PD": last_PD}
            prefix["p_PV"] = self._probabilities(decoder, last_PD)
            if self._recipe.routes:
                routes_PTR = expert_routes(stats)
                spare = ((0, 0), (0, slots - routes_PTR.shape[1]), (0, 0))
                prefix["routes_BSR"] = jnp.pad(routes_PTR, spare, constant_values=-1)
            if self._speculate:
                # The last token's successor is an answer's first: `admit` writes that entry.
                next_ids_PT = jnp.roll(ids_PT, -1, axis=1)
                passed = decoder.read_ahead(hidden_PTD, next_ids_PT, positions_PT, slots)
                (prefix["mtp_cache"],) = passed.cache
            return prefix

    def _empty(self, prefix: State, seed, *, rows: int) -> State:
        def blank(x: jax.Array) -> jax.Array:
            return jnp.zeros((rows, *x.shape[1:]), x.dtype)

        zeros_B = jnp.zeros(rows, jnp.int32)
        state = {name: jax.tree.map(blank, prefix[name]) for name in BY_ROWS if name in prefix}
        state |= dict.fromkeys(("lengths_B", "pending_B", "left_B", "streams_B"), zeros_B)
        state |= {"finished_B": jnp.ones(rows, bool), "key": jax.random.key(seed)}
        state["pending_logp_B"] = jnp.zeros(rows, jnp.float32)
        if self._kept:
            state["pending_kept_BK"] = jnp.full((rows, self._kept), -1, jnp.int32)
        if self._speculate:
            state["draft_B"] = zeros_B
            if not self._greedy:
                state["q_BV"] = blank(prefix["p_PV"])
        return state

    def _admit(self, weights: Tree, state: State, prefix: State, source_B, streams_B, budget, eos):
        with use_layout(self._layout):
            take_B, source_B = source_B >= 0, jnp.maximum(source_B, 0)

            def choose(new: jax.Array, old: jax.Array) -> jax.Array:
                return jnp.where(take_B.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

            fresh = {
                name: jax.tree.map(lambda x: x[source_B], prefix[name])
                for name in BY_ROWS
                if name in state
            }
            lengths_B, p_BV = prefix["lengths_P"][source_B], prefix["p_PV"][source_B]
            keys_B = row_keys(state["key"], streams_B, lengths_B, MAIN)
            pending_B = draw(keys_B, p_BV, self._sampling)
            left_B = jnp.full_like(lengths_B, budget) - 1
            fresh |= {
                "lengths_B": lengths_B,
                "streams_B": streams_B,
                "pending_B": pending_B,
                "pending_logp_B": log_p(p_BV, pending_B),
                "left_B": left_B,
                "finished_B": (left_B <= 0) | jnp.isin(pending_B, eos),
            }
            if self._kept:
                fresh["pending_kept_BK"] = kept_tokens(p_BV, self._kept)
            if self._speculate:
                fresh |= self._first_draft(weights, fresh | {"key": state["key"]}, prefix, source_B)
            fresh = {
                name: jax.tree.map(choose, value, state[name]) for name, value in fresh.items()
            }
            return place({**state, **fresh})

    def _keep(self, weights: Tree, state: State, rows_B) -> State:
        del weights
        with use_layout(self._layout):
            return place({
                name: value if name == "key" else jax.tree.map(lambda x: x[rows_B], value)
                for name, value in state.items()
            })  # fmt: skip

    def _first_draft(self, weights: Tree, fresh: State, prefix: State, source_B) -> State:
        """The MTP module's cache with the prompt's last token in, and the first draft."""
        decoder, last_B = self._decoder(weights), fresh["lengths_B"] - 1
        mtp_B1D, (mtp_cache,), _ = decoder.read_ahead(
            prefix["hidden_PD"][source_B][:, None],
            fresh["pending_B"][:, None],
            last_B[:, None],
            [fresh["mtp_cache"]],
        )
        drafted = self._draft(decoder, mtp_B1D[:, 0], last_B + 2, fresh)
        return {"mtp_cache": mtp_cache, **drafted}

    def _outputs(self, zeros_B: jax.Array) -> dict[str, jax.Array]:
        out = super()._outputs(zeros_B)
        logps_BN = jnp.zeros(out["tokens_BN"].shape, jnp.float32)
        out = {**out, "logps_BN": constrain(logps_BN, None, None)}
        if self._kept:
            kept_BNK = jnp.full((*logps_BN.shape, self._kept), -1, jnp.int32)
            out["kept_BNK"] = constrain(kept_BNK, None, None, None)
        return out
