"""Attention whose heads of keys and values are shared by groups of queries (GQA, arXiv 2305.13245).

One key head is multi-query attention, as many as there are queries the plain kind. RoPE turns whole
heads. Where `tensor` has more shards than there are key heads, every device holds all of them and
takes those of its own queries.

Letters: B batch, T query and S key positions, D hidden width, N heads, K heads of keys and values,
H channels of a head, L = 2 H channels of a slot of the cache: value, then key.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.context_attention import context_attention
from model.layers import RMSNorm, from_stream, project, to_stream, weight
from model.recipe import KEPT, PLAIN, Recipe
from model.rope import rotate, rotation, softmax_scale
from pallas_kernels.attention import grouped_attention, starts_of_segments
from pallas_kernels.decode import grouped_decode
from pallas_kernels.mosaic import Backend
from sharding.context import sequence_shards
from sharding.partition import as_cut, constrain, on_shards, shard_index, sum_over

HEADS = ("batch", "seq", "heads", "head_dim")
"""Logical axes of what every head has."""
KEY_HEADS = ("batch", "seq", "kv_heads", "head_dim")
"""Logical axes of keys and values."""
CACHE = ("batch", "kv_heads", None, None)
"""Logical axes of the cache [B, K, S, L]."""


class GroupedAttention(nnx.Module):
    """Attention over K heads of keys and values, each read by N / K heads of queries."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c, std = config, config.init_std
        D, N, K, H = c.hidden_size, c.num_heads, c.num_kv_heads, c.qk_head_dim
        shapes = {"q": ((N, H), "heads"), "k": ((K, H), "kv_heads"), "v": ((K, H), "kv_heads")}
        for name, (shape, heads) in shapes.items():
            axes = ("embed", heads, "head_dim")
            setattr(self, f"w_{name}", weight(rngs, (D, *shape), axes, std))
            if c.qkv_bias:
                zeros = jnp.zeros(shape)
                bias = nnx.Param(zeros, out_sharding=axes[1:], eager_sharding=False)
                setattr(self, f"b_{name}", bias)
        self.q_norm = RMSNorm(H, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(H, c.norm_eps) if c.qk_norm else None
        self.w_o = weight(rngs, (N, H, D), ("heads", "head_dim", "embed"), std)
        self.config = config

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
        recipe: Recipe = PLAIN,
    ) -> jax.Array:
        """Causal attention [B, T, D] within each segment (everything is one segment if None).

        On a mesh that cuts sequences, tokens come in balanced order (sharding/context.py).
        """
        return self._attend(self.heads(x_BTD, positions_BT, recipe), segments_BT, recipe)

    def expanded(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
        recipe: Recipe = PLAIN,
    ) -> tuple[jax.Array, jax.Array]:
        """Causal attention [B, T, D], and what a cache keeps of these tokens [B, K, T, L]."""
        heads = self.heads(x_BTD, positions_BT, recipe)
        return self._attend(heads, segments_BT, recipe), _slots(*heads[1:])

    def over_cache(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        cache_BKSL: jax.Array,
        halves: None,
        recipe: Recipe = PLAIN,
    ) -> tuple[jax.Array, jax.Array]:
        """Attention [B, T, D] of T new tokens over a cache, and the cache with them in.

        A token's place in the cache is its position; positions of one row are consecutive. Slots
        beyond a query's own position may hold anything finite. There are no `halves` here.
        """
        q_BTNH, *kv = self.heads(x_BTD, positions_BT, recipe)
        put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (0, at, 0)))
        new_BKTL = _slots(*kv).astype(cache_BKSL.dtype)
        cache_BKSL = constrain(put(cache_BKSL, new_BKTL, positions_BT[:, 0]), *CACHE)
        arrays = q_BTNH, cache_BKSL, positions_BT[:, -1] + 1
        o_BTNH = _decode_on_shards(*arrays, softmax_scale(self.config), recipe.kernels.decode)
        return self.output(o_BTNH, recipe), cache_BKSL

    def _attend(self, heads, segments_BT: jax.Array | None, recipe: Recipe) -> jax.Array:
        q_BTNH, k_BTKH, v_BTKH = heads
        scale = softmax_scale(self.config)
        if sequence_shards() > 1:
            form = Form(scale, self.config.num_heads, as_cut(KEY_HEADS, k_BTKH.shape))
            o_BTNH = context_attention(q_BTNH, (k_BTKH, v_BTKH), (), segments_BT, form)
        else:
            arrays = q_BTNH, k_BTKH, v_BTKH, segments_BT
            o_BTNH = _attend_on_shards(*arrays, scale, recipe.kernels.attention)
        return self.output(o_BTNH, recipe)

    def heads(
        self, x_BTD: jax.Array, positions_BT: jax.Array, recipe: Recipe
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H]; queries and keys are rotated."""
        cos_sin, x_BTD = rotation(self.config, positions_BT), from_stream(x_BTD)

        def turned(name: str, norm: RMSNorm | None, axes: tuple[str, ...]) -> jax.Array:
            x_BTNH = self._project(x_BTD, name, axes, recipe)
            x_BTNH = x_BTNH if norm is None else norm(x_BTNH)
            return constrain(rotate(x_BTNH, *cos_sin, self.config.rope_interleaved), *axes)

        queries, keys = turned("q", self.q_norm, HEADS), turned("k", self.k_norm, KEY_HEADS)
        return queries, keys, self._project(x_BTD, "v", KEY_HEADS, recipe)

    def _project(self, x_BTD, name: str, axes: tuple[str, ...], recipe: Recipe) -> jax.Array:
        """A projection to heads with its bias, if there is one."""
        x_BTNH = project("BTD,DNH->BTNH", x_BTD, getattr(self, f"w_{name}"), recipe)
        if self.config.qkv_bias:
            x_BTNH = x_BTNH + getattr(self, f"b_{name}")[...].astype(x_BTNH.dtype)
        return constrain(x_BTNH, *axes)

    def output(self, o_BTNH: jax.Array, recipe: Recipe) -> jax.Array:
        """Outputs of the heads to the residual stream."""
        o_BTNH = constrain(o_BTNH, *HEADS)
        return to_stream(project("BTNH,NHD->BTD", o_BTNH, self.w_o, recipe))


def _attend_on_shards(q_BTNH, k_BTKH, v_BTKH, segments_BT, scale: float, backend: Backend):
    """Attention [B, T, N, H], each device on its own rows and heads."""
    total, keys = q_BTNH.shape[2], as_cut(KEY_HEADS, k_BTKH.shape)
    arrays, names = (q_BTNH, k_BTKH, v_BTKH), (HEADS, keys, keys)
    if segments_BT is not None:
        arrays, names = (*arrays, segments_BT), (*names, ("batch", "seq"))

    def on_shard(q_BTNH, k_BTKH, v_BTKH, segments_BT=None):
        start_BT = None if segments_BT is None else starts_of_segments(segments_BT)
        k_BTKH, v_BTKH = (own_heads(x, q_BTNH.shape[2], total, keys) for x in (k_BTKH, v_BTKH))
        options = {"scale": scale, "backend": backend, "kept": KEPT}
        return (grouped_attention(q_BTNH, k_BTKH, v_BTKH, start_BT, **options),)

    return on_shards(on_shard, names, (HEADS,))(*arrays)[0]


def _slots(k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    """Slots of the cache [B, K, T, L]."""
    return constrain(jnp.concatenate([v_BTKH, k_BTKH], axis=-1).swapaxes(1, 2), *CACHE)


def _decode_on_shards(q_BTNH, cache_BKSL, lengths_B, scale: float, backend: Backend) -> jax.Array:
    """Attention over the cache [B, T, N, H], each device on its own rows and heads."""
    total, cache = q_BTNH.shape[2], as_cut(CACHE, cache_BKSL.shape)

    def on_shard(q_BTNH, cache_BKSL, lengths_B):
        cache_BKSL = own_heads(cache_BKSL, q_BTNH.shape[2], total, cache, axis=1)
        return (grouped_decode(q_BTNH, cache_BKSL, lengths_B, scale=scale, backend=backend),)

    run = on_shards(on_shard, (HEADS, cache, ("batch",)), (HEADS,))
    return run(q_BTNH, cache_BKSL, lengths_B)[0]


def own_heads(kv: jax.Array, here: int, total: int, names, axis: int = 2) -> jax.Array:
    """Of keys (or values, or slots) with these logical axes, heads along `axis`, those that this
    device's `here` of `total` heads of queries read; in a region."""
    if here == total or "kv_heads" in names:
        return kv
    group, first = total // kv.shape[axis], shard_index("heads") * here
    if group % here == 0:
        return jax.lax.dynamic_slice_in_dim(kv, first // group, 1, axis)
    return jnp.take(kv, (first + jnp.arange(here)) // group, axis)


class Form(NamedTuple):
    """What `context_attention` asks: keys and values travel as they are, one set for a group."""

    scale: float
    """Factor on the logits."""
    total: int
    """Heads of queries, on all devices."""
    names: tuple[str | None, ...]
    """Logical axes of keys and values as they are cut."""

    @property
    def sent_names(self):
        """Logical axes of what travels."""
        return self.names, self.names

    @property
    def weight_names(self):
        """Logical axes of what makes keys and values of it: nothing."""
        return ()

    def width(self, sent, weights) -> int:
        """Channels of a value."""
        return sent[1].shape[-1]

    def expand(self, here: int, sent, weights) -> tuple[jax.Array, jax.Array]:
        """Keys and values of this device's `here` heads of queries [B, S, N, H]."""

        def repeated(x_BSKH):
            x_BSKH = own_heads(x_BSKH, here, self.total, self.names)
            return jnp.repeat(x_BSKH, here // x_BSKH.shape[2], axis=2)

        return repeated(sent[0]), repeated(sent[1])

    def summed(self, dx_BTKH: jax.Array) -> jax.Array:
        """Gradients of what travelled, where devices with other heads of queries read it too."""
        return dx_BTKH if "kv_heads" in self.names else sum_over(dx_BTKH, "heads")
