"""Update rules against optax, a float64 closed form, and an independent Newton-Schulz."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from configs import preset
from model.blueprint import blueprint
from training.config import OptimizerConfig
from training.optimizer import (
    clip_by_global_norm,
    is_1d,
    make_optimizer,
    muon_dimensions,
    muon_label,
    state_axes,
)

# Every kind of parameter of the model; two stacked layers, three experts.
AXES = {
    "embed/table": ("vocab", "embed"),
    "head/kernel": ("embed", "vocab"),
    "final_norm": ("norm",),
    "layers/norm": ("layers", "norm"),
    "layers/w_dkv": ("layers", "embed", "latent_out"),
    "layers/w_uq": ("layers", "latent", "heads", "head_dim"),
    "layers/w_o": ("layers", "heads", "head_dim", "embed"),
    "layers/router": ("layers", "embed", "router"),
    "layers/w_gate": ("layers", "experts", "embed", "expert_ffn"),
    "layers/w_down": ("layers", "experts", "expert_ffn", "embed"),
    "mlp/w_up": ("embed", "ffn"),
    "mtp/proj": ("layers", "embed_pair", "embed"),
}
SIZES = {
    "vocab": 11, "embed": 6, "norm": 6, "layers": 2, "latent_out": 5, "latent": 4, "heads": 2,
    "head_dim": 3, "router": 3, "experts": 3, "expert_ffn": 4, "ffn": 7, "embed_pair": 12,
}  # fmt: skip
NORMS = {"final_norm", "layers/norm"}
ADAMW_UNDER_MUON = NORMS | {"embed/table", "head/kernel", "layers/router"}


def random_tree(seed: int, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {name: tuple(SIZES[axis] for axis in axes) for name, axes in AXES.items()}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def run(optimizer, steps: int = 4):
    """Directions of `steps` updates, parameters held fixed, and the last state."""
    params, update = random_tree(0), jax.jit(optimizer.update)
    state, directions = jax.jit(optimizer.init)(params), []
    for seed in range(1, steps + 1):
        direction, state = update(random_tree(seed), state, params)
        directions.append(jax.tree.map(np.asarray, direction))
    return directions, state


@functools.cache
def muon_run():
    return run(make_optimizer(OptimizerConfig(name="muon"), AXES), steps=3)


@pytest.mark.parametrize("decay_1d", [False, True])
def test_adamw_with_fp32_moments_is_optax_adamw(decay_1d):
    config = OptimizerConfig(moment_dtype="float32", decay_1d=decay_1d)
    ours, _ = run(make_optimizer(config, AXES))
    mask = {name: decay_1d or name not in NORMS for name in AXES}
    theirs, _ = run(
        optax.adamw(
            1.0, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=mask
        )  # learning rate 1: -direction
    )
    for mine, other in zip(ours, theirs, strict=True):
        for name in AXES:
            np.testing.assert_allclose(mine[name], -other[name], rtol=1e-6, atol=1e-7)


def test_adamw_with_bf16_moments_is_the_closed_form():
    # float64 recurrences; moments rounded to bf16 only where they are stored.
    directions, state = run(make_optimizer(OptimizerConfig(weight_decay=0.0), AXES))
    bf16 = lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float64)  # noqa: E731
    for name in AXES:
        mu = nu = np.zeros(())
        for t in range(1, 5):
            g = random_tree(t)[name].astype(np.float64)
            mu, nu = 0.9 * mu + 0.1 * g, 0.95 * nu + 0.05 * g * g
            expected = mu / (1 - 0.9**t) / (np.sqrt(nu / (1 - 0.95**t)) + 1e-8)
            # A value on a rounding edge may fall to the other side in fp32: one bf16 ulp is 2^-8,
            # halved by the sums that follow. Without an edge the two agree to fp32.
            np.testing.assert_allclose(directions[t - 1][name], expected, rtol=1e-2, atol=1e-3)
            error = np.abs(directions[t - 1][name] - expected)
            assert np.median(error) < 1e-6, (name, t, np.median(error))
            mu, nu = bf16(mu), bf16(nu)
    adam = state[0]
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves((adam.mu, adam.nu)))
    assert int(adam.steps) == 4


def test_weight_decay_reaches_matrices_and_not_stacked_norm_gains():
    # With zero gradients the direction is the decay alone.
    params = random_tree(0)
    zeros = jax.tree.map(np.zeros_like, params)
    optimizer = make_optimizer(OptimizerConfig(), AXES)
    direction = jax.jit(lambda: optimizer.update(zeros, optimizer.init(params), params)[0])()
    for name, value in direction.items():
        expected = 0.0 * params[name] if name in NORMS else 0.1 * params[name]
        np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=name)


def test_bf16_moments_refuse_a_beta_they_cannot_hold():
    config = OptimizerConfig(beta2=0.999)
    with pytest.raises(ValueError, match=r"beta2=0.999.*never decay.*moment_dtype='float32'"):
        make_optimizer(config, AXES)
    make_optimizer(dataclasses.replace(config, moment_dtype="float32"), AXES)
    with pytest.raises(ValueError, match=r"beta1 is 1.0.*\[0, 1\)"):
        make_optimizer(OptimizerConfig(beta1=1.0), AXES)
    # The claim itself: a bf16 moment times 0.999 rounds back to where it was, times 0.99 does not.
    stuck = jnp.bfloat16(1.5)
    assert (stuck.astype(jnp.float32) * 0.999).astype(jnp.bfloat16) == stuck
    assert (stuck.astype(jnp.float32) * 0.99).astype(jnp.bfloat16) != stuck


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """Quintic iteration of Muon in float64 (coefficients of Jordan et al.), for one [A, B]."""
    x = x.astype(np.float64) / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def as_matrices(name: str, value: np.ndarray) -> np.ndarray:
    """[..., A, B] view of a parameter, written out by hand per name."""
    if name == "layers/w_uq":
        return value.reshape(2, 4, 6)
    if name == "layers/w_o":
        return value.reshape(2, 6, 6)
    return value


def test_muon_is_newton_schulz_of_the_nesterov_momentum():
    directions, _ = muon_run()
    params = random_tree(0)
    for name in AXES.keys() - ADAMW_UNDER_MUON:
        mu = np.zeros(())
        for t in range(1, 4):
            g = random_tree(t)[name].astype(np.float64)
            mu = 0.95 * mu + 0.05 * g
            nesterov = 0.95 * mu / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
            batch = as_matrices(name, nesterov)
            rows, columns = batch.shape[-2:]
            flat = batch.reshape(-1, rows, columns)
            ortho = np.stack([newton_schulz(x) for x in flat]).reshape(g.shape)
            expected = 0.2 * np.sqrt(max(rows, columns)) * ortho + 0.1 * params[name]
            # 5 fp32 iterations with slope up to 3.4 each amplify rounding; 1e-4 leaves room.
            np.testing.assert_allclose(directions[t - 1][name], expected, atol=1e-4, err_msg=name)


def test_muon_updates_are_nearly_orthogonal_matrices():
    directions, _ = muon_run()
    for name in AXES.keys() - ADAMW_UNDER_MUON:
        update = as_matrices(name, directions[-1][name] - 0.1 * random_tree(0)[name])
        scale = 0.2 * np.sqrt(max(update.shape[-2:]))
        singular = np.linalg.svd(update / scale, compute_uv=False)
        # Jordan et al.: values land around (0.7, 1.2); tiny ones of the input may not arrive.
        assert singular.max() < 1.3, (name, singular)
        assert np.median(singular) > 0.6, (name, singular)


def test_muon_leaves_embedding_head_router_and_norms_to_adamw():
    muon, state = muon_run()
    adamw, _ = run(make_optimizer(OptimizerConfig(), AXES), steps=3)
    for name in AXES:
        same = np.allclose(muon[-1][name], adamw[-1][name], rtol=1e-6)
        assert same == (name in ADAMW_UNDER_MUON), name
        assert (muon_label(AXES[name]) == "adamw") == (name in ADAMW_UNDER_MUON)
        assert is_1d(AXES[name]) == (name in NORMS)
    moments = [x for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16]
    assert len(moments) == 2 * len(ADAMW_UNDER_MUON)


def test_muon_takes_a_model_with_eyes_and_a_brush():
    """Matrices of its attention and adaptors; convolutions, codes and positions stay with AdamW."""
    axes = blueprint(preset("janus_tiny").model).params_axes
    state = jax.eval_shape(
        make_optimizer(OptimizerConfig(name="muon"), axes).init,
        blueprint(preset("janus_tiny").model).params,
    )
    assert jax.tree.leaves(state)
    assert muon_label(axes["aligner"]["first"]["kernel"]) == "muon"
    assert muon_label(axes["encoder"]["patches"]["kernel"]) == "adamw"
    assert muon_label(axes["tokenizer"]["codebook"]) == "adamw"


def test_muon_reads_heads_as_one_side():
    assert muon_dimensions(AXES["layers/w_uq"]) == ((1,), (2, 3))
    assert muon_dimensions(AXES["layers/w_o"]) == ((1, 2), (3,))
    assert muon_dimensions(AXES["layers/w_down"]) == ((2,), (3,))
    with pytest.raises(ValueError, match=r"'embed', 'ffn', 'other'.*3 sides"):
        muon_dimensions(("layers", "embed", "ffn", "other"))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_state_can_be_laid_out_like_the_parameters(name):
    # Every moment gets the axes of its parameter, counters and constants get none.
    params = jax.eval_shape(lambda: random_tree(0))
    optimizer = make_optimizer(OptimizerConfig(name=name), AXES)
    state = jax.eval_shape(optimizer.init, params)
    axes = state_axes(state, AXES)
    leaves = jax.tree.leaves(state)
    names = jax.tree.structure(state).flatten_up_to(axes)
    moments = [(x, a) for x, a in zip(leaves, names, strict=True) if None not in a and a]
    assert len(moments) == {"adamw": 2 * 12, "muon": 7 + 2 * 5}[name]
    assert all(x.shape == tuple(SIZES[axis] for axis in a) for x, a in moments)
    others = {x.shape for x, a in zip(leaves, names, strict=True) if None in a or not a}
    assert others == {"adamw": {()}, "muon": {(), (3,)}}[name]  # counters, Newton-Schulz constants


def test_clip_by_global_norm():
    grads = {"a": np.full((3,), 2.0, np.float32), "b": jnp.full((4,), 2.0, jnp.bfloat16)}
    clipped, norm = jax.jit(clip_by_global_norm, static_argnums=1)(grads, 1.0)
    np.testing.assert_allclose(norm, np.sqrt(28.0), rtol=1e-6)
    np.testing.assert_allclose(clipped["a"], 2 / np.sqrt(28.0), rtol=1e-6)
    assert clipped["b"].dtype == jnp.bfloat16
    for clip in (0.0, 10.0):
        same, norm = clip_by_global_norm(grads, clip)
        np.testing.assert_array_equal(same["a"], grads["a"])
        np.testing.assert_allclose(norm, np.sqrt(28.0), rtol=1e-6)
    _, norm = clip_by_global_norm({"a": np.array([np.nan, 1.0], np.float32)}, 1.0)
    assert np.isnan(norm)
    many = {"a": jnp.ones((4096,), jnp.bfloat16)}  # a bf16 sum would stop at 256
    assert float(clip_by_global_norm(many, 0.0)[1]) == 64.0
