"""Hugging Face folders: every layout of files gives the same arrays, bad ones are refused."""

import dataclasses
import json
import pickle

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import save_file

from checkpoint import fp8, hf_reader, safetensors
from checkpoint.hf_reader import INDEX, HuggingFaceFolder
from generation.engine import Generator
from model.recipe import Recipe
from sharding.config import LAYOUTS, MeshConfig
from sharding.mesh import make_mesh
from sharding.partition import Layout
from tests.small_model import CONFIG, hf_folder, tensors, weights

BF16 = ml_dtypes.bfloat16
WIDE = dataclasses.replace(
    CONFIG, hidden_size=160, q_lora_rank=None, kv_lora_rank=72, expert_ffn_size=130, mtp_depth=0
)
"""No dimension of its matrices is a multiple of 128."""


def abstract(config=CONFIG, mesh=MeshConfig()):  # noqa: B008 - a frozen value
    devices = jax.devices()[: 1 if mesh == MeshConfig() else 8]
    return Generator(config, Recipe(), Layout(make_mesh(mesh, devices))).abstract_weights


def assert_equal(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), wanted)


def halves(state):
    names = sorted(state)
    return [{n: state[n] for n in names[::2]}, {n: state[n] for n in names[1::2]}]


def quantized(state):
    """As released: block matrices in FP8 with factors, the others in BF16, the bias in F32."""
    result = {}
    for name, tensor in state.items():
        plain = ("embed_tokens", "lm_head", "head.weight", "mlp.gate.weight", "eh_proj")
        if tensor.ndim == 2 and not any(part in name for part in plain):
            result[name], result[f"{name}_scale_inv"] = fp8.quantize(tensor)
        else:
            result[name] = tensor if "bias" in name else tensor.astype(BF16)
    return result


@pytest.fixture(params=[pytest.param(hf_reader.BAND, marks=pytest.mark.slow), 50])
def band(request, monkeypatch):
    """Elements converted at a time: whole tensors of these sizes, and a few rows."""
    monkeypatch.setattr(hf_reader, "BAND", request.param)


# ---- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [MeshConfig(), LAYOUTS["cube"], MeshConfig(fsdp=-1)])
@pytest.mark.parametrize("fuse", [pytest.param(False, marks=pytest.mark.slow), True])
def test_arrays_of_any_mesh(tmp_path, mesh, fuse):
    folder = HuggingFaceFolder(hf_folder(tmp_path, halves(tensors(weights(), fuse=fuse))))
    assert folder.config == dataclasses.replace(CONFIG, init_std=folder.config.init_std)
    loaded = folder.load(abstract(mesh=mesh))
    assert_equal(loaded, weights())
    wanted = jax.tree.leaves(abstract(mesh=mesh))
    assert all(
        a.sharding == w.sharding for a, w in zip(jax.tree.leaves(loaded), wanted, strict=True)
    )


def test_any_slice_of_any_array(tmp_path, band):
    folder = HuggingFaceFolder(hf_folder(tmp_path, [tensors(weights())]))
    rng = np.random.default_rng(0)
    leaves = jax.tree_util.tree_leaves_with_path(weights())
    for path, leaf in leaves:
        tree, *keys = (key.key for key in path)
        for _ in range(4):
            bounds = [sorted(rng.choice(n + 1, 2, replace=False)) for n in leaf.shape]
            index = tuple(slice(int(a), int(b)) for a, b in bounds)
            found = folder.read(tree, "/".join(keys), index, np.float32)
            np.testing.assert_array_equal(found, leaf[index])


