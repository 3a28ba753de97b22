"""Absorbed latent attention of a few new tokens over the latent cache.

    o[b, i, n] = softmax_s(scale * q[b, i, n] . cache[b, s]) cache[b, s, :C],   s < length - (Q-1-i)

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2: with W_UK absorbed by the queries and W_UV by
the output, all heads share one key, the cached latent and rotary key, and one value, the latent.

Schedule (`decode/kernel.py` has the inside of a block):
1. Queries and heads of a row are one axis, cut in blocks of 64.
2. A row's slots are cut evenly into splits, so that few rows fill the GPU too (flash-decoding).
3. A block keeps its queries in shared memory and reads each tile of 64 slots once, as keys and as
   values; two warpgroups share the tiles' logits, and each owns half of the output's channels.
4. XLA weighs the splits' outputs by their sums of exponentials. One split needs no such pass.

Roofline on an H200 (989 TFLOP/s, 4.8 TB/s): 2 B Q N S (L + C) FLOPs and 2 B S L bytes, which is
Q N (L + C) / L = 242 FLOPs per byte at 128 heads and 30 at 16. The ridge is at 206: 128 heads are
bound by the tensor cores, which blocks of 64 keep full; 16 heads by the memory.

Shape letters: B rows, Q new tokens of a row, N heads, L = C + R channels of a slot (C latent, R
rotary), S slots, G pages, P pages of a row, M = Q N, D splits.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.decode.kernel import PAIR, ROWS, TILE, Sizes, decode, shared_memory
from pallas_kernels.decode.portable import portable, reference
from pallas_kernels.mosaic import NUM_SMS, SMEM_BYTES, Backend
from pallas_kernels.tuned import tuned_blocks

MAX_SPLITS = 64
ROWS_OF_COPY = 8
"""Arrays in the device's memory have a multiple of these, or fewer."""
PRODUCTS_PER_SECOND = 550e12
"""FLOP/s that a full GPU is designed to reach."""
BYTES_PER_SECOND = 4.0e12
START_SECONDS = 4e-6
"""Seconds of a block outside of its products; and of a pass over the outputs."""


class Blocks(NamedTuple):
    """Blocks of a call."""

    splits: int
    """Parts of a row's slots."""


def mla_decode(
    q_BQNL: Array,
    cache: Array,
    lengths_B: Array,
    *,
    scale: float,
    latent: int,
    block_table_BP: Array | None = None,
    backend: Backend = "portable",
    blocks: Blocks | None = None,
) -> Array:
    """Attention of a row's last Q tokens over its cache, in absorbed form.

    Query i of Q sees the slots below lengths[b] - (Q - 1 - i); one that sees none gets zeros. Slots
    from lengths[b] on may hold anything, NaN included (finite, if "portable"), and so may the block
    table beyond the pages that the length needs. The softmax runs in fp32.

    Args:
        q_BQNL: queries with W_UK absorbed, then their rotary part [B, Q, N, L].
        cache: [B, S, L]; or pages [G, page size, L] with `block_table_BP`. Of the type of q.
        lengths_B: valid slots of each row, the Q new tokens included, int32 [B]; a run-time value,
            not checked: at most S.
        scale: of the logits; positive.
        latent: C, the leading channels of a slot that are its value.
        block_table_BP: page of each stretch of `page size` slots of a row, int32 [B, P].
        backend: the kernels ("mosaic", "emulated") take bf16 and what `unsupported` lets pass, and
            have no gradient; "portable" reads the whole cache; "reference" computes in fp32.
        blocks: how the kernel cuts the call; by default tuned, or `choose_blocks`.

    Returns:
        [B, Q, N, C], of the type of q.

    Raises:
        ValueError: shapes, types, the scale or the backend do not fit.
    """
    _check(q_BQNL, cache, lengths_B, block_table_BP, scale, latent)
    if backend in ("portable", "reference"):
        run = portable if backend == "portable" else reference
        return run(q_BQNL, cache, lengths_B, block_table_BP, scale, latent)
    if backend not in ("mosaic", "emulated"):
        raise ValueError(
            f"backend is {backend!r}; use 'mosaic', 'emulated', 'portable' or 'reference'"
        )
    B, _, N, L = q_BQNL.shape
    stretch = {"slots" if block_table_BP is None else "page": cache.shape[1]}
    why = unsupported(latent, L - latent, N, q_BQNL.dtype, **stretch)
    if why:
        raise ValueError(f"backend {backend!r} cannot compute this: {why}; use 'portable'")
    if block_table_BP is None:  # a row is one page
        block_table_BP = jnp.arange(B, dtype=jnp.int32)[:, None]
    arrays = q_BQNL, cache, block_table_BP, lengths_B
    return _by_kernel(*arrays, scale, latent, blocks, emulated=backend == "emulated")


