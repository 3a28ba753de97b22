"""Folders written by transformers against our reader, scorer, generator and writer.

One process of the reference environment writes random tiny checkpoints and what transformers makes
of them in fp32 (tests/reference/hf_parity.py); a second one reads our exports. Together the cases
cover every option of the format; `test_cases_cover_every_option` says which.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
import subprocess

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import generate
from checkpoint import safetensors
from checkpoint.hf_import import import_folder
from checkpoint.hf_reader import HuggingFaceFolder
from checkpoint.hf_writer import export
from checkpoint.weights import open_weights
from generation.config import Sampling
from generation.engine import Generator
from generation.score import Scorer
from model.recipe import Recipe
from sharding.config import MeshConfig
from sharding.mesh import make_mesh
from sharding.partition import Layout
from tests.reference.cases import CASES
from tests.test_reference import interpreter

pytestmark = pytest.mark.reference

ATOL = 2e-4
"""On fp32 logits, which are of order 1 to 8."""
NEW = 64
SCRIPT = pathlib.Path(__file__).resolve().parent / "reference" / "hf_parity.py"
RECIPE = Recipe()


@dataclasses.dataclass(frozen=True)
class Written:
    """How transformers' side writes a case of tests/reference/cases.py."""

    case: str
    kind: str = "fp32"
    shard: str | None = None
    """`max_shard_size`; None: one file."""
    fused: bool = False
    """Experts of a layer in two tensors instead of three for each."""
    old_config: bool = True
    """config.json as released (`rope_scaling`) instead of as transformers 5 writes it."""
    changes: tuple[tuple[str, object], ...] = ()

    @property
    def hf(self):
        return CASES[self.case].hf | dict(self.changes)


# No size a multiple of 128, most above it: blocks end inside matrices.
_UNEVEN = (
    ("hidden_size", 160), ("kv_lora_rank", 136), ("moe_intermediate_size", 132),
    ("intermediate_size", 200), ("n_routed_experts", 8), ("num_experts_per_tok", 2),
)  # fmt: skip

WRITTEN = {
    "v3": Written("v3"),
    "v3_sharded": Written("v3", "bf16", "20KB", old_config=False),
    "yarn_old": Written("v3_yarn", "bf16", "20KB"),
    "yarn_new_fused": Written("v3_yarn", fused=True, old_config=False),
    "no_q_lora": Written("moonlight", "bf16", fused=True),
    "kimi": Written("kimi_k2", shard="30KB", old_config=False),
    "half_split": Written("v3_half_split", "bf16", old_config=False),
    "half_split_yarn": Written(
        "v3_half_split", changes=(("rope_scaling", CASES["v3_yarn"].hf["rope_scaling"]),)
    ),
    "all_moe": Written("v3_all_moe", shard="30KB", fused=True),
    "all_dense": Written("v3_all_dense", "bf16", old_config=False),
    "mtp": Written("v3_mtp", "bf16", "20KB"),
    "mtp2_fused": Written("v3_mtp2", fused=True, old_config=False),
    "v2": Written("v2", shard="20KB"),
    "v2_new": Written("v2", "bf16", fused=True, old_config=False),
    "v2_lite": Written("v2_lite", "bf16", old_config=False),
    "fp8_mtp": Written("v3_mtp", "fp8", "500KB", changes=(*_UNEVEN, ("q_lora_rank", 140))),
    "fp8_v2_lite": Written(
        "v2_lite",
        "fp8",
        changes=(
            *_UNEVEN,
            ("rope_scaling", CASES["v2"].hf["rope_scaling"]),
        ),
        old_config=False,
    ),
}
EXPORTS = {
    **{name: [("fp32", False)] for name in WRITTEN},
    "mtp": [("fp32", False), ("bf16", False)],
    "v2_lite": [("fp32", False), ("bf16", False)],
    "no_q_lora": [("fp32", False), ("bf16", False)],
    "fp8_mtp": [("fp32", False), ("bf16", True)],
    "fp8_v2_lite": [("fp32", False), ("bf16", True)],
}
"""(dtype, fp8) of every case's exports. bf16 only where the weights are bf16: logits then stay."""
EXPORTED = [(name, *how) for name, exports in EXPORTS.items() for how in exports]


