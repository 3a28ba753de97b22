"""Janus folders written by transformers against our reader, scorer, painter and writer.

One process of the reference environment writes random tiny checkpoints and what transformers makes
of them in fp32 (tests/reference/janus.py); a second one reads our exports, a third counts the
parameters of the presets.
"""

import dataclasses
import functools
import json
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import generate
from checkpoint import safetensors
from checkpoint.hf_config import to_hf_config
from checkpoint.hf_import import import_folder
from checkpoint.hf_reader import HuggingFaceFolder
from checkpoint.hf_writer import export
from checkpoint.weights import open_weights
from configs import preset
from generation.engine import Generator
from model.blueprint import bind, blueprint
from model.costs import count_weights
from model.recipe import Recipe
from sharding.config import MeshConfig
from sharding.mesh import make_mesh
from sharding.partition import Layout
from tests.reference.janus_cases import JANUS_CASES
from tests.test_reference import interpreter
from vision.tokenizer import ImageTokenizer, codebook_loss

pytestmark = pytest.mark.reference

ATOL = 2e-4
"""On fp32 results, which are of order 1 to 10."""
SCRIPT = pathlib.Path(__file__).resolve().parent / "reference" / "janus.py"
RECIPE = Recipe()


def reference(*arguments: str) -> str:
    done = subprocess.run(
        [interpreter(), str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    """Folder and results of every case."""
    path = tmp_path_factory.mktemp("janus")
    (path / "cases.json").write_text(json.dumps(JANUS_CASES))
    reference("write", str(path / "cases.json"), str(path))
    return path


@pytest.fixture(scope="module")
def exports(root) -> pathlib.Path:
    """Run folders `<case>` by import, and exports `<case>-fp32`, which transformers reads."""
    path = root / "ours"
    path.mkdir()
    folders = {}
    for name in JANUS_CASES:
        import_folder(HuggingFaceFolder(root / name), path / name, say=str)
        out = path / f"{name}-fp32"
        export(open_weights(path / name), out, dtype="fp32", shard_bytes=200_000)
        folders[str(out)] = str(root / f"{name}.npz")
    (path / "folders.json").write_text(json.dumps(folders))
    reference("load", str(path / "folders.json"))
    return path


@functools.cache
def expected(file: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(file) as archive:
        return dict(archive)


@functools.cache
def model(folder: pathlib.Path):
    """The model with its weights, on one device."""
    weights = open_weights(folder)
    layout = Layout(make_mesh(MeshConfig(), jax.devices()[:1]))
    loaded = weights.load(Generator(weights.config, RECIPE, layout).abstract_weights)
    return bind(weights.config, loaded["params"], loaded["router_bias"])


def as_transformers(tokenizer: ImageTokenizer) -> ImageTokenizer:
    """The same, comparing encodings with codes as transformers does."""
    change = {"normalize_encoding": False, "codebook_weight": 0.25, "commitment_weight": 1.0}
    tokenizer.config = dataclasses.replace(tokenizer.config, **change)
    return tokenizer


def images_last(pixels_NCHW: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(pixels_NCHW, 1, -1))


def close(found, wanted: np.ndarray) -> None:
    found = np.asarray(found)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= ATOL
    assert np.abs(wanted).max() > 0.1, "results near zero would prove little"


def test_cases_cover_every_option():
    seen: dict[str, set] = {}
    for case in JANUS_CASES.values():
        for part in ("text_config", "vision_config", "vq_config"):
            for key, value in case["hf"][part].items():
                seen.setdefault(key, set()).add(str(value))
    varied = {
        "num_key_value_heads", "image_size", "patch_size", "depth", "attention_bias", "embed_dim",
        "channel_multiplier", "num_res_blocks", "num_hidden_layers", "mlp_ratio", "hidden_size",
    }  # fmt: skip
    assert varied - {"attention_bias", "depth", "mlp_ratio"} <= {
        k for k in seen if len(seen[k]) > 1
    }
    assert {"attention_bias", "depth", "mlp_ratio"} <= seen.keys()
    assert len(JANUS_CASES) >= 8
    assert {case["hf"]["tie_word_embeddings"] for case in JANUS_CASES.values()} == {True, False}
    assert {case["images"] for case in JANUS_CASES.values()} == {1, 2}


@pytest.mark.parametrize("name", JANUS_CASES)
def test_parts(root, name):
    """Features, adaptors, codes with their loss, decoded pixels."""
    ours, wanted = model(root / name), expected(root / f"{name}.npz")
    pixels = images_last(wanted["pixels"])
    close(ours.encoder(pixels, RECIPE), wanted["features"])
    close(ours.see(pixels, RECIPE), wanted["seen"])
    close(ours.drawing.embed(jnp.arange(len(wanted["embedded"])), RECIPE), wanted["embedded"])
    tokenizer = as_transformers(ours.tokenizer)
    paintings = images_last(wanted["paintings"])
    np.testing.assert_array_equal(tokenizer.encode(paintings), wanted["codes"])
    loss = codebook_loss(tokenizer.config, tokenizer.reconstruct(paintings))
    assert float(loss) == pytest.approx(float(wanted["loss"]), rel=1e-5)
    decoded = tokenizer.decode(jnp.asarray(wanted["drawn"]), ours.config.drawn_grid)
    close(np.moveaxis(np.asarray(decoded), -1, 1), wanted["decoded"])


@pytest.mark.parametrize("name", JANUS_CASES)
def test_score_command(root, tmp_path, name):
    """`generate.py score --pixels`: text logits with images, on eight devices."""
    wanted = expected(root / f"{name}.npz")
    for key in ("ids", "pixels"):
        np.save(tmp_path / f"{key}.npy", wanted[key])
    where = ["--checkpoint", str(root / name), "--tokens", str(tmp_path / "ids.npy")]
    what = ["--pixels", str(tmp_path / "pixels.npy"), "--out", str(tmp_path / "out.npy")]
    mesh = ["--mesh.tensor", "2"] if name == "two_images" else []
    assert generate.main(["score", *where, *what, *mesh]) == 0
    close(np.load(tmp_path / "out.npy"), wanted["logits"])


@pytest.mark.parametrize("name", JANUS_CASES)
def test_draw_command(root, tmp_path, name):
    """`generate.py --draw-ids --greedy`: ids with guidance, and their pixels."""
    wanted, case = expected(root / f"{name}.npz"), JANUS_CASES[name]
    assert wanted["margin"] > 1e-3, "near ties make the comparison a matter of luck"
    assert len(np.unique(wanted["drawn"])) > 3
    out = ["--ids-out", str(tmp_path / "ids.npy"), "--pixels-out", str(tmp_path / "pixels.npy")]
    ids = ",".join(map(str, wanted["prompts"][0]))
    how = ["--draw-ids", ids, "--greedy", "--guidance", str(case["guidance"])]
    mesh = ["--mesh.tensor", "2"] if name == "plain" else []
    arguments = ["--checkpoint", str(root / name), *how, *out, *mesh]
    assert generate.main(arguments) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "ids.npy"), wanted["drawn"][:1])
    close(np.load(tmp_path / "pixels.npy"), wanted["decoded"][:1])


@pytest.mark.parametrize("name", JANUS_CASES)
def test_back_to_transformers(root, exports, name):
    """Import, export: the same tensors, and the same logits by transformers, which refuses missing
    and unexpected ones."""

    def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
        found = {}
        for file in folder.glob("*.safetensors"):
            found |= {n: safetensors.read(i) for n, i in safetensors.read_header(file).items()}
        return found

    theirs, ours = tensors(root / name), tensors(exports / f"{name}-fp32")
    assert theirs.keys() == ours.keys()
    for tensor, value in theirs.items():
        np.testing.assert_array_equal(ours[tensor], value, err_msg=tensor)
    close(
        expected(exports / f"{name}-fp32.npz")["logits"], expected(root / f"{name}.npz")["logits"]
    )
    written = json.loads((exports / f"{name}-fp32" / "config.json").read_text())
    assert HuggingFaceFolder(exports / f"{name}-fp32").config == open_weights(root / name).config
    assert written["model_type"] == "janus"


def test_parameters_of_presets_to_the_last(tmp_path):
    """Against transformers' classes, built without their numbers."""
    names = ("janus_pro_1b", "janus_pro_7b", "janus_tiny")
    configs = {name: preset(name).model for name in names}
    cases = {name: {"hf": to_hf_config(config)} for name, config in configs.items()}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    counted = json.loads(reference("count", str(tmp_path / "cases.json")).splitlines()[-1])
    assert counted == {n: count_weights(blueprint(c).params) for n, c in configs.items()}
    assert counted["janus_pro_1b"] > 2e9
    assert counted["janus_pro_7b"] > 7e9


def test_another_configuration_is_noticed(root):
    """The tolerance is far below what one misread option does."""
    wanted = expected(root / "plain.npz")
    tokenizer = model(root / "plain").tokenizer
    published = dataclasses.replace(tokenizer.config, normalize_encoding=True)
    tokenizer.config = published
    codes = tokenizer.encode(images_last(wanted["paintings"]))
    assert (np.asarray(codes) != wanted["codes"]).any()
