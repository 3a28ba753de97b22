"""`convert.py`: both directions, their round trips, and what they refuse."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from safetensors.numpy import load_file

import checkpoint.hf_import
import checkpoint.partial
import convert
import train
import training.run
from checkpoint import fp8, safetensors
from checkpoint.checksum import checksums, part_checksum
from checkpoint.hf_reader import HuggingFaceFolder
from checkpoint.hf_writer import export, is_quantized
from checkpoint.weights import RunFolder, array_spec, differences, load_initial, open_weights
from data.tokenizer import train_tokenizer
from generation.engine import Generator
from model.recipe import Recipe
from sharding.config import LAYOUTS, MeshConfig
from sharding.mesh import make_mesh
from sharding.partition import Layout
from tests.small_model import CONFIG, hf_folder, run_folder, tensors, weights
from tests.test_checkpoint import files_of_at_most
from tests.test_reference import interpreter

BF16 = ml_dtypes.bfloat16
WIDE = dataclasses.replace(CONFIG, hidden_size=160, kv_lora_rank=72, expert_ffn_size=130)


def abstract(config=CONFIG, mesh=MeshConfig()):  # noqa: B008 - a frozen value
    devices = jax.devices()[: 1 if mesh == MeshConfig() else 8]
    return Generator(config, Recipe(), Layout(make_mesh(mesh, devices))).abstract_weights


def assert_equal(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), wanted)


def all_tensors(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {name: safetensors.read(i) for name, i in safetensors.read_header(file).items()}
    return found


def released(path: Path, config=WIDE, rule=lambda scale: scale) -> Path:
    """A folder as released: FP8 blocks, BF16, fp32 bias, tokenizer; factors chosen by `rule`."""
    state = {}
    for name, tensor in tensors(weights(config), config).items():
        if not is_quantized(name):
            state[name] = tensor if "bias" in name else tensor.astype(BF16)
            continue
        scale = rule(fp8.quantize(tensor)[1]).astype(np.float32)
        whole = np.kron(scale, np.ones((128, 128), np.float32))[: len(tensor), : tensor.shape[1]]
        state[name], state[f"{name}_scale_inv"] = (tensor / whole).astype(fp8.E4M3), scale
    names = sorted(state)
    hf_folder(path, [{n: state[n] for n in names[i::2]} for i in (0, 1)], config)
    (path / "tokenizer.json").write_text('{"made": "up"}')
    (path / "generation_config.json").write_text('{"eos_token_id": 7}')
    return path


def power_of_two(scale):
    return 2.0 ** np.ceil(np.log2(scale))


# ---- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mesh", [pytest.param(MeshConfig(), marks=pytest.mark.slow), LAYOUTS["cube"]]
)
def test_out_and_in_again_is_the_same(tmp_path, mesh, capsys):
    run = run_folder(tmp_path / "run", weights())
    assert convert.main(["export", str(run), str(tmp_path / "hf"), "--dtype", "fp32"]) == 0
    assert convert.main(["import", str(tmp_path / "hf"), str(tmp_path / "again")]) == 0
    again = open_weights(tmp_path / "again")
    assert differences(again.config, CONFIG) == []
    assert_equal(again.load(abstract(mesh=mesh)), weights())
    assert "written" in capsys.readouterr().err


def test_import_in_small_blocks(tmp_path, monkeypatch):
    """Blocks and commits of a few rows, as large models have them, fill the same checkpoint."""
    monkeypatch.setattr(checkpoint.hf_import, "BLOCK", 700)
    monkeypatch.setattr(checkpoint.hf_import, "BATCH", 3000)
    source = HuggingFaceFolder(hf_folder(tmp_path / "hf", [tensors(weights())]))
    checkpoint.hf_import.import_folder(source, tmp_path / "run")
    assert_equal(open_weights(tmp_path / "run").load(abstract(mesh=LAYOUTS["cube"])), weights())


@pytest.mark.parametrize("chunk", [".zarray", "0.0"])
def test_an_array_that_is_gone_from_a_checkpoint_is_an_error_not_zeros(tmp_path, chunk):
    folder = RunFolder(run_folder(tmp_path / "run", weights()))
    name = "params/head/kernel"
    store = array_spec(folder.step_folder, name)["kvstore"]
    tensorstore.KvStore.open(store).result().delete_range(
        tensorstore.KvStore.KeyRange(chunk, chunk + "~")
    ).result()
    with pytest.raises(ValueError, match=rf"{folder.step_folder}: {name} cannot be read"):
        folder.read("params", "head/kernel", (slice(2), slice(2)), np.float32)
    with pytest.raises(ValueError, match="cannot be read"):
        export(folder, tmp_path / "hf")


def test_import_as_bf16(tmp_path):
    source = hf_folder(tmp_path / "hf", [tensors(weights())])
    assert convert.main(["import", str(source), str(tmp_path / "run"), "--dtype", "bf16"]) == 0
    loaded = open_weights(tmp_path / "run").load(abstract())
    rounded = jax.tree.map(lambda x: x.astype(BF16).astype(np.float32), weights()["params"])
    assert_equal(loaded["params"], rounded)
    assert_equal(loaded["router_bias"], weights()["router_bias"])


@pytest.mark.parametrize("rule", [lambda scale: scale, power_of_two])
@pytest.mark.parametrize("way", ["direct", "fp32", "bf16"])
def test_fp8_returns_byte_by_byte(tmp_path, rule, way):
    source = start = released(tmp_path / "hf", rule=rule)
    if way != "direct":
        start = tmp_path / "run"
        assert convert.main(["import", str(source), str(start), "--dtype", way]) == 0
    dst = tmp_path / "again"
    assert convert.main(["export", str(start), str(dst), "--fp8"]) == 0
    wanted, found = all_tensors(source), all_tensors(dst)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].tobytes() == tensor.tobytes(), name
    for name in ("tokenizer.json", "generation_config.json"):
        assert (dst / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((dst / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]


def test_released_types_and_files(tmp_path):
    """BF16 but for the router's bias; several shards, which the safetensors library reads too."""
    run = run_folder(tmp_path / "run", weights())
    export(open_weights(run), tmp_path / "hf", shard_bytes=20_000)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert files[-1].name == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    for file in files:
        for name, tensor in load_file(file).items():
            assert tensor.dtype == (np.float32 if "bias" in name else BF16), name
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["torch_dtype"], "quantization_config" in config) == ("bfloat16", False)
    assert "model.layers.3.shared_head.head.weight" in all_tensors(tmp_path / "hf")


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_checksum_by_parts(dtype):
    x = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(dtype)
    parts = sum(
        part_checksum(x[i : i + 1, j : j + 2], (i, j, 0)) for i in range(3) for j in (0, 2, 4)
    )
    assert parts % 2**32 == checksums({"x": jax.numpy.asarray(x)})["x"]