def run_reference(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [interpreter(), str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def reference(*arguments: str) -> None:
    done = run_reference(*arguments)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    """Folder and results of every case."""
    path = tmp_path_factory.mktemp("parity")
    cases = {
        name: dataclasses.asdict(w) | {"hf": w.hf, "seed": 7000 + 500 * n}
        for n, (name, w) in enumerate(WRITTEN.items())
    }
    (path / "cases.json").write_text(json.dumps(cases))
    reference("write", str(path / "cases.json"), str(path))
    return path


@pytest.fixture(scope="module")
def exports(root) -> pathlib.Path:
    """Imports `<case>` and exports `<case>-<dtype>[-fp8]`, the latter read by transformers."""
    path = root / "ours"
    path.mkdir()
    folders = {}
    for name, dtype, fp8 in EXPORTED:
        if not (path / name).exists():
            import_folder(HuggingFaceFolder(root / name), path / name, say=str)
        out = exported(path, name, dtype, fp8)
        export(open_weights(path / name), out, dtype=dtype, fp8_blocks=fp8, shard_bytes=50_000)
        folders[str(out)] = str(root / f"{name}.npz")
    (path / "folders.json").write_text(json.dumps(folders))
    reference("load", str(path / "folders.json"))
    return path


def exported(path: pathlib.Path, name: str, dtype: str, fp8: bool) -> pathlib.Path:
    return path / f"{name}-{dtype}{'-fp8' * fp8}"


@functools.cache
def expected(file: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(file) as archive:
        return dict(archive)


def layout() -> Layout:
    return Layout(make_mesh(MeshConfig(), jax.devices()[:1]))


@functools.cache
def loaded(folder: pathlib.Path):
    """(generator, weights in fp32) straight from a folder."""
    weights = open_weights(folder)
    generator = Generator(weights.config, RECIPE, layout())
    return generator, weights.load(generator.abstract_weights)


def largest_difference(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Over the main head and all MTP modules; both must have the same ones."""
    heads = {name for name in wanted if "logits" in name}
    assert heads == {name for name in found if "logits" in name}
    return max(float(np.abs(found[name] - wanted[name]).max()) for name in heads)


def scored(folder: pathlib.Path, ids_BT: np.ndarray) -> dict[str, np.ndarray]:
    """Our logits under the names of hf_parity.py."""
    generator, weights = loaded(folder)
    depth = generator.config.mtp_depth
    scorer = Scorer(generator.config, RECIPE, layout(), bool(depth))
    rows = [scorer.logits(weights, ids_T[None]) for ids_T in ids_BT]
    main, *mtp = (np.concatenate(head) for head in zip(*rows, strict=True))
    return {"logits": main} | {f"mtp_logits_{k}": x[:, :-k] for k, x in enumerate(mtp, 1)}


def test_cases_cover_every_option():
    seen = {
        (option, value)
        for w in WRITTEN.values()
        for option, value in {
            "kind": w.kind,
            "sharded": w.shard is not None,
            "fused": w.fused,
            "model": w.hf["model_type"],
            "q_lora": w.hf["q_lora_rank"] is not None,
            "interleaved": w.hf.get("rope_interleave", True),
            "yarn": w.hf["rope_scaling"] and ("old" if w.old_config else "new"),
            "groups": w.hf["n_group"] > 1,
            "dense layers": min(w.hf["first_k_dense_replace"], 2),
            "mtp": w.hf.get("num_nextn_predict_layers", 0),
        }.items()
    }
    both = (True, False)
    wanted = {
        "kind": ("fp32", "bf16", "fp8"), "sharded": both, "fused": both, "q_lora": both,
        "model": ("deepseek_v2", "deepseek_v3"), "interleaved": both, "groups": both,
        "yarn": (None, "old", "new"), "dense layers": (0, 1, 2), "mtp": (0, 1, 2),
    }  # fmt: skip
    assert seen == {(option, value) for option, values in wanted.items() for value in values}


@pytest.mark.parametrize("name", WRITTEN)
def test_files_are_what_the_case_says(root, name):
    """transformers, not this test, decides some of this: its next version might write otherwise."""
    written, infos = WRITTEN[name], {}
    files = sorted((root / name).glob("*.safetensors"))
    for file in files:
        infos |= safetensors.read_header(file)
    moe = written.hf["first_k_dense_replace"] < written.hf["num_hidden_layers"]
    assert any(n.endswith("gate_up_proj") for n in infos) == (written.fused and moe)
    assert any("experts.0.up_proj" in n for n in infos) == (not written.fused and moe)
    kinds = {"fp32": "float32", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
    assert str(infos["model.layers.0.self_attn.o_proj.weight"].dtype) == kinds[written.kind]
    config = json.loads((root / name / "config.json").read_text())
    assert ("rope_scaling" in config, "rope_parameters" in config) == (
        (True, False) if written.old_config else (False, True)
    )
    if written.shard:
        assert len(files) > 2
    if written.kind == "fp8":
        weight = infos["model.layers.0.self_attn.kv_b_proj.weight"]
        assert all(size % 128 for size in weight.shape)
        assert infos[f"{weight.name}_scale_inv"].path != weight.path


@pytest.mark.parametrize("name", WRITTEN)
def test_logits(root, name):
    wanted = expected(root / f"{name}.npz")
    worst = largest_difference(scored(root / name, wanted["ids"]), wanted)
    print(f"{name}: logits differ by at most {worst:.1e} of {np.abs(wanted['logits']).max():.1f}")
    assert worst <= ATOL


def test_score_command(root, tmp_path):
    """`generate.py score`, on all eight devices."""
    wanted = expected(root / "mtp.npz")
    np.save(tmp_path / "ids.npy", wanted["ids"])
    where = ["--checkpoint", str(root / "mtp"), "--tokens", str(tmp_path / "ids.npy")]
    out = ["--out", str(tmp_path / "out.npy"), "--mtp", "--mesh.data", "8"]
    assert generate.main(["score", *where, *out]) == 0
    found = {"logits": np.load(tmp_path / "out.npy")}
    found["mtp_logits_1"] = np.load(tmp_path / "out.mtp.npy")[:, :-1]
    assert largest_difference(found, wanted) <= ATOL


@pytest.mark.parametrize("name", WRITTEN)
def test_greedy_text(root, name):
    wanted = expected(root / f"{name}.npz")
    assert wanted["greedy"].shape == (2, NEW)
    assert wanted["margin"] > 10 * ATOL, "near ties make the comparison a matter of luck"
    assert len(np.unique(wanted["greedy"])) > 3, "text of one token would prove little"
    generator, weights = loaded(root / name)
    prepared = generator.prepare(weights)
    for speculate in (False, True)[: 1 + bool(generator.config.mtp_depth)]:
        prompts = list(wanted["prompts"])
        session = generator.start(
            prepared, prompts, Sampling(temperature=0), NEW, speculate=speculate
        )
        rows = [[] for _ in prompts]
        while not session.done:
            for row, ids in zip(rows, session.advance(), strict=True):
                row += ids.tolist()
        assert rows == wanted["greedy"].tolist()


@pytest.mark.parametrize(("name", "dtype", "fp8"), EXPORTED)
def test_transformers_reads_our_export(root, exports, name, dtype, fp8):
    """`load` of hf_parity.py has refused missing and unexpected tensors by then."""
    out = exported(exports, name, dtype, fp8)
    found = expected(out.with_name(f"{out.name}.npz"))
    worst = largest_difference(found, expected(root / f"{name}.npz"))
    print(f"{out.name}: logits differ by at most {worst:.1e}")
    assert worst <= ATOL


@pytest.mark.parametrize("problem", ["missing_keys", "unexpected_keys", "mismatched_keys"])
def test_a_wrong_folder_is_refused_by_the_reference(root, exports, tmp_path, problem):
    """What the exports above passed does refuse."""
    folder = shutil.copytree(exported(exports, "v3", "fp32", False), tmp_path / "folder")
    state = {}
    for file in folder.glob("*.safetensors*"):
        state |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    norm = state.pop("model.norm.weight")
    if problem != "missing_keys":
        state["model.norm.weight"] = norm[1:] if problem == "mismatched_keys" else norm
    if problem == "unexpected_keys":
        state["model.layers.3.input_layernorm.weight"] = norm
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "folders.json").write_text(json.dumps({str(folder): str(root / "v3.npz")}))
    done = run_reference("load", str(tmp_path / "folders.json"))
    assert done.returncode != 0
    assert problem in done.stderr or "mismatch" in done.stderr, done.stderr


@pytest.mark.parametrize("name", [name for name, _, fp8 in EXPORTED if fp8])
def test_fp8_comes_back_bit_by_bit(root, exports, name):
    def files(folder):
        found = {}
        for file in folder.glob("*.safetensors"):
            found |= {n: safetensors.read(i) for n, i in safetensors.read_header(file).items()}
        return found

    theirs, ours = files(root / name), files(exported(exports, name, "bf16", True))
    assert theirs.keys() == ours.keys()
    for tensor, value in theirs.items():
        assert ours[tensor].dtype == value.dtype
        np.testing.assert_array_equal(ours[tensor], value, err_msg=tensor)


@pytest.mark.parametrize("name", ["yarn_old", "half_split", "v2"])
def test_another_configuration_is_noticed(root, name):
    """The tolerance is far below what one misread option does."""
    wanted = expected(root / f"{name}.npz")
    generator, weights = loaded(root / name)
    config = generator.config
    change = {"yarn": None} if config.yarn else {"rope_interleaved": True}
    scorer = Scorer(dataclasses.replace(config, **change), RECIPE, layout(), False)
    logits_TV = scorer.logits(weights, wanted["ids"][:1])[0][0]
    assert np.abs(logits_TV - wanted["logits"][0]).max() > 10 * ATOL
