"""Multi-head latent attention (V3 report, eq. 1-11; V2 report, section 2.1), in both its forms.

Expanded: keys and values of every head are computed from the latents; for training and prefill.
Absorbed: queries are taken into the latent space instead, and attention runs over a cache that
holds one latent and one rotary key per token, never expanded; for decoding. They are equal.

Letters: B batch, T query and S key positions, D hidden width, C latent width, N heads,
H query/key channels (nope then rope), R rope channels, V value channels, L = C + R cached channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.context_attention import Form, context_attention
from model.layers import LATENT_EPS, RMSNorm, from_stream, project, to_stream, weight
from model.recipe import Recipe, keep
from model.rope import rotate, rotation, softmax_scale
from pallas_kernels.attention.mla import mla_attention, starts_of_segments
from pallas_kernels.decode.mla import mla_decode
from pallas_kernels.mosaic import Backend
from sharding.context import sequence_shards
from sharding.partition import constrain, on_shards

PLAIN = Recipe()
QUERY_BLOCK = 128
MAX_BLOCKS = 16


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
    ) -> jax.Array:
        """Causal attention within each segment (everything is one segment if None).

        On a mesh that cuts sequences, tokens come in balanced order (sharding/context.py).
        """
        return self.expanded(x_BTD, positions_BT, segments_BT, recipe)[0]

    def expanded(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
        recipe: Recipe = PLAIN,
    ) -> tuple[jax.Array, jax.Array]:
        """Causal attention [B, T, D], and what a cache keeps of these tokens [B, T, L]."""
        c = self.config
        cos_sin = rotation(c, positions_BT)
        q_BTNH = constrain(
            self.queries(x_BTD, *cos_sin, recipe), "batch", "seq", "heads", "head_dim"
        )
        latents_BTL = self.latents(x_BTD, *cos_sin, recipe)
        if sequence_shards() > 1:
            w_ukv_CNH = self.w_ukv[...].astype(x_BTD.dtype)
            form = Form(softmax_scale(c), c.qk_nope_head_dim)
            o_BTNV = context_attention(q_BTNH, latents_BTL, w_ukv_CNH, segments_BT, form)
        elif recipe.kernels.attention != "portable":
            c_kv_BTC, k_rope_BTR = jnp.split(latents_BTL, [c.kv_lora_rank], axis=-1)
            kv_BTNW = self.expand_both(c_kv_BTC, recipe)
            arrays = q_BTNH, kv_BTNW, k_rope_BTR, segments_BT
            o_BTNV = keep(_attend_on_shards(*arrays, softmax_scale(c), recipe.kernels.attention))
        else:
            k_BTNH, v_BTNV = self.keys_values(latents_BTL, recipe)
            o_BTNV = keep(causal_attention(q_BTNH, k_BTNH, v_BTNV, softmax_scale(c), segments_BT))
        return self.output(o_BTNV, recipe), latents_BTL

    def keys_values(self, latents_BTL: jax.Array, recipe: Recipe) -> tuple[jax.Array, jax.Array]:
        """Keys [B, T, N, H] and values [B, T, N, V] of every head (eq. 2-5)."""
        c = self.config
        c_kv_BTC, k_rope_BTR = jnp.split(latents_BTL, [c.kv_lora_rank], axis=-1)
        k_nope, v_BTNV = self.expand(c_kv_BTC, recipe)
        k_rope = jnp.broadcast_to(k_rope_BTR[:, :, None], (*k_nope.shape[:3], c.qk_rope_head_dim))
        k_BTNH = jnp.concatenate([k_nope, k_rope], axis=-1)  # eq. 4
        heads = ("batch", "seq", "heads", "head_dim")
        return constrain(k_BTNH, *heads), constrain(v_BTNV, *heads)

    def absorbed(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        cache_BSL: jax.Array,
        recipe: Recipe = PLAIN,
    ) -> tuple[jax.Array, jax.Array]:
        """The same attention [B, T, D] for T new tokens over a cache, and the cache with them in.

        A token's place in the cache is its position; positions of one row are consecutive. Slots
        beyond a query's own position may hold anything finite. Source: V2 report, section 2.1.2
        (W_UK absorbed by the queries, W_UV by the output).
        """
        c, nope = self.config, self.config.qk_nope_head_dim
        cos_sin = rotation(c, positions_BT)
        q_BTNH = self.queries(x_BTD, *cos_sin, recipe)
        cache_BSL = write_rows(cache_BSL, self.latents(x_BTD, *cos_sin, recipe), positions_BT[:, 0])
        w_ukv = self.w_ukv.get_value()
        w_uk_NCH, w_uv_NCV = w_ukv if isinstance(w_ukv, tuple) else split_heads_first(w_ukv, nope)
        q_BNTC = jnp.einsum("BTNH,NCH->BNTC", q_BTNH[..., :nope], w_uk_NCH.astype(x_BTD.dtype))
        q_rope = jnp.swapaxes(q_BTNH[..., nope:], 1, 2)
        q_BNTL = jnp.concatenate([q_BNTC, q_rope], axis=-1)
        q_BNTL = constrain(q_BNTL, "batch", "heads", "seq", None)
        if recipe.kernels.decode != "portable":
            arrays = q_BNTL, cache_BSL, positions_BT[:, -1] + 1
            sizes = softmax_scale(c), c.kv_lora_rank
            o_BNTC = _decode_on_shards(*arrays, *sizes, recipe.kernels.decode)
        else:
            seen_BTS = jnp.arange(cache_BSL.shape[1]) <= positions_BT[:, :, None]
            o_BNTL = _attend(q_BNTL, cache_BSL, softmax_scale(c), seen_BTS)
            o_BNTC = o_BNTL[..., : c.kv_lora_rank]
        o_BTNV = jnp.einsum("BNTC,NCV->BTNV", o_BNTC, w_uv_NCV.astype(x_BTD.dtype))
        return self.output(o_BTNV, recipe), cache_BSL

    def expand(self, c_kv_BTC: jax.Array, recipe: Recipe) -> tuple[jax.Array, jax.Array]:
        """Keys without rotation [B, T, N, nope] and values [B, T, N, V] of latents (eq. 2, 5)."""
        if isinstance(self.w_ukv.get_value(), tuple):
            w_uk_NCH, w_uv_NCV = (w.astype(c_kv_BTC.dtype) for w in self.w_ukv.get_value())
            k_nope = jnp.einsum("BTC,NCH->BTNH", c_kv_BTC, w_uk_NCH)
            return k_nope, jnp.einsum("BTC,NCV->BTNV", c_kv_BTC, w_uv_NCV)
        kv = project("BTC,CNH->BTNH", c_kv_BTC, self.w_ukv, recipe)  # per head [k_nope | v]
        return kv[..., : self.config.qk_nope_head_dim], kv[..., self.config.qk_nope_head_dim :]

    def expand_both(self, c_kv_BTC: jax.Array, recipe: Recipe) -> jax.Array:
        """Per head its key without rotation, then its value [B, T, N, W] (eq. 2, 5)."""
        if isinstance(self.w_ukv.get_value(), tuple):
            return jnp.concatenate(self.expand(c_kv_BTC, recipe), axis=-1)
        kv_BTNW = project("BTC,CNH->BTNH", c_kv_BTC, self.w_ukv, recipe)
        return constrain(kv_BTNW, "batch", "seq", "heads", "head_dim")

    def queries(
        self, x_BTD: jax.Array, cos_BTJ: jax.Array, sin_BTJ: jax.Array, recipe: Recipe
    ) -> jax.Array:
        """Queries of every head, nope channels then rotated ones [B, T, N, H]."""
        c, nope = self.config, self.config.qk_nope_head_dim
        if c.q_lora_rank is None:
            q_BTNH = project("BTD,DNH->BTNH", from_stream(x_BTD), self.w_q, recipe)
        else:
            c_q_BTC = from_stream(self.q_norm(self._down(x_BTD, self.w_dq, recipe)))  # eq. 6
            q_BTNH = project("BTC,CNH->BTNH", c_q_BTC, self.w_uq, recipe)  # eq. 7, 8
        q_rope = rotate(q_BTNH[..., nope:], cos_BTJ, sin_BTJ, c.rope_interleaved)
        return jnp.concatenate([q_BTNH[..., :nope], q_rope], axis=-1)  # eq. 9

    def latents(
        self, x_BTD: jax.Array, cos_BTJ: jax.Array, sin_BTJ: jax.Array, recipe: Recipe
    ) -> jax.Array:
        """Normed key-value latent, then the rotated key that all heads share [B, T, L]."""
        c = self.config
        down_BTL = self._down(x_BTD, self.w_dkv, recipe)  # eq. 1 and the key of eq. 3
        c_kv_BTC = self.kv_norm(down_BTL[..., : c.kv_lora_rank])
        # One rotary key per token, not normalised.
        k_rope = down_BTL[..., None, c.kv_lora_rank :]
        k_rope = rotate(k_rope, cos_BTJ, sin_BTJ, c.rope_interleaved)
        return from_stream(jnp.concatenate([c_kv_BTC, k_rope[:, :, 0]], axis=-1))

    def _down(self, x_BTD: jax.Array, w_DC: nnx.Param, recipe: Recipe) -> jax.Array:
        """A down-projection; with sequence parallelism each device has its own tokens."""
        down_BTC = project("BTD,DC->BTC", x_BTD, w_DC, recipe, tokens="stream")
        return keep(constrain(down_BTC, "batch", "stream", None))

    def output(self, o_BTNV: jax.Array, recipe: Recipe) -> jax.Array:
        """Outputs of the heads to the residual stream (eq. 11)."""
        o_BTNV = constrain(o_BTNV, "batch", "seq", "heads", "head_dim")
        return to_stream(project("BTNV,NVD->BTD", o_BTNV, self.w_o, recipe))


def _attend_on_shards(q_BTNH, kv_BTNW, k_rope_BTR, segments_BT, scale: float, backend: Backend):
    """Expanded attention [B, T, N, V] by a kernel, which sees one device's rows and heads."""
    heads, tokens = ("batch", "seq", "heads", "head_dim"), ("batch", "seq")
    arrays, names = [q_BTNH, kv_BTNW, k_rope_BTR], [heads, heads, (*tokens, None)]
    if segments_BT is not None:
        arrays, names = [*arrays, starts_of_segments(segments_BT)], [*names, tokens]

    def on_shard(q_BTNH, kv_BTNW, k_rope_BTR, start_BT=None):
        out = mla_attention(q_BTNH, kv_BTNW, k_rope_BTR, start_BT, scale=scale, backend=backend)
        return (out,)

    return on_shards(on_shard, tuple(names), (heads,))(*arrays)[0]


