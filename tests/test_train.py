"""`train.py` as a person runs it: to the end, stopped and resumed, on another mesh, and refused."""

import dataclasses
import json
import os
import shutil
import signal
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import train
import training.evaluate
import training.loop
import training.run
from checkpoint.config import CheckpointConfig
from checkpoint.manager import CheckpointManager
from configs.command import parse
from rl.tasks.characters import character_tokenizer
from runtime.lock import hold
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


@pytest.mark.slow
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
def test_a_resumed_run_keeps_its_tokenizer_tokens_and_rows(
    options, corpus, stopped, tmp_path, capsys
):
    """One file more, another vocabulary and batch: what was, stays; what changed is said."""
    folder, more = tmp_path / "resumed", tmp_path / "text"
    shutil.copytree(stopped, folder)
    shutil.copytree(corpus, more)
    (more / "99.py").write_text("quite other words, over and over\n" * 99)
    before = (folder / "tokenizer.json").read_text()
    size = ["--train.batch-size", "16", "--data.vocab-size", "500", "--train.eval-every", "0"]
    text = ["--data.sources.0.path", str(more), "--train.steps", "4"]
    assert run(options, folder, *size, *text) == 0
    said = capsys.readouterr().out
    assert "--train.batch-size 8 -> 16" in said
    assert f"goes on from {3 * 8 * 32:,} tokens and {3 * 8} rows" in said
    assert "tokenizer: of the weights" in said
    assert (folder / "tokenizer.json").read_text() == before
    assert read_metrics(folder)[-1]["train/tokens"] == 32 * (3 * 8 + 16)
    with CheckpointManager(folder / "checkpoints", CheckpointConfig(), read_only=True) as manager:
        assert manager.meta(4)["batches"] == [[0, 0, 0, 8, 32], [3, 24, 768, 16, 32]]


def test_a_resumed_run_says_that_a_text_has_changed(options, stopped, tmp_path):
    config = parse([*options, "--run-dir", str(stopped)]).run
    recorded = json.loads((stopped / "config.json").read_text())["stores"]
    lines: list[str] = []
    training.run.check_stores(config, recorded, lines.append)
    assert not lines
    (path,) = recorded
    training.run.check_stores(config, {path: "other"}, lines.append)
    assert lines[0] == f"changed since this run began: the text of {path}"
    new = dataclasses.replace(config, run_dir=str(tmp_path))
    training.run.check_stores(new, {path: "other"}, lines.append)
    assert len(lines) == 2


def test_a_checkpoint_without_batches_goes_on_from_those_of_its_configuration(
    options, stopped, tmp_path
):
    """As versions wrote it that kept no table of batches."""
    folder = tmp_path / "old"
    shutil.copytree(stopped, folder)
    (file,) = folder.glob("checkpoints/*/meta/metadata")
    meta = json.loads(file.read_text())
    del meta["batches"]
    file.write_text(json.dumps(meta))
    config = parse([*options, "--run-dir", str(folder), "--train.batch-size", "16"]).run
    assert training.run.plan_of(config).tokens_before(4) == 32 * (3 * 8 + 16)
    lines: list[str] = []
    training.run.check_resumed(config, lines.append)
    assert "--train.batch-size 8 -> 16" in lines[0]
    assert lines[1] == "  goes on from 768 tokens and 24 rows"
    longer = parse([*options, "--run-dir", str(folder), "--train.seq-len", "64"]).run
    lines.clear()
    training.run.check_resumed(longer, lines.append)
    assert training.run.plan_of(longer).tokens_before(4) == 768 + 64 * 8
    assert "may come again" in lines[1]
    assert lines[2] == "  goes on from 768 tokens and 12 rows of 64 tokens"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--seed", "7"], "--seed 0 -> 7: the order of the data would be another"),
        (["--model.routed-scaling-factor", "1"], "--model.routed-scaling-factor 2.5 -> 1.0"),
        (["--data.tokenizer", "TOKENIZER"], "id 3 is '!' there and 'a' here"),
    ],
)
def test_what_would_rewrite_the_past_of_a_run_is_refused(
    options, stopped, tmp_path, capsys, more, says
):
    other = tmp_path / "tokenizer.json"
    other.write_text(character_tokenizer("abc").json)
    more = [str(other) if word == "TOKENIZER" else word for word in more]
    before = {file: file.read_bytes() for file in stopped.glob("*.json*")}
    assert run(options, stopped, *more) == 2
    assert says in capsys.readouterr().err
    assert {file: file.read_bytes() for file in stopped.glob("*.json*")} == before


