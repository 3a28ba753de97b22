"""Text from a model without a cache: for a look at the end of training, not for serving.

Letters: B batch, T length of the window, D hidden width, V vocabulary.
"""

import jax
import jax.numpy as jnp

from model.recipe import Recipe
from model.transformer import DeepSeekV3, Tokens


def continue_rows(
    model: DeepSeekV3,
    ids_BT: jax.Array,
    prompt_length: jax.Array,
    temperature: float,
    key: jax.Array,
    recipe: Recipe,
) -> jax.Array:
    """Fill ids[:, prompt_length:] by sampling, one full forward pass per token.

    Positions not yet reached hold anything: attention is causal. Returns int32 [B, T].
    """
    B, T = ids_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))

    def body(length, ids_BT):
        hidden_BTD = model(Tokens(ids_BT, positions_BT, None), recipe).hidden_BTD
        last_BD = jax.lax.dynamic_index_in_dim(hidden_BTD, length - 1, axis=1, keepdims=False)
        logits_BV = last_BD.astype(jnp.float32) @ model.head.kernel[...]
        noise = jax.random.fold_in(key, length)
        next_B = jax.random.categorical(noise, logits_BV / temperature, axis=-1)
        return jax.lax.dynamic_update_index_in_dim(ids_BT, next_B.astype(jnp.int32), length, axis=1)

    return jax.lax.fori_loop(prompt_length, T, body, ids_BT)
