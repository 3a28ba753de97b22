"""The trainer of models with images: mixed batches, or the image tokenizer alone, in the step of
pre-training.

What a stage does not learn is frozen: no gradient is computed for it and it has no optimizer state.

Letters: B rows, P places of a grid, S codes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from model.blueprint import Tree, bind_part, blueprint
from model.stages import join_weights
from sharding.partition import pipeline_ranks, use_layout
from training.gradients import accumulated_gradients, run_pipeline
from training.optimizer import make_optimizer
from training.step import Batch, Gradients, Knobs, State, Trainer
from vision.config import ImageTraining, JanusConfig, Learned
from vision.janus import LANGUAGE, Janus
from vision.loss import Counts, count_targets, mixed_examples, mixed_loss
from vision.pipeline import janus_stages
from vision.tokenizer import tokenizer_loss

PARTS: dict[Learned, tuple[str, ...]] = {
    "tokenizer": ("tokenizer",),
    "adaptors": ("aligner", "drawing", "brush"),
    "language": (*LANGUAGE, "aligner", "drawing", "brush"),
    "reading": (*LANGUAGE, "aligner", "drawing", "brush", "encoder"),
}
"""Parts of the parameters that a stage learns."""


@dataclasses.dataclass(frozen=True)
class ImageTrainer(Trainer):
    """A trainer of `Janus`."""

    images: ImageTraining = ImageTraining()

    def __post_init__(self):
        super().__post_init__()
        config = self.model
        if not isinstance(config, JanusConfig):
            raise ValueError(
                "stage images needs a model with eyes and a brush; --config janus_tiny has one"
            )
        if config.has_experts:
            raise ValueError("stage images trains language models without experts")
        if self.layout.config.overlap:
            raise ValueError("mesh.overlap is for experts; stage images has none, leave it off")
        if self.images.learned == "tokenizer" and pipeline_ranks(self.layout) > 1:
            raise ValueError("the image tokenizer has no layers to cut over pipe; set pipe to 1")

    @property
    def learned(self) -> tuple[str, ...]:
        """Parts of the parameters that change."""
        return PARTS[self.images.learned]

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The usual one for what is learned; nothing for the rest."""
        axes = {k: v for k, v in blueprint(self.model).params_axes.items() if k in self.learned}
        usual = make_optimizer(self.train.optimizer, axes)

        def init(params: Tree) -> Any:
            return usual.init(self._pick(params))

        def update(grads: Tree, state: Any, params: Tree | None = None) -> Any:
            assert params is not None
            some, state = usual.update(self._pick(grads), state, self._pick(params))
            still = {k: v for k, v in grads.items() if k not in self.learned}
            return {**jax.tree.map(jnp.zeros_like, still), **some}, state  # pyright: ignore

        return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]

    def _pick(self, tree: Tree) -> Tree:
        return {name: part for name, part in tree.items() if name in self.learned}

    def gradients(self, state: State, batch: Batch, knobs: Knobs) -> Gradients:
        """Loss and gradients of a mixed batch, or of pictures for the image tokenizer."""
        if self.images.learned == "tokenizer":
            return self._of_tokenizer(state, batch)
        counts = count_targets(batch)
        inputs = state["params"], state["router_bias"]
        if pipeline_ranks(self.layout) > 1:
            loss, parts, grads = self._pipelined(*inputs, batch, counts)
        else:

            def micro_loss(model: Any, micro: Batch, _: Any) -> Any:
                model = self._freeze(model)
                return mixed_loss(model, mixed_examples(micro), counts, self.recipe)

            weights: Any = counts
            loss, parts, grads = accumulated_gradients(
                self.model, self.recipe, *inputs, batch, weights, micro_loss=micro_loss
            )
        metrics = {
            "train/loss": loss,
            "train/text_loss": parts.text,
            "train/code_loss": parts.drawn,
        }
        return self._found(loss, grads, metrics)

    def _pipelined(self, params: Tree, router_bias: Tree, batch: Batch, counts: Counts) -> Any:
        """The same over `pipe`."""
        config = self.model
        assert isinstance(config, JanusConfig)
        stages = janus_stages(config, self.recipe)
        args = config, self.recipe, self.layout, params, router_bias, stages, batch, tuple(counts)
        result = run_pipeline(*args)
        return result.objective, result.parts, join_weights(config, result.gradients)

    def _of_tokenizer(self, state: State, batch: Batch) -> Gradients:
        """Pixels, codebook and commitment, in fp32."""
        config = self.model
        assert isinstance(config, JanusConfig)
        micros, S = batch["paint"].shape[0], config.tokenizer.num_codes

        def micro_loss(model: Any, micro: Batch, _: Any) -> Any:
            loss, found = tokenizer_loss(self._freeze(model).tokenizer, micro["paint"])
            error = jnp.square(found.pixels_NHWC - micro["paint"]).mean()
            used_S = jnp.zeros(S).at[found.codes_NP.reshape(-1)].add(1.0)
            means = (error / micros, found.commitment / micros)
            return loss / micros, (*means, jax.lax.stop_gradient(used_S))

        weights: Any = None
        inputs = state["params"], state["router_bias"], batch, weights
        loss, (error, commitment, used_S), grads = accumulated_gradients(
            self.model, self.recipe, *inputs, micro_loss=micro_loss
        )
        metrics = {
            "train/loss": loss,
            "train/pixel_error": error,
            "train/commitment_loss": commitment,
            "train/codes_used": (used_S > 0).mean(),
        }
        return self._found(loss, grads, metrics)

    def _found(self, loss: jax.Array, grads: Tree, metrics: dict[str, Any]) -> Gradients:
        """Without the gradients of what is frozen, which a pipeline computes all the same."""
        counts_LE = jnp.zeros((0, 1), jnp.float32)
        grads = {
            name: part if name in self.learned else jax.tree.map(jnp.zeros_like, part)
            for name, part in grads.items()
        }
        return Gradients(loss, grads, counts_LE, metrics | {"counts_LE": counts_LE})

    def _freeze(self, model: Janus) -> Janus:
        """The model, whose frozen parts are constants."""
        for name in blueprint(self.model).params:
            if name not in self.learned:
                graph, weights = nnx.split(getattr(model, name))
                setattr(model, name, nnx.merge(graph, jax.lax.stop_gradient(weights)))
        return model

    @functools.cached_property
    def codes(self):
        """`codes_NP = codes(tokenizer's params, pixels_NCHW)` of images to learn to draw."""

        @jax.jit
        def encode(params: Tree, pixels_NCHW: jax.Array) -> jax.Array:
            with use_layout(None):  # the same on every process
                tokenizer: Any = bind_part(self.model, "tokenizer", params, {})
                return tokenizer.encode(jnp.moveaxis(pixels_NCHW, 1, -1))

        return encode
