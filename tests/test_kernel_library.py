"""Kernels of the library: who chooses them, and what they compute.

Without the library: that it is asked for in words. With it (`make library`): attention and grouped
products as the library computes them by XLA, held to what our kernels are held to; the bodies of
its Triton attention, interpreted; what it takes on which GPU; regions of a mesh. Its Mosaic kernels
cannot be interpreted on CPU (docs/kernels.md): `bench.library_kernels` compiles them.
"""

import contextlib
import types
from functools import partial

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np
import pytest

from configs import preset
from model import kernels
from model.kernels import choose
from pallas_kernels import library
from pallas_kernels.attention import mla_attention
from pallas_kernels.fp8 import fp8_expert_ffn
from pallas_kernels.grouped import expert_ffn
from pallas_kernels.grouped.matmul import grouped_matmul
from pallas_kernels.library import installed
from tests import test_kernel_attention as attention
from tests import test_kernel_fp8 as fp8
from tests import test_kernel_grouped as grouped
from tests.kernel_ladder import relative_error
from tests.test_kernel_choice import AMPERE, CPU, HOPPER, SMALL, layout_on

BLACKWELL = HOPPER | {"device_kind": "NVIDIA B200", "compute_capability": "10.0"}
LOVELACE = HOPPER | {"device_kind": "NVIDIA L40S", "compute_capability": "8.9"}


def without(name, monkeypatch):
    """The library as it is, but for one package that is not there, or another version."""

    def version(asked):
        if asked == name:
            raise installed.metadata.PackageNotFoundError(asked)
        return installed.LOCKED[asked]

    monkeypatch.setattr(installed.metadata, "version", version)


@pytest.fixture
def pretended(monkeypatch):
    """The library is there and takes everything."""
    monkeypatch.setattr(installed.metadata, "version", installed.LOCKED.__getitem__)
    monkeypatch.setattr(kernels, "as_default", lambda _: contextlib.nullcontext())
    for name in ("attention_refusal", "experts_refusal", "fp8_experts_refusal"):
        monkeypatch.setattr(library, name, lambda *_: None)


# ---- who chooses it ------------------------------------------------------------------------------


def test_what_is_not_installed_is_asked_for(monkeypatch):
    without("jax-triton", monkeypatch)
    choice = choose("auto", SMALL, "bfloat16", layout_on(AMPERE))
    assert set(choice.kernels) == {"portable"}
    assert (
        "8.0, not 9.0; the library of kernels is not installed (jax-triton); make gpu-env"
        in (choice.describe()[0])
    )
    with pytest.raises(
        ValueError, match=r"kernels=library cannot run here.*make gpu-env.*auto can"
    ):
        choose("library", SMALL, "bfloat16", layout_on(AMPERE))
    q, kv, k_rope, _ = attention.operands(attention.TINY)
    with pytest.raises(ValueError, match=r"backend 'library'.*make gpu-env.*or use 'portable'"):
        mla_attention(q, kv, k_rope, scale=1.0, backend="library")


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(installed.metadata, "version", lambda _: "0.0.18")
    assert "tokamax is 0.0.18, and is called as 0.0.17 has it" in str(library.unusable())


@pytest.mark.parametrize("device", [AMPERE, LOVELACE, BLACKWELL])
def test_auto_takes_it_on_other_gpus(pretended, device):
    choice = choose("auto", SMALL, "bfloat16", layout_on(device))
    assert choice.kernels == kernels.Kernels(attention="library", experts="library")
    first, second = choice.describe()
    assert first.startswith("attention, experts: library (NVIDIA ")
    assert "not 9.0" in first
    assert second.startswith("decode, loss: portable (the library has no kernel")


def test_ours_stay_first_on_hopper(pretended):
    assert set(choose("auto", SMALL, "bfloat16", layout_on(HOPPER)).kernels[:4]) == {"mosaic"}
    asked = choose("library", SMALL, "bfloat16", layout_on(HOPPER))
    assert asked.kernels.attention == asked.kernels.experts == "library"
    assert "attention, experts: library (asked for)" in asked.describe()


def test_a_cpu_stays_with_xla(pretended):
    choice = choose("auto", SMALL, "bfloat16", layout_on(CPU))
    assert choice.describe() == [
        "attention, decode, experts, loss: portable (the devices are cpu, not NVIDIA Hopper GPUs)"
    ]
    with pytest.raises(ValueError, match="kernels=library cannot run here: the devices are cpu"):
        choose("library", SMALL, "bfloat16", layout_on(CPU))


