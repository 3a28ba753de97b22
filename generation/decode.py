"""The model over a latent cache: a prompt at once (expanded), then a few tokens (absorbed).

Here layers are separate modules, not a scanned stack: a scan slices every layer's weights out of
the stack, which is a copy of all experts per token where a token reads eight of them.

Letters: B batch, T prompt, Q new tokens of a row, S slots of the cache, D hidden width,
V vocabulary, L cached channels (latent and rotary key).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.blueprint import Tree, bind_part
from model.config import ModelConfig
from model.mla import split_heads_first
from model.moe import W_IN, W_OUT
from model.recipe import Recipe
from model.replicas import Copies
from model.transformer import MTP, Block
from pallas_kernels.grouped.separate import separate_experts

STACKS = ("dense_layers", "moe_layers", "mtp")
EXPERTS = ("/moe/w_gate", "/moe/w_up", "/moe/w_down")
Cache = list[jax.Array]
"""Per layer [B, S, L]; the MTP module's own last, if it runs."""


def unstack(
    config: ModelConfig,
    params: Tree,
    router_bias: Tree,
    dtype: jnp.dtype,
    consume: bool,
    expert_shards: int | None,
    copies: Copies | None = None,
) -> Tree:
    """{"params", "router_bias", "replicas"} as decoding reads them: lists of layers, not stacks.

    Matrices become `dtype`; router, biases and norms stay fp32. W_UKV is cut into its halves
    (`model/mla.py:split_heads_first`). With `expert_shards`, the number of parts that the mesh
    holds experts in, every expert becomes an array of its own (`separate_experts`). With `copies`
    they are laid out as those, and "replicas" has what each layer's tokens choose by. With
    `consume` every array passed in is freed once its layers exist, so that the peak is one copy and
    the largest stack.
    """
    nope, first_mtp = config.qk_nope_head_dim, config.num_moe_layers

    def convert_leaf(path, stack: jax.Array) -> list[Any]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        exact = name.endswith(("scale", "bias")) or "router/" in name
        kept = stack.dtype if exact else dtype
        if name.split("/")[0] not in STACKS:
            parts = [stack.astype(kept)]
        elif copies is not None and name.endswith(EXPERTS):
            first = first_mtp if name.startswith("mtp") else 0
            names = W_OUT if name.endswith("w_down") else W_IN
            lay_out = functools.partial(copies.weights, names=names, expert_shards=expert_shards)
            parts = [lay_out(stack[i].astype(kept), first + i) for i in range(len(stack))]
        elif expert_shards is not None and name.endswith(EXPERTS):
            parts = [_separate_layer(stack, i, expert_shards, kept) for i in range(len(stack))]
        elif name.endswith("/attn/w_ukv"):
            parts = [_split_ukv(stack, i, nope, kept) for i in range(len(stack))]
        else:
            parts = [stack[i].astype(kept) for i in range(len(stack))]
        if consume and not any(part is stack for part in parts):
            jax.block_until_ready(parts)
            stack.delete()
        return parts

    def layers(name: str, tree: Tree) -> Tree | list[Tree]:
        # Leaves are named from the top of the tree, where the stack's name stands.
        parts = jax.tree_util.tree_map_with_path(convert_leaf, {name: tree})[name]
        is_parts = lambda x: isinstance(x, list)  # noqa: E731
        count = max(map(len, jax.tree.leaves(parts, is_leaf=is_parts)), default=0)
        pick = lambda i: jax.tree.map(lambda p: p[i], parts, is_leaf=is_parts)  # noqa: E731
        return [pick(i) for i in range(count)] if name in STACKS else pick(0)

    def convert(tree: Tree) -> Tree:
        return {name: layers(name, sub) for name, sub in tree.items()}

    replicas = {} if copies is None else _replicas(config, copies)
    return {"params": convert(params), "router_bias": convert(router_bias), "replicas": replicas}


def _replicas(config: ModelConfig, copies: Copies) -> Tree:
    """What the tokens of every MoE layer choose copies by."""
    made = [copies.replicas(i) for i in range(config.num_moe_layers + config.mtp_depth)]
    return {"moe_layers": made[: config.num_moe_layers], "mtp": made[config.num_moe_layers :]}


