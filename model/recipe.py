"""How the mathematics is carried out: activation type, recomputation, kernels. Never what it is."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import Stash
from pallas_kernels.mosaic import Backend

KEPT = "kept"
"""Name of the values that selective recomputation stores."""


class Kernels(NamedTuple):
    """Backend of each hot path (`model/kernels.py` chooses)."""

    attention: Backend = "portable"
    """Expanded latent attention: training and prefill."""
    decode: Backend = "portable"
    """Absorbed latent attention over the cache."""
    experts: Backend = "portable"
    """Grouped products of the routed experts."""
    loss: Backend = "portable"
    """Head and cross-entropy."""
    linear: Backend = "portable"
    """FP8 products of dense layers; used with FP8 alone."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Numerics and cost of a forward pass.

    Whatever `dtype` says, these stay fp32: master weights, router, norm statistics, softmax, rotary
    angles, logits and losses.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products."""
    remat: Literal["none", "selective", "full"] = "none"
    """Work that the backward pass repeats: nothing; all but what `keep` marks; whole layers."""
    kernels: Kernels = Kernels()
    """Backends of the hot paths."""
    routes: bool = False
    """Report the experts of every token, for a later pass that replays them."""
    fp8: bool = False
    """Products of every linear layer in FP8 (V3 report, section 3.3), gradients included. Not in
    FP8: embedding, head, router, norms, attention."""
    stash: Stash = ""
    """Type that attention's output is held in for the backward pass, which rounds it; "": its own.
    V3 has E5M6 with FP8 (section 3.3.3)."""
    unroll: int = 1
    """Layers that one round of the loop over a stack computes."""

    def __post_init__(self):
        if self.fp8 and self.dtype != "bfloat16":
            raise ValueError(
                f"fp8 products give bfloat16 activations, but dtype is {self.dtype}; "
                "set dtype to bfloat16 or leave fp8 off"
            )

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
        policy = jax.checkpoint_policies.save_only_these_names(KEPT)
        return jax.checkpoint(fn, prevent_cse=False, policy=policy)


PLAIN = Recipe()
"""fp32, nothing recomputed, no kernels."""


def keep(x: jax.Array) -> jax.Array:
    """Mark a value that selective recomputation stores.

    Kept are the down-projected latents, the attention output and the routing choice; recomputed are
    norms and up-projections (V3 report, section 3.2.3), SwiGLU (section 3.3.3), attention weights,
    and the first products of the experts.
    """
    return checkpoint_name(x, KEPT)
