"""How the mathematics is carried out: activation type, recomputation, kernels. Never what it is."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

_KEPT = "kept"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Numerics and cost of a forward pass.

    Whatever `dtype` says, these stay fp32: master weights, router, norm statistics, softmax, rotary
    angles, logits and losses.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products."""
    remat: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes: nothing; all but what `keep` marks; whole layers."""
    kernels: Literal["auto", "portable", "reference"] = "auto"
    """Backend of the hot paths."""

    @property
    def activation_dtype(self) -> jnp.dtype:
        """`dtype` as JAX's type."""
        return jnp.dtype(self.dtype)

    def rematerialize(self, fn: Callable) -> Callable:
        """`fn` with this recipe's recomputation in its backward pass."""
        if self.remat == "none":
            return fn
        if self.remat == "full":
            return jax.checkpoint(fn, prevent_cse=False)
        policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
        return jax.checkpoint(fn, prevent_cse=False, policy=policy)


def keep(x: jax.Array) -> jax.Array:
    """Mark a value that selective recomputation stores.

    Kept are the down-projected latents, the attention output and the routing choice; recomputed are
    norms and up-projections (V3 report, section 3.2.3), SwiGLU (section 3.3.3), attention weights,
    and the first products of the experts.
    """
    return checkpoint_name(x, _KEPT)
