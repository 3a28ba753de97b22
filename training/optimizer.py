"""Update directions: AdamW with BF16 moments, and Muon on matrices with AdamW elsewhere.

`make_optimizer` returns an optax transformation that yields the direction, decoupled weight decay
included, *without* the learning rate: the step applies `param - learning_rate * direction`, with a
learning rate that the host computes in float64. Which parameter gets which rule follows from its
logical axes, never from its rank: a stacked norm gain is [L, d] and still one-dimensional.

Letters: A, B rows and columns of a matrix (reduction and output axes, flattened).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from training.config import OptimizerConfig

Axes = tuple[str, ...]
"""Logical axis names of one parameter, one per dimension."""

STACKED = frozenset({"layers", "experts"})
"""Axes that number independent matrices rather than being part of one."""

ADAMW_AXES = frozenset({"vocab", "router", "codes", "patches", "window"})
"""Under Muon AdamW's: embedding, head, router; image codes, positions of patches, convolutions."""


def make_optimizer(config: OptimizerConfig, param_axes: Any) -> optax.GradientTransformation:
    """Build the update rule.

    Args:
      config: name, constants, moment type.
      param_axes: tree like the parameters, with a tuple of logical axes (`Axes`) at every leaf.
    Returns:
      A transformation; `update(grads, state, params)` gives fp32 directions shaped like `params`.
      Decay is added to matrices, and to 1-D parameters only when `config.decay_1d`.
    Errors: ValueError for moments that BF16 cannot hold, or a matrix Muon cannot read.
    """
    _check_moments(config)
    matrices = jax.tree.map(lambda axes: not is_1d(axes), param_axes, is_leaf=_is_axes)
    decayed = jax.tree.map(lambda matrix: matrix or config.decay_1d, matrices)
    adamw = scale_by_adam(config.beta1, config.beta2, config.eps, jnp.dtype(config.moment_dtype))
    if config.name == "adamw":
        rule = adamw
    else:
        labels = jax.tree.map(muon_label, param_axes, is_leaf=_is_axes)
        rule = optax.partition({"muon": _muon(config, param_axes), "adamw": adamw}, labels)
    return optax.chain(rule, optax.add_decayed_weights(config.weight_decay, decayed))


def state_axes(state: Any, param_axes: Any) -> Any:
    """Logical axes of the optimizer's state, so that it can be laid out like the parameters.

    Args:
      state: the state, or its shapes (`jax.eval_shape(optimizer.init, params)`).
      param_axes: as for `make_optimizer`.
    Returns:
      A tree like `state` whose leaves are tuples: the axes of the parameter a moment belongs to
      (its path ends with the parameter's), and a `None` per dimension for counters and constants.
    """
    leaves = jax.tree_util.tree_leaves_with_path(param_axes, is_leaf=_is_axes)
    axes_of = dict(leaves)

    def axes(path, leaf):
        suffixes = (path[start:] for start in range(len(path)))
        return next((axes_of[s] for s in suffixes if s in axes_of), (None,) * len(leaf.shape))

    return jax.tree_util.tree_map_with_path(axes, state)


def clip_by_global_norm(grads: Any, clip: float) -> tuple[Any, jax.Array]:
    """Scale all gradients down together when their global norm exceeds `clip`.

    Args:
      grads: tree of arrays of any float type; squares are summed in fp32.
      clip: largest norm; 0 never scales.
    Returns:
      (gradients in their own types, norm before clipping as fp32 scalar). A norm that is not finite
      goes through to the gradients, for the step's finite check to see.
    """
    norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
    if not clip:
        return grads, norm
    scale = clip / jnp.maximum(norm, clip)
    return jax.tree.map(lambda g: (g.astype(jnp.float32) * scale).astype(g.dtype), grads), norm


HEADS = ("heads", "kv_heads", "head_dim")
"""Axes that are one side of a matrix together."""


def is_1d(axes: Axes) -> bool:
    """True for norm gains and the like: at most one axis besides the stacking of layers; the two of
    heads, which biases have, are one."""
    return sum(axis not in ("layers", *HEADS) for axis in axes) + bool(set(HEADS) & set(axes)) <= 1


def muon_label(axes: Axes) -> str:
    """Name of the rule a parameter gets under Muon: `muon` or `adamw`."""
    return "adamw" if is_1d(axes) or ADAMW_AXES & set(axes) else "muon"


class AdamState(NamedTuple):
    """Moments of AdamW, shaped like the parameters."""

    steps: jax.Array
    """Updates so far, int32 []."""
    mu: Any
    """First moment, stored in the moment type."""
    nu: Any
    """Second moment, stored in the moment type."""


