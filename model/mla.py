"""Multi-head latent attention (V3 report, eq. 1-11; V2 report, section 2.1), in both its forms.

Expanded: keys and values of every head are computed from the latents; for training and prefill.
Absorbed: queries are taken into the latent space instead, and attention runs over a cache that
holds one latent and one rotary key per token, never expanded; for decoding. They are equal.

Letters: B batch, T query and S key positions, D hidden width, C latent width, N heads,
H query/key channels (nope then rope), R rope channels, V value channels, L = C + R cached channels.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.context_attention import context_attention
from model.layers import (
    LATENT_EPS,
    RMSNorm,
    from_stream,
    project,
    project_all,
    to_stream,
    weight,
)
from model.recipe import KEPT, PLAIN, Recipe, keep
from model.rope import rotate, rotation, softmax_scale
from pallas_kernels.attention import Stash, mla_attention, starts_of_segments
from pallas_kernels.decode import mla_decode
from pallas_kernels.mosaic import Backend
from sharding.context import sequence_shards
from sharding.held import master
from sharding.partition import constrain, on_shards, sum_over

HEADS = ("batch", "seq", "heads", "head_dim")
"""Logical axes of what every head has."""


class MLA(nnx.Module):
    """Latent attention; keys and values are expanded from a shared latent of r_kv channels."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c, std = config, config.init_std
        D, N, H = c.hidden_size, c.num_heads, c.qk_head_dim
        if c.q_lora_rank is None:
            self.w_q = weight(rngs, (D, N, H), ("embed", "heads", "head_dim"), std)
        else:
            self.w_dq = weight(rngs, (D, c.q_lora_rank), ("embed", "latent_out"), std)
            self.q_norm = RMSNorm(c.q_lora_rank, LATENT_EPS)
            self.w_uq = weight(rngs, (c.q_lora_rank, N, H), ("latent", "heads", "head_dim"), std)
        latent = (D, c.kv_lora_rank + c.qk_rope_head_dim)
        self.w_dkv = weight(rngs, latent, ("embed", "latent_out"), std)
        self.kv_norm = RMSNorm(c.kv_lora_rank, LATENT_EPS)
        expanded = (c.kv_lora_rank, N, c.qk_nope_head_dim + c.v_head_dim)
        self.w_ukv = weight(rngs, expanded, ("latent", "heads", "head_dim"), std)
        self.w_o = weight(rngs, (N, c.v_head_dim, D), ("heads", "head_dim", "embed"), std)
        self.config = config

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
        recipe: Recipe = PLAIN,
    ) -> tuple[jax.Array, jax.Array]:
        """Expanded: causal attention [B, T, D] within each segment (everything is one segment if
        None), and what a cache keeps of these tokens [B, T, L].

        On a mesh that cuts sequences, tokens come in balanced order (sharding/context.py).
        """
        c = self.config
        cos_sin = rotation(c, positions_BT)
        x_q, down_BTL = self.down(x_BTD, recipe)
        q_BTNH = constrain(self.queries(x_q, *cos_sin, recipe), *HEADS)
        latents_BTL = self.latents(down_BTL, *cos_sin)
        if sequence_shards() > 1:
            form = Form(softmax_scale(c), c.qk_nope_head_dim, recipe.stash)
            weights = (master(self.w_ukv.get_value()),)
            o_BTNV = context_attention(q_BTNH, (latents_BTL,), weights, segments_BT, form)
        else:
            c_kv_BTC, k_rope_BTR = jnp.split(latents_BTL, [c.kv_lora_rank], axis=-1)
            arrays = q_BTNH, self.keys_values(c_kv_BTC, recipe), k_rope_BTR, segments_BT
            o_BTNV = _attend_on_shards(*arrays, softmax_scale(c), recipe)
        return self.output(o_BTNV, recipe), latents_BTL

    def cache(self, latents_BTL: jax.Array, slots: int, recipe: Recipe) -> jax.Array:
        """A cache with room for so many tokens [B, S, L] that begins with these."""
        return jnp.pad(latents_BTL, ((0, 0), (0, slots - latents_BTL.shape[1]), (0, 0)))

    def keys_values(self, c_kv_BTC: jax.Array, recipe: Recipe) -> jax.Array:
        """Per head its key without rotation, then its value [B, T, N, W] (eq. 2, 5)."""
        kv_BTNW = project("BTC,CNH->BTNH", c_kv_BTC, self.w_ukv, recipe)
        return constrain(kv_BTNW, *HEADS)

    def over_cache(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        cache_BSL: jax.Array,
        halves: tuple[jax.Array, jax.Array],
        recipe: Recipe = PLAIN,
    ) -> tuple[jax.Array, jax.Array]:
        """Absorbed: the same attention [B, T, D] for T new tokens over a cache, and the cache with
        them in.

        A token's place in the cache is its position; positions of one row are consecutive. Slots
        beyond a query's own position may hold anything finite. `halves` are those of `w_ukv`
        (`split_heads_first`): W_UK is absorbed by the queries, W_UV by the output. Source: V2
        report, section 2.1.2.
        """
        c, nope = self.config, self.config.qk_nope_head_dim
        cos_sin, (w_uk_NCH, w_uv_NCV) = rotation(c, positions_BT), halves
        x_q, down_BTL = self.down(x_BTD, recipe)
        q_BTNH = self.queries(x_q, *cos_sin, recipe)
        cache_BSL = write_rows(cache_BSL, self.latents(down_BTL, *cos_sin), positions_BT[:, 0])
        q_BTNC = jnp.einsum("BTNH,NCH->BTNC", q_BTNH[..., :nope], w_uk_NCH.astype(x_BTD.dtype))
        q_BTNL = jnp.concatenate([q_BTNC, q_BTNH[..., nope:]], axis=-1)
        arrays = constrain(q_BTNL, *HEADS), cache_BSL, positions_BT[:, -1] + 1
        sizes = softmax_scale(c), c.kv_lora_rank
        o_BTNC = _decode_on_shards(*arrays, *sizes, recipe.kernels.decode)
        o_BTNV = jnp.einsum("BTNC,NCV->BTNV", o_BTNC, w_uv_NCV.astype(x_BTD.dtype))
        return self.output(o_BTNV, recipe), cache_BSL

    def down(self, x_BTD: jax.Array, recipe: Recipe) -> tuple[jax.Array, jax.Array]:
        """What queries are made of, the latent [B, T, r_q] or x itself; and the latent of keys and
        values with the rotary key [B, T, L], before norm and rotation (eq. 1, 3, 6).

        With sequence parallelism each device has its own tokens.
        """
        products = [("BTD,DC->BTC", self.w_dkv)]
        if self.config.q_lora_rank is not None:
            products.append(("BTD,DC->BTC", self.w_dq))
        downs = project_all(x_BTD, products, recipe, tokens="stream")
        down_BTL, *down_q = (keep(constrain(d, "batch", "stream", None)) for d in downs)
        return (down_q[0] if down_q else x_BTD), down_BTL

    def queries(
        self, x_q: jax.Array, cos_BTJ: jax.Array, sin_BTJ: jax.Array, recipe: Recipe
    ) -> jax.Array:
        """Queries of every head [B, T, N, H], nope channels then rotated ones; see `down`."""
        c, nope = self.config, self.config.qk_nope_head_dim
        if c.q_lora_rank is None:
            q_BTNH = project("BTD,DNH->BTNH", from_stream(x_q), self.w_q, recipe)
        else:
            c_q_BTC = from_stream(self.q_norm(x_q))  # eq. 6
            q_BTNH = project("BTC,CNH->BTNH", c_q_BTC, self.w_uq, recipe)  # eq. 7, 8
        q_rope = rotate(q_BTNH[..., nope:], cos_BTJ, sin_BTJ, c.rope_interleaved)
        return jnp.concatenate([q_BTNH[..., :nope], q_rope], axis=-1)  # eq. 9

    def latents(self, down_BTL: jax.Array, cos_BTJ: jax.Array, sin_BTJ: jax.Array) -> jax.Array:
        """Normed key-value latent, then the rotated key that all heads share [B, T, L]."""
        c = self.config
        c_kv_BTC = self.kv_norm(down_BTL[..., : c.kv_lora_rank])
        # One rotary key per token, not normalised.
        k_rope = down_BTL[..., None, c.kv_lora_rank :]
        k_rope = rotate(k_rope, cos_BTJ, sin_BTJ, c.rope_interleaved)
        return from_stream(jnp.concatenate([c_kv_BTC, k_rope[:, :, 0]], axis=-1))

    def output(self, o_BTNV: jax.Array, recipe: Recipe) -> jax.Array:
        """Outputs of the heads to the residual stream (eq. 11)."""
        o_BTNV = constrain(o_BTNV, *HEADS)
        return to_stream(project("BTNV,NVD->BTD", o_BTNV, self.w_o, recipe))