@functools.partial(jax.jit, static_argnums=(2, 3))
def _split_ukv(stack_LCNH: jax.Array, layer: int, nope: int, dtype: jnp.dtype):
    return split_heads_first(stack_LCNH[layer].astype(dtype), nope)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _separate_layer(stack_LEKN: jax.Array, layer: int, shards: int, dtype: jnp.dtype):
    return separate_experts(stack_LEKN[layer].astype(dtype), shards)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The modules of a model whose layers are apart."""

    embed: Any
    blocks: list[Block]
    final_norm: Any
    head: Any
    mtp: MTP | None
    """The first MTP module."""
    recipe: Recipe
    counts: list[jax.Array] | None = None
    """Where layers leave their tokens per expert until `take_counts`; None: nowhere."""
    routes: list[jax.Array] = dataclasses.field(default_factory=list)
    """Where layers leave the experts of every token, if the recipe asks for them."""

    def logits(self, hidden_BD: jax.Array) -> jax.Array:
        """Main head on normed hidden states, also those of the MTP module; [B, V] fp32."""
        kernel_DV = self.head.kernel[...].astype(hidden_BD.dtype)
        return jnp.einsum("BD,DV->BV", hidden_BD, kernel_DV, preferred_element_type=jnp.float32)

    def prefill(
        self,
        ids_BT: jax.Array,
        positions_BT: jax.Array,
        slots: int,
        valid_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Normed hidden states [B, T, D] of prompts, and their cache with room for `slots` tokens.

        Rows start at position 0 and may be padded at the end: attention is causal, and the slots
        of padding are written again before anything reads them. `valid_BT` is 1.0 for tokens whose
        experts are counted; None: all.
        """
        x_BTD, cache = self.embed(ids_BT, self.recipe), []
        for block in self.blocks:
            x_BTD, entries_BSL = self._prefill_block(block, x_BTD, positions_BT, slots, valid_BT)
            cache.append(entries_BSL)
        return self.final_norm(x_BTD), cache

    def extend(
        self,
        ids_BQ: jax.Array,
        positions_BQ: jax.Array,
        cache: Cache,
        valid_BQ: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Normed hidden states [B, Q, D] of new tokens, and the cache with them in."""
        x_BQD, new = self.embed(ids_BQ, self.recipe), []
        for block, entries_BSL in zip(self.blocks, cache, strict=True):
            x_BQD, entries_BSL = self._extend_block(
                block, x_BQD, positions_BQ, entries_BSL, valid_BQ
            )
            new.append(entries_BSL)
        return self.final_norm(x_BQD), new

    def prefill_mtp(self, hidden_BTD, next_ids_BT, positions_BT, slots: int, valid_BT=None):
        """The MTP module on a prompt; `next_ids_BT` is the token after each. As `prefill`."""
        assert self.mtp is not None
        x_BTD = self.mtp.merge(hidden_BTD, self.embed(next_ids_BT, self.recipe), self.recipe)
        x_BTD, entries_BSL = self._prefill_block(
            self.mtp.block, x_BTD, positions_BT, slots, valid_BT
        )
        return self.mtp.out_norm(x_BTD), entries_BSL

    def extend_mtp(self, hidden_BQD, next_ids_BQ, positions_BQ, entries_BSL, valid_BQ=None):
        """The MTP module on new tokens. As `extend`."""
        assert self.mtp is not None
        x_BQD = self.mtp.merge(hidden_BQD, self.embed(next_ids_BQ, self.recipe), self.recipe)
        x_BQD, entries_BSL = self._extend_block(
            self.mtp.block, x_BQD, positions_BQ, entries_BSL, valid_BQ
        )
        return self.mtp.out_norm(x_BQD), entries_BSL

    def take_counts(self) -> jax.Array:
        """Tokens routed to each expert [L, E] since this was last called: the MoE layers in order,
        the MTP module last. Needs `counts`."""
        assert self.counts is not None
        taken = jnp.stack(self.counts)
        self.counts.clear()
        return taken

    def take_routes(self) -> jax.Array:
        """Experts of every token [B, T, R] since this was last called: those of the MoE layers of
        the main model one after the other, R of them in all; int16. The MTP module's are left
        out."""
        num_layers = sum(block.has_experts for block in self.blocks)
        taken_BTR = jnp.concatenate(self.routes[:num_layers], axis=-1).astype(jnp.int16)
        self.routes.clear()
        return taken_BTR

    def _prefill_block(self, block: Block, x_BTD, positions_BT, slots: int, valid_BT):
        y_BTD, latents_BTL = block.attn.expanded(
            block.attn_norm(x_BTD), positions_BT, None, self.recipe
        )
        entries_BSL = jnp.pad(latents_BTL, ((0, 0), (0, slots - latents_BTL.shape[1]), (0, 0)))
        return self._feed_forward(block, x_BTD + y_BTD, valid_BT), entries_BSL

    def _extend_block(self, block: Block, x_BQD, positions_BQ, entries_BSL, valid_BQ):
        y_BQD, entries_BSL = block.attn.absorbed(
            block.attn_norm(x_BQD), positions_BQ, entries_BSL, self.recipe
        )
        return self._feed_forward(block, x_BQD + y_BQD, valid_BQ), entries_BSL

    def _feed_forward(self, block: Block, x_BTD, valid_BT):
        if valid_BT is None:
            valid_BT = jnp.ones(x_BTD.shape[:2], jnp.float32)
        x_BTD, stats = block.feed_forward(x_BTD, valid_BT, self.recipe)
        if self.counts is not None and stats is not None:
            self.counts.append(stats.counts_E)
        if stats is not None and stats.ids_BTK is not None:
            self.routes.append(stats.ids_BTK)
        return x_BTD


def make_decoder(
    config: ModelConfig, weights: Tree, recipe: Recipe, mtp: bool, count: bool = False
) -> Decoder:
    """Modules over weights from `unstack`.

    `mtp` binds the first MTP module as well; `count` lets the decoder count the experts' tokens.
    Products are never in FP8, whatever the recipe says: few tokens at a time would pay for
    quantising every weight.
    """
    params, bias = weights["params"], weights["router_bias"]

    def layers(name: str) -> list[Any]:
        biases = bias.get(name) or [{}] * len(params.get(name, ()))
        pairs = zip(params.get(name, ()), biases, strict=True)
        made: list[Any] = [bind_part(config, name, *pair) for pair in pairs]
        for layer, replicas in zip(made, weights["replicas"].get(name, ()), strict=False):
            block = layer.block if name == "mtp" else layer
            block.moe.replicas = nnx.data(replicas)
        return made

    def part(name: str) -> Any:
        return bind_part(config, name, params[name], {})

    return Decoder(
        embed=part("embed"),
        blocks=[*layers("dense_layers"), *layers("moe_layers")],
        final_norm=part("final_norm"),
        head=part("head"),
        mtp=layers("mtp")[0] if mtp else None,
        recipe=dataclasses.replace(recipe, fp8=False),
        counts=[] if count else None,
    )
