"""A folder that one program at a time writes: who holds it, and what a dead holder leaves."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import convert
from runtime import lock
from runtime.lock import hold, holds

HOLDER = """
import pathlib, sys, time
from runtime.lock import hold
with hold(pathlib.Path(sys.argv[1]), "the folder", print):
    print("held", flush=True)
    time.sleep(60)
"""


def silent(line: str) -> None:
    raise AssertionError(f"there is nothing to wait for: {line}")


@pytest.fixture
def other(tmp_path):
    """Another process that holds tmp_path/.lock, started in its own interpreter."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_told_who_holds_it(tmp_path, other):
    in_use = rf"the folder is in use by process {other.pid} on \S+ \("
    with pytest.raises(ValueError, match=in_use), hold(tmp_path / ".lock", "the folder", silent):
        pass
    other.send_signal(signal.SIGSTOP)  # it does nothing, but it is there
    with pytest.raises(ValueError, match=in_use), hold(tmp_path / ".lock", "the folder", silent):
        pass


def test_a_killed_holder_leaves_nothing_behind(tmp_path, other):
    other.kill()
    other.wait()
    assert (tmp_path / ".lock").exists()
    with hold(tmp_path / ".lock", "the folder", silent) as token:
        assert holds(tmp_path / ".lock", token)
        assert not holds(tmp_path / ".lock", "another")
    assert not (tmp_path / ".lock").exists()


def elsewhere(file: Path) -> None:
    """As a holder on another machine leaves the file, on a disk whose locks end at a machine."""
    left = {"host": "far", "process": 7, "since": "today", "boot": "another", "token": "t"}
    file.write_text(json.dumps(left))


def test_a_holder_elsewhere_is_in_use_while_it_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENT_S", 5.0)
    file, said = tmp_path / ".lock", []
    elsewhere(file)
    beat = threading.Timer(0.3, os.utime, [file])
    beat.start()
    in_use = r"in use by process 7 on far \(since today\)"
    with pytest.raises(ValueError, match=in_use), hold(file, "the folder", said.append):
        pass
    beat.join()
    assert "looking for signs of life for 5 s" in said[0]


@pytest.mark.parametrize("locks", [True, False])
def test_a_holder_elsewhere_that_is_silent_is_dead(tmp_path, monkeypatch, locks):
    monkeypatch.setattr(lock, "SILENT_S", 0.5)
    if not locks:  # a disk without locks is used all the same
        monkeypatch.setattr(lock, "_lock", lambda handle: None)
    elsewhere(tmp_path / ".lock")
    said = []
    with hold(tmp_path / ".lock", "the folder", said.append) as token:
        assert holds(tmp_path / ".lock", token)
    assert len(said) == 1


def test_a_holder_renews_the_time_of_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    file = tmp_path / ".lock"
    with hold(file, "the folder", silent):
        first, end = file.stat().st_mtime_ns, time.monotonic() + 10
        while file.stat().st_mtime_ns == first and time.monotonic() < end:
            time.sleep(0.02)
        assert file.stat().st_mtime_ns > first


def test_a_holder_that_was_written_over_ends(tmp_path):
    """Two that found no locks, and started at one time: one of them goes on."""
    code = HOLDER.replace("with hold", "import runtime.lock; runtime.lock.BEAT_S = 0.1\nwith hold")
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    root = Path(__file__).parent.parent
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=root, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        elsewhere(tmp_path / ".lock")
        assert process.wait(timeout=30) == 2
        assert "the folder was taken over by process 7 on far" in process.stderr.read()
    assert (tmp_path / ".lock").exists()


def test_two_conversions_into_one_folder(tmp_path, capsys):
    """The second would take the first's unfinished folder for one that was left."""
    work = tmp_path / "dst.partial"
    work.mkdir()
    with hold(tmp_path / "dst.lock", "dst", silent):
        assert convert.main(["import", str(tmp_path / "src"), str(tmp_path / "dst")]) == 2
    assert f"{tmp_path}/dst is in use by process {os.getpid()}" in capsys.readouterr().err
    assert work.is_dir()
