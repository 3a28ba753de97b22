"""Images through generate.py with a tokenizer, and stage images through train.py, at tiny sizes."""

import json

import numpy as np
import pytest
from PIL import Image

import generate
import train

SIZES = {
    "model.num-layers": 1, "model.num-dense-layers": 1, "model.hidden-size": 32,
    "model.num-heads": 2, "model.num-kv-heads": 2, "model.qk-rope-head-dim": 16,
    "model.v-head-dim": 16, "model.dense-ffn-size": 32, "model.encoder.num-layers": 1,
    "model.encoder.width": 16, "model.encoder.ffn-size": 16, "model.encoder.image-size": 16,
    "model.drawn-tokens": 64, "train.seq-len": 128, "train.batch-size": 8, "train.steps": 2,
    "images.answers": 8,
}  # fmt: skip
SMALL = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
SMALL += ["--model.tokenizer.multipliers", "1", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps over drawn scenes."""
    folder = tmp_path_factory.mktemp("janus") / "run"
    assert train.main(["--config", "janus_tiny", *SMALL, "--run-dir", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_a_run_is_judged_at_its_end(run):
    figures = json.loads((run / "exam.json").read_text())
    assert figures.keys() == {"understanding", "drawing"}
    assert (run / "sheet.png").is_file()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(record["train/code_loss"] > 0 < record["train/text_loss"] for record in records)


@pytest.mark.slow
def test_pictures_and_answers_of_the_run(run, tmp_path, capsys):
    where = ["--checkpoint", str(run)]
    drawn = ["--draw", "a red circle", "--images", "2", "--out", str(tmp_path / "out")]
    files = ["--ids-out", str(tmp_path / "ids.npy")]
    for seed in ("3", "3", "4"):
        assert generate.main([*where, *drawn, *files, "--seed", seed]) == 0
        (tmp_path / "ids.npy").rename(tmp_path / f"ids{seed}.npy")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "0000.png", "0001.png", "sheet.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "out" / "0000.png") as image:
        assert image.size == (16, 16)
    ids = np.load(tmp_path / "ids3.npy")
    assert ids.shape == (2, 64)
    assert (ids != np.load(tmp_path / "ids4.npy")).any()
    assert "images/s" in capsys.readouterr().err
    asked = ["--image", str(tmp_path / "out" / "0000.png"), "--prompt", "what is it?"]
    assert generate.main([*where, *asked, "--max-new-tokens", "3"]) == 0
    (tmp_path / "bad.png").write_bytes(b"")
    asked[1] = str(tmp_path / "bad.png")
    assert generate.main([*where, *asked, "--max-new-tokens", "3"]) == 2
    assert "has no bytes" in capsys.readouterr().err
