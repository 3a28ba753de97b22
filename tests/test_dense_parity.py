"""Folders of dense models written by transformers against our reader, generator and writer.

As tests/test_hf_parity.py, whose programs these are. What transformers says when it loads an export
is an error here.
"""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from checkpoint.hf_import import import_folder
from checkpoint.hf_reader import HuggingFaceFolder
from checkpoint.hf_writer import export
from checkpoint.weights import open_weights
from generation.config import Sampling
from tests.reference.cases import DENSE
from tests.test_hf_parity import (
    ATOL,
    NEW,
    Written,
    expected,
    largest_difference,
    loaded,
    reference,
    scored,
)

pytestmark = pytest.mark.reference

WRITTEN = {
    name: Written(
        name,
        kind=("fp32", "bf16")[n % 2],
        shard=(None, "4KB")[n // 2 % 2],
        old_config=n % 3 != 0,
        changes=(("vocab_size", 48 + n),),
    )
    for n, name in enumerate(DENSE)
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    """Folder and results of every case, and `<case>-ours`, our export of its import."""
    path = tmp_path_factory.mktemp("dense")
    cases = {
        name: dataclasses.asdict(w) | {"hf": DENSE[name].hf | dict(w.changes), "seed": 100 * n}
        for n, (name, w) in enumerate(WRITTEN.items())
    }
    (path / "cases.json").write_text(json.dumps(cases))
    reference("write", str(path / "cases.json"), str(path))
    folders = {}
    for name, written in WRITTEN.items():
        run = path / f"{name}-run"
        import_folder(HuggingFaceFolder(path / name), run, say=str)
        out = path / f"{name}-ours"
        export(open_weights(run), out, dtype=written.kind, shard_bytes=6_000)
        folders[str(out)] = str(path / f"{name}.npz")
    (path / "folders.json").write_text(json.dumps(folders))
    reference("load", str(path / "folders.json"))
    return path


def test_there_are_enough_cases(root):
    """At least twelve whose text is not a token or two over and over, as tied heads tend to."""
    texts = [expected(root / f"{name}.npz")["greedy"] for name in WRITTEN]
    assert sum(len(np.unique(text)) > 3 for text in texts) >= 12


@pytest.mark.parametrize("name", WRITTEN)
def test_logits(root, name):
    wanted = expected(root / f"{name}.npz")
    worst = largest_difference(scored(root / name, wanted["ids"]), wanted)
    print(f"{name}: logits differ by at most {worst:.1e} of {np.abs(wanted['logits']).max():.1f}")
    assert worst <= ATOL


@pytest.mark.parametrize("name", WRITTEN)
def test_greedy_text(root, name):
    wanted = expected(root / f"{name}.npz")
    assert wanted["greedy"].shape == (2, NEW)
    assert wanted["margin"] > 10 * ATOL, "near ties make the comparison a matter of luck"
    generator, weights = loaded(root / name)
    prompts = list(wanted["prompts"])
    session = generator.start(generator.prepare(weights), prompts, Sampling(temperature=0), NEW)
    rows = [[] for _ in prompts]
    while not session.done:
        for row, ids in zip(rows, session.advance(), strict=True):
            row += ids.tolist()
    assert rows == wanted["greedy"].tolist()


@pytest.mark.parametrize("name", WRITTEN)
def test_transformers_reads_our_export(root, name):
    """Without a missing or unexpected tensor, and without a word (`load` of hf_parity.py)."""
    out = root / f"{name}-ours"
    found = expected(out.with_name(f"{out.name}.npz"))
    assert largest_difference(found, expected(root / f"{name}.npz")) <= ATOL
    theirs = json.loads((root / name / "config.json").read_text())
    assert json.loads((out / "config.json").read_text())["model_type"] == theirs["model_type"]
