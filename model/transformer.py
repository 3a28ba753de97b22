"""DeepSeek-V3: embedding, dense layers, scanned MoE layers, multi-token prediction, head.

A model without experts is the same with its dense layers in the place of the MoE layers.

Letters: B batch, T sequence, D hidden width, V vocabulary, L layers, E experts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.grouped import GroupedAttention
from model.layers import RMSNorm, SwiGLU, project, scan_layers, stack, weight
from model.mla import MLA
from model.moe import MoE, MoEStats, Routed
from model.recipe import Recipe
from sharding.context import balance, restore
from sharding.held import master
from sharding.partition import constrain, on_shards, shard_index, sum_over


class Tokens(NamedTuple):
    """A batch as the model reads it."""

    ids_BT: jax.Array
    """Token ids, int32."""
    positions_BT: jax.Array
    """Position of each token for RoPE, int32."""
    segments_BT: jax.Array | None
    """Document of each token, 0 for padding; None: one document, nothing padded."""
    beside: Any = None
    """What else a model reads for its input vectors (`DeepSeekV3.inputs`): a tree of arrays."""

    @property
    def valid_BT(self) -> jax.Array:
        """1.0 for tokens, 0.0 for padding, fp32."""
        if self.segments_BT is None:
            return jnp.ones(self.ids_BT.shape, jnp.float32)
        return (self.segments_BT > 0).astype(jnp.float32)


class Output(NamedTuple):
    """Result of a forward pass."""

    hidden_BTD: jax.Array
    """Last hidden state after the final norm; the head's input."""
    mtp_hidden: tuple[jax.Array, ...]
    """Per MTP module, its normed output [B, T, D]: the head's input for the token 2, 3.. ahead."""
    stats: MoEStats | None
    """Statistics of every MoE layer, stacked [L]; MTP modules last. None for a dense model."""


ATTENTION: dict[str, Callable[[ModelConfig, nnx.Rngs], Any]] = {
    "mla": MLA,
    "grouped": GroupedAttention,
}
"""Kinds of `ModelConfig.attention`."""


class Block(nnx.Module):
    """Pre-norm decoder layer: attention, then a dense MLP or experts."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, moe: bool):
        size, eps = config.hidden_size, config.norm_eps
        self.attn_norm = RMSNorm(size, eps)
        self.attn = ATTENTION[config.attention](config, rngs)
        self.ffn_norm = RMSNorm(size, eps)
        if moe:
            self.moe = MoE(config, rngs)
        else:
            self.mlp = SwiGLU(rngs, size, config.dense_ffn_size, config.init_std)
        self.has_experts = moe

    def __call__(
        self,
        x_BTD: jax.Array,
        tokens: Tokens,
        recipe: Recipe,
        replayed_BTK: jax.Array | None = None,
    ):
        """Next hidden state [B, T, D] and the layer's MoEStats (None for a dense layer)."""
        normed_BTD = self.attn_norm(x_BTD)
        y_BTD, _ = self.attn(normed_BTD, tokens.positions_BT, tokens.segments_BT, recipe)
        x_BTD = x_BTD + y_BTD
        return self.feed_forward(x_BTD, tokens.valid_BT, recipe, replayed_BTK)

    def feed_forward(
        self,
        x_BTD: jax.Array,
        valid_BT: jax.Array,
        recipe: Recipe,
        replayed_BTK: jax.Array | None = None,
        routed: Routed | None = None,
    ):
        """The block's second half: MLP or experts on the residual stream after attention."""
        normed_BTD = self.ffn_norm(x_BTD)
        if not self.has_experts:
            return x_BTD + self.mlp(normed_BTD, recipe), None
        y_BTD, stats = self.moe(normed_BTD, valid_BT, recipe, replayed_BTK, routed)
        return x_BTD + y_BTD, stats


class Embedding(nnx.Module):
    """Token embedding table; MTP modules read the same one."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.table = weight(rngs, shape, ("vocab", "embed"), config.init_std)

    def __call__(self, ids_BT: jax.Array, recipe: Recipe) -> jax.Array:
        tokens = ("batch", "seq")
        look_up = partial(_look_up, recipe.activation_dtype)
        run = on_shards(look_up, (("vocab", "embed"), tokens), ((*tokens, "embed"),))
        return constrain(run(master(self.table.get_value()), ids_BT)[0], "batch", "stream", "embed")


def _look_up(dtype: jnp.dtype, table_VD: jax.Array, ids_BT: jax.Array) -> tuple[jax.Array]:
    """Rows of a table of which this device holds a part: x[B, T, D]{U_vocab} -> AllReduce -> x.

    fp32 rows are cast, not the table: so the gradient is added up in fp32. A token that occurs a
    thousand times in a batch adds a thousand terms to its row, and a sum in bf16 stops growing.
    """
    local_BT = ids_BT - shard_index("vocab") * table_VD.shape[0]
    here_BT = (local_BT >= 0) & (local_BT < table_VD.shape[0])
    rows_BTD = table_VD.astype(jnp.float32)[jnp.where(here_BT, local_BT, 0)].astype(dtype)
    return (sum_over(jnp.where(here_BT[..., None], rows_BTD, 0), "vocab"),)


class Head(nnx.Module):
    """Output projection of its own; MTP modules read the same one."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.hidden_size, config.vocab_size)
        self.kernel = weight(rngs, shape, ("embed", "vocab"), config.init_std)


