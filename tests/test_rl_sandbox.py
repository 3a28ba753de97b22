"""Code of a model in its sandbox: right and wrong programs, hostile ones, what is left behind."""

import os
import pathlib
import re
import tempfile
import time

import pytest

from rl import sandbox
from rl.records import Record
from rl.rewards import accuracy, code
from rl.sandbox import FunctionTest, Limits, ProgramTest, chosen_isolation, read_tests, run_tests

EVERY = ["hook"] + ["namespaces"] * (chosen_isolation("auto") == "namespaces")
"""Kinds of isolation that this system has; namespaces are tested where they are permitted."""

every_isolation = pytest.mark.parametrize("isolation", EVERY)


def reason(source: str, isolation="auto", stdout="", **limits) -> str:
    """Why a program that should print `stdout` failed; '' if it did not."""
    report = run_tests(source, [ProgramTest("", stdout)], Limits(isolation=isolation, **limits))
    assert report.passed == (not report.reasons[0],)
    return report.reasons[0]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path, monkeypatch):
    """No process of the sandbox, no folder, no open file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files = len(os.listdir("/proc/self/fd"))
    yield
    assert not list(tmp_path.glob("sandbox-*"))
    assert len(os.listdir("/proc/self/fd")) == files
    assert not running(str(tmp_path))


def running(text: str) -> list[str]:
    """Command lines of processes, zombies of ours included, that name `text` or have no name."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = re.search(r"\) \w (\d+)", (folder / "stat").read_text())
            line = (folder / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        ours = parent is not None and int(parent[1]) == os.getpid()
        if text in line or (ours and not line):
            found.append(f"{folder.name}: {line}")
    return found


@every_isolation
def test_programs_and_functions_are_tested_in_order(isolation):
    source = """
def half(x):
    print("noise")
    return x / 2

if __name__ == "__main__":
    print(half(int(input())), end="  \\n\\n")
"""
    tests = [
        ProgramTest("4\n", "noise\n2.0"),
        FunctionTest("assert half(4) == 2"),
        ProgramTest("4\n", "noise\n3.0"),
        FunctionTest("assert half(4) == 3, 'no'"),
        FunctionTest("assert half(3) == 1.5"),
    ]
    report = run_tests(source, tests, Limits(isolation=isolation))
    assert report.passed == (True, True, False, False, True)
    assert report.reasons[2] == r"printed 'noise\n2.0  \n\n', not 'noise\n3.0'"
    assert report.reasons[3] == "AssertionError: no"
    assert report.isolation == isolation


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("1 / 0", "exit status 1: ZeroDivisionError: division by zero"),
        ("def f(:", "exit status 1: SyntaxError: invalid syntax"),
        ("import sys; sys.exit(3)", "exit status 3: "),
        ("import os; os.abort()", "killed by signal 6"),
        ("x = bytearray(10**10)", "exit status 1: MemoryError"),
        ("open('a', 'wb').write(bytes(2**25))", "exit status 1: OSError: .* File too large"),
        ("\ud800", "exit status 1: UnicodeEncodeError"),
        ("import numpy", "exit status 1: ModuleNotFoundError"),
    ],
)
def test_why_a_program_failed(source, said):
    assert re.match(said, reason(source))


SOCKET = "import socket; socket.create_connection(('127.0.0.1', 9), 1)"
REFUSED = {
    SOCKET: "socket",
    "import subprocess; subprocess.run(['true'])": "subprocess.Popen",
    "import multiprocessing as m; m.Process(target=print).start()": "os.fork",
    "import ctypes": "import 'ctypes'",
    "import os; os.kill(os.getppid(), 9)": "os.kill",
    "open(OUTSIDE, 'w')": "open",
    "import os; os.remove(OUTSIDE)": "os.remove",
    "import resource as r; r.setrlimit(r.RLIMIT_CPU, (9, 9))": "resource",
}


@pytest.mark.parametrize(
    ("source", "isolation"),
    [(source, "hook") for source in REFUSED] + [(SOCKET, kind) for kind in EVERY[1:]],
)
def test_the_hook_refuses(source, isolation, tmp_path):
    event = REFUSED[source]
    kept = tmp_path / "kept"
    kept.write_text("text")
    said = reason(source.replace("OUTSIDE", repr(str(kept))), isolation)
    assert re.match(f"exit status 1: PermissionError: the sandbox refuses {event}", said), said
    assert kept.read_text() == "text"


@every_isolation
def test_the_folder_is_the_programs_own(isolation):
    source = """
import os, pathlib, tempfile
pathlib.Path("a").write_text("x"); os.rename("a", "b"); os.mkdir("c"); os.remove("b")
tempfile.TemporaryFile().write(b"x")
print(sorted(os.listdir()), os.environ["HOME"] == os.getcwd(), len(os.environ) < 10)
"""
    assert reason(source, isolation, "['c', 'solution.py'] True True") == ""


@pytest.mark.skipif("namespaces" not in EVERY, reason="the system denies user namespaces")
def test_behind_the_hook_namespaces_are_a_wall(tmp_path, monkeypatch):
    """The same without the hook: the kernel refuses, and what was started is gone afterwards."""
    open_program = tmp_path / "program.py"
    text = pathlib.Path(sandbox._PROGRAM).read_text()
    for line in ("    _no_processes()\n", "    sys.addaudithook(hook)\n"):
        assert text.count(line) == 1
        text = text.replace(line, "    pass\n")
    open_program.write_text(text)
    monkeypatch.setattr(sandbox, "_PROGRAM", open_program)
    marker = f"{tmp_path}/marker"
    source = f"""
import os, socket, subprocess, sys, time
def refused(action):
    try:
        action()
    except OSError as error:
        return type(error).__name__ + " " + str(error.errno)
    return "permitted"
print(refused(lambda: socket.create_connection(("127.0.0.1", 9), 1)))
print(refused(lambda: socket.create_connection(("192.0.2.1", 9), 1)))
print(refused(lambda: open({marker!r}, "w")))
print(refused(lambda: os.kill({os.getpid()}, 0)))
print(refused(lambda: os.unshare(os.CLONE_NEWNET)))
for _ in range(3):
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)", {marker!r}],
                     start_new_session=True)
print("started")
"""
    expected = "\n".join(
        [
            "OSError 101",  # network is unreachable: not even a loopback
            "OSError 101",
            "OSError 30",  # read-only file system
            "ProcessLookupError 3",
            "PermissionError 1",
            "started",
        ]
    )
    assert reason(source, "namespaces", expected) == ""
    assert not running(marker)


