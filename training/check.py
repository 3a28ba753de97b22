"""`--train.check-every N`: loss and gradient norm of a micro batch once more, by the plainest path.

What a step computes by kernels, in small number fields and with recomputation is computed again in
fp32 by XLA, with the same experts for every token: a choice that flips is no error of arithmetic.
A gap above the bound of the recipe's types is reported with the operation that makes it, found by
switching one backend at a time, then FP8, then bf16, to the plain one.

Letters: L MoE layers (main ones, then MTP modules), B batch, T sequence, K choices per token.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from model.blueprint import Tree, bind
from model.config import ModelConfig
from model.loss import LossWeights, loss_of_output, make_examples
from model.recipe import Kernels, Recipe
from sharding.devices import EXACT
from sharding.partition import Layout, num_shards, pipeline_ranks, use_layout
from training.config import TrainConfig
from training.gradients import Batch, loss_weights

PAIRS_BYTES = 1 << 30
"""Logits of attention over all pairs, fp32, up to which it is computed by its definition."""
EXPERTS_RATIO = 32
"""Experts over choices per token up to which experts are: the definition has all compute all."""


class Bound(NamedTuple):
    """Relative gaps that arithmetic in a type explains, with a wide margin."""

    loss: float
    norm: float


BOUNDS = {"float32": Bound(1e-4, 1e-3), "bfloat16": Bound(2e-3, 1e-2), "fp8": Bound(5e-3, 3e-2)}
"""Of the smallest models of the tests, whose weights are random; `tiny` stays a tenth below."""


class Found(NamedTuple):
    """Loss and norm of its gradient, and the experts of every token (None: there are none)."""

    loss: jax.Array
    norm: jax.Array
    routes_LBTK: jax.Array | None


def gradients_and_routes(
    config: ModelConfig,
    recipe: Recipe,
    params: Tree,
    router_bias: Tree,
    micro: Batch,
    weights: LossWeights,
    routes_LBTK: jax.Array | None = None,
) -> tuple[jax.Array, Tree, jax.Array | None]:
    """Training loss of one micro batch, its gradient, and the experts of every token.

    Tokens keep to the experts of `routes_LBTK`, those of MTP modules behind the main layers'; where
    they are negative they choose.
    """
    recipe = dataclasses.replace(recipe, routes=config.num_moe_layers + config.mtp_depth > 0)

    def loss_of(params: Tree):
        model = bind(config, params, router_bias)
        examples = make_examples(micro, config.mtp_depth)
        output = model.forward(examples.tokens, recipe, examples.targets_KBT[:-1], routes_LBTK)
        loss, _ = loss_of_output(model, output, examples, weights, recipe)
        return loss, None if output.stats is None else output.stats.ids_BTK

    (loss, routes), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return loss, grads, routes


def plain_recipe(config: ModelConfig, train: TrainConfig, layout: Layout, recipe: Recipe) -> Recipe:
    """fp32 by the definitions, or by XLA's portable products where those would not fit."""
    with use_layout(layout):
        rows = (train.micro_batch_size or train.batch_size) // num_shards("batch")
        heads = config.num_heads // num_shards("heads")
    by_definition = Kernels(
        attention="reference",
        decode="reference",
        experts="reference",
        loss="reference",
        linear="reference",
    )
    if 4 * rows * heads * train.seq_len**2 > PAIRS_BYTES:
        by_definition = by_definition._replace(attention="portable")
    if config.num_experts > EXPERTS_RATIO * config.experts_per_token:
        by_definition = by_definition._replace(experts="portable")
    return Recipe("float32", recipe.remat, by_definition)


def switches(recipe: Recipe, plain: Recipe) -> dict[str, Recipe]:
    """The recipe with one thing at a time as the plain one has it."""
    found = {}
    for name, backend in recipe.kernels._asdict().items():
        other = getattr(plain.kernels, name)
        if backend != other and name != "decode" and (name != "linear" or recipe.fp8):
            kernels = recipe.kernels._replace(**{name: other})
            found[f"{name} ({backend})"] = dataclasses.replace(recipe, kernels=kernels)
    if recipe.stash:
        found[f"attention's output in {recipe.stash}"] = dataclasses.replace(recipe, stash="")
    if recipe.fp8:
        found["fp8 products"] = dataclasses.replace(recipe, fp8=False, stash="")
    if recipe.dtype != "float32":
        found[f"activations in {recipe.dtype}"] = dataclasses.replace(
            recipe, dtype="float32", fp8=False, stash="", kernels=plain.kernels
        )
    return found


