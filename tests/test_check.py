"""The guard of a run: silent where arithmetic is sound, and with the operation's name where not."""

import dataclasses

import jax
import numpy as np
import pytest

import model.moe
from model.recipe import Kernels, Recipe
from pallas_kernels.grouped import expert_sums
from sharding.config import MeshConfig
from tests.layout_helpers import (
    KNOBS,
    ONE_DEVICE,
    ONE_LAYER,
    TRAIN,
    layout_of,
    micro_batches,
    random_rows,
    start,
)
from training.check import BOUNDS, Check, plain_recipe, switches
from training.run import make_check
from training.step import Trainer

CHECKED = dataclasses.replace(TRAIN, check_every=2, dtype="bfloat16")
BF16 = Recipe("bfloat16")


def look(recipe=BF16, train=CHECKED):
    """Metrics, and what was said."""
    trainer = Trainer(ONE_LAYER, train, recipe, layout_of(ONE_DEVICE))
    check, state, said = make_check(trainer), start(trainer), []
    assert check is not None
    batch = {"tokens": micro_batches(random_rows(), 2)}
    inputs = state["params"], state["router_bias"], batch, KNOBS["mtp_weight"]
    return check(*inputs, said.append), said


def test_sound_arithmetic_is_silent_and_both_numbers_are_logged():
    found, said = look()
    assert not said
    bound = BOUNDS["bfloat16"]
    np.testing.assert_allclose(found["check/loss"], found["check/loss_plain"], rtol=bound.loss)
    np.testing.assert_allclose(
        found["check/grad_norm"], found["check/grad_norm_plain"], rtol=bound.norm
    )
    assert found["check/loss"] != found["check/loss_plain"]


@pytest.mark.slow
def test_a_wrong_operation_is_named(monkeypatch):
    """Experts too large in one backend alone, as a wrong kernel would be."""

    def wrong(*arguments, backend, **options):
        y = expert_sums(*arguments, backend=backend, **options)
        return y * np.float32(1.5).astype(y.dtype) if backend == "portable" else y

    monkeypatch.setattr(model.moe, "expert_sums", wrong)
    _, said = look()
    assert len(said) == 2, said
    assert "arithmetic is off: loss" in said[0]
    assert said[1].startswith("  it is experts (portable): computed plainly, the gap is 0.")


def test_every_backend_and_type_is_a_switch():
    """Big cases take XLA's products, whose definition would not fit."""
    layout = layout_of(ONE_DEVICE)
    kernels = Kernels(*["mosaic"] * 5)
    recipe = Recipe("bfloat16", kernels=kernels, fp8=True, stash="e5m6")
    plain = plain_recipe(ONE_LAYER, CHECKED, layout, recipe)
    assert set(plain.kernels) == {"reference"}
    assert list(switches(recipe, plain)) == [
        "attention (mosaic)", "experts (mosaic)", "loss (mosaic)", "linear (mosaic)",
        "attention's output in e5m6", "fp8 products", "activations in bfloat16",
    ]  # fmt: skip
    large = dataclasses.replace(CHECKED, seq_len=8192)
    many = dataclasses.replace(ONE_LAYER, num_experts=128)
    kernels = plain_recipe(many, large, layout, recipe).kernels
    assert (kernels.attention, kernels.experts) == ("portable", "portable")


def test_what_cannot_be_checked_is_refused():
    pipe = layout_of(MeshConfig(pipe=2))
    with pytest.raises(ValueError, match="pipe=2 cuts the layers"):
        Check(ONE_LAYER, CHECKED, BF16, pipe)

    class Other(Trainer):
        """Of another loss."""

    with pytest.raises(ValueError, match="this stage has another"):
        make_check(Other(ONE_LAYER, CHECKED, BF16, layout_of(ONE_DEVICE)))
    assert make_check(Trainer(ONE_LAYER, TRAIN, BF16, layout_of(ONE_DEVICE))) is None


@pytest.mark.slow
def test_replayed_experts_are_those_of_mtp_modules_too():
    """Experts 0 .. K-1 for every token of every layer, whatever the router wants."""
    from training.check import gradients_and_routes
    from training.gradients import loss_weights

    trainer = Trainer(ONE_LAYER, TRAIN, Recipe(), layout_of(ONE_DEVICE))
    state, batch = start(trainer), {"tokens": random_rows()[None]}
    c = ONE_LAYER
    shape = (c.num_moe_layers + c.mtp_depth, TRAIN.batch_size, TRAIN.seq_len, c.experts_per_token)
    routes = np.broadcast_to(np.arange(c.experts_per_token, dtype=np.int32), shape)

    @jax.jit
    def run(routes):
        weights = loss_weights(batch, KNOBS["mtp_weight"], 0.0)
        micro = {name: rows[0] for name, rows in batch.items()}
        inputs = state["params"], state["router_bias"], micro, weights
        return gradients_and_routes(c, Recipe(), *inputs, routes)

    _, grads, found = run(routes)
    np.testing.assert_array_equal(found, routes)
    for block in (grads["moe_layers"], grads["mtp"]["block"]):
        used = np.abs(block["moe"]["w_up"]).sum((0, 2, 3)) > 0
        assert used[: c.experts_per_token].all()
        assert not used[c.experts_per_token :].any()