def scale_by_adam(
    beta1: float, beta2: float, eps: float, moment_dtype: Any
) -> optax.GradientTransformation:
    """Adam's bias-corrected direction, fp32 arithmetic, both moments *stored* in `moment_dtype`.

    V3 report, section 3.3.3: BF16 moments with fp32 master weights and gradients. The direction
    uses the moments of this step before they are rounded for storage, so rounding enters only
    through what the next step reads. (optax can choose the type of the first moment alone.)
    """

    def init(params):
        zeros = lambda p: jnp.zeros_like(p, dtype=moment_dtype)  # noqa: E731
        return AdamState(
            jnp.zeros([], jnp.int32), jax.tree.map(zeros, params), jax.tree.map(zeros, params)
        )

    def update(updates: Any, state: Any, params: Any = None):
        del params
        steps = jnp.asarray(optax.safe_increment(state.steps))
        g = jax.tree.map(lambda x: x.astype(jnp.float32), updates)
        mu = jax.tree.map(lambda m, x: beta1 * m.astype(jnp.float32) + (1 - beta1) * x, state.mu, g)
        nu = jax.tree.map(lambda n, x: beta2 * n.astype(jnp.float32) + (1 - beta2) * x * x,
                          state.nu, g)  # fmt: skip
        mu_correction = 1 - beta1 ** steps.astype(jnp.float32)
        nu_correction = 1 - beta2 ** steps.astype(jnp.float32)
        direction = jax.tree.map(
            lambda m, n: (m / mu_correction) / (jnp.sqrt(n / nu_correction) + eps), mu, nu
        )
        stored = jax.tree.map(lambda x: x.astype(moment_dtype), (mu, nu))
        return direction, AdamState(steps, *stored)

    return optax.GradientTransformation(init, update)


def _check_moments(config: OptimizerConfig) -> None:
    """BF16 has 8 significant bits: a moment that moves by less than 2^-8 of itself stands still."""
    finest = 2.0**-8
    for name in ("beta1", "beta2"):
        beta = getattr(config, name)
        if not 0 <= beta < 1:
            raise ValueError(f"optimizer.{name} is {beta}; it must be in [0, 1)")
        if config.moment_dtype == "bfloat16" and 1 - beta < finest:
            raise ValueError(
                f"optimizer.{name}={beta} with moment_dtype='bfloat16': a moment moves by "
                f"{1 - beta:.2g} of itself per step, and bfloat16 rounds away changes below "
                f"{finest:.2g}, so it would never decay; use moment_dtype='float32' or a {name} of "
                f"at most {1 - finest:.3f}"
            )


def _muon(config: OptimizerConfig, param_axes: Any) -> optax.GradientTransformation:
    """Muon's direction with the update RMS of AdamW, 0.2 * sqrt(max(A, B)) (arXiv 2502.16982).

    Layers and experts are batches of independent matrices. The momentum stays fp32.
    """
    # Parameters of the other rule are MaskedNodes in what `partition` hands over.
    dimensions = jax.tree.map(
        lambda axes: muon_dimensions(axes) if muon_label(axes) == "muon" else optax.MaskedNode(),
        param_axes,
        is_leaf=_is_axes,
    )
    return optax.chain(
        optax.contrib.scale_by_muon(
            beta=config.muon_momentum,
            mu_dtype=jnp.float32,
            nesterov=True,
            weight_dimension_numbers=lambda _: dimensions,
        ),
        optax.stateless(lambda updates, _: jax.tree.map(_match_rms, updates, dimensions)),
    )


def _match_rms(update: jax.Array, dimensions: Any) -> jax.Array:
    """An orthogonal [A, B] has RMS 1/sqrt(max(A, B)); 0.2 is about AdamW's update RMS."""
    A, B = (math.prod(update.shape[dim] for dim in dims) for dims in dimensions)
    return 0.2 * math.sqrt(max(A, B)) * update


def muon_dimensions(axes: Axes) -> optax.contrib.MuonDimensionNumbers:
    """Dimensions that are the rows (inputs) and the columns (outputs) of one matrix.

    `heads, head_dim` are one side: outputs when they come last (w_uq, w_ukv: [latent, heads,
    head_dim]), inputs when they come first (w_o: [heads, head_dim, embed]).
    Errors: ValueError when the remaining axes are not two sides.
    """
    sides: list[list[int]] = []
    for dim, axis in enumerate(axes):
        if axis in STACKED:
            continue
        if axis == "head_dim" and dim > 0 and axes[dim - 1] in HEADS:
            sides[-1].append(dim)
        else:
            sides.append([dim])
    if len(sides) != 2:
        raise ValueError(
            f"Muon needs matrices; a parameter with logical axes {axes} has {len(sides)} sides "
            f"besides {sorted(STACKED)}; add an axis it may use AdamW for to ADAMW_AXES, or name "
            "the pair heads, head_dim"
        )
    return optax.contrib.MuonDimensionNumbers(*(tuple(side) for side in sides))


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(name, str) for name in node)
