"""The command line of generate.py from end to end, on a tiny model with random weights."""

import functools
import json
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

import generate
from data.tokenizer import train_tokenizer
from generation import engine
from generation.score import NpyWriter
from tests.small_model import CONFIG, hf_folder, run_folder, tensors, weights

TOKENIZER = train_tokenizer(["the cat sat on the mat, the rat ran"] * 3, CONFIG.vocab_size)
GREEDY = ["--temperature", "0", "--max-new-tokens", "20"]
HERE = pathlib.Path(generate.__file__).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = run_folder(tmp_path_factory.mktemp("run"), weights())
    (path / "tokenizer.json").write_text(TOKENIZER.json)
    return path


@pytest.fixture(scope="module", autouse=True)
def one_generator():
    """Compiling is nearly all that a call does here, so calls share their programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "Generator", functools.cache(engine.Generator))
        yield


@pytest.fixture(scope="module", autouse=True)
def no_cache_of_programs():
    """Nothing is left in the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate.Common, "compilation_cache", "")
        patch.setattr(generate.Generate, "compilation_cache", "")
        patch.setattr(generate.Score, "compilation_cache", "")
        yield


@pytest.fixture
def answer(run, capsys):
    """Standard output of generate.py; it must succeed."""

    def call(*arguments, checkpoint=run, mesh=("--mesh.data", "8")):
        code = generate.main(["--checkpoint", str(checkpoint), *mesh, *arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return call


@pytest.fixture
def refusal(run, capsys):
    """What generate.py says when it refuses."""

    def call(*arguments, checkpoint=run):
        command = ["score"] if arguments[0] == "score" else []
        rest = [str(a) for a in arguments[len(command) :]]
        code = generate.main([*command, "--checkpoint", str(checkpoint), *rest])
        assert code == 2
        return capsys.readouterr().err

    return call


# ---- the command line ----------------------------------------------------------------------------


def test_run_folder_and_hugging_face_folder_give_the_same_ids(answer, tmp_path):
    hf_folder(tmp_path, [tensors(weights())])
    ours = answer("--prompt-ids", "5,77", *GREEDY)
    ids = [int(i) for i in ours.split(",")]
    assert 1 < len(ids) <= 20
    assert answer("--prompt-ids", "5,77", *GREEDY, checkpoint=tmp_path) == ours


def test_text_begins_as_the_training_data_did(answer, run, tmp_path):
    hf_folder(tmp_path, [tensors(weights())])
    shutil.copy(run / "tokenizer.json", tmp_path)
    for folder, first in ((run, TOKENIZER.eos_id), (tmp_path, TOKENIZER.bos_id)):
        text = answer("--prompt", "the cat", *GREEDY, checkpoint=folder)
        prompt = ",".join(map(str, [first, *TOKENIZER.encode("the cat")]))
        ids = answer("--prompt-ids", prompt, *GREEDY, checkpoint=folder)
        assert text == TOKENIZER.decode(map(int, ids.split(",")), skip_special=True) + "\n"


@pytest.mark.slow
def test_speculation_keeps_greedy_text_and_reports_acceptance(answer, run, capsys):
    plain = answer("--prompt", "the cat", *GREEDY)
    command = ["--checkpoint", str(run), "--mesh.data", "8", "--prompt", "the cat", *GREEDY]
    assert generate.main([*command, "--speculate", "on"]) == 0
    out, err = capsys.readouterr()
    assert out == plain
    assert re.search(r"MTP drafts accepted \d+%", err)
    assert re.search(r"prefill \d+ tokens, [\d.,]+ tokens/s; decode \d+ tokens, [\d.,]+", err)


def test_prompts_of_a_file_are_those_of_the_command_line(answer, tmp_path):
    one, two = (answer("--prompt", text, *GREEDY) for text in ("the cat", "a"))
    lines = tmp_path / "prompts.txt"
    lines.write_text("the cat\n\na\n")
    assert answer("--prompts", str(lines), *GREEDY) == f"--- 0\n{one}--- 1\n{two}"
    records = tmp_path / "prompts.jsonl"
    records.write_text('{"prompt": "the cat"}\n{"messages": [{"role": "user", "content": "a"}]}\n')
    both = answer("--prompts", str(records), *GREEDY)
    chat = answer("--prompt", "a", "--chat", *GREEDY)
    assert both == f"--- 0\n{one}--- 1\n{chat}"


def test_stop_string_ends_the_text(answer):
    whole = answer("--prompt", "the cat", *GREEDY)
    stop = whole[6:9]
    assert (
        answer("--prompt", "the cat", "--stop", stop, *GREEDY) == whole[: whole.find(stop)] + "\n"
    )


@pytest.mark.slow
def test_seed_decides_sampled_text(answer):
    sampled = ["--prompt", "the cat", "--max-new-tokens", "20", "--top-k", "40", "--top-p", "0.9"]
    first = answer(*sampled, "--seed", "7")
    assert answer(*sampled, "--seed", "7") == first
    assert answer(*sampled, "--seed", "8") != first


def test_score_writes_logits_of_both_heads(answer, run, tmp_path, capsys):
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 12)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", ids)
    common = ["--checkpoint", str(run), "--tokens", str(tmp_path / "tokens.npy")]
    out = tmp_path / "logits.npy"
    command = ["score", *common, "--mesh.data", "8"]
    assert generate.main([*command, "--out", str(out), "--mtp"]) == 0
    main, ahead = np.load(out), np.load(tmp_path / "logits.mtp.npy")
    assert main.dtype == ahead.dtype == np.float32
    assert main.shape == ahead.shape == (3, 12, CONFIG.vocab_size)
    assert np.isfinite(main).all()
    assert np.isfinite(ahead[:, :-1]).all()
    assert np.isnan(ahead[:, -1]).all()
    assert str(out) in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {
        "tokens.npy", "logits.npy", "logits.mtp.npy"
    }  # fmt: skip
    assert generate.main([*command, "--mtp"]) == 0
    said = capsys.readouterr().out.splitlines()
    for line, logits, k in zip(said, (main, ahead), (1, 2), strict=True):
        p = np.exp(logits[:, :-k].astype(np.float64))
        p = np.take_along_axis(p, ids[:, k:, None], -1)[..., 0] / p.sum(-1)
        expected = -np.log(p).mean()
        loss, perplexity, targets = re.findall(r"[\d.]+(?= nats|,| targets)", line)
        assert float(loss) == pytest.approx(expected, abs=2e-6)
        assert float(perplexity) == pytest.approx(np.exp(expected), rel=1e-5)
        assert int(targets) == 3 * (12 - k)


@pytest.mark.slow
def test_a_layout_scores_like_one_of_replicas(run, tmp_path):
    ids = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (5, 9)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", ids)
    common = ["score", "--checkpoint", str(run), "--tokens", str(tmp_path / "tokens.npy"), "--mtp"]
    for layout in ("replicas", "cube"):
        out = tmp_path / f"{layout}.npy"
        assert generate.main([*common, "--layout", layout, "--out", str(out)]) == 0
    for head in ("npy", "mtp.npy"):
        one, other = (np.load(tmp_path / f"{name}.{head}") for name in ("replicas", "cube"))
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_mtp_modules_are_read_only_when_asked_for(answer, tmp_path, capsys):
    """Their expert weights hold NaN here, which would be noticed."""
    state = tensors(weights())
    for name, tensor in state.items():
        if name.startswith("model.layers.3.mlp.experts."):
            tensor[:] = np.nan
    folder = hf_folder(tmp_path / "hf", [state])
    np.save(tmp_path / "tokens.npy", np.ones((1, 5), np.int32))
    score = ["score", "--checkpoint", str(folder), "--tokens", str(tmp_path / "tokens.npy")]
    assert generate.main([*score, "--mesh.data", "8"]) == 0
    assert "nan" not in capsys.readouterr().out
    assert generate.main([*score, "--mesh.data", "8", "--mtp"]) == 2
    assert "logits of MTP module 1 are not all finite" in capsys.readouterr().err


def test_answers_are_written_in_order_as_they_end(capsys):
    answers = generate.Answers(3)
    answers.add(2, "c")
    answers.end(2)
    answers.add(0, "a")
    assert capsys.readouterr().out == ""
    answers.end(0)
    assert capsys.readouterr().out == "--- 0\na\n"
    answers.add(1, "b")
    answers.end(1)
    assert capsys.readouterr().out == "--- 1\nb\n--- 2\nc\n"


@pytest.mark.slow
def test_two_processes_give_the_text_of_one(run, tmp_path):
    """Experts are apart over the processes; scores are gathered; the first process writes."""
    np.save(tmp_path / "tokens.npy", np.arange(12, dtype=np.int32).reshape(3, 4))
    mesh = ["--mesh.data", "2", "--mesh.expert", "2", "--mesh.tensor", "2"]
    text = ["--prompt-ids", "5,77", "--speculate", *GREEDY]
    score = ["--tokens", str(tmp_path / "tokens.npy"), "--mtp", "--out"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def outputs(name, processes):
        """Of every process: its standard output. The score goes to a file."""
        found = []
        for kind, options in (("", text), ("score", [*score, str(tmp_path / f"{name}.npy")])):
            started = []
            for i in range(processes):
                several = ["--coordinator", f"localhost:{port}", "--num-processes",
                           str(processes), "--process-id", str(i)]  # fmt: skip
                command = [sys.executable, "generate.py", *([kind] if kind else []), "--checkpoint",
                           str(run), *options, *mesh, "--emulate", str(8 // processes),
                           "--compilation-cache", ""]  # fmt: skip
                command += several if processes > 1 else []
                pipe = subprocess.PIPE
                started.append(
                    subprocess.Popen(command, cwd=HERE, stdout=pipe, stderr=pipe, text=True)
                )
            ended = [process.communicate(timeout=400) for process in started]
            assert [p.returncode for p in started] == [0] * processes, ended
            found.append([out for out, _ in ended])
        return found

    one, two = outputs("one", 1), outputs("two", 2)
    assert two[0] == [one[0][0], ""]
    assert len(one[0][0].split(",")) > 1
    for head in ("npy", "mtp.npy"):
        a, b = (np.load(tmp_path / f"{name}.{head}") for name in ("one", "two"))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_processes_with_prompts_of_their_own_are_refused_by_all(run):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for i, prompt in enumerate(("5,77", "5,999")):
        command = [
            sys.executable, "generate.py", "--checkpoint", str(run), "--prompt-ids", prompt,
            "--emulate", "2", "--compilation-cache", "", "--coordinator", f"localhost:{port}",
            "--num-processes", "2", "--process-id", str(i),
        ]  # fmt: skip
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=HERE, stdout=pipe, stderr=pipe, text=True))
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], said
    for words in said:
        assert "the processes of this run differ in their options" in words
        assert "--prompt-ids" in words
        assert "5,999" in words


