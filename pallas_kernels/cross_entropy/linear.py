"""Cross-entropy of a linear head, softmax(x w), without all logits: rows are taken in chunks.

A chunk of C rows is three products: logits = x w, dx = d w^T and dw += x^T d, where
d = weights (softmax - one-hot). Between the first and the others stand three numbers per row, which
the caller combines when the vocabulary is cut over devices.

    x, w -> kernel -> per row and tile: largest, sum of exponentials, target's logit
                  `-> exponentials, fp16 [C, V], relative to the largest of their row and tile
    combine over tiles, then over devices -> lse, loss
    exponentials x exp(largest - lse) x weights -> d, bf16 [C, V]   (XLA, 6 bytes a logit)
    d, w -> dx;  x, d -> dw   (XLA)

fp16's 11 bits add 1 % to the rounding error that d in bf16 has anyway, and a fourth product, the
logits once more, is saved: 6 bytes a logit take a twelfth of the time of 2 D FLOPs at D = 7168.
With `recompute` that product is made instead and the fp16 array is not: half the memory of a chunk.

Roofline at M = 4096, D = 7168, V = 129280 on an H200 (989 TFLOP/s, 4.8 TB/s): 7.6 TFLOP and 7.7 ms
for each of three products, bound by the tensor cores; 0.44 ms for d, bound by memory.

Letters: M rows, C rows of a chunk, D hidden width, V vocabulary (this device's part), T tiles of V.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.cross_entropy import tiles as cross_entropy_tiles
from pallas_kernels.cross_entropy.tiles import (
    CLUSTER_ROWS,
    KEPT_SCALE,
    Blocks,
    choose_blocks,
    unsupported,
)
from pallas_kernels.grouped.ragged import zeros_varying
from pallas_kernels.mosaic import Backend
from pallas_kernels.tuned import tuned_blocks

PORTABLE_CHUNK_BYTES = 4 << 20
"""Logits at a time without kernels, fp32: a few MiB stay in the last-level cache of a CPU."""
KERNEL_CHUNK_BYTES = 1 << 30
"""Arrays [C, V] at a time with kernels. Each chunk reads and writes dw, 8 D V bytes, beside
6 C D V FLOPs: 2000 rows keep that to a tenth of the time."""


class Parts(NamedTuple):
    """Cross-entropy's three numbers of a row, over a part of the vocabulary; fp32 [M] each."""

    largest_M: Array
    sum_M: Array
    """Sum of exp(logit - largest)."""
    target_M: Array
    """Logit of the target; 0 where the target lies elsewhere."""

    def lse(self) -> Array:
        """log of the sum of exp(logit)."""
        return self.largest_M + jnp.log(self.sum_M)


type Combine = Callable[[Parts], Parts]


def alone(parts: Parts) -> Parts:
    """The combination of one device that holds the whole vocabulary."""
    return parts


def merge(parts: Parts, largest_over: Callable, sum_over: Callable) -> Parts:
    """Parts of the vocabulary to the whole, given how to take the largest and the sum of them."""
    largest_M = largest_over(parts.largest_M)
    sum_M = sum_over(parts.sum_M * jnp.exp(parts.largest_M - largest_M))
    return Parts(largest_M, sum_M, sum_over(parts.target_M))


# ---- one call for all rows ----------------------------------------------------------------------


