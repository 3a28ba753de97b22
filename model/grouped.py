"""Attention whose heads of keys and values are shared by groups of queries (GQA, arXiv 2305.13245).

One key head is multi-query attention, as many as there are queries the plain kind. RoPE turns whole
heads. Where `tensor` has more shards than there are key heads, every device holds all of them and
takes those of its own queries.

Letters: B batch, T query and S key positions, D hidden width, N heads, K heads of keys and values,
H channels of a head.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.context_attention import context_attention
from model.layers import RMSNorm, from_stream, project, to_stream, weight
from model.recipe import KEPT, PLAIN, Recipe
from model.rope import rotate, rotation, softmax_scale
from pallas_kernels.attention import Stash, grouped_attention, starts_of_segments
from pallas_kernels.decode import grouped_decode, kept, slot_axis
from pallas_kernels.mosaic import Backend
from sharding.context import sequence_shards
from sharding.partition import as_cut, constrain, on_shards, shard_index, sum_over

HEADS = ("batch", "seq", "heads", "head_dim")
"""Logical axes of what every head has."""
KEY_HEADS = ("batch", "seq", "kv_heads", "head_dim")
"""Logical axes of keys and values."""
CACHE = ("batch", "kv_heads", None, None)
"""Logical axes of the cache's arrays (`pallas_kernels/decode/grouped.py:kept`)."""


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
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Causal attention [B, T, D] within each segment (everything is one segment if None), and
        keys and values [B, T, K, H], which a cache keeps.

        On a mesh that cuts sequences, tokens come in balanced order (sharding/context.py).
        """
        q_BTNH, k_BTKH, v_BTKH = self.heads(x_BTD, positions_BT, recipe)
        scale = softmax_scale(self.config)
        if sequence_shards() > 1:
            form = Form(scale, self.config.num_heads, as_cut(KEY_HEADS, k_BTKH.shape), recipe.stash)
            o_BTNH = context_attention(q_BTNH, (k_BTKH, v_BTKH), (), segments_BT, form)
        else:
            arrays = q_BTNH, k_BTKH, v_BTKH, segments_BT
            o_BTNH = _attend_on_shards(*arrays, scale, recipe)
        return self.output(o_BTNH, recipe), (k_BTKH, v_BTKH)

    def cache(
        self, kv: tuple[jax.Array, jax.Array], slots: int, recipe: Recipe
    ) -> tuple[jax.Array, ...]:
        """A cache with room for so many tokens that begins with these keys and values."""
        axis = slot_axis(recipe.kernels.decode)

        def with_room(x: jax.Array) -> jax.Array:
            spare = [(0, slots - x.shape[axis]) if i == axis else (0, 0) for i in range(x.ndim)]
            return constrain(jnp.pad(x, spare), *CACHE)

        return tuple(with_room(x) for x in kept(*kv, recipe.kernels.decode))

    def over_cache(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        cache: tuple[jax.Array, ...],
        halves: None,
        recipe: Recipe = PLAIN,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Attention [B, T, D] of T new tokens over a cache, and the cache with them in.

        A token's place in the cache is its position; positions of one row are consecutive. Slots
        beyond a query's own position may hold anything finite. There are no `halves` here.
        """
        q_BTNH, k_BTKH, v_BTKH = self.heads(x_BTD, positions_BT, recipe)
        backend = recipe.kernels.decode
        put = jax.vmap(
            functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=slot_axis(backend) - 1)
        )
        cache = tuple(
            constrain(put(held, new.astype(held.dtype), positions_BT[:, 0]), *CACHE)
            for held, new in zip(cache, kept(k_BTKH, v_BTKH, backend), strict=True)
        )
        arrays = q_BTNH, cache, positions_BT[:, -1] + 1
        o_BTNH = _decode_on_shards(*arrays, softmax_scale(self.config), backend)
        return self.output(o_BTNH, recipe), cache

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


def _attend_on_shards(q_BTNH, k_BTKH, v_BTKH, segments_BT, scale: float, recipe: Recipe):
    """Attention [B, T, N, H], each device on its own rows and heads."""
    total, keys = q_BTNH.shape[2], as_cut(KEY_HEADS, k_BTKH.shape)
    arrays, names = (q_BTNH, k_BTKH, v_BTKH), (HEADS, keys, keys)
    if segments_BT is not None:
        arrays, names = (*arrays, segments_BT), (*names, ("batch", "seq"))

    def on_shard(q_BTNH, k_BTKH, v_BTKH, segments_BT=None):
        start_BT = None if segments_BT is None else starts_of_segments(segments_BT)
        k_BTKH, v_BTKH = (own_heads(x, q_BTNH.shape[2], total, keys) for x in (k_BTKH, v_BTKH))
        options: Any = {"backend": recipe.kernels.attention, "kept": KEPT, "stash": recipe.stash}
        return (grouped_attention(q_BTNH, k_BTKH, v_BTKH, start_BT, scale=scale, **options),)

    return on_shards(on_shard, names, (HEADS,))(*arrays)[0]


def _decode_on_shards(q_BTNH, cache, lengths_B, scale: float, backend: Backend) -> jax.Array:
    """Attention over the cache [B, T, N, H], each device on its own rows and heads."""
    total, names = q_BTNH.shape[2], as_cut(CACHE, cache[0].shape)

    def on_shard(q_BTNH, lengths_B, *cache):
        own = tuple(own_heads(x, q_BTNH.shape[2], total, names, axis=1) for x in cache)
        return (grouped_decode(q_BTNH, own, lengths_B, scale=scale, backend=backend),)

    run = on_shards(on_shard, (HEADS, ("batch",), *(names for _ in cache)), (HEADS,))
    return run(q_BTNH, lengths_B, *cache)[0]


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
    stash: Stash = ""
    """Type that outputs are held in for the backward pass."""

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

    def pull(self, here: int, sent, weights, dk_BTNH: jax.Array, dv_BTNH: jax.Array):
        """fp32 gradients of what travelled: sums over the queries of a group."""
        whole = tuple(x.astype(jnp.float32) for x in sent)
        return jax.vjp(lambda *sent: self.expand(here, sent, ()), *whole)[1]((dk_BTNH, dv_BTNH)), ()

    def summed(self, dx_BTKH: jax.Array) -> jax.Array:
        """Gradients of what travelled, where devices with other heads of queries read it too."""
        return dx_BTKH if "kv_heads" in self.names else sum_over(dx_BTKH, "heads")