def _decode_on_shards(
    q_BNTL, cache_BSL, lengths_B, scale: float, latent: int, backend: Backend
) -> jax.Array:
    """Absorbed attention [B, N, T, C] by a kernel, which sees one device's rows and heads."""
    heads = ("batch", "heads", "seq", None)

    def on_shard(q_BNTL, cache_BSL, lengths_B):
        q_BTNL = jnp.swapaxes(q_BNTL, 1, 2)
        o_BTNC = mla_decode(
            q_BTNL, cache_BSL, lengths_B, scale=scale, latent=latent, backend=backend
        )
        return (jnp.swapaxes(o_BTNC, 1, 2),)

    names = heads, ("batch", None, None), ("batch",)
    return on_shards(on_shard, names, (heads,))(q_BNTL, cache_BSL, lengths_B)[0]


def split_heads_first(w_CNH: jax.Array, nope: int) -> tuple[jax.Array, jax.Array]:
    """W_UK [N, C, nope] and W_UV [N, C, V] of `w_ukv`: as products per head read them.

    `w_ukv` may hold this pair instead of one array, so that decoding copies it once and not at
    every step.
    """
    w_NCH = jnp.moveaxis(w_CNH, 1, 0)
    return w_NCH[..., :nope], w_NCH[..., nope:]


