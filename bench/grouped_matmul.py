"""Grouped matmul and expert FFN, forward and backward, against dense products of the same FLOPs.

    python -m bench.grouped_matmul [--write]

The dense chain is what one expert with all the rows would cost: x @ w, dy @ w.T, x.T @ dy (and
the SwiGLU of three such products for the FFN). Nothing can be faster for the same FLOPs, so the
ratio is the price of the groups.

Shape letters: M rows, E experts, K input width, N output width, D model width, F expert width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from bench.command import Command
from bench.timing import interleaved
from pallas_kernels.grouped import expert_ffn
from pallas_kernels.grouped.matmul import grouped_matmul

PEAK_SIZE = 2048


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape. `valid` is the share of the buffer's rows that belong to a group."""

    name: str
    rows: int
    experts: int
    inputs: int
    outputs: int
    valid: float = 1.0
    ragged_dot: bool = False


CASES = (
    Case("tiny: 2048 tokens, top-4", 8192, 16, 256, 128, ragged_dot=True),
    Case("64 experts, top-6, up", 12288, 64, 256, 128),
    Case("64 experts, top-6, down", 12288, 64, 128, 256),
    Case("shard of 4 experts, half full", 8192, 4, 256, 128, valid=0.5),
    Case("V2-Lite width", 4096, 8, 2048, 1408),
)


@dataclasses.dataclass(frozen=True)
class Figure:
    """Median seconds of forward and backward, and the FLOPs they stand for."""

    case: str
    what: str
    seconds: float
    dense_seconds: float
    flops: float


def main(arguments: list[str] | None = None) -> list[Figure]:
    """Measure, print, and with `--write` record."""
    parser = Command(__doc__, repeats=1, cases=1)
    parser.add_argument("--cases", type=int, default=len(CASES), help="shapes, the first so many")
    parser.add_argument("--repeats", type=int, default=20, help="rounds per shape")
    options = parser.options(arguments)
    peak = measure_peak(options.repeats)
    figures = [f for case in CASES[: options.cases] for f in measure(case, options.repeats)]
    lines = table(figures, peak)
    parser.show("Grouped matmul and expert FFN", lines)
    return figures


def measure_peak(repeats: int) -> float:
    """FLOP/s of a square fp32 product."""
    a = jnp.ones((PEAK_SIZE, PEAK_SIZE), jnp.float32)
    product = jax.jit(jnp.matmul)
    return 2 * PEAK_SIZE**3 / interleaved({"peak": lambda: product(a, a)}, repeats)["peak"]


def measure(case: Case, repeats: int) -> list[Figure]:
    """Times of one shape, all in the same rounds."""
    rng = np.random.default_rng(0)
    M, E, K, N = case.rows, case.experts, case.inputs, case.outputs
    valid = int(M * case.valid)
    # Uneven groups, as routing gives: Dirichlet(3) leaves the largest about 2.5 times the mean.
    sizes_E = jnp.asarray(rng.multinomial(valid, rng.dirichlet(np.full(E, 3.0))), jnp.int32)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) * 0.1, jnp.float32)

    x_MK, dy_MN, dy_MK = normal(M, K), normal(M, N), normal(M, K)
    w_EKN, w_up_EKN, w_down_ENK = normal(E, K, N), normal(E, K, N), normal(E, N, K)
    ffn_weights = w_EKN, w_up_EKN, w_down_ENK
    x, dense_weights = x_MK[:valid], [w[0] for w in ffn_weights]
    runs = {
        "dense": chain(jnp.matmul, dy_MN[:valid], x, dense_weights[0]),
        "grouped matmul": chain(grouped_matmul, dy_MN, x_MK, w_EKN, sizes_E),
        "dense SwiGLU": chain(swiglu, dy_MK[:valid], x, *dense_weights),
        "expert FFN": chain(expert_ffn, dy_MK, x_MK, *ffn_weights, sizes_E),
        "three grouped matmuls": chain(three_matmuls, dy_MK, x_MK, *ffn_weights, sizes_E),
    }
    if case.ragged_dot:
        runs["ragged_dot"] = chain(jax.lax.ragged_dot, dy_MN, x_MK, w_EKN, sizes_E)
    seconds = interleaved(runs, repeats)
    flops = 6 * valid * K * N
    return [
        Figure(case.name, what, seconds[what], seconds[dense], flops * products)
        for what, dense, products in (
            ("dense", "dense", 1),
            ("grouped matmul", "dense", 1),
            ("ragged_dot", "dense", 1),
            ("dense SwiGLU", "dense SwiGLU", 3),
            ("expert FFN", "dense SwiGLU", 3),
            ("three grouped matmuls", "dense SwiGLU", 3),
        )
        if what in seconds
    ]


def chain(function, dy, *arguments):
    """A call without arguments: the value and the gradients of all float arguments."""
    floats = [a for a in arguments if jnp.issubdtype(a.dtype, jnp.floating)]
    rest = arguments[len(floats) :]

    @jax.jit
    def run(dy, floats, rest):
        y, vjp = jax.vjp(lambda *floats: function(*floats, *rest), *floats)
        return y, vjp(dy)

    return lambda: run(dy, floats, rest)


def swiglu(x, w_gate, w_up, w_down):
    """The expert FFN of one expert."""
    return (jax.nn.silu(x @ w_gate) * (x @ w_up)) @ w_down


def three_matmuls(x, w_gate, w_up, w_down, sizes_E):
    """The expert FFN without fusion."""
    gate, up = grouped_matmul(x, w_gate, sizes_E), grouped_matmul(x, w_up, sizes_E)
    return grouped_matmul(jax.nn.silu(gate) * up, w_down, sizes_E)


def table(figures: list[Figure], peak: float) -> list[str]:
    """Markdown rows; share of peak is of the square product measured in the same run."""
    return [
        f"fp32, forward and backward, medians. Square product of {PEAK_SIZE}: "
        f"{peak / 1e9:.0f} GFLOP/s (the peak below).",
        "",
        "| shape | what | ms | x dense | GFLOP/s | share of peak |",
        "|---|---|---:|---:|---:|---:|",
        *(
            f"| {f.case} | {f.what} | {f.seconds * 1e3:.2f} | {f.seconds / f.dense_seconds:.2f} "
            f"| {f.flops / f.seconds / 1e9:.0f} | {f.flops / f.seconds / peak:.0%} |"
            for f in figures
        ),
    ]


if __name__ == "__main__":
    main()