def test_fp8_blocks_and_slices_of_them(tmp_path, band):
    """Sizes that are no multiple of 128, and factors in another shard than their weight."""
    state = quantized(tensors(weights(WIDE), WIDE))
    scales = {name: t for name, t in state.items() if name.endswith("scale_inv")}
    rest = {name: t for name, t in state.items() if name not in scales}
    folder = HuggingFaceFolder(hf_folder(tmp_path, [scales, rest], WIDE))
    assert folder.quantized
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert state[name].shape == (130, 160)
    whole = (
        state[name].astype(np.float32)
        * np.kron(state[f"{name}_scale_inv"], np.ones((128, 128), np.float32))[:130, :160]
    )
    found = folder.read("params", "moe_layers/moe/w_up", (slice(0, 1), slice(3, 4)), np.float32)
    np.testing.assert_array_equal(found[0, 0], whole.T)
    part = (slice(0, 1), slice(3, 4), slice(100, 150), slice(120, 129))
    found = folder.read("params", "moe_layers/moe/w_up", part, np.float32)
    np.testing.assert_array_equal(found[0, 0], whole.T[100:150, 120:129])


def test_bf16_is_exact_in_fp32(tmp_path):
    state = {n: t if "bias" in n else t.astype(BF16) for n, t in tensors(weights()).items()}
    loaded = HuggingFaceFolder(hf_folder(tmp_path, [state])).load(abstract())
    rounded = jax.tree.map(lambda x: x.astype(BF16).astype(np.float32), weights()["params"])
    assert_equal(loaded["params"], rounded)
    assert_equal(loaded["router_bias"], weights()["router_bias"])


def test_half_precision_is_exact_in_fp32(tmp_path):
    state = {name: tensor.astype(np.float16) for name, tensor in tensors(weights()).items()}
    folder = HuggingFaceFolder(hf_folder(tmp_path, [state]))
    found = folder.read("params", "head/kernel", (), np.float32)
    np.testing.assert_array_equal(found, state["lm_head.weight"].T.astype(np.float32))


def test_a_host_reads_its_own_bytes_only(tmp_path, monkeypatch):
    folder = HuggingFaceFolder(hf_folder(tmp_path, [tensors(weights())]))
    read, original = [], safetensors._pread
    monkeypatch.setattr(
        safetensors,
        "_pread",
        lambda f, i, into, at: (read.append(into.nbytes), original(f, i, into, at)),
    )
    folder.read("params", "moe_layers/moe/w_gate", (slice(None), slice(2, 4)), np.float32)
    assert sum(read) == weights()["params"]["moe_layers"]["moe"]["w_gate"][:, 2:4].nbytes


def test_columns_are_read_without_the_rest_of_their_rows(tmp_path, monkeypatch):
    array = np.arange(6 * 2048, dtype=np.float32).reshape(6, 2048)
    path = tmp_path / "x.safetensors"
    safetensors.write(path, {"a": (array.dtype, array.shape)}, [("a", array)])
    info = safetensors.read_header(path)["a"]
    read, original = [], safetensors._pread
    monkeypatch.setattr(
        safetensors,
        "_pread",
        lambda f, i, into, at: (read.append(into.nbytes), original(f, i, into, at)),
    )
    for columns in (slice(512, 1024), slice(7, 9)):  # long pieces; short ones, read as rows
        found = safetensors.read(info, (slice(2, 5), columns))
        np.testing.assert_array_equal(found, array[2:5, columns])
    assert read == [512 * 4] * 3 + [3 * 2048 * 4]


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    array = np.ones((4, 4), np.float32)
    safetensors.write(path, {"a": (array.dtype, array.shape)}, [("a", array)])
    info = safetensors.read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="a: the file ends 5 bytes early"):
        safetensors.read(info)


def test_mtp_layers_that_config_promises_and_files_lack(tmp_path):
    state = {n: t for n, t in tensors(weights()).items() if not n.startswith("model.layers.3.")}
    with pytest.warns(UserWarning, match="1 MTP layers, the files hold none"):
        folder = HuggingFaceFolder(hf_folder(tmp_path, [state]))
    assert folder.config.mtp_depth == 0
    folder.load(abstract(folder.config))


def test_derived_frequencies_that_old_files_hold_are_passed_over(tmp_path):
    """Checkpoints of early V2 releases list what their rotary embedding computed."""
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    folder = HuggingFaceFolder(hf_folder(tmp_path, [tensors(weights()) | old]))
    assert_equal(folder.load(abstract(folder.config)), weights())


# ---- what is refused -----------------------------------------------------------------------------