def unsupported(
    latent: int, rotary: int, heads: int, dtype: Any, *, slots: int = 0, page: int = 0
) -> str | None:
    """Reason why the kernel cannot take such a cache, a clause; None if it can.

    Where it is known, `slots` is the length of a cache [B, S, L], or `page` that of pages.
    """
    if dtype != jnp.bfloat16:
        return f"queries are {jnp.dtype(dtype)}, and the kernel multiplies bfloat16"
    if latent % 32 or not 0 < latent <= 512:
        return f"the latent width {latent} is not a multiple of 32 up to 512"
    if rotary % 16 or rotary <= 0:
        return f"the rotary width {rotary} is not a positive multiple of 16"
    if shared_memory(latent, rotary) > SMEM_BYTES:
        return f"tiles of {latent} + {rotary} channels do not fit shared memory"
    if heads < 1:
        return f"there are {heads} heads"
    if slots % ROWS_OF_COPY:
        return f"a cache of {slots} slots is not a multiple of {ROWS_OF_COPY}"
    if page % TILE:
        return f"pages of {page} slots are not a multiple of {TILE}"
    return None


# ---- how many splits -----------------------------------------------------------------------------


def candidates(B: int, M: int, S: int) -> list[Blocks]:
    """Numbers of splits that differ in the pairs of tiles each gets, for the tuner."""
    pairs = math.ceil(S / PAIR)
    each = {math.ceil(pairs / splits) for splits in range(1, min(pairs, MAX_SPLITS) + 1)}
    return [Blocks(math.ceil(pairs / n)) for n in sorted(each, reverse=True)]


def seconds(B: int, M: int, S: int, latent: int, width: int, blocks: Blocks) -> float:
    """Predicted time of a call on an H200.

    Blocks run in waves over the SMs. In one, a pair of tiles takes as long as its products or, if
    longer, as the SM's share of the memory traffic: row blocks that run together share a row's
    tiles. Splits add one pass over their fp32 outputs.
    """
    row_blocks = math.ceil(M / ROWS)
    waves = math.ceil(B * row_blocks * blocks.splits / NUM_SMS)
    pairs = math.ceil(math.ceil(S / PAIR) / blocks.splits)
    products = 2 * ROWS * PAIR * (width + latent) / (PRODUCTS_PER_SECOND / NUM_SMS)
    copies = 2 * PAIR * width / row_blocks / (BYTES_PER_SECOND / NUM_SMS)
    time = waves * (pairs * max(products, copies) + START_SECONDS)
    if blocks.splits > 1:  # written once, read once
        time += START_SECONDS + 8 * blocks.splits * B * M * latent / BYTES_PER_SECOND
    return time


def choose_blocks(B: int, M: int, S: int, latent: int, width: int) -> Blocks:
    """The candidate that `seconds` finds fastest; of equals the one with fewer splits."""
    return min(candidates(B, M, S), key=lambda b: (seconds(B, M, S, latent, width, b), b))


def _blocks(B: int, M: int, S: int, latent: int, width: int) -> Blocks:
    shapes = spelled(B, M, S, latent, width)
    return tuned_blocks("mla_decode", shapes, Blocks) or choose_blocks(B, M, S, latent, width)


def spelled(B: int, M: int, S: int, latent: int, width: int) -> str:
    """A call as files of timed blocks name it."""
    return f"B{B} M{M} S{S} C{latent} L{width}"


