"""Recipes from the command line, and the signals that they hand on; no stage is trained here."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

import train
from configs.command import parse

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGE = """
import json, os, pathlib, signal, sys, time

folder = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
folder.mkdir(parents=True)
(folder / "arguments").write_text(json.dumps(sys.argv[1:]))
print(folder.name)
if "--exit" in sys.argv:
    sys.exit(int(sys.argv[-1]))

def end(number, _):
    (folder / "signal").write_text(signal.Signals(number).name)
    sys.exit(0)

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, end)
(folder / "pid.new").write_text(str(os.getpid()))
(folder / "pid.new").rename(folder / "pid")
time.sleep(60)
"""
"""Stands in for train.py: leaves its arguments, then ends as --exit says, or by a signal."""


@pytest.fixture
def scripts(tmp_path) -> pathlib.Path:
    """A copy of the recipes whose train.py is STAGE."""
    shutil.copytree(ROOT / "runs", tmp_path / "runs", ignore=lambda _, names: {
        name for name in names if not name.endswith(".sh")
    })  # fmt: skip
    (tmp_path / "train.py").write_text(STAGE)
    return tmp_path / "runs"


def run_script(script: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [script, *arguments], env=os.environ | {"PYTHON": sys.executable}, capture_output=True,
        text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ["--recipe=r1_zer"],
        ["--recipe=r1_zer", "--print-config"],
        ["--recipe", "r1_zer", "--config=tiny"],
    ],
)
def test_an_unknown_recipe_names_the_near_one(arguments, capsys, monkeypatch):
    monkeypatch.setattr(train, "train", lambda _: pytest.fail("a single run was started"))
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    assert "--recipe 'r1_zer': did you mean r1_zero? Known: r1, r1_zero\n" in said


def test_a_recipe_is_never_a_single_run():
    command = dataclasses.replace(parse(["--config", "tiny"]), recipe="r1_zero")
    with pytest.raises(ValueError, match="recipe r1_zero is no single run"):
        train.train(command)


def test_an_option_is_not_taken_for_the_run_folder(scripts):
    done = run_script(scripts / "r1_zero.sh", "--train.steps", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "give that first: runs/r1_zero.sh FOLDER --train.steps 2" in done.stderr


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (["--config=tiny"], "--config"),
        (["--config", "tiny"], "--config"),
        (["--init-from=runs/x"], "--init-from"),
        (["--init_from", "runs/x"], "--init-from"),
    ],
)
def test_what_a_recipe_names_itself_is_refused_in_every_form(option, named, tmp_path):
    """Through train.py, which becomes the script; no stage begins."""
    words = ["--recipe", "r1_zero", "--run_dir", str(tmp_path), *option]
    done = subprocess.run(
        [sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"--recipe names the {named} of every stage" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "stages"),
    [
        ("r1_zero", "r1_base r1_zero"),
        ("r1", "base zero cold reasoning sft r1 student"),
    ],
)
def test_a_stage_starts_from_one_that_came_before(recipe, stages, scripts, tmp_path):
    """Every command line is one that train.py takes, the recipe's options last."""
    runs = tmp_path / "a folder"
    done = run_script(scripts / f"{recipe}.sh", str(runs), "--train.steps", "2", "--exit", "0")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[1::2] == stages.split()
    assert said[0] == f"== {recipe}: stage {said[1]}"
    for at, name in enumerate(said[1::2]):
        arguments = json.loads((runs / name / "arguments").read_text())
        assert arguments[-4:] == ["--train.steps", "2", "--exit", "0"]
        command = parse(arguments[:-2])
        before = {"", *(str(runs / one) for one in said[1::2][:at])}
        assert {command.init_from, command.run.sft.policy} <= before
        assert command.run.run_dir == str(runs / name)
        assert command.run.train.steps == 2
        assert at == 0 or command.init_from or command.run.sft.policy


def test_a_stage_that_fails_ends_its_recipe(scripts, tmp_path):
    done = run_script(scripts / "r1.sh", str(tmp_path / "out"), "--exit", "3")
    assert (done.returncode, done.stdout) == (3, "== r1: stage base\nbase\n")
    assert done.stderr == "recipe r1: stage base ended with 3; run again to go on\n"


def start(scripts: pathlib.Path, *prefix: str) -> tuple[subprocess.Popen, int]:
    """A recipe whose first stage is under way, and the process of that stage."""
    words = [*prefix, str(scripts / "r1_zero.sh"), str(scripts.parent / "out")]
    env = os.environ | {"PYTHON": sys.executable}
    recipe = subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True)
    wait_for(pid := scripts.parent / "out" / "r1_base" / "pid")
    return recipe, int(pid.read_text())


def wait_for(path: pathlib.Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)


@pytest.fixture
def signals_arrive():
    """A shell cannot trap what its parent ignores: nohup, or a script's `&`, ignored for us."""
    ours = {one: signal.getsignal(one) for one in (signal.SIGHUP, signal.SIGINT)}
    for one, handler in ours.items():
        if handler is signal.SIG_IGN:
            signal.signal(one, signal.SIG_DFL)
    yield
    for one, handler in ours.items():
        signal.signal(one, handler)


@pytest.mark.parametrize(
    ("sent", "got"),
    [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGHUP", "SIGTERM"), ("SIGKILL", "SIGTERM")],
)
def test_a_stage_ends_with_its_recipe(sent, got, scripts, tmp_path, signals_arrive):
    """Whatever ends the recipe, its stage saves and goes; no later stage begins."""
    if sent == "SIGKILL" and not shutil.which("setpriv"):
        pytest.skip("without setpriv (Linux) a process is not told that its parent is gone")
    recipe, stage = start(scripts)
    recipe.send_signal(signal.Signals[sent])
    _, said = recipe.communicate(timeout=120)
    if sent == "SIGKILL":
        assert recipe.returncode == -signal.SIGKILL
    else:
        assert recipe.returncode == 0
        assert said == "recipe r1_zero: stage r1_base was stopped; run again to go on\n"
    folder = tmp_path / "out" / "r1_base"
    wait_for(folder / "signal")
    assert (folder / "signal").read_text() == got
    assert [path.name for path in (tmp_path / "out").iterdir()] == [folder.name]
    end = time.monotonic() + 30
    while pathlib.Path(f"/proc/{stage}/cmdline").exists() and time.monotonic() < end:
        time.sleep(0.02)


def test_a_recipe_under_nohup_is_left_alone(scripts):
    recipe, stage = start(scripts, "nohup")
    recipe.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert recipe.poll() is None
    os.kill(stage, 0)
    recipe.terminate()
    recipe.communicate(timeout=120)
    assert recipe.returncode == 0
