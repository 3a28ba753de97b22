"""Multi-head latent attention, expanded form (V3 report, eq. 1-11; V2 report, section 2.1).

Letters: B batch, T query and S key positions, D hidden width, C latent width, N heads,
H query/key channels (nope then rope), R rope channels, V value channels.
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
        q_BTNH, k_BTNH, v_BTNV = self.expand(x_BTD, positions_BT)
        scale = softmax_scale(self.config)
        o_BTNV = keep(causal_attention(q_BTNH, k_BTNH, v_BTNV, scale, segments_BT))
        # y[B, T, D]{U_tp} -> AllReduce_tp -> y[B, T, D]
        return constrain(project("BTNV,NVD->BTD", o_BTNV, self.w_o), "batch", "seq", "embed")

    def expand(self, x_BTD, positions_BT) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys [B, T, N, H] and values [B, T, N, V] of every head."""
        c, nope = self.config, self.config.qk_nope_head_dim
        cos, sin = rotation(c, positions_BT)
        if c.q_lora_rank is None:
            q_BTNH = project("BTD,DNH->BTNH", x_BTD, self.w_q)
        else:
            down_BTC = keep(project("BTD,DC->BTC", x_BTD, self.w_dq))
            c_q_BTC = self.q_norm(down_BTC)  # eq. 6
            q_BTNH = project("BTC,CNH->BTNH", c_q_BTC, self.w_uq)  # eq. 7, 8
        q_rope = rotate(q_BTNH[..., nope:], cos, sin, c.rope_interleaved)
        q_BTNH = jnp.concatenate([q_BTNH[..., :nope], q_rope], axis=-1)  # eq. 9

        down_BTC = keep(project("BTD,DC->BTC", x_BTD, self.w_dkv))  # eq. 1 and the key of eq. 3
        c_kv_BTC = self.kv_norm(down_BTC[..., : c.kv_lora_rank])
        # One rotary key per token, not normalised, shared by all heads.
        k_rope = rotate(down_BTC[..., None, c.kv_lora_rank :], cos, sin, c.rope_interleaved)
        kv = project("BTC,CNH->BTNH", c_kv_BTC, self.w_ukv)  # eq. 2, 5: per head [k_nope | v]
        k_rope = jnp.broadcast_to(k_rope, (*kv.shape[:3], c.qk_rope_head_dim))
        k_BTNH = jnp.concatenate([kv[..., :nope], k_rope], axis=-1)  # eq. 4

        def heads(x):
            return constrain(x, "batch", "seq", "heads", "head_dim")

        return heads(q_BTNH), heads(k_BTNH), heads(kv[..., nope:])


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
