"""`train.py` as a person runs it: to the end, stopped and resumed, on another mesh, and refused."""

import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import train
import training.loop
from checkpoint.manager import CheckpointManager
from configs.command import parse
from training.metrics import read_metrics

SMALL = [
    "--config",
    "tiny",
    "--layout",
    "cube",
    "--train.steps",
    "6",
    "--train.seq-len",
    "32",
    "--train.eval-every",
    "3",
    "--train.eval-batches",
    "1",
    "--checkpoint.every",
    "0",
    "--model.vocab-size",
    "512",
    "--model.hidden-size",
    "32",
    "--model.num-layers",
    "2",
    "--model.num-heads",
    "2",
    "--model.q-lora-rank",
    "16",
    "--model.kv-lora-rank",
    "16",
    "--model.qk-nope-head-dim",
    "8",
    "--model.qk-rope-head-dim",
    "8",
    "--model.v-head-dim",
    "8",
    "--model.dense-ffn-size",
    "32",
    "--model.expert-ffn-size",
    "16",
    "--model.num-experts",
    "8",
    "--model.experts-per-token",
    "2",
    "--data.vocab-size",
    "400",
    "--train.learning-rate.0.until",
    "2",
    "--train.learning-rate.1.until",
    "3",
    "--train.learning-rate.2.until",
    "6",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Forty short documents with something to learn."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        lines = (f"def function_{i}_{j}(x):\n    return x + {j}\n" for j in range(20))
        (folder / f"{i:02}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def options(corpus, tmp_path_factory) -> list[str]:
    """A model of a few thousand weights on that corpus."""
    cache = tmp_path_factory.mktemp("cache")
    caches = ["--data.cache-dir", str(cache), "--compilation-cache", str(cache / "xla")]
    return [*SMALL, "--data.sources.0.path", str(corpus), *caches]


def run(options: list[str], folder: Path, *more: str) -> int:
    return train.main([*options, "--run-dir", str(folder), *more])


def final_state(options: list[str], folder: Path):
    """Newest checkpoint, on the layout of `options`."""
    config = parse([*options, "--run-dir", str(folder)]).run
    with CheckpointManager(folder / "checkpoints", config.checkpoint, read_only=True) as manager:
        state = manager.restore(train.make_trainer(config).abstract_state)
    assert state is not None
    return jax.device_get(state)


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory) -> Path:
    """A run from the first to the last step."""
    folder = tmp_path_factory.mktemp("straight")
    assert run(options, folder) == 0
    return folder


@pytest.fixture(scope="module")
def stopped(options, tmp_path_factory) -> Path:
    """A run that got SIGTERM in the middle of its third step."""
    folder = tmp_path_factory.mktemp("stopped")
    original = training.loop.knobs_at

    def knobs_and_signal(config, plan, step):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(config, plan, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.loop, "knobs_at", knobs_and_signal)
        assert run(options, folder) == 0
    return folder


def test_run_leaves_everything_behind(straight, capsys):
    """Records of every step, held-out figures, plots, sample, configuration, checkpoint."""
    records = read_metrics(straight)
    assert [record["step"] for record in records] == list(range(6))
    assert records[-1]["train/loss"] < records[0]["train/loss"]
    assert all(record["moe/dropped_tokens"] == 0 for record in records)
    assert all(record["train/skipped_steps"] == 0 for record in records)
    assert "eval/bits_per_byte" in records[2]
    assert "eval/mtp_acceptance" in records[5]
    for name in ("loss.png", "expert_load.png", "sample.txt", "tokenizer.json"):
        assert (straight / name).stat().st_size > 0
    assert json.loads((straight / "config.json").read_text())["model"]["hidden_size"] == 32


def test_a_stopped_run_has_its_pictures(stopped):
    """Stopped after the first evaluation, or before: the pictures are there either way."""
    assert len(read_metrics(stopped)) == 3
    for name in ("loss.png", "expert_load.png"):
        assert (stopped / name).stat().st_size > 0


def test_pictures_are_drawn_after_every_evaluation(options, tmp_path, monkeypatch, capsys):
    """And the compilation, of which the speed of the first step is free, is announced."""
    drawn = []
    original = training.loop.Pictures.draw

    def draw(pictures, last=False):
        original(pictures, last)
        drawn.append((tmp_path / "loss.png").exists())

    monkeypatch.setattr(training.loop.Pictures, "draw", draw)
    assert run(options, tmp_path) == 0
    assert drawn == [True, True]
    printed = capsys.readouterr().out
    assert printed.index("compiling the step …") < printed.index("first step: ")
    assert ["perf/step_s" in record for record in read_metrics(tmp_path)] == [False, *[True] * 5]


@pytest.mark.slow
def test_profile_writes_a_trace(options, stopped, tmp_path):
    """Also when the window reaches beyond the last step."""
    folder = tmp_path / "profiled"
    shutil.copytree(stopped, folder)
    assert run(options, folder, "--profile", "1:9") == 0
    assert list((folder / "profile").rglob("*.xplane.pb"))


def test_complete_run_says_so(options, straight, capsys):
    """Typing the command again trains nothing, and prints the result again."""
    assert run(options, straight) == 0
    printed = capsys.readouterr().out
    assert "the run is complete: 6 of 6 steps are done" in printed
    assert "gzip -9" in printed
    assert str(straight) in printed
    assert len(read_metrics(straight)) == 6


def test_sigterm_loses_nothing_and_resume_is_bit_equal(options, straight, stopped, tmp_path):
    """The step in progress is finished and saved; stopping leaves no trace in the numbers."""
    assert final_state(options, stopped)["step"] == 3
    folder = tmp_path / "resumed"
    shutil.copytree(stopped, folder)
    assert run(options, folder) == 0
    for (path, once), twice in zip(
        jax.tree_util.tree_leaves_with_path(final_state(options, straight)),
        jax.tree.leaves(final_state(options, folder)),
        strict=True,
    ):
        np.testing.assert_array_equal(once, twice, err_msg=jax.tree_util.keystr(path))
    losses = [[r["train/loss"] for r in read_metrics(f)] for f in (straight, folder)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_resume_on_another_mesh(options, straight, stopped, tmp_path):
    """The same checkpoint goes on under another layout; weights agree to 1e-4 of the largest."""
    folder = tmp_path / "moved"
    shutil.copytree(stopped, folder)
    assert run([*options, "--layout", "replicas"], folder) == 0
    once, other = final_state(options, straight), final_state(options, folder)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(once["params"]),
        jax.tree.leaves(other["params"]),
        strict=True,
    ):
        limit = 1e-4 * np.abs(a).max()
        np.testing.assert_allclose(a, b, atol=limit, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_the_sample_is_the_same_on_every_mesh(options):
    """Also where training cuts layers or sequences, which generation does not."""
    texts = []
    for mesh in (
        "fsdp=2 expert=2 tensor=2",
        "fsdp=2 expert=2 tensor=1 pipe=2",
        "fsdp=2 expert=2 tensor=1 context=2",
        "fsdp=1 expert=2 tensor=2 data=2",
    ):
        sizes = [word for size in mesh.split() for word in f"--mesh.{size}".split("=")]
        more = ["--model.num-layers", "3", "--train.micro-batch-size", "4"]
        config = parse([*options, *more, *sizes]).run
        trainer, prepared = train.make_trainer(config), train.prepare_data(config, print)
        texts.append(train.sample_text(trainer, trainer.init(jax.random.key(0)), prepared, "def "))
    assert texts[0].startswith("def ")
    assert len(texts[0]) > len("def ")
    assert texts == texts[:1] * 4


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--train.seq-len", "512"], "train.seq_len=512 exceeds model.max_position=256"),
        (["--mesh.tensor", "3"], "fsdp=2 x expert=2 x tensor=3 = 12 devices, but 8 are present"),
        (
            ["--mesh.context", "2", "--mesh.tensor", "1", "--train.seq-len", "30"],
            "sequences of 30 tokens do not split over context=2",
        ),
        (
            ["--mesh.pipe", "2", "--mesh.tensor", "1", "--mesh.schedule", "dualpipe"],
            "schedule dualpipe",
        ),
        (["--mesh.exchange", "ragged"], "exchange"),
        (["--train.batch-size", "6"], "does not split over fsdp=2 x expert=2"),
        (["--model.num-heads", "3"], "axis 'heads' has size 3, which does not split over tensor=2"),
        (["--data.vocab-size", "600"], "data.vocab_size=600 exceeds model.vocab_size=512"),
        (["--train.batch-size", "100000"], "corpus is too small for one batch"),
        (["--data.sources.0.path", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--profile", "nine"], "give FIRST:LAST"),
    ],
)
def test_what_cannot_work_is_refused(options, tmp_path, capsys, more, says):
    """One line on stderr with the numbers and the remedy, exit status 2, no traceback."""
    assert run(options, tmp_path / "run", *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ")
    assert says in error


def test_unknown_option_and_preset_name_the_nearest(capsys):
    with pytest.raises(SystemExit):
        parse(["--train.stepz", "3"])
    assert "--train.steps" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="did you mean tiny"):
        parse(["--config", "tinyy"])


def test_print_config_prints_every_field_and_what_follows(capsys):
    """Nothing is trained; 671B fit a laptop."""
    flags = ["--config", "v3_671b", "--print-config", "--layout", "fsdp", "--compilation-cache="]
    assert train.main(flags) == 0
    printed = capsys.readouterr().out
    assert "model.num_experts=256" in printed
    assert "train.learning_rate.2.shape='cosine'" in printed
    assert "671,026,419,200 total, 37,552,297,472 active, 11,610,068,224 in MTP" in printed
