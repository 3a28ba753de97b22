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
from model.layers import LATENT_EPS, RMSNorm, project, weight
from model.recipe import keep
from model.rope import rotate, rotation, softmax_scale
from sharding.partition import constrain

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
        self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None
    ) -> jax.Array:
        """Causal attention within each segment (everything is one segment if None)."""
        return self.expanded(x_BTD, positions_BT, segments_BT)[0]

    def expanded(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Causal attention [B, T, D], and what a cache keeps of these tokens [B, T, L]."""
        c, nope = self.config, self.config.qk_nope_head_dim
        cos_sin = rotation(c, positions_BT)
        q_BTNH = self.queries(x_BTD, *cos_sin)
        latents_BTL = self.latents(x_BTD, *cos_sin)
        c_kv_BTC, k_rope_BTR = jnp.split(latents_BTL, [c.kv_lora_rank], axis=-1)
        kv = project("BTC,CNH->BTNH", c_kv_BTC, self.w_ukv)  # eq. 2, 5: per head [k_nope | v]
        k_rope = jnp.broadcast_to(k_rope_BTR[:, :, None], (*kv.shape[:3], c.qk_rope_head_dim))
        k_BTNH = jnp.concatenate([kv[..., :nope], k_rope], axis=-1)  # eq. 4

        def heads(x):
            return constrain(x, "batch", "seq", "heads", "head_dim")

        q_BTNH, k_BTNH, v_BTNV = heads(q_BTNH), heads(k_BTNH), heads(kv[..., nope:])
        o_BTNV = keep(causal_attention(q_BTNH, k_BTNH, v_BTNV, softmax_scale(c), segments_BT))
        return self.output(o_BTNV), latents_BTL

    def absorbed(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cache_BSL: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The same attention [B, T, D] for T new tokens over a cache, and the cache with them in.

        A token's place in the cache is its position; positions of one row are consecutive. Slots
        beyond a query's own position may hold anything finite. Source: V2 report, section 2.1.2
        (W_UK absorbed by the queries, W_UV by the output).
        """
        c, nope = self.config, self.config.qk_nope_head_dim
        cos_sin = rotation(c, positions_BT)
        q_BTNH = self.queries(x_BTD, *cos_sin)
        cache_BSL = _write(cache_BSL, self.latents(x_BTD, *cos_sin), positions_BT[:, 0])
        w_ukv = self.w_ukv[...].astype(x_BTD.dtype)
        q_BTNC = jnp.einsum("BTNH,CNH->BTNC", q_BTNH[..., :nope], w_ukv[..., :nope])
        q_BTNL = jnp.concatenate([q_BTNC, q_BTNH[..., nope:]], axis=-1)
        q_BTNL = constrain(q_BTNL, "batch", "seq", "heads", None)
        logits_BNTS = softmax_scale(c) * jnp.einsum(
            "BTNL,BSL->BNTS", q_BTNL, cache_BSL, preferred_element_type=jnp.float32
        )
        seen_BTS = jnp.arange(cache_BSL.shape[1]) <= positions_BT[:, :, None]
        p_BNTS = masked_softmax(logits_BNTS, seen_BTS[:, None]).astype(x_BTD.dtype)
        # Over whole cache rows, rotary key included: a slice of the cache would be a copy of it.
        o_BTNL = jnp.einsum("BNTS,BSL->BTNL", p_BNTS, cache_BSL)
        o_BTNV = jnp.einsum("BTNC,CNV->BTNV", o_BTNL[..., : c.kv_lora_rank], w_ukv[..., nope:])
        return self.output(o_BTNV), cache_BSL

    def queries(self, x_BTD: jax.Array, cos_BTJ: jax.Array, sin_BTJ: jax.Array) -> jax.Array:
        """Queries of every head, nope channels then rotated ones [B, T, N, H]."""
        c, nope = self.config, self.config.qk_nope_head_dim
        if c.q_lora_rank is None:
            q_BTNH = project("BTD,DNH->BTNH", x_BTD, self.w_q)
        else:
            down_BTC = keep(project("BTD,DC->BTC", x_BTD, self.w_dq))
            c_q_BTC = self.q_norm(down_BTC)  # eq. 6
            q_BTNH = project("BTC,CNH->BTNH", c_q_BTC, self.w_uq)  # eq. 7, 8
        q_rope = rotate(q_BTNH[..., nope:], cos_BTJ, sin_BTJ, c.rope_interleaved)
        return jnp.concatenate([q_BTNH[..., :nope], q_rope], axis=-1)  # eq. 9

    def latents(self, x_BTD: jax.Array, cos_BTJ: jax.Array, sin_BTJ: jax.Array) -> jax.Array:
        """Normed key-value latent, then the rotated key that all heads share [B, T, L]."""
        c = self.config
        down_BTL = keep(project("BTD,DC->BTC", x_BTD, self.w_dkv))  # eq. 1 and the key of eq. 3
        c_kv_BTC = self.kv_norm(down_BTL[..., : c.kv_lora_rank])
        # One rotary key per token, not normalised.
        k_rope = down_BTL[..., None, c.kv_lora_rank :]
        k_rope = rotate(k_rope, cos_BTJ, sin_BTJ, c.rope_interleaved)
        return jnp.concatenate([c_kv_BTC, k_rope[:, :, 0]], axis=-1)

    def output(self, o_BTNV: jax.Array) -> jax.Array:
        """Outputs of the heads to the residual stream (eq. 11)."""
        # y[B, T, D]{U_tp} -> AllReduce_tp -> y[B, T, D]
        return constrain(project("BTNV,NVD->BTD", o_BTNV, self.w_o), "batch", "seq", "embed")


def _write(cache_BSL: jax.Array, new_BTL: jax.Array, start_B: jax.Array) -> jax.Array:
    """The cache with T new entries per row, the first of row b at slot start[b]."""
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
