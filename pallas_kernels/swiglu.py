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