def logsumexp_and_target(
    x_MD: Array,
    w_DV: Array,
    targets_M: Array,
    *,
    backend: Backend = "portable",
    blocks: Blocks | None = None,
) -> Parts:
    """Per row over this part of the vocabulary: largest logit, sum of exp, the target's logit.

    Args:
        x_MD: rows, bf16 for the kernels [M, D].
        w_DV: this device's columns of the head [D, V], of the type of `x_MD`.
        targets_M: columns of the targets, int32 [M], counted from this device's first; those
            outside of [0, V) belong to other devices.
        backend: kernels and "reference" take all rows at once; "portable" chunks of them.
        blocks: how the kernel cuts the product; by default tuned, or from the shapes.

    Raises:
        ValueError: shapes do not fit each other, or not the kernels.
    """
    _check(x_MD, w_DV, targets_M, backend)
    if backend != "portable":
        return _softmax(x_MD, w_DV, targets_M, backend, blocks, recompute=True)[0]
    chunks, _ = _chunks((x_MD, targets_M), 4 * w_DV.shape[1], PORTABLE_CHUNK_BYTES, 1)
    parts = lax.map(lambda c: _softmax(c[0], w_DV, c[1], backend, None, False)[0], chunks)
    return Parts(*(a.reshape(-1)[: x_MD.shape[0]] for a in parts))


def dlogits(
    x_MD: Array,
    w_DV: Array,
    targets_M: Array,
    lse_M: Array,
    weights_M: Array,
    *,
    backend: Backend = "portable",
    blocks: Blocks | None = None,
) -> Array:
    """weights (softmax(x w) - one-hot), of the type of x [M, V]; logits are computed anew.

    Arguments and errors as in `logsumexp_and_target`; `lse_M` is that of the whole vocabulary,
    `weights_M` the rows' weights, fp32 both.
    """
    _check(x_MD, w_DV, targets_M, backend)
    if backend in ("mosaic", "emulated"):
        blocks = blocks or _blocks(x_MD, w_DV)
        rows = targets_M, lse_M, weights_M
        return cross_entropy_tiles.gradient(
            x_MD, w_DV, *rows, blocks=blocks, emulated=backend == "emulated"
        )
    logits_MV = _logits(x_MD, w_DV, backend)
    return _dlogits(logits_MV, targets_M, lse_M, weights_M).astype(x_MD.dtype)


def loss_sum(
    x_MD: Array,
    w_DV: Array,
    targets_M: Array,
    weights_M: Array,
    *,
    combine: Combine = alone,
    backend: Backend = "portable",
    blocks: Blocks | None = None,
) -> Array:
    """sum(weights * -log softmax(x w)[target]) over these rows, an fp32 scalar. No gradient.

    Arguments and errors as in `loss_and_gradients`.
    """
    _check(x_MD, w_DV, targets_M, backend, weights_M)
    parts = combine(logsumexp_and_target(x_MD, w_DV, targets_M, backend=backend, blocks=blocks))
    return jnp.sum((parts.lse() - parts.target_M) * weights_M)


# ---- loss and gradients, a chunk at a time ------------------------------------------------------