def _attend_on_shards(q_BTNH, kv_BTNW, k_rope_BTR, segments_BT, scale: float, recipe: Recipe):
    """Expanded attention [B, T, N, V], each device on its own rows and heads."""
    arrays, names = [q_BTNH, kv_BTNW, k_rope_BTR], [HEADS, HEADS, ("batch", "seq", None)]
    if segments_BT is not None:
        arrays, names = [*arrays, starts_of_segments(segments_BT)], [*names, ("batch", "seq")]
    backend, stash = recipe.kernels.attention, recipe.stash
    attend = functools.partial(mla_attention, scale=scale, backend=backend, kept=KEPT, stash=stash)
    return on_shards(lambda *shards: (attend(*shards),), tuple(names), (HEADS,))(*arrays)[0]


def _decode_on_shards(
    q_BTNL, cache_BSL, lengths_B, scale: float, latent: int, backend: Backend
) -> jax.Array:
    """Absorbed attention [B, T, N, C], each device on its own rows and heads."""
    names = HEADS, ("batch", None, None), ("batch",)
    attend = functools.partial(mla_decode, scale=scale, latent=latent, backend=backend)
    on_shard = on_shards(lambda *shards: (attend(*shards),), names, (HEADS,))
    return on_shard(q_BTNL, cache_BSL, lengths_B)[0]