def _attend(q_BNTL: jax.Array, cache_BSL: jax.Array, scale: float, seen_BTS: jax.Array):
    """softmax(q cache^T * scale) cache [B, N, T, L], fp32 softmax over the slots that are seen.

    The rotary key takes part in the sum too: a slice of the cache would be a copy of it. Heads and
    tokens are one axis in both products, or XLA:CPU transposes the cache for each.
    """
    B, N, T, L = q_BNTL.shape
    logits_BMS = jnp.einsum(
        "BML,BSL->BMS",
        q_BNTL.reshape(B, N * T, L),
        cache_BSL,
        preferred_element_type=jnp.float32,
    )
    logits_BNTS = scale * logits_BMS.reshape(B, N, T, -1)
    p_BNTS = masked_softmax(logits_BNTS, seen_BTS[:, None]).astype(q_BNTL.dtype)
    return jnp.einsum("BMS,BSL->BML", p_BNTS.reshape(B, N * T, -1), cache_BSL).reshape(B, N, T, L)


def write_rows(cache_BSL: jax.Array, new_BTL: jax.Array, start_B: jax.Array) -> jax.Array:
    """A cache with T new entries per row, the first of row b at slot start[b]."""
    put = jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice(row, new, (start, 0)))
    cache_BSL = put(cache_BSL, new_BTL.astype(cache_BSL.dtype), start_B)
    return constrain(cache_BSL, "batch", None, None)