def test_an_axis_overrides_the_layout(run):
    options = ["--checkpoint", str(run), "--layout", "cube", "--mesh.tensor", "4"]
    mesh = generate.parse(options).mesh
    assert (mesh.fsdp, mesh.expert, mesh.tensor) == (2, 2, 4)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "off"),
        (["--speculate"], "auto"),
        (["--speculate", "--seed", "1"], "auto"),
        (["--speculate", "on", "--seed", "1"], "on"),
        (["--speculate=off"], "off"),
    ],
)
def test_speculate_alone_is_auto(run, arguments, expected):
    options = generate.parse(["--checkpoint", str(run), *arguments])
    assert isinstance(options, generate.Generate)
    assert options.speculate == expected


def test_a_score_that_fails_leaves_no_file(run, tmp_path, monkeypatch):
    np.save(tmp_path / "tokens.npy", np.ones((9, 4), np.int32))

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(NpyWriter, "append", full)
    common = ["--checkpoint", str(run), "--tokens", str(tmp_path / "tokens.npy")]
    assert generate.main(["score", *common, "--out", str(tmp_path / "logits.npy")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "1"], "nothing to do: give --prompt"),
        (["--prompt-ids", "1,x"], "token ids '1,x': give whole numbers"),
        (["--prompt-ids", "1,320"], "token 320; the vocabulary has ids 0..319"),
        (["--prompt", "a", "--max-new-tokens", "511"], "the model's max_position is 512"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "a", "--system", "s"], "add --chat"),
        (["--prompt", "a", "--prompt-ids", "1"], "leave out --prompt"),
        (["--prompt", "a", "--layout", "tensor", "--mesh.tensor", "3"], "8 are present"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompt", "a", "--stop", ""], "a stop string is empty"),
        (["score", "--tokens", "nowhere.npy"], "nowhere.npy: no such file"),
    ],
)
def test_requests_that_cannot_be_met(refusal, arguments, message):
    assert message in refusal(*arguments)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3), np.float32), "holds float32 [2, 3]"),
        (np.zeros(3, np.int32), "holds int32 [3]"),
        (np.zeros((0, 3), np.int32), "holds int32 [0, 3]"),
        (np.full((1, 3), -1, np.int32), "holds token -1"),
        (np.zeros((1, 513), np.int32), "the model's max_position is 512"),
        (np.zeros((4, 1), np.int32), "a loss needs two"),
        (np.array([[{}]]), "is no .npy file of numbers"),
        (np.full((1, 3), 320, np.int32), "holds token 320"),
    ],
)
def test_token_files_that_are_none(refusal, tmp_path, array, message):
    np.save(tmp_path / "tokens.npy", array)
    assert message in refusal("score", "--tokens", tmp_path / "tokens.npy")


def test_folders_that_are_no_checkpoint(refusal, run, tmp_path):
    assert "does not exist" in refusal("--prompt", "a", checkpoint=tmp_path / "nowhere")
    assert "is neither" in refusal("--prompt", "a", checkpoint=tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({"model": config["model"] | {"new": 1}}))
    assert "does not describe a model of this version" in refusal(
        "--prompt", "a", checkpoint=broken
    )
    shutil.rmtree(broken / "checkpoints" / "step_00000000")
    shutil.copy(run / "config.json", broken)
    assert "no checkpoint that can be read" in refusal("--prompt", "a", checkpoint=broken)
