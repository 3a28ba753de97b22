"""The model over a cache: a prompt at once (expanded), then a few tokens (absorbed).

Here layers are separate modules, not a scanned stack: a scan slices every layer's weights out of
the stack, which is a copy of all experts per token where a token reads eight of them.

Letters: B batch, T prompt, Q new tokens of a row, S slots of the cache, D hidden width,
V vocabulary, K heads of keys, L cached channels (latent and rotary key).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from generation.replicas import Copies, Replicas
from generation.routed import RoutedExperts
from model.blueprint import Tree, bind_part
from model.config import ModelConfig
from model.mla import join_halves, split_heads_first
from model.moe import W_IN, W_OUT, MoEStats
from model.recipe import Recipe
from model.transformer import MTP, Block
from pallas_kernels.grouped import separate_experts

STACKS = ("dense_layers", "moe_layers", "mtp")
EXPERT_WEIGHTS = ("w_gate", "w_up", "w_down")
EXPERTS = tuple(f"/moe/{name}" for name in EXPERT_WEIGHTS)
Cache = list[Any]
"""Per layer latents [B, S, L], or the arrays of grouped attention, whose first axes are rows and
key heads; the MTP module's own last, if it runs."""


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

    Matrices become `dtype`; router, biases and norms stay fp32. W_UKV becomes the pair of its
    halves (`model/mla.py:split_heads_first`). With `expert_shards`, the number of parts that the
    mesh holds experts in, every expert becomes an array of its own (`separate_experts`). With
    `copies` they are laid out as those, and "replicas" has what each layer's tokens choose by. With
    `consume` every array passed in is freed once its layers exist, so that the peak is one copy and
    the largest stack.
    """
    nope, first_mtp = config.qk_nope_head_dim, config.num_moe_layers

    def convert_leaf(path, stack: jax.Array) -> list[Any]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        exact = name.endswith(("scale", "bias")) or "router/" in name or "/b_" in name
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


class Layer(NamedTuple):
    """One layer with what decoding holds in a layout of its own."""

    block: Block
    """Its `w_ukv` is joined anew from the halves: a program that does not read it never does so."""
    halves: tuple[jax.Array, jax.Array] | None
    """W_UK and W_UV, heads first; None in grouped attention."""
    routed: RoutedExperts | None
    """None in a dense layer."""


class Passed(NamedTuple):
    """Tokens after all layers, or after the MTP module."""

    hidden_BTD: jax.Array
    """Normed hidden states."""
    cache: Cache
    stats: list[MoEStats]
    """Of every MoE layer that ran, in order."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The modules of a model whose layers are apart.

    Tokens count in the statistics by `valid_BT` (1.0 or 0.0; None: all count).
    """

    embed: Any
    layers: list[Layer]
    final_norm: Any
    head: Any
    mtp: tuple[MTP, Layer] | None
    """The first MTP module, and its block."""
    recipe: Recipe

    def logits(self, hidden_BD: jax.Array) -> jax.Array:
        """Main head on normed hidden states, also those of the MTP module; [B, V] fp32."""
        # A tied head reads the table as it lies: [V, D].
        tied = self.head is None
        kernel = (self.embed.table if tied else self.head.kernel)[...].astype(hidden_BD.dtype)
        product = "BD,VD->BV" if tied else "BD,DV->BV"
        return jnp.einsum(product, hidden_BD, kernel, preferred_element_type=jnp.float32)

    def read(
        self,
        ids_BT: jax.Array,
        positions_BT: jax.Array,
        cache: Cache | int,
        valid_BT: jax.Array | None = None,
    ) -> Passed:
        """Tokens through the main model.

        `cache` holds the tokens before these. For prompts, which start at position 0, it is instead
        the number of slots to make room for. Prompts may be padded at the end: attention is causal,
        and the slots of padding are written again before anything reads them.
        """
        x_BTD = self.embed(ids_BT, self.recipe)
        return self.read_vectors(x_BTD, positions_BT, cache, valid_BT)

    def read_vectors(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cache: Cache | int, valid_BT=None
    ) -> Passed:
        """The same for input vectors, of whatever they are made."""
        x_BTD, cache, stats = self._run(self.layers, x_BTD, positions_BT, cache, valid_BT)
        return Passed(self.final_norm(x_BTD), cache, stats)

    def read_ahead(
        self, hidden_BTD, next_ids_BT, positions_BT, cache: Cache | int, valid_BT=None
    ) -> Passed:
        """The same through the MTP module; `next_ids_BT` is the token after each."""
        assert self.mtp is not None
        module, layer = self.mtp
        x_BTD = module.merge(hidden_BTD, self.embed(next_ids_BT, self.recipe), self.recipe)
        x_BTD, cache, stats = self._run([layer], x_BTD, positions_BT, cache, valid_BT)
        return Passed(module.out_norm(x_BTD), cache, stats)

    def _run(
        self, layers: list[Layer], x_BTD, positions_BT, cache: Cache | int, valid_BT
    ) -> tuple[jax.Array, Cache, list[MoEStats]]:
        """Layers one after the other."""
        if valid_BT is None:
            valid_BT = jnp.ones(x_BTD.shape[:2], jnp.float32)
        new, stats = [], []
        for number, (block, halves, routed) in enumerate(layers):
            normed_BTD = block.attn_norm(x_BTD)
            if isinstance(cache, int):
                y_BTD, kept = block.attn(normed_BTD, positions_BT, None, self.recipe)
                entries = block.attn.cache(kept, cache, self.recipe)
            else:
                y_BTD, entries = block.attn.over_cache(
                    normed_BTD, positions_BT, cache[number], halves, self.recipe
                )
            x_BTD, found = block.feed_forward(x_BTD + y_BTD, valid_BT, self.recipe, routed=routed)
            new.append(entries)
            stats += [] if found is None else [found]
        return x_BTD, new, stats


def expert_load(stats: list[MoEStats]) -> jax.Array:
    """Tokens routed to each expert [L, E] of the MoE layers."""
    return jnp.stack([layer.counts_E for layer in stats])


def expert_routes(stats: list[MoEStats]) -> jax.Array:
    """Experts of every token [B, T, R], those of the MoE layers one after the other, R of them in
    all; int16. The recipe must ask for routes."""
    ids = [layer.ids_BTK for layer in stats if layer.ids_BTK is not None]
    assert len(ids) == len(stats)
    return jnp.concatenate(ids, axis=-1).astype(jnp.int16)


def make_decoder(config: ModelConfig, weights: Tree, recipe: Recipe, mtp: bool) -> Decoder:
    """Modules over weights from `unstack`; `mtp` binds the first MTP module as well.

    Products are never in FP8, whatever the recipe says: few tokens at a time would pay for
    quantising every weight.
    """
    params, bias = weights["params"], weights["router_bias"]

    def layers(name: str) -> list[tuple[Any, Layer]]:
        held = params.get(name, ())
        biases = bias.get(name) or [{}] * len(held)
        replicas = weights["replicas"].get(name) or [None] * len(held)
        parts = zip(held, biases, replicas, strict=True)
        return [_bind_layer(config, name, *part) for part in parts]

    def part(name: str) -> Any:
        return bind_part(config, name, params[name], {})

    return Decoder(
        embed=part("embed"),
        layers=[layer for _, layer in (*layers("dense_layers"), *layers("moe_layers"))],
        final_norm=part("final_norm"),
        head=None if config.tie_embeddings else part("head"),
        mtp=layers("mtp")[0] if mtp else None,
        recipe=dataclasses.replace(recipe, fp8=False),
    )


def _bind_layer(
    config: ModelConfig, name: str, params: Tree, bias: Tree, replicas: Replicas | None
) -> tuple[Any, Layer]:
    """The module of one layer, and the layer; its own block but for the MTP module's."""
    inside = params["block"] if name == "mtp" else params
    halves = inside["attn"].get("w_ukv")
    if halves is not None:
        inside = {**inside, "attn": {**inside["attn"], "w_ukv": join_halves(*halves)}}
    routed = None
    if "moe" in inside:
        moe = dict(inside["moe"])
        routed = RoutedExperts(config, tuple(moe.pop(w) for w in EXPERT_WEIGHTS), replicas)
        inside["moe"] = moe
    module: Any = bind_part(
        config, name, {**params, "block": inside} if name == "mtp" else inside, bias
    )
    return module, Layer(module.block if name == "mtp" else module, halves, routed)