def test_exports_of_runs_know_their_special_tokens(tmp_path):
    """Generation with transformers must know where to stop."""
    tokenizer = train_tokenizer(["the cat sat on the mat"], CONFIG.vocab_size)
    run = run_folder(tmp_path / "run", weights())
    (run / "tokenizer.json").write_text(tokenizer.json)
    export(open_weights(run), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for name in ("bos", "eos", "pad"):
        assert config[f"{name}_token_id"] == getattr(tokenizer, f"{name}_id")
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<｜end▁of▁sentence｜>"
    assert differences(open_weights(tmp_path / "hf").config, CONFIG) == []


@pytest.mark.parametrize("kind", ["import", "export"])
def test_conversions_compare_every_row_of_mtp_copies(tmp_path, kind, capsys):
    """Opening a folder compares a few; a copy that differs elsewhere would be lost."""
    state = tensors(weights())
    state["model.layers.3.embed_tokens.weight"] = state["model.embed_tokens.weight"].copy()
    state["model.layers.3.embed_tokens.weight"][1] += 1
    source = hf_folder(tmp_path / "hf", [state])
    assert HuggingFaceFolder(source).config == open_weights(source).config
    assert convert.main([kind, str(source), str(tmp_path / "dst")]) == 2
    assert "embed_tokens.weight differs from model.embed_tokens" in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()


# ---- interruptions, disks, wrong requests --------------------------------------------------------


def test_a_killed_conversion_is_started_again(tmp_path, capsys):
    source = released(tmp_path / "hf")
    script = (
        "import os, sys, checkpoint.hf_writer as w, checkpoint.hf_import as i, convert\n"
        "name = {'export': (w, '_tensors'), 'import': (i, '_write_array')}[sys.argv[1]]\n"
        "real, count = getattr(*name), [0]\n"
        "def dying(*a):\n"
        "    count[0] += 1\n"
        "    if count[0] == 9: os._exit(9)\n"
        "    yield from real(*a)\n"
        "setattr(*name, dying)\n"
        "convert.main(sys.argv[1:])\n"
    )
    for kind in ("export", "import"):
        dst = tmp_path / f"{kind}ed"
        done = subprocess.run(
            [sys.executable, "-c", script, kind, str(source), str(dst)],
            cwd=Path(convert.__file__).parent, env=os.environ | {"JAX_PLATFORMS": "cpu"},
            check=False, capture_output=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 9, done.stderr
        assert not dst.exists()
        with pytest.raises(ValueError, match="is neither"):
            open_weights(dst.with_name(f"{dst.name}.partial"))
        assert convert.main([kind, str(source), str(dst)]) == 0
        assert "left by an interrupted conversion" in capsys.readouterr().err
        assert not dst.with_name(f"{dst.name}.partial").exists()
        assert open_weights(dst).config.num_layers == WIDE.num_layers


@pytest.mark.parametrize("kind", ["import", "export"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, kind, capsys):
    source = hf_folder(tmp_path / "hf", [tensors(weights())])
    with files_of_at_most(1 << 14):
        assert convert.main([kind, str(source), str(tmp_path / "dst")]) == 2
    assert "convert.py: " in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("kind", ["import", "export"])
def test_refused_before_anything_is_written(tmp_path, kind, capsys, monkeypatch):
    source = hf_folder(tmp_path / "hf", [tensors(weights())])
    (tmp_path / "there").mkdir()
    assert convert.main([kind, str(source), str(tmp_path / "there")]) == 2
    assert "there exists already" in capsys.readouterr().err
    assert convert.main([kind, str(source), str(tmp_path / "no" / "dst")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert convert.main([kind, str(tmp_path / "nothing"), str(tmp_path / "dst")]) == 2
    assert "nothing" in capsys.readouterr().err
    monkeypatch.setattr(checkpoint.partial, "SPARE", 1 << 60)
    assert convert.main([kind, str(source), str(tmp_path / "dst")]) == 2
    words = capsys.readouterr().err
    assert "needs 1,152,921" in words
    assert "free" in words
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "there"]


def test_infinity_has_no_fp8(tmp_path, capsys):
    state = tensors(weights())
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    state[name][0, 0] = np.inf
    source = hf_folder(tmp_path / "hf", [state])
    assert convert.main(["export", str(source), str(tmp_path / "dst"), "--fp8"]) == 2
    assert f"{name} holds values that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()


# ---- a new run's weights ----------------------------------------------------------------------


def state_shapes(config):
    return Generator(config, Recipe(), Layout(make_mesh(LAYOUTS["cube"]))).abstract_weights


@pytest.mark.parametrize("format_", ["ours", "theirs"])
def test_initial_weights(tmp_path, format_):
    if format_ == "ours":
        path = run_folder(tmp_path / "run", weights())
    else:
        path = hf_folder(tmp_path / "hf", [tensors(weights())])
    loaded, note = load_initial(path, CONFIG, state_shapes(CONFIG))
    assert_equal(loaded, weights())
    assert "MTP" not in note


def test_initial_weights_without_mtp(tmp_path):
    config = dataclasses.replace(CONFIG, mtp_depth=0)
    path = hf_folder(tmp_path / "hf", [tensors(weights(config), config)], config)
    loaded, note = load_initial(path, CONFIG, state_shapes(CONFIG))
    assert_equal(loaded, weights(config))
    assert "no MTP modules" in note


def test_initial_weights_of_another_model(tmp_path):
    path = hf_folder(tmp_path / "hf", [tensors(weights())])
    other = dataclasses.replace(CONFIG, num_layers=4, rope_theta=5.0, init_std=1.0)
    words = r"(?s)num_layers: 3 against 4.*rope_theta: 10000.0 against 5.0"
    with pytest.raises(ValueError, match=words) as error:
        load_initial(path, other, state_shapes(other))
    assert "init_std" not in str(error.value)


def test_train_refuses_another_model_before_it_prepares_data(tmp_path, capsys, monkeypatch):
    path = run_folder(tmp_path / "weights", weights())
    monkeypatch.setattr(train, "prepare_data", None)
    command = ["--config", "tiny", "--layout", "cube", "--init-from", str(path), "--run-dir"]
    assert train.main([*command, str(tmp_path / "run"), "--compilation-cache", ""]) == 2
    assert "hidden_size: 32 against 256" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_train_starts_from_weights(tmp_path, capsys):
    """A new run's state holds what was loaded when its training begins."""
    model = [f"--model.{f.name.replace('_', '-')}={getattr(CONFIG, f.name)}"
             for f in dataclasses.fields(CONFIG) if type(getattr(CONFIG, f.name)) in (int, float)
             and f.name not in ("mtp_depth", "init_std")]  # fmt: skip
    path = run_folder(tmp_path / "weights", weights())
    (path / "tokenizer.json").write_text(train_tokenizer(["a few words"], 300).json)
    command = [
        "--config", "tiny", "--layout", "cube", "--train.steps", "1", "--train.seq-len", "16",
        "--train.eval-every", "0", "--checkpoint.every", "0", "--data.vocab-size", "300",
        "--model.mtp-depth", "1", *model, "--compilation-cache", "", "--init-from", str(path),
        "--run-dir", str(tmp_path / "run"),
    ]  # fmt: skip
    loop = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.run, "to_end", lambda made, *_: loop.append(made) or 0)
        assert train.main(command) == 0, capsys.readouterr().err
    assert "fresh optimizer state" in capsys.readouterr().out
    assert_equal({k: loop[0].state[k] for k in ("params", "router_bias")}, weights())


# ---- against transformers ------------------------------------------------------------------------

LOADS = """
import sys, json, numpy as np, torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
bad = {k: sorted(map(str, v)) for k, v in info.items() if v}
assert not bad, bad
ids = torch.tensor(np.load(sys.argv[2])).long()
with torch.no_grad():
    np.save(sys.argv[3], model(ids).logits.numpy())
"""


@pytest.mark.reference
def test_transformers_loads_an_export(tmp_path):
    from generation.score import Scorer

    config = dataclasses.replace(CONFIG, mtp_depth=0)
    trees = weights(config)
    run = run_folder(tmp_path / "run", trees, config)
    export(open_weights(run), tmp_path / "hf", dtype="fp32")
    ids_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24)).astype(np.int32)
    np.save(tmp_path / "ids.npy", ids_BT)
    done = subprocess.run(
        [interpreter(), "-c", LOADS, *(str(tmp_path / n) for n in ("hf", "ids.npy", "out.npy"))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    layout = Layout(make_mesh(MeshConfig(), jax.devices()[:1]))
    scorer = Scorer(config, Recipe(), layout, False)
    loaded = open_weights(run).load(Generator(config, Recipe(), layout).abstract_weights)
    rows = [scorer.logits(loaded, ids_BT[i : i + scorer.rows])[0] for i in range(0, 2, scorer.rows)]
    np.testing.assert_allclose(
        np.concatenate(rows)[:2], np.load(tmp_path / "out.npy"), rtol=0, atol=2e-4
    )