# ---- the kernel and its splits -------------------------------------------------------------------


def _by_kernel(
    q_BQNL, cache_GSL, table_BP, lengths_B, scale: float, latent: int, blocks: Blocks | None, *,
    emulated: bool,
) -> Array:  # fmt: skip
    """[B, Q, N, C]; heads and queries are one axis to the kernel."""
    (B, Q, N, L), page = q_BQNL.shape, cache_GSL.shape[1]
    blocks = blocks or _blocks(B, Q * N, page * table_BP.shape[1], latent, L)
    if not 1 <= blocks.splits <= MAX_SPLITS:
        raise ValueError(f"blocks ask for {blocks.splits} splits; give 1 to {MAX_SPLITS}")
    sizes = Sizes(Q, N, latent, L - latent, page, blocks.splits, scale * math.log2(math.e))
    padding = -(Q * N) % ROWS_OF_COPY if Q * N > ROWS_OF_COPY else 0
    q_BML = jnp.pad(q_BQNL.reshape(B, Q * N, L), ((0, 0), (0, padding), (0, 0)))
    o_BMC = _kernel(sizes, emulated, q_BML, cache_GSL, table_BP, lengths_B)
    return o_BMC[:, : Q * N].reshape(B, Q, N, latent)


def _run(sizes: Sizes, emulated: bool, q_BML, cache_GSL, table_BP, lengths_B) -> Array:
    """Outputs [B, M, C] of the kernel and, if there are several splits, their combination."""
    out, lse_DBM = decode(q_BML, cache_GSL, table_BP, lengths_B, sizes, emulated=emulated)
    if lse_DBM is None:
        return out
    return combine(out, lse_DBM[..., : q_BML.shape[1]]).astype(q_BML.dtype)


def _no_gradient(sizes, emulated, primals, tangents):
    raise ValueError(
        "mla_decode's kernel has no gradient; use backend='portable', or mla_attention to train"
    )


_kernel = jax.custom_jvp(_run, nondiff_argnums=(0, 1))
_kernel.defjvp(_no_gradient)


def combine(o_DBMC: Array, lse_DBM: Array) -> Array:
    """Outputs of splits, weighted by their sums of exponentials 2^lse: fp32 [B, M, C].

    A split without slots has a sum near 0, and zeros: it changes nothing.
    """
    weight_DBM = jnp.exp2(lse_DBM - lse_DBM.max(axis=0))
    weight_DBM /= weight_DBM.sum(axis=0)
    return jnp.sum(o_DBMC * weight_DBM[..., None], axis=0)


def _check(q_BQNL, cache, lengths_B, block_table_BP, scale: float, latent: int) -> None:
    """Raise ValueError unless the arguments of `mla_decode` fit each other."""
    if q_BQNL.ndim != 4:
        raise ValueError(f"queries have shape {q_BQNL.shape}; give [rows, tokens, heads, channels]")
    B, _, _, L = q_BQNL.shape
    if cache.ndim != 3 or cache.shape[2] != L:
        raise ValueError(
            f"the cache has shape {cache.shape}; queries have {L} channels: "
            f"give [rows, slots, {L}], or [pages, page size, {L}] with a block table"
        )
    if cache.dtype != q_BQNL.dtype:
        raise ValueError(f"the cache is {cache.dtype}, queries are {q_BQNL.dtype}; cast one")
    if block_table_BP is None and cache.shape[0] != B:
        raise ValueError(f"the cache has {cache.shape[0]} rows, queries have {B}; give as many")
    if not 0 < latent < L:
        raise ValueError(f"latent is {latent}; a slot has {L} channels: give 1 to {L - 1}")
    if not scale > 0:
        raise ValueError(f"scale is {scale}; give a positive number")
    given = {"lengths": (lengths_B, 1), "block table": (block_table_BP, 2)}
    for name, (x, ndim) in given.items():
        if x is not None and (x.ndim != ndim or x.shape[0] != B or x.dtype != jnp.int32):
            raise ValueError(
                f"{name} has shape {x.shape} and type {x.dtype}; give int32, {ndim}-dimensional, "
                f"{B} rows"
            )