class MTP(nnx.Module):
    """One multi-token prediction module (V3 report, section 2.2, eq. 21-23)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        size, eps = config.hidden_size, config.norm_eps
        self.embed_norm = RMSNorm(size, eps)
        self.hidden_norm = RMSNorm(size, eps)
        shape = (2 * size, size)
        self.proj = Projection(rngs, shape, config.init_std)
        self.block = Block(config, rngs, moe=True)
        self.out_norm = RMSNorm(size, eps)

    def __call__(self, hidden_BTD, embedded_BTD, tokens: Tokens, recipe: Recipe, replayed_BTK=None):
        """Normed hidden state, input of the head and of the next module, and MoEStats.

        `embedded_BTD` holds, at position i, the embedding of the token k ahead. The released
        checkpoints concatenate embedding first, hidden second, unlike the paper's figure. Every
        module reads its predecessor's state after that one's output norm, the main model included.
        """
        x_BTD = self.merge(hidden_BTD, embedded_BTD, recipe)
        x_BTD, stats = self.block(x_BTD, tokens, recipe, replayed_BTK)
        return self.out_norm(x_BTD), stats

    def merge(self, hidden_BTD: jax.Array, embedded_BTD: jax.Array, recipe: Recipe) -> jax.Array:
        """Input of the module's block: both norms and the projection (eq. 21)."""
        pair = jnp.concatenate([self.embed_norm(embedded_BTD), self.hidden_norm(hidden_BTD)], -1)
        merged_BTD = project("BTP,PD->BTD", pair, self.proj.kernel, recipe, tokens="stream")
        return constrain(merged_BTD, "batch", "stream", "embed")


class Projection(nnx.Module):
    """A plain matrix."""

    def __init__(self, rngs: nnx.Rngs, shape: tuple[int, int], std: float):
        self.kernel = weight(rngs, shape, ("embed_pair", "embed_out"), std)


