"""Grouped matmul and expert FFN by their kernels, emulated and lowered, against NumPy in float64.

Tolerances: relative error 1e-2 and no more than 1.1 times that of the same computation by XLA in
bf16; 1e-6 where the result is fp32 of bf16 operands, which is exact but for the order of sums.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped import expert_ffn
from pallas_kernels.grouped import products as grouped_matmul_mosaic
from pallas_kernels.grouped import weight_gradient as grouped_matmul_weights
from pallas_kernels.grouped.blocks import Blocks
from pallas_kernels.grouped.matmul import MatmulBlocks, grouped_matmul
from pallas_kernels.grouped.row_tiles import make_row_tiles
from pallas_kernels.grouped.weight_gradient import grouped_weight_gradient
from pallas_kernels.mosaic import SMEM_BYTES
from pallas_kernels.swiglu import swiglu
from tests.kernel_ladder import emulate, lower, relative_error

M, K, N = 275, 192, 128
"""No multiple of a swizzle's 8 rows; a tile and a half of weight gradient; steps of 3 and 2."""
GROUPS = {  # all in M rows, so that one compilation serves them
    "one and empty ones": [0, 0, 0, 275, 0, 0],
    "at edges of tiles": [64, 128, 1, 0, 5, 61],
}
"""The second: groups of whole tiles, three groups within 8 rows, a tail; NaN in 16 rows beyond."""
BLOCKS = {
    "alone": MatmulBlocks(*(Blocks(columns, 2, 1, programs=2) for columns in (64, 192, 128))),
    "in pairs": MatmulBlocks(
        Blocks(64, 3, 1, "columns", programs=2),
        Blocks(192, 2, 1, "rows", programs=2),
        Blocks(64, 2, 1, "columns", programs=4),
    ),
}
"""Two programs with several tiles each, so that the ring goes on from tile to tile."""
D, F = 7168, 2048
"""Widths of DeepSeek-V3."""


def operands(sizes, widths, rows=M):
    """Rows and cotangents, NaN where no group owns them, and a weight per pair of widths."""
    rng = np.random.default_rng(0)
    cast = partial(jnp.asarray, dtype=jnp.bfloat16)
    nobody = np.arange(rows)[:, None] >= sum(sizes)
    x = np.where(nobody, np.nan, rng.standard_normal((rows, widths[0][0])))
    dy = np.where(nobody, np.nan, rng.standard_normal((rows, widths[-1][1])))
    weights = [cast(rng.standard_normal((len(sizes), *pair)) * pair[0] ** -0.5) for pair in widths]
    return cast(x), weights, cast(dy), jnp.array(sizes, jnp.int32)


@cache
def compiled(function, **options):
    """y and all gradients, compiled once for all sizes."""

    def run(x, weights, dy, sizes):
        y, vjp = jax.vjp(partial(function, group_sizes_E=sizes, **options), x, *weights)
        return [y, *vjp(dy)]

    run = jax.jit(run)
    return partial(emulate, run) if options["backend"] == "emulated" else run


def plain_ffn(x, w_gate, w_up, w_down, group_sizes_E, backend):
    """The FFN as XLA computes it in bf16: every product summed in fp32 and rounded."""
    matmul = partial(grouped_matmul, group_sizes_E=group_sizes_E, backend=backend)
    gate, up = (matmul(x, w).astype(jnp.float32) for w in (w_gate, w_up))
    return matmul(swiglu(gate, up).astype(x.dtype), w_down)


def by_group(sizes, product, out):
    """out[span or expert] = product(span, expert) for every group."""
    start = 0
    for e, n in enumerate(sizes):
        product(out, slice(start, start + n), e)
        start += n
    return out