def refuse(path, message):
    def read():
        folder = HuggingFaceFolder(path)
        folder.load(abstract(folder.config))

    with pytest.raises(ValueError, match=message):
        read()


def changed(change):
    state = dict(tensors(weights()))
    change(state)
    return [state]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("model.norm.weight"),
            r"model.norm.weight: expected \[32\], found nothing",
        ),
        (
            lambda s: s.update(extra=np.zeros(3, np.float32)),
            r"extra: found \[3\], expected nothing",
        ),
        (
            lambda s: s.update({"lm_head.weight": np.zeros((320, 31), np.float32)}),
            r"lm_head.weight: expected \[320, 32\], found \[320, 31\]",
        ),
        (
            lambda s: s.update({"model.norm.weight": np.zeros(32, np.int32)}),
            "model.norm.weight: type int32 holds no weights",
        ),
        (
            lambda s: s.update(
                {"model.layers.3.embed_tokens.weight": np.ones((320, 32), np.float32)}
            ),
            "differs from model.embed_tokens.weight",
        ),
        (
            lambda s: s.update(
                {"model.layers.0.self_attn.o_proj.weight": np.zeros((32, 48), fp8.E4M3)}
            ),
            r"o_proj.weight_scale_inv: expected \(1, 1\), found nothing",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    refuse(hf_folder(tmp_path, changed(change)), message)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_factor_that_is_not_finite(tmp_path, bad):
    state = quantized(tensors(weights()))
    state["model.layers.0.self_attn.o_proj.weight_scale_inv"][:] = bad
    refuse(hf_folder(tmp_path, [state]), "o_proj.weight_scale_inv holds NaN or infinity")


def test_missing_shard(tmp_path):
    hf_folder(tmp_path, halves(tensors(weights())))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refuse(tmp_path, r"model-00002-of-00002.safetensors is missing; the index places \d+ tensors")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", 7, ""])
def test_an_index_that_leaves_the_folder(tmp_path, name):
    hf_folder(tmp_path, [tensors(weights())])
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (tmp_path / INDEX).write_text(json.dumps(index))
    refuse(tmp_path, "plain names|no usable weight_map")


def test_pickles_are_not_read(tmp_path):
    hf_folder(tmp_path, [tensors(weights())])
    for file in [*tmp_path.glob("*.safetensors"), tmp_path / INDEX]:
        file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    refuse(tmp_path, "pytorch_model.bin, which are pickles and never read")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "llama"}'])
def test_config_that_is_not_one(tmp_path, text):
    hf_folder(tmp_path, [tensors(weights())])
    (tmp_path / "config.json").write_text(text)
    refuse(tmp_path, "config.json")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"vocab_size": 320',
            '"vocab_size": 320, "vocab_size": 322',
            "'vocab_size' is there twice",
        ),
        ('"num_hidden_layers": 3', '"num_hidden_layers": 1000000000', "is not enough"),
        ('"n_routed_experts": ', '"n_routed_experts": 100000000', "is not enough"),
        ('"rms_norm_eps": 1e-06', '"rms_norm_eps": Infinity', "rms_norm_eps is inf"),
    ],
)
def test_configs_that_no_reader_should_follow(tmp_path, old, new, message):
    file = hf_folder(tmp_path, [tensors(weights())]) / "config.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    refuse(tmp_path, message)


# ---- safetensors files ---------------------------------------------------------------------------