def loss_and_gradients(
    x_MD: Array,
    w_DV: Array,
    targets_M: Array,
    weights_M: Array,
    *,
    combine: Combine = alone,
    backend: Backend = "portable",
    recompute: bool = False,
    chunk_bytes: int | None = None,
    blocks: Blocks | None = None,
) -> tuple[Array, Array, Array]:
    """sum(weights * -log softmax(x w)[target]) and its gradients, while the logits are at hand.

    Args:
        x_MD: rows [M, D]; bf16 for the kernels.
        w_DV: this device's columns of the head [D, V], of the type of `x_MD`.
        targets_M: int32 [M], counted from this device's first column.
        weights_M: fp32 [M]; 0 for rows that do not count.
        combine: makes `Parts` of this device's columns those of the whole vocabulary
            (`merge`); called once per chunk.
        recompute: kernels only: compute logits twice rather than keep their exponentials.
        chunk_bytes: memory for arrays [C, V].
        blocks: how the kernel cuts the product; by default tuned, or from the shapes.

    Returns:
        The loss, fp32, alike on every device that `combine` joins; dx [M, D], of the type of x,
        which the caller sums over the vocabulary's devices; dw fp32 [D, V].

    Raises:
        ValueError: shapes do not fit each other, or not the kernels.
    """
    _check(x_MD, w_DV, targets_M, backend, weights_M)
    operands = (x_MD, w_DV, targets_M, weights_M)

    def step(carry, chunk):
        total, dw_DV = carry
        x_CD, targets_C, weights_C = chunk
        parts, dlogits_of = _softmax(x_CD, w_DV, targets_C, backend, blocks, recompute)
        parts = combine(parts)
        d_CV = dlogits_of(parts, weights_C).astype(x_CD.dtype)
        dw_DV = dw_DV + _dot(x_CD, d_CV, 0, 0, backend)
        dx_CD = _dot(d_CV, w_DV, 1, 1, backend).astype(x_CD.dtype)
        nll_C = parts.lse() - parts.target_M
        return (total + jnp.sum(nll_C * weights_C), dw_DV), dx_CD

    rows = (x_MD, targets_M, weights_M)
    chunks, num = _chunks(rows, *_chunk_size(w_DV.shape[1], backend, recompute, chunk_bytes))
    start = (
        zeros_varying((), jnp.float32, operands),
        zeros_varying(w_DV.shape, jnp.float32, operands),
    )
    if num == 1:  # without a loop, XLA adds nothing to dw
        (total, dw_DV), dx_CD = step(start, jax.tree.map(lambda a: a[0], chunks))
        return total, dx_CD[: x_MD.shape[0]], dw_DV
    (total, dw_DV), dx = lax.scan(step, start, chunks)
    return total, dx.reshape(-1, x_MD.shape[1])[: x_MD.shape[0]], dw_DV


# ---- parts --------------------------------------------------------------------------------------


def _check(x_MD: Array, w_DV: Array, targets_M: Array, backend: Backend, *more_M: Array) -> None:
    if x_MD.ndim != 2 or w_DV.ndim != 2 or x_MD.shape[1] != w_DV.shape[0]:
        raise ValueError(
            f"x has shape {x_MD.shape} and w {w_DV.shape}; give [rows, width] and "
            "[width, vocabulary]"
        )
    if x_MD.dtype != w_DV.dtype:
        raise ValueError(f"x is {x_MD.dtype} but w is {w_DV.dtype}; cast one of them")
    for a_M in (targets_M, *more_M):
        if a_M.shape != x_MD.shape[:1]:
            raise ValueError(
                f"x has {x_MD.shape[0]} rows, but targets or weights have shape {a_M.shape}; "
                "give one per row"
            )
    if backend in ("portable", "reference"):
        return
    if backend not in ("mosaic", "emulated"):
        raise ValueError(
            f"backend is {backend!r}; use 'mosaic', 'emulated', 'portable' or 'reference'"
        )
    D, V = w_DV.shape
    why = unsupported(D, V, x_MD.dtype)
    if why:
        raise ValueError(f"backend {backend!r} cannot compute this: {why}; use 'portable'")


def _blocks(x_MD: Array, w_DV: Array) -> Blocks:
    M, (D, V) = x_MD.shape[0], w_DV.shape
    return tuned_blocks("cross_entropy", spelled(M, D, V), Blocks) or choose_blocks(M, D, V)


def spelled(M: int, D: int, V: int) -> str:
    """A call as files of timed blocks name it."""
    return f"M{M} D{D} V{V}"


def _chunk_size(V: int, backend: Backend, recompute: bool, chunk_bytes: int | None):
    """Bytes of a row, of a chunk, and the multiple that a chunk's rows are."""
    if backend == "reference":
        return 1, 1 << 62, 1
    if backend == "portable":
        return 4 * V, chunk_bytes or PORTABLE_CHUNK_BYTES, 1
    return (2 if recompute else 4) * V, chunk_bytes or KERNEL_CHUNK_BYTES, CLUSTER_ROWS