def causal_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNV: jax.Array,
    scale: float,
    segments_BT: jax.Array | None,
) -> jax.Array:
    """softmax(q k^T * scale) v with a causal mask, fp32 softmax -> [B, T, N, V].

    Queries are taken in blocks, each against the keys up to its own end only: about half of the
    products of the full square are never computed, and no T x T array exists.
    """
    T = q_BTNH.shape[1]
    block = max(QUERY_BLOCK, -(-T // MAX_BLOCKS))
    outputs = []
    for start in range(0, T, block):
        end = min(start + block, T)
        logits_BNTS = scale * jnp.einsum(
            "BTNH,BSNH->BNTS",
            q_BTNH[:, start:end],
            k_BTNH[:, :end],
            preferred_element_type=jnp.float32,
        )
        mask = (jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :])[None, None]
        if segments_BT is not None:
            same = segments_BT[:, start:end, None] == segments_BT[:, None, :end]
            mask = mask & same[:, None]
        p_BNTS = masked_softmax(logits_BNTS, mask).astype(v_BTNV.dtype)
        outputs.append(jnp.einsum("BNTS,BSNV->BTNV", p_BNTS, v_BTNV[:, :end]))
    return jnp.concatenate(outputs, axis=1)


@jax.custom_vjp
def masked_softmax(logits_BNTS: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis of the entries where `mask`, others 0; no row may be all masked.

    For the backward pass it keeps its result and nothing else: logits, mask and exponentials of
    every layer would be the largest arrays of training at short sequences.
    """
    return jax.nn.softmax(jnp.where(mask, logits_BNTS, -jnp.inf), axis=-1)


def _masked_softmax_fwd(logits_BNTS, mask):
    p_BNTS = masked_softmax(logits_BNTS, mask)
    return p_BNTS, p_BNTS


def _masked_softmax_bwd(p_BNTS, dp_BNTS):
    mean_BNT1 = jnp.sum(p_BNTS * dp_BNTS, axis=-1, keepdims=True)
    return p_BNTS * (dp_BNTS - mean_BNT1), None


masked_softmax.defvjp(_masked_softmax_fwd, _masked_softmax_bwd)