@every_isolation
def test_a_program_that_ignores_term_is_killed_in_time(isolation):
    source = "import signal; signal.signal(15, signal.SIG_IGN)\nprint('on', flush=True)\n"
    source += "import time\nwhile True: time.sleep(9)"
    begin = time.monotonic()
    assert reason(source, isolation, seconds=0.6) == "time limit of 0.6 s"
    assert 0.6 <= time.monotonic() - begin < 0.6 + sandbox.GRACE + 3


def test_term_comes_before_kill(tmp_path):
    """A program may tidy up: its handler runs, in the time between."""
    source = (
        "import signal, time\nsignal.signal(15, lambda *_: (print('bye', flush=True), exit()))\n"
    )
    source += "print('up', flush=True)\nwhile True: time.sleep(9)"
    seen = {}

    def collect(process, limits):
        seen["output"] = collected = original(process, limits)
        return collected

    original, sandbox_end = sandbox._collect, sandbox._end

    def end(process):
        sandbox_end(process)
        seen["after"] = process.stdout.read()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "GRACE", 5.0)
        patch.setattr(sandbox, "_collect", collect)
        patch.setattr(sandbox, "_end", end)
        assert reason(source, seconds=2) == "time limit of 2 s"
    assert (seen["output"][0], seen["after"]) == (b"up\n", b"bye\n")


@every_isolation
def test_closed_output_does_not_hide_a_running_program(isolation):
    source = "import os, time\nos.close(1); os.close(2)\ntime.sleep(9)"
    assert reason(source, isolation, seconds=0.6) == "time limit of 0.6 s"


def test_output_is_cut():
    begin = time.monotonic()
    said = reason("while True: print('x' * 1000)", output_kb=16, seconds=30)
    assert said == "more than 16 KiB of output"
    assert time.monotonic() - begin < 15


@pytest.mark.slow
def test_cpu_time_has_a_limit_of_its_own():
    said = reason("while True: pass", seconds=30, cpu_seconds=0.5)
    assert said == "killed: CPU time or memory over the limit"


def test_all_tests_together_have_an_end():
    tests = [ProgramTest("", "")] * 50
    begin = time.monotonic()
    report = run_tests("import time; time.sleep(9)", tests, Limits(total_seconds=0.6))
    assert time.monotonic() - begin < 6
    assert report.reasons[0] == "time limit of 0.6 s"
    assert report.reasons[-1] == "not run: 0.6 s for all tests had passed"


@pytest.mark.parametrize(
    "source", ["import os; os._exit(0)", "import sys; sys.exit(0)", "print('0')"]
)
def test_leaving_early_passes_no_check(source):
    report = run_tests(source, [FunctionTest("assert False"), FunctionTest("undefined")])
    assert report.passed == (False, False)


def test_a_check_that_hangs_fails_itself_and_those_after_it():
    checks = ["pass", "import time; time.sleep(9)", "pass"]
    report = run_tests("", [FunctionTest(check) for check in checks], Limits(seconds=2))
    assert report.passed == (True, False, False)
    assert report.reasons[1] == "time limit of 2 s"


def test_the_code_reward():
    tests = [{"stdin": "3", "stdout": "9"}, {"check": "assert square(2) == 4"}]
    asked = Record("Square.", {"tests": tests}, "code")
    right = "```python\ndef square(x): return x * x\nif __name__ == '__main__':"
    right += " print(square(int(input())))\n```\nIt squares."
    assert accuracy(asked, f"<think>easy</think>\n{right}") == 1.0
    assert code(asked, right.replace("x * x", "x + x"), seconds=3) == 0.0
    assert code(asked, "") == 0.0
    with pytest.raises(TypeError, match="minutes"):
        code(asked, right, minutes=1)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], r"tests is '\[\]'; give a list with at least one test"),
        ("assert", "tests is 'assert'"),
        ([{"check": "pass"}, {"check": 1}], r"test 1 is .*give \{'stdin': text, 'stdout': text\}"),
        ([{"stdin": "", "stdout": "", "check": ""}], "test 0 is"),
    ],
)
def test_wrong_tests_are_told(entries, message):
    with pytest.raises(ValueError, match=message):
        read_tests(entries)


def test_wrong_limits_are_told():
    with pytest.raises(ValueError, match="limit seconds is 0; give a number above 0"):
        Limits(seconds=0)
    with pytest.raises(ValueError, match="limit memory_mb is 'all'"):
        Limits(memory_mb="all")
    with pytest.raises(ValueError, match="isolation is 'docker'; choose auto, namespaces or hook"):
        Limits(isolation="docker")


def test_namespaces_asked_for_and_denied_are_an_error(monkeypatch):
    monkeypatch.setattr(sandbox, "_why_no_namespaces", lambda: "Operation not permitted")
    assert chosen_isolation("auto") == "hook"
    with pytest.raises(ValueError, match=r"denies them \(Operation not permitted\)"):
        chosen_isolation("namespaces")