class Form(NamedTuple):
    """What `context_attention` asks: latents travel, with the key that all heads share."""

    scale: float
    """Factor on the logits."""
    nope: int
    """Query/key channels without rotation."""
    stash: Stash = ""
    """Type that outputs are held in for the backward pass."""
    sent_names = (("batch", "seq", None),)
    weight_names = (("latent", "heads", "head_dim"),)

    def width(self, sent, weights) -> int:
        """Channels of a value."""
        return weights[0].shape[-1] - self.nope

    def expand(self, here: int, sent, weights) -> tuple[jax.Array, jax.Array]:
        """Keys and values of every head (V3 report, eq. 2-5)."""
        (latents_BTL,), (w_CNH,) = sent, weights
        C = w_CNH.shape[0]
        kv = jnp.einsum("BTC,CNH->BTNH", latents_BTL[..., :C], w_CNH)
        shared = latents_BTL[:, :, None, C:]
        shared = jnp.broadcast_to(shared, (*kv.shape[:3], shared.shape[-1]))
        return jnp.concatenate([kv[..., : self.nope], shared], axis=-1), kv[..., self.nope :]

    def pull(self, here: int, sent, weights, dk_BTNH: jax.Array, dv_BTNV: jax.Array):
        """fp32 gradients of the latents and the weight, of fp32 ones of keys and values."""
        (latents_BTL,), (w_CNH,) = sent, weights
        dkv = jnp.concatenate([dk_BTNH[..., : self.nope], dv_BTNV], axis=-1).astype(w_CNH.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        dc_BTC = product("BTNH,CNH->BTC", dkv, w_CNH)
        dshared_BTR = jnp.sum(dk_BTNH[..., self.nope :], axis=2)
        dw_CNH = product("BTC,BTNH->CNH", latents_BTL[..., : w_CNH.shape[0]], dkv)
        return (jnp.concatenate([dc_BTC, dshared_BTR], axis=-1),), (dw_CNH,)

    def summed(self, dlatents_BTL: jax.Array) -> jax.Array:
        """All devices' heads read the same latents."""
        return sum_over(dlatents_BTL, "heads")


def split_heads_first(w_CNH: jax.Array, nope: int) -> tuple[jax.Array, jax.Array]:
    """W_UK [N, C, nope] and W_UV [N, C, V] of `w_ukv`: as products per head read them.

    Decoding makes them once and not at every step.
    """
    w_NCH = jnp.moveaxis(w_CNH, 1, 0)
    return w_NCH[..., :nope], w_NCH[..., nope:]


def join_halves(w_uk_NCH: jax.Array, w_uv_NCV: jax.Array) -> jax.Array:
    """`w_ukv` [C, N, H] of its halves: the inverse of `split_heads_first`."""
    return jnp.moveaxis(jnp.concatenate([w_uk_NCH, w_uv_NCV], axis=-1), 0, 1)


def write_rows(cache_BSL: jax.Array, new_BTL: jax.Array, start_B: jax.Array) -> jax.Array:
    """A cache with T new entries per row, the first of row b at slot start[b]."""
    put = jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new, (start, 0)))
    cache_BSL = put(cache_BSL, new_BTL.astype(cache_BSL.dtype), start_B)
    return constrain(cache_BSL, "batch", None, None)
