"""FP8: quantisation bit by bit, products against float64, and both as kernels for Hopper.

The emulator multiplies E4M3 as NumPy does, in fp32, and converts as XLA does; only how many bits
the tensor cores keep inside a partial sum over 128 is beyond it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.fp8 import matmul as dense
from pallas_kernels.fp8.grouped import (
    fp8_grouped_matmul,
    fp8_grouped_matmul_tiles,
    pad_groups,
    pad_rows,
    padded_size,
    unpad_rows,
)
from pallas_kernels.fp8.matmul import fp8_matmul, fp8_matmul_tiles
from pallas_kernels.fp8.product import Blocks, smem_bytes
from pallas_kernels.fp8.quantize import (
    E4M3,
    Quantized,
    dequantize,
    quantize_blocks,
    quantize_blocks_both,
    quantize_both,
    quantize_tiles,
    quantize_tiles_transposed,
    swiglu_quantize,
    swiglu_quantize_both,
    tile_scale,
)
from pallas_kernels.mosaic import SMEM_BYTES
from pallas_kernels.scales import reciprocal
from tests.kernel_ladder import emulate, lower, relative_error, unlikeness

PRODUCT = 1e-3  # `unlikeness` that FP8 kernels are held to elsewhere; these reach 1e-5 and less
Shape = jax.ShapeDtypeStruct
to_tiles, to_tiles_transposed, to_blocks = map(
    jax.jit, (quantize_tiles, quantize_tiles_transposed, quantize_blocks_both)
)


def draw(*shape, dtype="bfloat16", seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def difficult(rows=144, width=208, dtype="bfloat16"):
    """Zeros, tiles of very different sizes, largest entries that are powers of two, ties."""
    x = np.array(draw(rows, width), np.float32)
    x[5] = 0
    x[:, 128:] *= 1e-3
    x[7] *= 1e30
    x[8] *= 1e-30
    x[9, :4] = [448, 17, 19, -23]  # scale 1: exactly between two neighbours
    x[9, 4:128] = 1
    return jnp.asarray(x, dtype)


def run(backend, function, *arguments, **options):
    """One compiled call of a backend; races are looked for in emulated ones."""
    call = jax.jit(partial(function, backend=backend, **options))
    return emulate(call, *arguments) if backend == "emulated" else call(*arguments)


def quantized_in_numpy(x, power_of_two=False):
    """1 x 128 tiles from the definition, rounded by ml_dtypes."""
    R, C = x.shape
    tiles = np.pad(np.float32(x), ((0, 0), (0, -C % 128))).reshape(R, -1, 128)
    largest = np.abs(tiles).max(axis=-1)
    scale = np.where(largest > 0, largest / np.float32(448), np.float32(1))
    if power_of_two:
        scale = np.float32(2.0) ** np.ceil(np.log2(np.float64(scale))).astype(np.float32)
    q = tiles * (np.float32(1) / scale)[..., None]
    return q.astype(ml_dtypes.float8_e4m3fn).reshape(R, -1)[:, :C], scale


def assert_same_bits(got, want):
    q, scale = want
    np.testing.assert_array_equal(np.asarray(got.scale), scale)
    np.testing.assert_array_equal(np.asarray(got.q).view(np.uint8), q.view(np.uint8))


# ---- quantisation --------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "power_of_two"), [("bfloat16", False), ("float32", True)])
@pytest.mark.parametrize("backend", ["emulated", "portable"])
def test_tiles_bit_by_bit(backend, dtype, power_of_two):
    x = difficult(dtype=dtype)
    by_rows, by_columns = run(backend, quantize_both, x, power_of_two=power_of_two)
    assert_same_bits(by_rows, quantized_in_numpy(np.asarray(x), power_of_two))
    assert_same_bits(by_columns, quantized_in_numpy(np.asarray(x).T, power_of_two))


def test_scales_are_rounded_whatever_division_the_compiler_chooses():
    """Divisions of GPUs are up to 2 units of the last place off."""
    rng = np.random.default_rng(0)
    # Next to powers of two, a unit is twice as large on one side.
    edges = np.ldexp(np.float32(1) + np.arange(-4, 5) * np.float32(2**-23), 40)
    x = np.concatenate([rng.uniform(1, 2, 200_000), edges]).astype(np.float32)
    x *= np.exp2(rng.integers(-60, 60, x.shape)).astype(np.float32)
    np.testing.assert_array_equal(
        jax.jit(tile_scale, static_argnums=1)(x, False), x / np.float32(448)
    )
    for units in range(-2, 3):
        start = ((1 / x).view(np.int32) + units).view(np.float32)
        np.testing.assert_array_equal(jax.jit(reciprocal)(x, start), 1 / x)


def test_one_layout_gives_the_bits_of_both():
    x = difficult(16, 144)
    assert_same_bits(run("emulated", quantize_tiles, x), quantized_in_numpy(np.asarray(x)))
    got = run("emulated", quantize_tiles_transposed, x)
    assert_same_bits(got, quantized_in_numpy(np.asarray(x).T))


@pytest.mark.parametrize("backend", ["emulated", "portable"])
def test_blocks_bit_by_bit(backend):
    w = jnp.stack([difficult(16), draw(16, 208)]).at[1, :, :128].set(0)
    as_is, transposed = run(backend, quantize_blocks_both, w)
    for e, matrix in enumerate(np.asarray(w, np.float32)):
        padded = np.pad(matrix, ((0, 112), (0, 48)))
        largest = np.abs(padded.reshape(1, 128, 2, 128)).max(axis=(1, 3))
        scale = np.where(largest > 0, largest / np.float32(448), np.float32(1))
        inverse = np.repeat(np.repeat(np.float32(1) / scale, 128, 0), 128, 1)[:16, :208]
        q = (matrix * inverse).astype(ml_dtypes.float8_e4m3fn)
        assert_same_bits(Quantized(as_is.q[e], as_is.scale[e]), (q, scale))
        assert_same_bits(Quantized(transposed.q[e], transposed.scale[e]), (q.T, scale.T))
    single = run("portable", quantize_blocks, w[0])
    assert_same_bits(single, (np.asarray(as_is.q[0]), np.asarray(as_is.scale[0])))


def test_what_is_not_finite_stays_visible():
    """It is NaN again, alone or with its tile; the other tiles are not touched."""
    x = draw(16, 256).at[3, 5].set(jnp.nan).at[4, 200].set(jnp.inf)
    for backend in ("emulated", "portable"):
        back = np.isnan(dequantize(run(backend, quantize_tiles, x), jnp.float32))
        assert back[3, 5]
        assert back[4, 200]
        assert not np.delete(back.reshape(32, 128), [6, 9], axis=0).any()


def test_swiglu_is_quantised_in_one_pass():
    gate, up = 3 * draw(144, 144), draw(144, 144, seed=1)
    g, u = np.float64(gate), np.float64(up)
    h = g / (1 + np.exp(-g)) * u
    best = quantized_in_numpy(h)
    exact = np.float64(best[0]) * np.repeat(np.float64(best[1]), 128, 1)[:, :144]
    by_rows, by_columns = run("emulated", swiglu_quantize_both, gate, up)
    alone = run("portable", swiglu_quantize, gate, up)
    for got, want in ((by_rows, exact), (alone, exact), (by_columns, h.T)):
        back = dequantize(got, jnp.float32)
        error = relative_error(back, want)
        assert error < (0.04 if want is not exact else 3e-3), error
    assert relative_error(exact, h) > 0.01  # the bound above is far below E4M3's own error


# ---- products ------------------------------------------------------------------------------------


def float64(x, blocks=False):
    scale = np.repeat(np.float64(x.scale), 128, -1)[..., : x.q.shape[-1]]
    if blocks:
        scale = np.repeat(scale, 128, -2)[..., : x.q.shape[-2], :]
    return np.float64(x.q) * scale


@pytest.mark.parametrize(("columns", "N"), [(128, 208), (256, 304)])
def test_product_of_tiles_and_blocks(columns, N):
    """Odd sizes; fewer resident blocks than tiles, so that slots carry on from tile to tile."""
    x, w = difficult(136, 272).at[7:9].set(1), draw(272, N, seed=1)
    a, b = to_tiles(x), to_blocks(w)[1]
    options = {"blocks": Blocks(columns, 2, 1, programs=2), "dtype": jnp.float32}
    y = run("emulated", fp8_matmul, a, b, **options)
    exact = float64(a) @ float64(b, True).T
    assert relative_error(y, exact) < 1e-6
    for backend in ("portable", "reference"):
        assert unlikeness(run(backend, fp8_matmul, a, b), exact) < 1e-5 < PRODUCT
    # What FP8 itself costs.
    assert relative_error(exact, np.float64(x) @ np.float64(w)) < 0.05


def test_gradient_of_rows_in_bf16():
    """The weight in its other orientation; the only error is the rounding of the result."""
    dy, w = to_tiles(draw(64, 144)), to_blocks(draw(64, 144, seed=1))[0]
    dx = run("emulated", fp8_matmul, dy, w)
    assert dx.dtype == jnp.bfloat16
    exact = float64(dy) @ float64(w, True).T
    rounded = jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16)
    assert relative_error(dx, exact) < 1.1 * relative_error(rounded, exact)


def test_weight_gradient_is_a_product_of_tiles():
    x, dy = difficult(272, 144), draw(272, 16, seed=1)
    a, b = to_tiles_transposed(x), to_tiles_transposed(dy)
    dw = run("emulated", fp8_matmul_tiles, a, b, blocks=Blocks(128, 2, 1, programs=3))
    exact = float64(a) @ float64(b).T
    assert dw.dtype == jnp.float32
    assert relative_error(dw, exact) < 1e-6
    assert unlikeness(run("portable", fp8_matmul_tiles, a, b), exact) < 1e-5


@pytest.mark.parametrize("backend", ["emulated", "portable", "reference"])
def test_products_of_experts(backend):
    """A group of two tiles, an empty one, one of a single row, and rows of no group."""
    sizes, M, K, N = [129, 0, 1], 144, 144, 16
    x, dy, w = draw(M, K), draw(M, N, seed=1), draw(3, K, N, seed=2)
    group_sizes = jnp.array(sizes, jnp.int32)
    padding = jax.jit(pad_groups, static_argnums=1)(group_sizes, M)
    rows, gradients = jax.jit(pad_rows)(x, padding), jax.jit(pad_rows)(dy, padding)
    a, weights = to_tiles(rows), to_blocks(w)[1]
    # The padding may hold anything in the forward product.
    nan = jnp.where((padding.source_P == M)[:, None], jnp.nan, a.scale)
    options = {"blocks": Blocks(256, 2, 2, programs=3)} if backend == "emulated" else {}
    y = run(backend, fp8_grouped_matmul, Quantized(a.q, nan), weights, group_sizes, **options)
    b, c = to_tiles_transposed(rows), to_tiles_transposed(gradients)
    options = {"blocks": Blocks(128, 2, 2, programs=3)} if options else {}
    dw = run(backend, fp8_grouped_matmul_tiles, b, c, group_sizes, **options)

    exact_y, exact_dw, start = np.zeros((len(rows), N)), np.zeros((3, K, N)), 0
    for e, size in enumerate(sizes):
        own = slice(start, start + size)
        exact_y[own] = float64(a)[own] @ float64(weights, True)[e].T
        exact_dw[e] = float64(b)[:, own] @ float64(c)[:, own].T
        start += -(-size // 128) * 128
    y, dw = np.asarray(y, np.float32), np.asarray(dw)
    assert unlikeness(y, exact_y) < 1e-5
    assert unlikeness(dw, exact_dw) < 1e-5
    assert not y[exact_y == 0].any()
    assert not dw[1].any()
    unpadded = np.asarray(unpad_rows(jnp.asarray(y), padding))
    assert relative_error(unpadded[129], np.float64(x)[129] @ np.float64(w)[2]) < 0.06
    assert not unpadded[130:].any()


def test_padding_holds_every_row_once():
    M = 310
    x = jnp.arange(1.0, M + 1)[:, None]

    @jax.jit
    def there_and_back(sizes):
        padding = pad_groups(sizes, M)
        return padding.source_P, unpad_rows(pad_rows(x, padding), padding)

    for sizes in ([0, 0, 0], [1, 1, 1], [128, 182, 0], [0, 300, 3]):
        source, back = map(np.asarray, there_and_back(jnp.array(sizes)))
        assert len(source) == padded_size(M, 3)
        want = np.arange(1, M + 1) * (np.arange(M) < sum(sizes))
        np.testing.assert_array_equal(back[:, 0], want)
        starts = [np.argmax(source == sum(sizes[:e])) for e in range(3) if sizes[e]]
        assert not np.any(np.array(starts, int) % 128)


# ---- real shapes ---------------------------------------------------------------------------------


def quantized(*shape, blocks=False):
    *lead, R, C = shape
    scale = (*lead, -(-R // 128) if blocks else R, -(-C // 128))
    return Quantized(Shape(shape, E4M3), Shape(scale, jnp.float32))


def test_real_shapes_lower():
    def lowers(function, *arguments):
        lower(partial(function, backend="mosaic"), *arguments)

    lowers(partial(quantize_both, power_of_two=True), Shape((4096, 7168), "float32"))
    lowers(quantize_blocks_both, Shape((8, 7168, 2048), "float32"))
    lowers(swiglu_quantize_both, *[Shape((4096, 2048), "bfloat16")] * 2)
    for N, K in ((2112, 7168), (32768, 512)):
        lowers(fp8_matmul, quantized(8192, K), quantized(N, K, blocks=True))
    lowers(fp8_matmul_tiles, quantized(7168, 8192), quantized(2112, 8192))
    groups, P = Shape((256,), jnp.int32), padded_size(65536, 256)
    lowers(fp8_grouped_matmul, quantized(P, 7168), quantized(256, 4096, 7168, blocks=True), groups)
    lowers(fp8_grouped_matmul_tiles, quantized(2048, P), quantized(7168, P), groups)


def test_blocks_follow_the_shapes():
    """Few tiles: narrow ones, to fill the last wave. Many: wide ones, which read less."""
    assert dense.choose_blocks(32, 2112, b_in_tiles=False).columns == 128
    assert dense.choose_blocks(32, 24576, b_in_tiles=False).columns == 256
    assert dense.choose_blocks(32, 24576, b_in_tiles=True).columns == 128
    for b_in_tiles, dtype in ((False, jnp.bfloat16), (True, jnp.float32)):
        choices = dense.candidates(32, 4096, b_in_tiles=b_in_tiles)
        chosen = dense.choose_blocks(32, 4096, b_in_tiles=b_in_tiles)
        assert {smem_bytes(c, dtype) <= SMEM_BYTES for c in [*choices, chosen]} == {True}


# ---- errors --------------------------------------------------------------------------------------


def test_errors_say_what_to_do():
    x = draw(16, 128)

    def made(*shape, blocks=False):
        return jax.tree.map(lambda s: np.ones(s.shape, s.dtype), quantized(*shape, blocks=blocks))

    a, b, experts = made(16, 128), made(16, 128, blocks=True), made(1, 16, 128, blocks=True)
    groups = np.array([16])
    kernel = partial(fp8_matmul, backend="mosaic")
    for message, call in (
        ("give a matrix of bf16 or fp32", lambda: quantize_tiles(x.astype(jnp.float16))),
        ("width 136 is no multiple of 16", lambda: quantize_tiles(draw(16, 136), backend="mosaic")),
        ("there are 17 rows", lambda: quantize_both(draw(17, 128), backend="mosaic")),
        (r"up is bfloat16 \(15, 128\)", lambda: swiglu_quantize(x, x[1:])),
        (r"give \[K, N\] or \[E, K, N\]", lambda: quantize_blocks(x[0])),
        ("give float8_e4m3fn", lambda: fp8_matmul(Quantized(x, a.scale), b)),
        ("contraction as the last axis", lambda: fp8_matmul(a, made(16, 64, blocks=True))),
        (r"128 x 128 blocks need \(1, 1\)", lambda: fp8_matmul(a, a)),
        (r"1 x 128 tiles need \(16, 1\)", lambda: fp8_matmul_tiles(a, b)),
        ("the result cannot be", lambda: fp8_matmul(a, b, dtype=jnp.float16)),
        ("9 columns of 2 bytes", lambda: kernel(a, made(9, 128, blocks=True))),
        ("1 weights for 2 groups", lambda: fp8_grouped_matmul(a, experts, np.array([1, 1]))),
        ("give a padded buffer", lambda: fp8_grouped_matmul(a, experts, groups)),
        ("one integer per expert", lambda: fp8_grouped_matmul(a, experts, groups[0])),
    ):
        with pytest.raises(ValueError, match=message):
            call()