def test_the_tokenizer_of_initial_weights_comes_along_or_another_is_refused(
    options, stopped, tmp_path
):
    config = parse([*options, "--run-dir", str(tmp_path / "new")]).run
    lines: list[str] = []
    own = train.prepare_data(config, lines.append, str(stopped)).tokenizer
    assert own.json == (stopped / "tokenizer.json").read_text()
    assert "of the weights" in lines[0]
    kept = dataclasses.replace(config, run_dir=str(stopped))  # resumed, on another corpus
    source = dataclasses.replace(config.data.sources[0], path=__file__)
    data = dataclasses.replace(config.data, sources=(source,), held_out=0)
    assert (
        train.prepare_data(dataclasses.replace(kept, data=data), print).tokenizer.json == own.json
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(ValueError, match=r"bare has weights and no tokenizer.json.*--data.tok"):
        train.prepare_data(config, print, str(bare))
    other = tmp_path / "other.json"
    other.write_text(character_tokenizer("abc").json)
    data = dataclasses.replace(config.data, tokenizer=str(other), fim_rate=0)
    with pytest.raises(ValueError, match=r"Leave --data\.tokenizer out"):
        train.prepare_data(dataclasses.replace(config, data=data), print, str(stopped))


def test_the_evaluation_at_the_end_is_bounded_and_says_how_far_it_is(
    options, stopped, monkeypatch, capsys
):
    config = parse([*options, "--run-dir", str(stopped)]).run
    prepared = train.prepare_data(config, print)
    trainer = train.make_trainer(config)
    assert train.last_batches(trainer, prepared, print) == 0
    monkeypatch.setattr(train, "LAST_EVALUATION", 256)
    said: list[str] = []
    assert train.last_batches(trainer, prepared, said.append) == 1
    assert "evaluating 256 of" in said[0]
    monkeypatch.setattr(training.evaluate, "SECONDS_PER_LINE", -1.0)
    evaluate = train.held_out_evaluation(trainer, prepared, 1, said.append)
    assert evaluate is not None
    assert evaluate(final_state(options, stopped))["eval/loss"] > 0
    assert said[1:] == ["evaluating held-out text: 0 of 1 batches are done"]


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
    ):
        sizes = [word for size in mesh.split() for word in f"--mesh.{size}".split("=")]
        more = ["--model.num-layers", "3", "--train.micro-batch-size", "4"]
        config = parse([*options, *more, *sizes]).run
        trainer, prepared = train.make_trainer(config), train.prepare_data(config, print)
        texts.append(train.sample_text(trainer, trainer.init(jax.random.key(0)), prepared, "def "))
    assert texts[0].startswith("def ")
    assert len(texts[0]) > len("def ")
    assert texts == texts[:1] * 3


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
    with pytest.raises(SystemExit):
        parse(["--config", "tinyy"])
    assert "did you mean tiny" in capsys.readouterr().err


def test_print_config_prints_every_field_and_what_follows(capsys):
    """Nothing is trained; 671B fit a laptop."""
    flags = ["--config", "v3_671b", "--print-config", "--layout", "fsdp", "--compilation-cache="]
    assert train.main(flags) == 0
    printed = capsys.readouterr().out
    assert "model.num_experts=256" in printed
    assert "train.learning_rate.2.shape='cosine'" in printed
    assert "671,026,419,200 total, 37,552,297,472 active, 11,610,068,224 in MTP" in printed


# ---- Found before the first step -----------------------------------------------------------------