def exact_matmul(x, w, dy, sizes):
    """In float64: y, dx, dw."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))

    def product(out, span, e):
        y, dx, dw = out
        y[span], dx[span], dw[e] = x[span] @ w[e], dy[span] @ w[e].T, x[span].T @ dy[span]

    return by_group(sizes, product, [np.zeros((len(x), w.shape[2])), np.zeros(x.shape), 0 * w])


def exact_ffn(x, w_gate, w_up, w_down, dy, sizes):
    """In float64: y, dx and the gradients of the three weights."""
    x, w_gate, w_up, w_down, dy = (np.asarray(a, np.float64) for a in (x, w_gate, w_up, w_down, dy))

    def product(out, span, e):
        y, dx, dw_gate, dw_up, dw_down = out
        gate, up = x[span] @ w_gate[e], x[span] @ w_up[e]
        sigmoid = 1 / (1 + np.exp(-gate))
        h, dh = gate * sigmoid * up, dy[span] @ w_down[e].T
        dgate = dh * up * sigmoid * (1 + gate * (1 - sigmoid))
        dup = dh * gate * sigmoid
        y[span], dx[span] = h @ w_down[e], dgate @ w_gate[e].T + dup @ w_up[e].T
        dw_gate[e], dw_up[e], dw_down[e] = x[span].T @ dgate, x[span].T @ dup, h.T @ dy[span]

    empty = [np.zeros(x.shape), np.zeros(x.shape), 0 * w_gate, 0 * w_up, 0 * w_down]
    return by_group(sizes, product, empty)


def assert_as_good_as_xla(got, by_xla, want):
    assert len(got) == len(want)
    for kernel, xla, exact in zip(got, by_xla, want, strict=True):
        assert kernel.dtype == jnp.bfloat16
        assert np.isfinite(np.asarray(kernel, np.float32)).all()
        assert relative_error(kernel, exact) <= min(1e-2, 1.1 * relative_error(xla, exact))


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("one and empty ones", "in pairs"),
        ("at edges of tiles", "in pairs"),
        ("at edges of tiles", "alone"),
    ],
)
def test_matmul_and_gradients(name, cut):
    """Also: zeros in rows of no group, which hold NaN, and in weights of empty groups."""
    sizes = GROUPS[name]
    inputs = operands(sizes, [(K, N)])
    got = compiled(grouped_matmul, backend="emulated", blocks=BLOCKS[cut])(*inputs)
    x, (w,), dy, _ = inputs
    by_xla = compiled(grouped_matmul, backend="reference")(*inputs)
    assert_as_good_as_xla(got, by_xla, exact_matmul(x, w, dy, sizes))
    y, dx, dw = got
    assert not np.asarray(y[sum(sizes) :]).any()
    assert not np.asarray(dx[sum(sizes) :]).any()
    assert not np.asarray(dw)[np.array(sizes) == 0].any()


def test_no_group_has_rows():
    inputs = operands([0] * 6, [(K, N)])
    for array in compiled(grouped_matmul, backend="emulated", blocks=BLOCKS["alone"])(*inputs):
        assert not np.asarray(array, np.float32).any()


def test_ffn_and_gradients(monkeypatch):
    """SwiGLU in the epilogue, the sum of two products in dx; fewer rows than a tile."""
    for module in (grouped_matmul_mosaic, grouped_matmul_weights):  # one program: emulated faster
        monkeypatch.setattr(module, "choose_blocks", lambda *_: Blocks(64, 2, 1, programs=1))
    sizes = [9, 31]
    inputs = operands(sizes, [(128, 64), (128, 64), (64, 128)], rows=40)
    x, weights, dy, _ = inputs
    got = compiled(expert_ffn, backend="emulated")(*inputs)
    by_xla = compiled(plain_ffn, backend="reference")(*inputs)
    assert_as_good_as_xla(got, by_xla, exact_ffn(x, *weights, dy, sizes))
    alone = jax.jit(partial(expert_ffn, backend="emulated"))  # stores h, but neither gate nor up
    np.testing.assert_array_equal(emulate(alone, x, *weights, inputs[-1]), got[0])


def test_gradient_of_weights_in_fp32():
    x, (w,), dy, sizes = operands([70, 0, 75], [(64, 64)], rows=160)
    _, _, want = exact_matmul(x, w, dy, [70, 0, 75])
    got = emulate(jax.jit(partial(grouped_weight_gradient, emulated=True)), x, dy, sizes)
    assert got.dtype == jnp.float32
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_every_row_is_in_one_tile_of_its_group(seed):
    rng = np.random.default_rng(seed)
    num_rows, tile_rows = 1003, 64
    sizes = rng.multinomial(700 + 150 * seed, rng.dirichlet(np.full(40, 0.3)))
    tiles = make_row_tiles(jnp.asarray(sizes), num_rows, tile_rows)
    group, start, first, end, (count,) = (np.asarray(table) for table in tiles)
    assert count <= len(group)
    owner = np.full(num_rows, -1)
    for t in range(count):
        assert start[t] % 8 == 0
        assert 0 <= first[t] < end[t] <= tile_rows
        rows = slice(start[t] + first[t], start[t] + end[t])
        assert (owner[rows] == -1).all()
        owner[rows] = group[t]
    np.testing.assert_array_equal(owner, np.repeat(np.arange(41), [*sizes, num_rows - sizes.sum()]))


def test_tables_have_room_for_the_worst_sizes():
    """Every group one row longer than its tiles, each starting just before a multiple of 8."""
    sizes = np.array([7, *[130] * 30])
    tiles = make_row_tiles(jnp.asarray(sizes), int(sizes.sum()), 128)
    assert tiles.count_1[0] == 1 + 2 * 30
    assert len(tiles.group_C) >= 61


def test_lowers_for_cuda():
    """The FFN and its gradients with all experts of DeepSeek-V3 and 256 rows for each."""
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    x, E = shape((65536, D)), 256
    weights = [shape((E, D, F)), shape((E, D, F)), shape((E, F, D))]
    sizes = jax.ShapeDtypeStruct((E,), jnp.int32)
    program = lower(compiled(expert_ffn, backend="mosaic"), x, weights, x, sizes)
    # Seven products; two of them, of alike shapes, are one kernel that is called twice.
    assert program.count("call @wrapper") == 7
    assert program.count("custom_call @mosaic_gpu") == 6


def test_blocks_fit_the_machine():
    for products in (1, 2):
        for blocks in grouped_matmul_mosaic.candidates(F, products):
            assert grouped_matmul_mosaic.shared_memory(blocks, products) <= SMEM_BYTES
            assert products * blocks.columns <= 256
            assert F % (blocks.columns * blocks.pair_columns * blocks.band) == 0
    for blocks in grouped_matmul_weights.candidates(D, F):
        assert grouped_matmul_weights.shared_memory(blocks) <= SMEM_BYTES


def test_choice_of_blocks():
    """Pairs share the larger operand, the weight; few tiles are narrow, so that all cores work."""
    choose = grouped_matmul_mosaic.choose_blocks
    assert choose(65536, 8, F) == Blocks(256, 4, 8, "rows")
    assert choose(65536, 8, D) == Blocks(256, 4, 7, "rows")
    assert choose(65536, 8, F, 2) == Blocks(128, 4, 16, "rows")
    assert choose(512, 4, F).columns < 256
    assert grouped_matmul_weights.choose_blocks(8, D, F) == Blocks(256, 4, 8, "rows")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_MK": jnp.ones((3, 64)), "w_EKN": jnp.ones((2, 64, 64))}, "bfloat16, not float32"),
        ({"w_EKN": jnp.ones((2, 64, 100), jnp.bfloat16)}, "100 is no multiple of 64"),
        ({"backend": "auto"}, "use one of mosaic, emulated, library, portable, reference"),
    ],
)
def test_what_the_kernels_cannot_do_is_named(change, message):
    good = {
        "x_MK": jnp.ones((3, 64), jnp.bfloat16),
        "w_EKN": jnp.ones((2, 64, 64), jnp.bfloat16),
        "group_sizes_E": jnp.ones(2, int),
        "backend": "emulated",
    }
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**(good | change))
