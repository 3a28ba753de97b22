"""Recipes from the command line, and the signals that they hand on; no stage is trained here."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import train
from configs.command import parse
from configs.recipes import RECIPES
from rl.recipe import run_recipe

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGE = """
import os, pathlib, signal, sys, time

folder = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
folder.mkdir(parents=True)

def end(number, _):
    (folder / "signal").write_text(signal.Signals(number).name)
    sys.exit(0)

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, end)
(folder / "pid.new").write_text(str(os.getpid()))
(folder / "pid.new").rename(folder / "pid")
time.sleep(60)
"""
"""Stands in for train.py: says that it runs, and which signal ended it."""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--recipe=r1_zer"],
        ["--recipe=r1_zer", "--print-config"],
        ["--recipe", "r1_zer", "--config=tiny"],
    ],
)
def test_a_recipe_is_recognised_with_an_equals_sign(arguments, capsys, monkeypatch):
    monkeypatch.setattr(train, "train", lambda _: pytest.fail("a single run was started"))
    assert train.main(arguments) == 2
    assert "--recipe 'r1_zer': did you mean r1_zero?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (["--config=tiny"], "--config"),
        (["--config", "tiny"], "--config"),
        (["--init-from=runs/x"], "--init-from"),
        (["--init_from", "runs/x"], "--init-from"),
    ],
)
def test_what_a_recipe_names_itself_is_refused_in_every_form(option, named, capsys):
    assert run_recipe(["--recipe", "r1_zero", *option]) == 2
    assert f"--recipe names the {named} of every stage" in capsys.readouterr().err


def test_a_recipe_is_never_a_single_run(monkeypatch):
    monkeypatch.setattr("runtime.start.start", lambda _: pytest.fail("a single run was started"))
    command = dataclasses.replace(parse(["--config", "tiny"]), recipe="r1_zero")
    with pytest.raises(ValueError, match="recipe r1_zero is no single run"):
        train.train(command)


def start(folder: pathlib.Path, *prefix: str) -> tuple[subprocess.Popen, int]:
    """A recipe whose first stage is under way, and the process of that stage."""
    (folder / "stage.py").write_text(STAGE)
    program = (
        "import pathlib, sys, rl.recipe as r; r.TRAIN = pathlib.Path(sys.argv[1]);"
        "sys.exit(r.run_recipe(['--recipe', 'r1_zero', '--run_dir', sys.argv[2]]))"
    )
    words = [sys.executable, "-c", program, str(folder / "stage.py"), str(folder / "runs")]
    recipe = subprocess.Popen([*prefix, *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(pid := folder / "runs" / RECIPES["r1_zero"][0].name / "pid")
    return recipe, int(pid.read_text())


def wait_for(path: pathlib.Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("sent", "got"),
    [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGHUP", "SIGTERM"), ("SIGKILL", "SIGTERM")],
)
def test_a_stage_ends_with_its_recipe(sent, got, tmp_path):
    """Whatever ends the recipe, its stage saves and goes; no later stage begins."""
    if sent == "SIGKILL" and sys.platform != "linux":
        pytest.skip("only Linux tells a process that its parent is gone")
    recipe, stage = start(tmp_path)
    recipe.send_signal(signal.Signals[sent])
    code = recipe.wait(30)
    assert code == (-signal.SIGKILL if sent == "SIGKILL" else 0)
    folder = tmp_path / "runs" / RECIPES["r1_zero"][0].name
    wait_for(folder / "signal")
    assert (folder / "signal").read_text() == got
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name]
    end = time.monotonic() + 30
    while pathlib.Path(f"/proc/{stage}/cmdline").exists() and time.monotonic() < end:
        time.sleep(0.02)


def test_a_recipe_under_nohup_is_left_alone(tmp_path):
    recipe, stage = start(tmp_path, "nohup")
    recipe.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert recipe.poll() is None
    os.kill(stage, 0)
    recipe.terminate()
    assert recipe.wait(30) == 0