class DeepSeekV3(nnx.Module):
    """The whole model. Layers of one kind are stacked and scanned.

    The stack `config.stack` is the one between `before` and `after`. Without it (`layers` False)
    the two still work.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, layers: bool = True):
        c = config
        self.embed = Embedding(c, rngs)
        counts = {"dense_layers": c.num_dense_layers, "moe_layers": c.num_moe_layers}
        if not layers:
            counts[c.stack] = 0
        self.dense_layers = stack(lambda r: Block(c, r, moe=False), counts["dense_layers"], rngs)
        self.moe_layers = stack(lambda r: Block(c, r, moe=True), counts["moe_layers"], rngs)
        self.final_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.head = None if c.tie_embeddings else Head(c, rngs)
        self.mtp = stack(lambda r: MTP(c, r), c.mtp_depth, rngs)
        self.config = c

    def __call__(
        self, tokens: Tokens, recipe: Recipe, next_ids_BT: jax.Array | None = None
    ) -> Output:
        """Hidden states of all positions.

        `next_ids_BT` is the token after each position (the targets); with it the MTP modules run.
        On a mesh that cuts sequences, all arrays are in balanced order (sharding/context.py).
        """
        if next_ids_BT is None or self.mtp is None:
            return self.forward(tokens, recipe, None)
        return self.forward(tokens, recipe, ids_ahead(next_ids_BT, self.config.mtp_depth))

    def forward(
        self,
        tokens: Tokens,
        recipe: Recipe,
        ahead_KBT: jax.Array | None,
        replayed_LBTK: jax.Array | None = None,
    ) -> Output:
        """The same, with what MTP module k reads at hand: the token k ahead, k = 1 .. K.

        `replayed_LBTK` are the experts that the tokens of every MoE layer keep to: of the main
        model's, and behind them of the MTP modules', which may be left out.
        """
        x_BTD, of_mtp = self.before(tokens, recipe), None
        if replayed_LBTK is not None:
            replayed_LBTK, of_mtp = jnp.split(replayed_LBTK, [self.config.num_moe_layers])
        (x_BTD,), (layer_stats,) = self.between((x_BTD,), (tokens,), recipe, replayed_LBTK)
        output = self.after(x_BTD, tokens, recipe, ahead_KBT, of_mtp)
        stats = [part for part in (layer_stats, output.stats) if part is not None]
        merged = jax.tree.map(lambda *a: jnp.concatenate(a), *stats) if stats else None
        return output._replace(stats=merged)

    def inputs(self, tokens: Tokens, recipe: Recipe) -> jax.Array:
        """Input of the first layer [B, T, D]; a model that reads more than ids overrides it."""
        return self.embed(tokens.ids_BT, recipe)

    def before(self, tokens: Tokens, recipe: Recipe) -> jax.Array:
        """Input of the stack [B, T, D]: embedding, and the dense layers of a model with experts."""
        return self.dense(self.inputs(tokens, recipe), tokens, recipe)

    def dense(self, x_BTD: jax.Array, tokens: Tokens, recipe: Recipe) -> jax.Array:
        """The dense layers before the stack, of the embedding."""
        if self.dense_layers is not None and self.config.stack != "dense_layers":
            apply, unroll = _one_layer(tokens, recipe), recipe.unroll
            x_BTD, _ = scan_layers(self.dense_layers, x_BTD, apply, unroll=unroll)
        return x_BTD

    def between(
        self,
        xs: tuple[jax.Array, ...],
        tokens: tuple[Tokens, ...],
        recipe: Recipe,
        replayed_LBTK: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, ...], tuple[MoEStats | None, ...]]:
        """The stack, for micro batches side by side; statistics are stacked [L] for each, None
        without experts.

        Every layer is computed for all of them before the next: what one exchanges with other
        devices can travel while another is computed.
        """
        applies = [_one_layer(tokens_of_one, recipe) for tokens_of_one in tokens]
        assert replayed_LBTK is None or len(xs) == 1

        def apply(layer: Block, xs, *replayed_BTK):
            pairs = [
                apply(layer, x_BTD, *replayed_BTK) for apply, x_BTD in zip(applies, xs, strict=True)
            ]
            ys, stats = zip(*pairs, strict=True)
            return ys, stats

        layers = getattr(self, self.config.stack)
        inputs = () if replayed_LBTK is None else (replayed_LBTK,)
        return scan_layers(layers, xs, apply, *inputs, unroll=recipe.unroll)

    def head_kernel(self) -> jax.Array:
        """The output projection [D, V], fp32: the head's, or the transposed embedding table."""
        if self.head is not None:
            return master(self.head.kernel.get_value())
        return constrain(master(self.embed.table.get_value()).T, "embed", "vocab")

    def after(
        self,
        x_BTD: jax.Array,
        tokens: Tokens,
        recipe: Recipe,
        ahead: jax.Array | None,
        replayed_KBTK: jax.Array | None = None,
    ) -> Output:
        """Output for the last layer's result; its statistics are those of the MTP modules.

        `ahead` is what these read, the tokens [K, B, T] or their embeddings [K, B, T, D].
        """
        hidden_BTD = self.final_norm(x_BTD)
        if self.mtp is None or ahead is None:
            return Output(hidden_BTD, (), None)
        replays = replayed_KBTK is not None and len(replayed_KBTK) > 0
        inputs = (ahead, replayed_KBTK) if replays else (ahead,)
        mtp_hidden, stats = self._predict_ahead(hidden_BTD, inputs, tokens, recipe)
        return Output(hidden_BTD, mtp_hidden, stats)

    def _predict_ahead(self, hidden_BTD, inputs, tokens: Tokens, recipe: Recipe):
        """Run the MTP modules one after the other; module k reads the token k ahead (eq. 21).

        `inputs` are what they read and, where they are replayed, the experts of every module.
        """

        @recipe.rematerialize
        def apply(module: MTP, hidden_BTD, ahead, *replayed_BTK):
            embedded_BTD = ahead if ahead.ndim == hidden_BTD.ndim else self.embed(ahead, recipe)
            hidden_BTD, stats = module(hidden_BTD, embedded_BTD, tokens, recipe, *replayed_BTK)
            return hidden_BTD, (hidden_BTD, stats)

        assert self.mtp is not None
        _, (hidden, stats) = scan_layers(self.mtp, hidden_BTD, apply, *inputs, unroll=recipe.unroll)
        return tuple(hidden), stats


def ids_ahead(next_ids_BT: jax.Array, depth: int) -> jax.Array:
    """What MTP modules 1..depth read: the token k ahead of every position [K, B, T].

    What enters at the end has no target and no weight.
    """
    text_BT = restore(next_ids_BT)
    shifted = (jnp.pad(text_BT[:, k:], ((0, 0), (0, k))) for k in range(depth))
    return jnp.stack([balance(ids_BT) for ids_BT in shifted])


def _one_layer(tokens: Tokens, recipe: Recipe):
    """One step of a scan over layers, with the recipe's recomputation."""

    @recipe.rematerialize
    def apply(layer: Block, x_BTD: jax.Array, *replayed_BTK: jax.Array):
        return layer(x_BTD, tokens, recipe, *replayed_BTK)

    return apply
