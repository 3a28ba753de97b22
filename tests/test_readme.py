"""The commands of the README, run as they are written, one after the other, in an empty checkout.

Only size is changed: runs of train.py get options that make them short, and the corpus is small.
"""

import os
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest

from tests.test_docs import ROOT, commands, read
from tests.xla_flags import QUICK_XLA

SECONDS = 600
"""Limit of one command: far above what it takes on two cores."""

SHORT = [
    "--train.steps", "2", "--data.held-out-tokens", "5000", "--model.num-layers", "2",
    "--data.vocab-size", "400", "--train.seq-len", "64",
]  # fmt: skip
MAKE_TRAIN = [".venv/bin/python", "train.py", "--emulate", "8", "--layout", "cube"]
ELSEWHERE = {
    "make": "CI's own phases",
    "pip install": "needs a GPU",
    "train.py --config small": "needs a GPU, or several hosts",
    "--recipe": "tests/test_rl_tuning.py",
    "--layout hybrid": "tests/test_layouts.py",
    "--mesh.fsdp": "tests/test_layouts.py",
    "-m bench.": "tests/test_bench_scripts.py, with the compiler for GPUs",
}
"""Parts of commands that are not run here, and what runs them, or why nothing does."""


def readme() -> list[list[str]]:
    """Commands to run; the folder that is imported is the one that was exported."""
    blocks = read(ROOT / "README.md").shell
    found = [words for block in blocks for words in commands(block)]
    ours = [words for words in found if not any(part in " ".join(words) for part in ELSEWHERE)]
    return sorted(ours, key=lambda words: "runs/imported" in words)


@pytest.fixture
def checkout(tmp_path) -> pathlib.Path:
    """A folder with everything that the project's has, but for runs and caches."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name not in ("runs", "cache", ".venv"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)
    notes = tmp_path / "notes"
    notes.mkdir()
    for number in range(30):
        text = "\n".join(f"def f{number}_{i}(x):\n    return x + {i}" for i in range(30))
        (notes / f"{number}.md").write_text(text)
        (notes / f"{number}.py").write_text(text)
    np.save(folder / "tokens.npy", np.arange(2, 34, dtype=np.int32)[None])
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / "hf-folder").symlink_to("new-folder")
    return folder


@pytest.mark.slow
def test_commands_of_the_readme_work_as_written(checkout, tmp_path):
    environment = os.environ | {"XLA_FLAGS": QUICK_XLA}
    found = readme()
    assert len(found) >= 8
    for command in [MAKE_TRAIN, *found]:
        words = [word.replace("/data/notes", str(tmp_path / "notes")) for word in command]
        if "train.py" in words and not {"--help", "--print-config"} & set(words):
            words += SHORT
            if "--data.sources.0.path" not in words:
                words += ["--data.sources.0.path", str(tmp_path / "notes" / "*.py")]
        done = subprocess.run(
            words,
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        said = f"{shlex.join(words)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        assert done.returncode == 0, said
    assert np.load(checkout / "logits.npy").ndim == 3