def test_what_it_refuses_goes_to_xla_with_its_words(pretended, monkeypatch):
    monkeypatch.setattr(library, "attention_refusal", lambda *_: "too wide")
    choice = choose("auto", SMALL, "bfloat16", layout_on(BLACKWELL), fp8=True)
    assert choice.kernels.attention == choice.kernels.linear == "portable"
    assert choice.kernels.experts == "library"
    assert any("attention" in line and "too wide" in line for line in choice.describe())


# ---- what it computes, by XLA --------------------------------------------------------------------


@pytest.fixture
def by_xla():
    with library.by_xla():
        yield


@pytest.mark.library
@pytest.mark.parametrize("packed", [False, True])
def test_attention(by_xla, packed):
    sizes = attention.V3._replace(T=264, N=2)
    arrays = attention.operands(sizes)
    start_BT = attention.starts(sizes.T, 100, 250) if packed else None
    got = jax.jit(partial(attention.with_gradients, backend="library"))(*arrays, start_BT)
    whole = attention.starts(sizes.T) if start_BT is None else start_BT
    want, by_xla = attention.exact(*arrays, whole), attention.by_xla(*arrays, whole)
    for name, g, w, x in zip(attention.NAMES, got, want, by_xla, strict=True):
        assert g.dtype == jnp.bfloat16
        assert relative_error(g, w) <= min(1e-2, 1.1 * relative_error(x, w)), name


@pytest.mark.library
@pytest.mark.parametrize("name", grouped.GROUPS)
def test_matmul_and_gradients(by_xla, name):
    sizes = grouped.GROUPS[name]
    inputs = grouped.operands(sizes, [(grouped.K, grouped.N)])
    got = grouped.compiled(grouped_matmul, backend="library")(*inputs)
    x, (w,), dy, _ = inputs
    reference = grouped.compiled(grouped_matmul, backend="reference")(*inputs)
    grouped.assert_as_good_as_xla(got, reference, grouped.exact_matmul(x, w, dy, sizes))
    assert not np.asarray(got[0][sum(sizes) :]).any()
    assert not np.asarray(got[1][sum(sizes) :]).any()


@pytest.mark.library
def test_ffn_and_gradients(by_xla):
    sizes = [9, 31]
    inputs = grouped.operands(sizes, [(128, 64), (128, 64), (64, 128)], rows=56)
    x, weights, dy, _ = inputs
    got = grouped.compiled(expert_ffn, backend="library")(*inputs)
    plain = grouped.compiled(grouped.plain_ffn, backend="reference")(*inputs)
    grouped.assert_as_good_as_xla(got, plain, grouped.exact_ffn(x, *weights, dy, sizes))


@pytest.mark.library
def test_products_of_experts_in_fp8(by_xla):
    fp8.test_products_of_experts("library")


@pytest.mark.library
def test_expert_ffn_in_fp8(by_xla):
    """Of the same quantised operands: only the order of sums, and roundings after them, differ."""
    x, weights, dy, sizes = grouped.operands([70, 0, 33], [(128, 64), (128, 64), (64, 128)], 110)
    x, dy = jnp.nan_to_num(x), jnp.nan_to_num(dy)

    def run(backend):
        y, pull = jax.vjp(lambda x, *w: fp8_expert_ffn(x, *w, sizes, backend=backend), x, *weights)
        return y, *pull(dy)

    got, want = (jax.jit(run, static_argnums=0)(b) for b in ("library", "reference"))
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < 1e-2


@pytest.mark.library
def test_gradients_agree_on_a_mesh(by_xla):
    """Inside of a region that tracks what varies, over devices that share weights."""
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    x, weights, dy, _ = grouped.operands([40, 24], [(64, 64), (64, 64), (64, 64)], rows=64)
    sizes = jnp.array([[30, 2], [5, 27]], jnp.int32)

    def total(weights, x, sizes):
        # As in every region of ours (sharding/partition.py:on_shards).
        weights = [jax.lax.pcast(w, ("x",), to="varying") for w in weights]
        y = expert_ffn(x[0], *weights, sizes[0], backend="library").astype(jnp.float32)
        return jax.lax.psum(jnp.sum(y * dy[:32].astype(jnp.float32)), "x")

    P = jax.P
    on_mesh = jax.shard_map(total, mesh=mesh, in_specs=(P(), P("x"), P("x")), out_specs=P())
    got = jax.jit(jax.grad(on_mesh))(weights, x.reshape(2, 32, 64), sizes)

    def alone(weights):
        ys = [expert_ffn(x[32 * i : 32 * i + 32], *weights, sizes[i], backend="reference")
              for i in range(2)]  # fmt: skip
        return sum(jnp.sum(y.astype(jnp.float32) * dy[:32].astype(jnp.float32)) for y in ys)

    for g, w in zip(got, jax.jit(jax.grad(alone))(weights), strict=True):
        assert relative_error(g, w) < 1e-2