def _chunks(
    arrays: tuple[Array, ...], row_bytes: int, chunk_bytes: int, multiple: int
) -> tuple[tuple[Array, ...], int]:
    """[M, ...] -> [number, C, ...], and the number; rows of zeros fill the last chunk."""
    M = arrays[0].shape[0]
    most = max(1, chunk_bytes // (row_bytes * multiple)) * multiple
    number = max(1, -(-M // most))
    C = -(-M // (number * multiple)) * multiple if number > 1 else M
    number = -(-M // C) if C else 1

    def cut(a: Array) -> Array:
        a = jnp.pad(a, ((0, number * C - M), *[(0, 0)] * (a.ndim - 1)))
        return a.reshape(number, C, *a.shape[1:])

    return tuple(cut(a) for a in arrays), number


def _dot(a: Array, b: Array, axis_a: int, axis_b: int, backend: Backend) -> Array:
    """Product over one axis of each, in fp32; exact to fp32 for the reference."""
    precision = None
    if backend == "reference":
        a, b, precision = a.astype(jnp.float32), b.astype(jnp.float32), lax.Precision.HIGHEST
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _logits(x_MD: Array, w_DV: Array, backend: Backend) -> Array:
    return _dot(x_MD, w_DV, 1, 0, backend)


def _hits(targets_M: Array, V: int) -> Array:
    return targets_M[:, None] == jnp.arange(V)


def _dlogits(logits_MV: Array, targets_M: Array, lse_M: Array, weights_M: Array) -> Array:
    p_MV = jnp.exp(logits_MV - lse_M[:, None])
    return weights_M[:, None] * (p_MV - _hits(targets_M, logits_MV.shape[1]))


def _softmax(
    x_MD: Array,
    w_DV: Array,
    targets_M: Array,
    backend: Backend,
    blocks: Blocks | None,
    recompute: bool,
) -> tuple[Parts, Callable[[Parts, Array], Array]]:
    """This device's parts; and dlogits [M, V], given those of the whole vocabulary and weights."""
    if backend in ("mosaic", "emulated"):
        blocks = blocks or _blocks(x_MD, w_DV)
        tiles_T3M, exp_MV = cross_entropy_tiles.statistics(
            x_MD, w_DV, targets_M, keep=not recompute, blocks=blocks, emulated=backend == "emulated"
        )
        tiles = Parts(*tiles_T3M.swapaxes(0, 1))
        parts = merge(tiles, partial(jnp.max, axis=0), partial(jnp.sum, axis=0))
        if exp_MV is None:
            again = partial(dlogits, x_MD, w_DV, targets_M, backend=backend, blocks=blocks)
            return parts, lambda whole, weights_M: again(whole.lse(), weights_M)
        return parts, partial(_from_exponentials, exp_MV, tiles.largest_M, targets_M, blocks)

    logits_MV = _logits(x_MD, w_DV, backend)
    largest_M = logits_MV.max(axis=1)
    sum_M = jnp.exp(logits_MV - largest_M[:, None]).sum(axis=1)
    target_M = jnp.where(_hits(targets_M, w_DV.shape[1]), logits_MV, 0.0).sum(axis=1)
    return Parts(largest_M, sum_M, target_M), lambda whole, weights_M: _dlogits(
        logits_MV, targets_M, whole.lse(), weights_M
    )


def _from_exponentials(
    exp_MV: Array,
    largest_TM: Array,
    targets_M: Array,
    blocks: Blocks,
    whole: Parts,
    weights_M: Array,
) -> Array:
    """dlogits of exponentials that are relative to the largest of their row and tile.

    At the target, where softmax - 1 may cancel, it is computed from the fp32 logit.
    """
    V, lse_M = exp_MV.shape[1], whole.lse()
    scale_TM = jnp.exp(largest_TM - lse_M) * (weights_M / KEPT_SCALE)
    scale_MV = jnp.repeat(scale_TM.T, blocks.columns, axis=1)[:, :V]
    at_target_M = weights_M * (jnp.exp(whole.target_M - lse_M) - 1)
    d_MV = exp_MV.astype(jnp.float32) * scale_MV
    return jnp.where(_hits(targets_M, V), at_target_M[:, None], d_MV)