def raw(path, header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def entry(low, high, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [low, high]}


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        (b"{", b"", "not readable"),
        (b"\xff\xfe", b"", "not readable"),
        (b"[" * 100_000, b"", "not readable"),
        (b'{"a": 1, "a": 2}', b"", "a key occurs twice"),
        ([], b"", "is a list"),
        ({"a": 3}, b"", "a: its header entry 3 is malformed"),
        ({"a": entry(0, 4, [-1])}, b"1234", "malformed"),
        ({"a": entry(0, 4, [1.0])}, b"1234", "malformed"),
        ({"a": entry(0, 4, [True])}, b"1234", "malformed"),
        ({"a": entry(0, 4, [1], "F128")}, b"1234", "type 'F128'"),
        ({"a": entry(0, 4, [2])}, b"1234", "takes 8 bytes, its range has 4"),
        ({"a": entry(0, 8, [2])}, b"1234", "it is cut"),
        ({"a": entry(0, 4, [1])}, b"123456", "bytes that belong to nothing"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"1" * 12, "neither overlap"),
        ({"a": entry(4, 8, [1])}, b"1" * 8, "leave holes"),
        ({"a": entry(0, 4, [2**40, 2**40])}, b"1234", "its range has 4"),
    ],
)
def test_malformed_headers(tmp_path, header, body, message):
    path = raw(tmp_path / "x.safetensors", header, body)
    with pytest.raises(ValueError, match=message) as error:
        safetensors.read_header(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"1234", (2**62).to_bytes(8, "little") + b"{}"])
def test_headers_longer_than_their_file(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no safetensors file"):
        safetensors.read_header(path)


def test_files_are_those_of_the_library(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        f"t{i}": rng.normal(size=(5, i, 3)).astype(dtype)
        for i, dtype in enumerate((np.float32, np.float16, BF16, fp8.E4M3, np.float64), 1)
    } | {"empty": np.zeros((0, 4), np.float32), "scalar": np.array(3, np.int64)}
    path = tmp_path / "ours.safetensors"
    safetensors.write(path, {n: (a.dtype, a.shape) for n, a in arrays.items()}, arrays.items())
    for name, found in deserialize(path.read_bytes()):  # load_file knows no FP8
        assert bytes(found["data"]) == arrays[name].tobytes()
        assert tuple(found["shape"]) == arrays[name].shape
    theirs = tmp_path / "theirs.safetensors"
    save_file(arrays, theirs)
    for name, info in safetensors.read_header(theirs).items():
        np.testing.assert_array_equal(safetensors.read(info), arrays[name])


# ---- FP8 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("power_of_two", [False, True])
def test_unchanged_fp8_returns_bit_by_bit(power_of_two):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(300, 200)).astype(np.float32) * np.exp(rng.normal(size=(300, 1)) * 3)
    w[:128, :128] = 0
    q, scale = fp8.quantize(w.astype(np.float32))
    if power_of_two:  # as V3.1's: not the factors that `quantize` would choose
        scale = np.exp2(np.ceil(np.log2(scale))).astype(np.float32)
        q = (
            (w / np.kron(scale, np.ones((128, 128)))[:300, :200])
            .astype(np.float32)
            .astype(fp8.E4M3)
        )
    values = fp8.dequantize(q, scale)
    for kept in (np.float32, BF16):
        again, factors = fp8.quantize(values.astype(kept), scale)
        np.testing.assert_array_equal(factors, scale)
        np.testing.assert_array_equal(again.view(np.uint8), q.view(np.uint8))
    changed = values.copy()
    changed[299, 199] *= 1.5
    again, factors = fp8.quantize(changed, scale)
    np.testing.assert_array_equal(factors[:2], scale[:2])
    # Half a step of E4M3: 2^-4 of a value, 2^-10 of the factor where values are subnormal.
    found, step = fp8.dequantize(again, factors), factors.max() * 2**-10
    np.testing.assert_allclose(found, changed, rtol=2**-4, atol=step)


def test_fp8_error_is_half_a_step():
    w = np.random.default_rng(0).normal(size=(256, 130)).astype(np.float32)
    q, scale = fp8.quantize(w)
    assert scale.shape == (2, 2)
    largest = np.kron(scale, np.ones((128, 128)))[:256, :130] * 448
    # E4M3 keeps 3 bits: an error of 2^-4 of the value, or half the smallest step (2^-10).
    bound = np.maximum(np.abs(w) * 2**-4, largest / 448 * 2**-10) * 1.0001
    assert (np.abs(fp8.dequantize(q, scale) - w) <= bound).all()


def test_fp8_cannot_hold_nan():
    with pytest.raises(ValueError, match="not finite"):
        fp8.quantize(np.full((4, 4), np.nan, np.float32))
