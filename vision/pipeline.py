"""A model with images as a pipeline sees it: encoder and adaptors stand on the first stage, after
the embedding that all ranks hold a part of; the generation head stands on the last.

Letters: B batch, T places, D hidden width.
"""

from typing import Any

import jax
import jax.numpy as jnp

from model.blueprint import Tree, bind_around, bind_part, prepare_parts
from model.recipe import Recipe
from sharding.held import master
from sharding.partition import constrain
from sharding.pipeline.stages import Stages
from vision.config import JanusConfig
from vision.janus import text_ids, with_images
from vision.loss import Counts, mixed_examples, mixed_parts, plain_code_loss, text_loss

FIRST = ("encoder", "aligner", "drawing")


def janus_stages(config: JanusConfig, recipe: Recipe) -> Stages:
    """Functions for `sharding/pipeline/executor.py:run`; micro is (MixedExamples, Counts).

    Their objectives add up to `vision/loss.py:mixed_loss`.
    """
    prepare_parts(config, *FIRST)

    def ids(micro):
        ids_BT = text_ids(micro[0].tokens)
        return ids_BT, jnp.zeros((0, *ids_BT.shape), jnp.int32)

    def embed(vocab: Tree, ids_BT: jax.Array) -> jax.Array:
        module: Any = bind_part(config, "embed", vocab["embed"], {})
        return module(ids_BT, recipe)

    def first(weights: Tree, x_BTD: jax.Array, micro) -> jax.Array:
        def part(name: str) -> Any:
            return bind_part(config, name, weights[name], {})

        encoder, aligner, drawing = map(part, FIRST)
        return with_images(x_BTD, micro[0].tokens.beside, encoder, aligner, drawing, recipe)

    def block(weights: Tree, bias: Tree, x_BTD: jax.Array, tokens):
        module: Any = bind_part(config, config.stack, weights, bias)
        return module(x_BTD, tokens, recipe)

    recompute = recipe.rematerialize(block)

    def layer(weights: Tree, bias: Tree, x_BTD: jax.Array, micro):
        x_BTD, _ = recompute(weights, bias, x_BTD, micro[0].tokens)
        return (x_BTD, jnp.zeros(())), None

    def last(weights: Tree, bias: Tree, x_BTD: jax.Array, _, micro):
        model: Any = bind_around(config, weights, bias)
        examples, counts = micro[0], Counts(*micro[1])
        hidden_BTD = model.after(x_BTD, examples.tokens, recipe, None).hidden_BTD
        nats = plain_code_loss(model.brush, hidden_BTD, examples)
        return (hidden_BTD[None], nats / counts.total), mixed_parts(0 * nats, nats, counts)

    def loss(vocab: Tree, hidden_BTD: jax.Array, micro, _):
        tied, counts = config.tie_embeddings, Counts(*micro[1])
        kernel = master(vocab["embed"]["table"]).T if tied else master(vocab["head"]["kernel"])
        nats = text_loss(hidden_BTD, kernel, micro[0], recipe)
        return nats / counts.total, mixed_parts(nats, 0 * nats, counts)

    def place(x_BTD: jax.Array) -> jax.Array:
        return constrain(x_BTD, "batch", "stream", "embed")

    return Stages(jax.vmap(mixed_examples), ids, embed, first, layer, last, loss, place)
