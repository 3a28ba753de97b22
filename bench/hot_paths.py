"""Hot paths of a model with their gradients, by backend: `bench/gpu_proof.py` proves them.

Widths are those of a model; lengths and heads are given.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases.attention import Sizes, _cudnn
from model.config import ModelConfig
from pallas_kernels import library
from pallas_kernels.attention import mla_attention
from pallas_kernels.cross_entropy import loss_and_gradients
from pallas_kernels.decode import mla_decode
from pallas_kernels.fp8 import fp8_expert_ffn, fp8_linear
from pallas_kernels.grouped import expert_ffn

EXPERTS = 8


class Work(NamedTuple):
    """A hot path at some widths: a call with its gradients, by backend."""

    path: str
    call: Callable[[str], Callable[..., Any]]
    """From a backend to a function that gives the output, and gradients where there are any."""
    shapes: tuple[Any, ...]
    """Shapes of its arrays; values of integer arrays are in `integers`."""
    flops: float
    integers: tuple[np.ndarray, ...] = ()
    kernels: bool = True
    """Whether there is one of ours."""
    fp8: bool = False
    rival: tuple[str, Callable[..., Any]] | None = None
    forward: tuple[Callable[[str], Callable[..., Any]], float] | None = None
    """The output alone, and its FLOPs."""


def with_gradients(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Output, and gradients of the first `count` operands for a cotangent of ones."""

    def run(*operands):
        y, pull = jax.vjp(lambda *first: function(*first, *operands[count:]), *operands[:count])
        return y, *pull(jnp.ones_like(y))

    return run


def works(c: ModelConfig, tokens: int, heads: int, fp8: bool) -> Iterator[Work]:
    """Every hot path of a model, for `tokens` tokens and `heads` heads at most."""
    array, ints = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16), np.int32
    T, D, F, V = tokens, c.hidden_size, c.expert_ffn_size, c.vocab_size
    N, C, R = min(heads, c.num_heads), c.kv_lora_rank, c.qk_rope_head_dim
    sizes = Sizes(1, T, N, c.qk_nope_head_dim, R, c.v_head_dim)
    scale = (sizes.P + R) ** -0.5
    shapes = array((1, T, N, sizes.P + R)), array((1, T, N, sizes.P + sizes.V)), array((1, T, R))
    flops = float(N * T * T * (sizes.P + R + sizes.V))

    def attend(backend: str):
        return lambda q, kv, k: mla_attention(q, kv, k, scale=scale, backend=backend)  # pyright: ignore[reportArgumentType]

    def cudnn(q, kv, k):
        return _cudnn(q, kv, k, None, sizes=sizes)

    yield Work(
        "attention",
        lambda b: with_gradients(attend(b), 3),
        shapes,
        3.5 * flops,
        rival=("cuDNN", with_gradients(cudnn, 3)),
        forward=(attend, flops),
    )
    rows = 32 if T >= 1024 else 2
    decode = partial(mla_decode, scale=scale, latent=C)
    yield Work(
        "decode",
        lambda b: lambda *a: (decode(*a, backend=b),),
        (array((rows, 1, N, C + R)), array((rows, T, C + R)), jax.ShapeDtypeStruct((rows,), ints)),
        2.0 * rows * N * T * (2 * C + R),
        (np.full(rows, T - 3),),
    )
    M, E = (T, 2) if T < 512 else (EXPERTS * T // 2, EXPERTS)
    weights = array((E, D, F)), array((E, D, F)), array((E, F, D))
    groups = jax.ShapeDtypeStruct((E,), ints)
    cut = np.diff(np.round(np.linspace(0, 1, E + 1) ** 1.3 * M)).astype(ints)
    for ffn in [expert_ffn, *([fp8_expert_ffn] if fp8 else [])]:
        yield Work(
            "experts, FP8" if ffn is fp8_expert_ffn else "experts",
            lambda b, ffn=ffn: with_gradients(partial(ffn, backend=b), 4),
            (array((M, D)), *weights, groups),
            18.0 * M * D * F,
            (cut,),
            fp8=ffn is fp8_expert_ffn,
        )
    if fp8:
        yield Work(
            "linear, FP8",
            lambda b: with_gradients(partial(fp8_linear, backend=b), 2),
            (array((T, D)), array((D, F))),
            6.0 * T * D * F,
            fp8=True,
            rival=("cuBLAS in BF16", with_gradients(jnp.dot, 2)),
        )
    part = V // 8 // 128 * 128 or V
    targets = jax.ShapeDtypeStruct((T,), ints), jax.ShapeDtypeStruct((T,), jnp.float32)

    def loss(backend: str):
        return partial(loss_and_gradients, backend=backend)  # pyright: ignore[reportArgumentType]

    drawn = np.random.default_rng(0).integers(0, part, T).astype(ints)
    yield Work(
        "loss", loss, (array((T, D)), array((D, part)), *targets), 6.0 * T * D * part, (drawn,)
    )


def arrays(work: Work) -> tuple[jax.Array, ...]:
    """Normal numbers of the scale that activations and weights have, and its integers."""
    rng, integers = np.random.default_rng(0), iter(work.integers)

    def make(x: Any) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.asarray(next(integers))
        if len(x.shape) == 1:
            return jnp.ones(x.shape, x.dtype)
        weight = work.path.startswith("experts") and len(x.shape) == 3
        scale = x.shape[-2] ** -0.5 if weight else 1.0
        return jnp.asarray(rng.standard_normal(x.shape, np.float32) * scale, x.dtype)

    return tuple(map(make, work.shapes))


def backends(work: Work, dry: bool) -> list[str]:
    """Backends that can run here, XLA's first."""
    found = ["portable"]
    hopper = not dry and str(jax.devices()[0].compute_capability).startswith("9.")
    if work.kernels and (dry or hopper):
        found.append("emulated" if dry else "mosaic")
    has_one = work.path == "attention" or work.path.startswith("experts")
    if has_one and not dry and not library.unusable():
        found.append("library")
    return found