@pytest.fixture
def no_data(monkeypatch):
    """Nothing may be prepared."""

    def prepare(*_: object):
        raise AssertionError("data was prepared")

    monkeypatch.setattr(train, "prepare_data", prepare)


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_run_folder_that_is_in_use_is_refused(options, tmp_path, capsys, stage):
    more = ("--stage", stage, "--sft.examples", str(tmp_path / "none.jsonl"))
    with hold(tmp_path / ".lock", "the folder", print):
        before = sorted(tmp_path.iterdir())
        assert run(options, tmp_path, *more) == 2
        assert sorted(tmp_path.iterdir()) == before
    said = capsys.readouterr().err
    assert f"--run-dir {tmp_path} is in use by process {os.getpid()} on " in said


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("place", ["", "checkpoints", "tensorboard", "metrics.jsonl"])
def test_a_run_folder_that_cannot_be_written_is_refused(options, tmp_path, capsys, place):
    folder = tmp_path / "run"
    if place:
        folder.mkdir()
    if place == "metrics.jsonl":
        (folder / place).mkdir()
    else:
        (folder / place).touch()
    assert run(options, folder, "--compilation-cache", "") == 2
    assert f"--run-dir {folder} cannot be written (" in capsys.readouterr().err


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--train.log-every", "0"), "train.log_every is 0"),
        (("--train.eval-batches", "-1"), "train.eval_batches is -1"),
    ],
)
def test_numbers_that_would_end_a_run_later_are_refused(options, tmp_path, capsys, given, says):
    assert run(options, tmp_path / "run", *given) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def disk(monkeypatch, *free: int):
    """A disk with so many bytes free, at one question after the other; the last answer stays."""
    answers = iter(free)
    last = free[-1]
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=next(answers, last)))


@pytest.mark.usefixtures("no_data")
def test_a_disk_without_room_for_a_checkpoint_is_refused(options, tmp_path, capsys, monkeypatch):
    disk(monkeypatch, 1000)
    assert run(options, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "a checkpoint's " in said
    assert f"fit onto the disk of {tmp_path}/run, which has 1,000 bytes free; make room" in said
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fills_up_ends_the_run_with_its_newest_checkpoint(
    options, tmp_path, capsys, monkeypatch
):
    """Two questions before the run, one of a save; after it there is room for no more."""
    disk(monkeypatch, 1 << 30, 1 << 30, 1 << 30, 1000)
    folder, every = tmp_path / "run", ("--checkpoint.every", "2", "--train.eval-every", "0")
    with pytest.warns(RuntimeWarning, match=r"step \d was not saved.* 1,000 bytes free"):
        assert run(options, folder, *every) == 2
    assert CheckpointManager(folder / "checkpoints", CheckpointConfig(), True).steps() == [2]
    said = capsys.readouterr()
    assert (
        said.err.strip()
        .splitlines()[-1]
        .startswith(f"the last checkpoint is step 2 in {folder}/checkpoints; run again")
    )
    assert "held-out text" not in said.out
    assert not (folder / ".lock").exists()


def test_a_disk_with_room_for_fewer_checkpoints_than_are_kept(
    options, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train.Pretraining, "run_stage", lambda *_: 0)
    disk(monkeypatch, 1 << 30, 1000)
    assert run(options, tmp_path / "run", "--checkpoint.every", "1") == 0
    assert "warning: 4 more checkpoints will lie there at a time" in capsys.readouterr().out


@pytest.mark.parametrize("length", [31, 32])
def test_a_sample_prompt_without_room_is_refused_before_training(
    options, tmp_path, capsys, monkeypatch, length
):
    """32 tokens a row: one parts documents, one is to come."""

    def begin(*_: object):
        raise OSError("training begins")

    monkeypatch.setattr("training.run.open_loop", begin)
    prompt = "\x01" * (length - 1)  # a byte that is in no document is a token
    assert run(options, tmp_path / "run", "--sample-prompt", prompt) == 2
    said = capsys.readouterr().err
    refused = f"--sample-prompt takes {length} tokens, one at its start included, and a sequence"
    assert (refused in said, "training begins" in said) == (length == 32, length == 31)


@pytest.mark.parametrize(("seq_len", "length"), [(1, 1), (2, 1), (4, 3), (32, 5)])
def test_the_default_sample_prompt_is_cut_to_a_short_row(seq_len, length):
    """One token stays free for the sample to begin with."""
    tokenizer = types.SimpleNamespace(encode_prompt=lambda text: np.arange(1 + len(text)))
    tokenizer.of_documents = lambda: tokenizer
    prepared: Any = types.SimpleNamespace(tokenizer=tokenizer)
    trainer: Any = types.SimpleNamespace(train=types.SimpleNamespace(seq_len=seq_len))
    assert train.sample_start(trainer, prepared, "def ").tolist() == list(range(length))