class Check:
    """Compares the first micro batch of a step with the plain path, before the step is taken.

    Raises:
        ValueError: the layout has a pipeline, whose ranks do not hold the whole model.
    """

    def __init__(self, config: ModelConfig, train: TrainConfig, recipe: Recipe, layout: Layout):
        if pipeline_ranks(layout) > 1:
            raise ValueError(
                f"train.check_every={train.check_every} computes a whole micro batch on every "
                f"device, but pipe={pipeline_ranks(layout)} cuts the layers over devices; set "
                "check_every to 0, or pipe to 1"
            )
        self._config, self._train, self._layout = config, train, layout
        self.recipe, self.plain = recipe, plain_recipe(config, train, layout, recipe)
        self.bound = BOUNDS["fp8" if recipe.fp8 else recipe.dtype]
        self._measures: dict[Recipe, Callable[..., Found]] = {}

    def __call__(
        self,
        params: Tree,
        router_bias: Tree,
        batch: Batch,
        mtp_weight: Any,
        say: Callable[[str], None],
    ) -> dict[str, float]:
        """Metrics check/*; a gap above the bound is said, with the operation that makes it."""
        inputs = params, router_bias, batch, mtp_weight
        step = self._measure(self.recipe, *inputs)
        plain = self._measure(self.plain, *inputs, step.routes_LBTK)
        gap = self._gap(step, plain)
        if gap > 1:
            say(self._warning(step, plain))
            say(self._name_cause(gap, step, plain, inputs))
        return {
            "check/loss": float(step.loss),
            "check/loss_plain": float(plain.loss),
            "check/grad_norm": float(step.norm),
            "check/grad_norm_plain": float(plain.norm),
        }

    def _measure(self, recipe: Recipe, params, router_bias, batch, mtp_weight, routes=None):
        if recipe not in self._measures:
            self._measures[recipe] = jax.jit(self._of(recipe), compiler_options=EXACT)
        return self._measures[recipe](params, router_bias, batch, mtp_weight, routes)

    def _of(self, recipe: Recipe) -> Callable[..., Found]:
        def measure(params, router_bias, batch: Batch, mtp_weight, routes_LBTK) -> Found:
            with use_layout(self._layout):
                first = {name: rows[:1] for name, rows in batch.items()}
                weights = loss_weights(first, mtp_weight, self._train.balance_weight)
                micro = {name: rows[0] for name, rows in first.items()}
                loss, grads, routes = gradients_and_routes(
                    self._config, recipe, params, router_bias, micro, weights, routes_LBTK
                )
                grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
                return Found(loss, optax.tree.norm(grads), routes)

        return measure

    def _gap(self, found: Found, plain: Found) -> float:
        """The larger of both gaps, in bounds; infinite where something is not finite."""
        loss, norm = (
            abs(float(a) - float(b)) / abs(float(b))
            for a, b in zip(found[:2], plain[:2], strict=True)
        )
        gap = max(loss / self.bound.loss, norm / self.bound.norm)
        return gap if np.isfinite(gap) else np.inf

    def _warning(self, step: Found, plain: Found) -> str:
        def one(name: str, a, b, bound: float) -> str:
            return f"{name} {float(a):.6g} against {float(b):.6g} (bound {bound:.2%})"

        loss = one("loss", step.loss, plain.loss, self.bound.loss)
        norm = one("gradient norm", step.norm, plain.norm, self.bound.norm)
        return f"warning: the step's arithmetic is off: {loss}, {norm} by the plain path in fp32"

    def _name_cause(self, gap: float, step: Found, plain: Found, inputs: tuple) -> str:
        """Which switch to the plain way closes the gap."""
        gaps = {}
        for name, recipe in switches(self.recipe, self.plain).items():
            found = self._measure(recipe, *inputs, routes=step.routes_LBTK)
            gaps[name] = self._gap(found, plain)
            if gaps[name] <= 1:
                return f"  it is {name}: computed plainly, the gap is {gaps[name]:.2g} of the bound"
        tried = ", ".join(f"{name} {left:.2g}" for name, left in gaps.items())
        return f"  no single operation: the gap is {gap:.2g} bounds, and without each: {tried}"