# ---- what it computes, by the bodies of its kernels ----------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
    """JAX's default device says that it is a GPU of some capability; nothing runs on it."""

    class Device(types.SimpleNamespace):
        __hash__ = object.__hash__

    def pretend(capability):
        device = Device(platform="gpu", device_kind="NVIDIA X", core_count=108,
                        compute_capability=capability)  # fmt: skip
        monkeypatch.setattr(jax.extend.backend, "get_default_device", lambda: device)
        monkeypatch.setattr(kernels, "as_default", lambda _: contextlib.nullcontext())

    return pretend


def interpreted(monkeypatch):
    """`pl.pallas_call` runs a kernel's body on CPU; what numbers its programs is asked for before
    its loops, where the interpreter knows it."""
    from jax.experimental import pallas as pl

    call, program_id = pl.pallas_call, pl.program_id

    def pallas_call(kernel, *arguments, **options):
        count = len(options["grid_spec"].grid)

        def body(*refs):
            ids = [program_id(i) for i in range(count)]

            def known(axis):
                if axis >= count:
                    raise ValueError(f"no axis {axis}")
                return ids[axis]

            with monkeypatch.context() as patch:
                patch.setattr(pl, "program_id", known)
                kernel(*refs)

        del options["compiler_params"]
        return call(body, *arguments, **options, interpret=True)

    monkeypatch.setattr(pl, "pallas_call", pallas_call)


@pytest.mark.library
def test_triton_attention_interpreted(on_gpu, monkeypatch):
    """Its kernels scale queries and keys in bf16, so they stay within 1e-2, but up to 1.8 times the
    error of XLA, where ours stay within 1.1. Masks of its backward pass cannot be interpreted."""
    on_gpu("8.0")
    interpreted(monkeypatch)
    sizes = attention.V3._replace(T=264, N=1)
    arrays, start_BT = attention.operands(sizes), attention.starts(sizes.T, 100, 250)
    attend = partial(mla_attention, scale=attention.SCALE, backend="library")
    o = jax.jit(attend)(*arrays[:3], start_BT)
    want, xla = (f(*arrays, start_BT)[0] for f in (attention.exact, attention.by_xla))
    assert relative_error(o, want) <= min(1e-2, 1.8 * relative_error(xla, want))
    whole = attention.starts(sizes.T)
    got = jax.jit(partial(attention.with_gradients, backend="library"))(*arrays)
    want, xla = (f(*arrays, whole) for f in (attention.exact, attention.by_xla))
    for name, g, w, x in zip(attention.NAMES, got, want, xla, strict=True):
        assert relative_error(g, w) <= min(1e-2, 1.8 * relative_error(x, w)), name


# ---- what it takes on which GPU ------------------------------------------------------------------


@pytest.mark.library
@pytest.mark.parametrize(
    ("device", "in_fp8"), [(AMPERE, False), (LOVELACE, False), (HOPPER, True), (BLACKWELL, True)]
)
@pytest.mark.filterwarnings("ignore")
def test_what_it_takes(on_gpu, device, in_fp8):
    """It is asked itself, by tracing: every generation takes V3's widths in bf16."""
    on_gpu(device["compute_capability"])
    v3, layout = preset("v3_671b").model, layout_on(device)
    choice = choose("library", v3, "bfloat16", layout)
    assert (choice.kernels.attention, choice.kernels.experts) == ("library", "library")
    experts = choose("library", v3, "bfloat16", layout, fp8=True)
    assert experts.kernels.experts == ("library" if in_fp8 else "portable")
    assert in_fp8 or any("no FP8 on GPUs of compute capability 8" in x for x in experts.describe())
    assert choose("auto", v3, "float32", layout_on(BLACKWELL)).kernels.attention == "portable"
