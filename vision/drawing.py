"""Images from text: codes drawn one after the other with classifier-free guidance, then decoded.

Every image is two rows of one batch: its prompt, and the same prompt with all but bos and
begin-of-image replaced by padding. The scores of a code are u + w (c - u) of the two rows' scores
(Janus-Pro report and code; w = 5, temperature 1), and both rows read the code that is drawn. The
two rows are neighbours, so that they lie on the same device.

Letters: N images, R rows of an image (two; one where w = 1), B = N R rows, T prompt length,
S codes of the codebook, P codes of an image, D hidden width, Q steps of one call.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from generation.decode import make_decoder
from generation.engine import SLOT_BLOCK, Generator, padded_length
from generation.steps import at_index
from model.blueprint import Tree, bind_part
from sharding.partition import batch_sharding, batch_shards, constrain, replicated, use_layout
from vision.config import JanusConfig

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Brush:
    """How codes are drawn."""

    guidance: float = 5.0
    """How far scores go from those without the prompt towards, and beyond, those with it [w]."""
    temperature: float = 1.0
    """Scores are divided by it; 0 takes the best code."""
    seed: int = 0
    """Seed of the draws. An image's draws depend on it, the image's number and the step only."""

    def __post_init__(self):
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(f"guidance is {self.guidance}; give 0 or more, 5 is published")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; give 0 (greedy) or more")

    @property
    def rows(self) -> int:
        """Rows that one image takes."""
        return 1 if self.guidance == 1 else 2


@dataclasses.dataclass(frozen=True)
class DrawingTokens:
    """Ids that drawing is told apart by."""

    bos: int
    """Begin of text."""
    begin: int
    """Begin of image: the last token of a prompt."""
    pad: int
    """What stands for the words of a prompt in the row without it."""


def without_text(prompt: np.ndarray, tokens: DrawingTokens) -> np.ndarray:
    """The prompt that says nothing: all but bos and begin-of-image is padding."""
    kept = (prompt == tokens.bos) | (prompt == tokens.begin)
    return np.where(kept, prompt, tokens.pad).astype(np.int32)


class Painter:
    """The programs that draw images on one layout."""

    def __init__(self, generator: Generator, brush: Brush):
        config = generator.config
        assert isinstance(config, JanusConfig)
        self.config, self.brush, self._generator = config, brush, generator
        self.compile_seconds = self.seconds = 0.0
        """Time of compiling, and of drawing."""

    def check(self, prompts: Sequence[np.ndarray]) -> None:
        """Raise ValueError for prompts that cannot be drawn."""
        self._generator.check(prompts, self.config.drawn_tokens, False)

    def draw(
        self, weights: Tree, prompts: Sequence[np.ndarray], tokens: DrawingTokens
    ) -> Iterator[np.ndarray]:
        """Draw an image for every prompt (int32 [n], begin-of-image last).

        Yields codes int32 [N, p] as far as they are drawn, a row of the image more each time, at
        last [N, P]. FloatingPointError for scores that are not numbers.
        """
        self.check(prompts)
        config, R = self.config, self.brush.rows
        shards = batch_shards(self._generator.layout)
        N = -(-len(prompts) // shards) * shards
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        T = padded_length(int(lengths.max()))
        ids_NRT = np.full((N, R, T), tokens.pad, np.int32)
        for image, prompt in enumerate(prompts):
            ids_NRT[image, 0, : len(prompt)] = prompt
            ids_NRT[image, 1:, : len(prompt)] = without_text(prompt, tokens)
        lengths_N = np.pad(lengths, (0, N - len(prompts)), constant_values=1)
        P = config.drawn_tokens
        slots = -(-(T + P + 1) // SLOT_BLOCK) * SLOT_BLOCK
        whole = functools.partial(jax.device_put, device=replicated(self._generator.layout))
        seed = whole(np.array(self.brush.seed % 2**32, np.uint32))
        start = (weights, whole(ids_NRT.reshape(N * R, T)), whole(lengths_N), seed)
        state = self._timed(self._start.lower(*start, slots).compile, *start)
        width = max(1, round(P**0.5))
        steps = whole(np.array(width, np.int32))
        advance = self._timed(self._advance.lower(weights, state, steps).compile)
        for drawn in range(0, P, width):
            steps = whole(np.array(min(width, P - drawn), np.int32))
            began = time.perf_counter()
            state = advance(weights, state, steps)
            finite = bool(state["finite"])
            self.seconds += time.perf_counter() - began
            if not finite:
                raise FloatingPointError(
                    "the scores of codes are not all finite numbers; the weights are damaged, or "
                    "too large for --dtype"
                )
            yield np.asarray(state["codes_NP"])[: len(prompts), : drawn + width]

    def _timed(self, make: Any, *arguments: Any) -> Any:
        """What `make` compiles; called, if there are arguments, as part of drawing."""
        began = time.perf_counter()
        compiled = make()
        self.compile_seconds += time.perf_counter() - began
        if not arguments:
            return compiled
        began = time.perf_counter()
        result = jax.block_until_ready(compiled(*arguments))
        self.seconds += time.perf_counter() - began
        return result

    @functools.cached_property
    def _shardings(self) -> State:
        layout = self._generator.layout
        rows, whole = batch_sharding(layout, ("batch",)), replicated(layout)
        names = ("lengths_N", "codes_NP", "drawn", "finite", "key")
        return {"cache": rows, "hidden_BD": rows} | dict.fromkeys(names, whole)

    @functools.cached_property
    def _start(self):
        """`state = start(weights, ids_BT, lengths_N, seed, slots)`: the prompts are read."""
        return jax.jit(self._begin, static_argnums=4, out_shardings=self._shardings)

    @functools.cached_property
    def _advance(self):
        """`state = advance(weights, state, steps)`: as many codes more; the state is consumed."""
        return jax.jit(self._loop, donate_argnums=1, out_shardings=self._shardings)

    def _begin(self, weights: Tree, ids_BT, lengths_N, seed, slots: int) -> State:
        with use_layout(self._generator.layout):
            decoder = make_decoder(self.config, weights, self._generator.recipe, mtp=False)
            positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
            hidden_BTD, cache, _ = decoder.read(ids_BT, positions_BT, slots)
            ends_B = jnp.repeat(lengths_N, self.brush.rows) - 1
            return {
                "cache": cache,
                "hidden_BD": at_index(hidden_BTD, ends_B),
                "lengths_N": lengths_N,
                "codes_NP": jnp.zeros((len(lengths_N), self.config.drawn_tokens), jnp.int32),
                "drawn": jnp.zeros((), jnp.int32),
                "finite": jnp.ones((), bool),
                "key": jax.random.key(seed),
            }

    def _loop(self, weights: Tree, state: State, steps: jax.Array) -> State:
        with use_layout(self._generator.layout):
            recipe = self._generator.recipe
            decoder = make_decoder(self.config, weights, recipe, mtp=False)
            parts = ("drawing", "brush")
            drawing, brush = (self._part(name, weights["params"][name]) for name in parts)
            R = self.brush.rows

            def step(_, state: State) -> State:
                scores_NS = self._scores(brush, state["hidden_BD"])
                code_N = self._choose(scores_NS, state["key"], state["drawn"])
                x_ND = drawing.embed(code_N, recipe)
                x_B1D = constrain(jnp.repeat(x_ND, R, 0)[:, None], "batch", None, None)
                at_B1 = jnp.repeat(state["lengths_N"] + state["drawn"], R)[:, None]
                hidden_B1D, cache, _ = decoder.read_vectors(x_B1D, at_B1, state["cache"])
                codes_NP = state["codes_NP"].at[:, state["drawn"]].set(code_N)
                return {
                    **state,
                    "cache": jax.tree.map(lambda x: constrain(x, *_rows(x)), cache),
                    "hidden_BD": constrain(hidden_B1D[:, 0], "batch", None),
                    "codes_NP": constrain(codes_NP, None, None),
                    "drawn": state["drawn"] + 1,
                    "finite": state["finite"] & jnp.isfinite(scores_NS).all(),
                }

            return jax.lax.fori_loop(0, steps, step, state)

    def _part(self, name: str, params: Tree) -> Any:
        return bind_part(self.config, name, params, {})

    def _scores(self, brush: Any, hidden_BD: jax.Array) -> jax.Array:
        """Guided scores [N, S] of the next code; whole on every device, which all draw the same."""
        scores_NRS = constrain(brush.logits(hidden_BD), None, None)
        scores_NRS = scores_NRS.reshape(-1, self.brush.rows, scores_NRS.shape[-1])
        with_text_NS, without_NS = scores_NRS[:, 0], scores_NRS[:, -1]
        return without_NS + self.brush.guidance * (with_text_NS - without_NS)

    def _choose(self, scores_NS: jax.Array, key: jax.Array, step: jax.Array) -> jax.Array:
        if self.brush.temperature == 0:
            return jnp.argmax(scores_NS, -1).astype(jnp.int32)
        images_N = jnp.arange(len(scores_NS))
        keys_N = jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(key, n), step))(images_N)
        choose = jax.vmap(jax.random.categorical)
        return choose(keys_N, scores_NS / self.brush.temperature).astype(jnp.int32)


def _rows(x: jax.Array) -> tuple[str | None, ...]:
    return ("batch", *(None,) * (x.ndim - 1))


def decode_images(generator: Generator, weights: Tree, codes_NP: np.ndarray) -> np.ndarray:
    """Pixels of codes, float32 [N, 3, H, W], about -1 .. 1; one image at a time, in fp32."""
    config = generator.config
    assert isinstance(config, JanusConfig)
    grid = config.drawn_grid

    @jax.jit
    def decode(params: Tree, codes_1P: jax.Array) -> jax.Array:
        with use_layout(None):  # one image is not cut
            tokenizer: Any = bind_part(config, "tokenizer", params, {})
            return jnp.moveaxis(tokenizer.decode(codes_1P, grid), -1, 1)

    params = jax.tree.map(lambda x: x.astype(jnp.float32), weights["params"]["tokenizer"])
    whole = replicated(generator.layout)
    images = [decode(params, jax.device_put(codes_P[None], whole)) for codes_P in codes_NP]
    return np.concatenate([np.asarray(image, np.float32) for image in images])
