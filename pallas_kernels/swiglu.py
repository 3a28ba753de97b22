"""SwiGLU, silu(gate) * up, of fp32 values, and its derivative.

Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 6.
"""

import jax
import jax.numpy as jnp
from jax import Array


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up, elementwise in the type given."""
    return jax.nn.silu(gate) * up


def swiglu_vjp(gate: Array, up: Array, dh: Array) -> tuple[Array, Array, Array]:
    """silu(gate) * up and the cotangents of gate and up, computed in fp32, in the type of gate."""
    gate32, up32, dh = (a.astype(jnp.float32) for a in (gate, up, dh))
    sigmoid = jax.nn.sigmoid(gate32)
    silu = gate32 * sigmoid
    dgate = dh * up32 * (sigmoid + silu * (1 - sigmoid))
    h, dup = silu * up32, dh * silu
    return h.astype(gate.dtype), dgate.astype(gate.dtype), dup.astype(gate.dtype)


def weighted_swiglu_vjp(gate: Array, up: Array, dh: Array, weight: Array | None):
    """`swiglu_vjp` where h is multiplied by one weight per row, of the shape without the last axis.

    h comes weighted, `dh` is the cotangent of the weighted h. Fourth is that of the weight, fp32;
    without a weight it is None.
    """
    if weight is None:
        return *swiglu_vjp(gate, up, dh), None
    gate32, up32, dh = (a.astype(jnp.float32) for a in (gate, up, dh))
    h = jax.nn.silu(gate32) * up32
    _, dgate, dup = swiglu_vjp(gate, up, dh * weight[..., None])
    weighted = (h * weight[..., None]).astype(gate.dtype)
    return weighted, dgate, dup, jnp.sum(dh * h, axis=-1)
