"""Code of a model in its sandbox: right, wrong and hostile programs, and what they leave."""

import os
import pathlib
import re
import tempfile
import time

import pytest

from rl.problems import Problem
from rl.verdict import sandbox
from rl.verdict.code_tests import FunctionTest, ProgramTest, ValueTest, read_tests
from rl.verdict.rules import accuracy, code
from rl.verdict.sandbox import Limits, Report, check_isolation, described_isolation, run_tests
from tests.tables import each

KEPT_IN = not sandbox._probed().why
"""Whether this system has bubblewrap. Without it the tests run code under limits alone; where
MESHSEEK_REQUIRE_BWRAP is set, as in CI, that is a failure."""
assert KEPT_IN or not os.environ.get("MESHSEEK_REQUIRE_BWRAP"), sandbox._probed().why

every_isolation = pytest.mark.parametrize("unsafe", [True] + [False] * KEPT_IN)
needs_bubblewrap = pytest.mark.skipif(
    not KEPT_IN, reason=f"code is refused: {sandbox._probed().why}"
)


def judged(source: str, tests: list, unsafe: bool = not KEPT_IN, **limits) -> Report:
    return run_tests(source, tests, Limits(unsafe=unsafe, **limits))


def reason(source: str, unsafe: bool = not KEPT_IN, stdout="", **limits) -> str:
    """Why a program that should print `stdout` failed; '' if it did not."""
    report = judged(source, [ProgramTest("", stdout)], unsafe, **limits)
    assert report.passed == (not report.reasons[0],)
    return report.reasons[0]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path, monkeypatch):
    """No process of the sandbox, no folder, no open file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files, before = len(os.listdir("/proc/self/fd")), running(str(tmp_path))
    yield
    assert not list(tmp_path.glob("sandbox-*"))
    assert len(os.listdir("/proc/self/fd")) == files
    assert running(str(tmp_path)) == before  # other tests of the worker may have left a zombie


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
def test_programs_and_functions_are_tested_in_order(unsafe):
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
    report = judged(source, tests, unsafe)
    assert report.passed == (True, True, False, False, True)
    assert report.reasons[2] == r"printed 'noise\n2.0  \n\n', not 'noise\n3.0'"
    assert report.reasons[3] == "AssertionError: no"
    assert report.isolation == ("limits alone" if unsafe else "bubblewrap")


@each(
    [
        ("1 / 0", "exit status 1: ZeroDivisionError: division by zero"),
        ("def f(:", "exit status 1: SyntaxError: invalid syntax"),
        ("import sys; sys.exit(3)", "exit status 3: "),
        ("import os; os.abort()", "killed by signal 6"),
        ("x = bytearray(10**10)", "exit status 1: MemoryError"),
        ("open('a', 'wb').write(bytes(2**25))", "exit status 1: OSError: .* File too large"),
        ("\ud800", "exit status 1: UnicodeEncodeError"),
        ("import numpy", "exit status 1: ModuleNotFoundError"),
    ]
)
def test_why_a_program_failed(source, said):
    assert re.match(said, reason(source))


ACTS = """
os.pidfd_open(PARENT)
signal.pidfd_send_signal(0, 9)
os.kill(PARENT, 0)
os.killpg(0, 0)
signal.pthread_kill(0, 9)
os.setpriority(os.PRIO_PROCESS, PARENT, 5)
os.nice(1)
os.sched_setaffinity(PARENT, [0])
os.sched_setscheduler(PARENT, os.SCHED_BATCH, os.sched_param(0))
os.sched_setparam(PARENT, os.sched_param(0))
resource.prlimit(PARENT, resource.RLIMIT_CPU, (9, 9))
fcntl.fcntl(0, fcntl.F_SETOWN, PARENT)
fcntl.ioctl(0, 0)
fcntl.flock(0, fcntl.LOCK_SH)
os.mkfifo(OUTSIDE)
os.mknod(OUTSIDE)
os.mkfifo("inside")
os.chroot("/")
os.setns(0)
os.unshare(0)
os.setuid(0)
os.seteuid(0)
os.setgid(0)
os.setgroups([])
os.setpgid(0, 0)
os.setsid()
os.tcsetpgrp(0, 0)
os.openpty()
os.login_tty(0)
os.sync()
os.symlink("a", "b")
time.clock_settime(time.CLOCK_REALTIME, 0)
sys.activate_stack_trampoline("perf")
open(f"/proc/{PARENT}/mem", "rb")
open(f"/proc/{PARENT}/cmdline")
os.open(f"{PARENT}/cmdline", os.O_RDONLY, dir_fd=os.open("/proc", os.O_RDONLY))
os.open("made", os.O_WRONLY | os.O_CREAT, dir_fd=os.open(FOLDER, os.O_RDONLY))
os.mkdir("made", dir_fd=os.open(FOLDER, os.O_RDONLY))
os.remove("kept", dir_fd=os.open(FOLDER, os.O_RDONLY))
os.rename("solution.py", "made", dst_dir_fd=os.open(FOLDER, os.O_RDONLY))
os.posix_spawn("/bin/true", ["true"], {})
os.execv("/bin/true", ["true"])
os.fork()
importlib.import_module("ctypes")
importlib.import_module("_ctypes")
importlib.import_module("sqlite3")
importlib.import_module("tkinter")
importlib.import_module("termios")
importlib.import_module("readline")
importlib.import_module("_xxsubinterpreters")
importlib.import_module("multiprocessing.shared_memory")
(sys.modules.pop("posix"), importlib.import_module("posix"))
importlib.machinery.BuiltinImporter.create_module(importlib.machinery.ModuleSpec("posix", None))
native("posix_spawn", os.getcwd() + "/native.so")
socket.socket()
socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
socket.socket(fileno=socket.socketpair()[0].detach())
socket.socket(socket.AF_UNIX).bind("inside")
socket.socket(socket.AF_UNIX).bind("\\0name")
socket.socket(socket.AF_UNIX).connect(OUTSIDE)
socket.socket(socket.AF_UNIX).connect_ex(OUTSIDE)
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"", OUTSIDE)
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendmsg([b""], [], 0, OUTSIDE)
socket.getaddrinfo("localhost", 9)
asyncio.run(asyncio.open_connection("127.0.0.1", 9))
asyncio.run(asyncio.open_unix_connection(OUTSIDE))
asyncio.run(asyncio.start_unix_server(print, "inside"))
asyncio.run(asyncio.create_subprocess_exec("true"))
asyncio.run(asyncio.to_thread(open, OUTSIDE, "w"))
concurrent.futures.ProcessPoolExecutor(1)
square.__code__.replace(co_code=b"")
socket.create_connection(('127.0.0.1', 9), 1)
subprocess.run(['true'])
multiprocessing.Process(target=int).start()
os.kill(1, 9)
open(OUTSIDE, 'w')
os.remove(OUTSIDE)
resource.setrlimit(resource.RLIMIT_CPU, (9, 9))
os.unshare(os.CLONE_NEWNET)
os.unshare(os.CLONE_NEWUSER)
socket.create_connection(('192.0.2.1', 9), 1)
open('/usr/made', 'w')
open('/proc/sys/kernel/core_pattern', 'w')
open(KEPT)
open(f'/proc/{PARENT}/environ')
"""
CONTAINED = """
os.killpg(0, 0)
signal.pthread_kill(0, 9)
os.nice(1)
fcntl.flock(0, fcntl.LOCK_SH)
os.mkfifo("inside")
os.unshare(0)
os.setpgid(0, 0)
os.setsid()
os.openpty()
os.sync()
os.symlink("a", "b")
sys.activate_stack_trampoline("perf")
os.posix_spawn("/bin/true", ["true"], {})
os.fork()
importlib.import_module("ctypes")
importlib.import_module("_ctypes")
importlib.import_module("sqlite3")
importlib.import_module("tkinter")
importlib.import_module("termios")
importlib.import_module("readline")
importlib.import_module("_xxsubinterpreters")
importlib.import_module("multiprocessing.shared_memory")
(sys.modules.pop("posix"), importlib.import_module("posix"))
importlib.machinery.BuiltinImporter.create_module(importlib.machinery.ModuleSpec("posix", None))
socket.socket()
socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
socket.socket(fileno=socket.socketpair()[0].detach())
socket.socket(socket.AF_UNIX).bind("\\0name")
socket.socket(socket.AF_UNIX).connect_ex(OUTSIDE)
asyncio.run(asyncio.create_subprocess_exec("true"))
square.__code__.replace(co_code=b"")
subprocess.run(['true'])
multiprocessing.Process(target=int).start()
os.kill(1, 9)
"""
"""Of these, what may succeed: it reaches the program's own processes and folder alone."""


@needs_bubblewrap
def test_nothing_outside_is_reached(tmp_path):
    """Every function that acts on other processes, on files outside and on the network."""
    kept = tmp_path / "kept"
    kept.write_text("text")
    made = f"PARENT, OUTSIDE, FOLDER = {os.getpid()}, {str(tmp_path / 'made')!r}, {str(tmp_path)!r}"
    source = f"""
import asyncio, concurrent.futures, fcntl, importlib.machinery, multiprocessing, os, resource
import signal, socket, subprocess, sys, time
{made}
KEPT = FOLDER + "/kept"
def square(x): return x * x
def native(name, path):
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    loader.create_module(importlib.machinery.ModuleSpec(name, loader, origin=path))
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
for line in {ACTS.strip().splitlines()!r}:
    if (child := os.fork()) == 0:  # some acts change or end the process
        try:
            eval(line)
        except BaseException:
            os._exit(0)
        os._exit(1)
    if os.waitpid(child, 0)[1]:
        print(line, flush=True)
"""
    priority = os.getpriority(os.PRIO_PROCESS, 0)
    program = ProgramTest("", CONTAINED.strip())
    assert judged(source, [program], False, seconds=60, output_kb=999).reasons == ("",)
    assert os.listdir(tmp_path) == ["kept"]
    assert kept.read_text() == "text"
    assert os.getpriority(os.PRIO_PROCESS, 0) == priority


@every_isolation
def test_the_standard_library_works(unsafe):
    """Modules that an answer may import, and folders made and removed by their descriptors."""
    source = """
import collections, concurrent.futures, dataclasses, datetime, decimal, fractions
import getpass, hashlib, heapq, http.client, itertools, json, math, multiprocessing, random, re
import shutil, signal, statistics, string, tempfile, threading, time, typing, urllib.request, uuid
with concurrent.futures.ThreadPoolExecutor(2) as pool:
    print(sum(pool.map(abs, range(4))), end=" ")
with tempfile.TemporaryDirectory() as folder:
    open(f"{folder}/a", "w").close()
shutil.rmtree(tempfile.mkdtemp())
print(os.listdir() if (os := __import__("os")) else "", open("/proc/self/comm").read() != "")
"""
    assert reason(source, unsafe, "6 ['solution.py'] True") == ""


COMPUTES = """
import array, asyncio, bisect, collections, concurrent.futures, copy, dataclasses, datetime, decimal
import enum, fractions, functools, heapq, io, itertools, json, math, operator, pickle, queue, random
import re, statistics, string, sys, threading, types, typing

@dataclasses.dataclass(order=True)
class Point:
    x: int
    y: int = 0

class Color(enum.Enum):
    RED = enum.auto()

Pair = typing.NamedTuple("Pair", [("a", int)])

def deep(n):
    return n and 1 + deep(n - 1)

@types.coroutine
def three():
    yield from asyncio.sleep(0).__await__()
    return 3

async def square(n):
    await asyncio.sleep(0.001 * n)
    return n * n

async def main():
    async with asyncio.TaskGroup() as group, asyncio.Lock():
        tasks = [group.create_task(square(n)) for n in range(3)]
    try:
        await asyncio.wait_for(asyncio.sleep(9), 0.01)
    except TimeoutError:
        return [task.result() for task in tasks], await asyncio.to_thread(abs, -2), await three()

print(asyncio.run(main()))
lines = iter(sys.stdin.readline, "")
print([int(line) for line in lines])
sys.setrecursionlimit(10**6)
threading.stack_size(2**27)
thread = threading.Thread(target=lambda: print(deep(20_000)))
thread.start(); thread.join()
threading.stack_size(0)
with concurrent.futures.ThreadPoolExecutor(2) as pool:
    print(list(pool.map(functools.lru_cache(math.factorial), range(4))))
print(copy.deepcopy(min(Point(2), Point(1))), pickle.loads(pickle.dumps(Color.RED)), Pair(1))
print(decimal.Decimal("0.1") * 3, fractions.Fraction(1, 3) + 1, statistics.median([1, 4]))
print(datetime.datetime.strptime("2020-02-28", "%Y-%m-%d") + datetime.timedelta(2))
print(io.StringIO("a").read(), re.sub("a", "b", "aa"), json.dumps({"a": 1}), string.digits)
print(heapq.nsmallest(1, [3, 1]), bisect.bisect([1, 2], 1), sum(itertools.chain([1], [2])))
print(collections.Counter("aab"), functools.reduce(operator.mul, array.array("i", [2, 3])))
print(random.Random(1).randrange(1), queue.PriorityQueue().empty())
"""
COMPUTED = """([0, 1, 4], 2, 3)
[4, 5]
20000
[1, 1, 2, 6]
Point(x=1, y=0) Color.RED Pair(a=1)
0.3 4/3 2.5
2020-03-01 00:00:00
a bb {"a": 1} 0123456789
[1] 1 3
Counter({'a': 2, 'b': 1}) 6
0 True"""


@every_isolation
def test_modules_that_answers_import_compute(unsafe):
    test = ProgramTest("4\n5\n", COMPUTED)
    assert judged(COMPUTES, [test], unsafe).reasons == ("",)


def test_unsafe_code_has_room_for_processes_above_those_of_the_user():
    """The kernel counts them all, so the limit is above those that run."""
    source = """
limit = next(line for line in open("/proc/self/limits") if line.startswith("Max processes"))
print(int(limit.split()[2]) > 1)
"""
    assert reason(source, True, "True", processes=1) == ""


@needs_bubblewrap
def test_a_program_sees_its_own_processes_only():
    """Itself and number 1, which started it, and what they are."""
    source = """
import os
seen = [name for name in os.listdir("/proc") if name.isdigit()]
print(len(seen), "1" in seen, str(os.getpid()) in seen)
print(*(open(f"/proc/{name}/cmdline").read().split("\\0")[4] for name in seen))
"""
    assert reason(source, False, "2 True True\n/program.py /program.py") == ""


@needs_bubblewrap
def test_where_proc_cannot_be_mounted_it_is_empty_or_code_is_refused(monkeypatch):
    """As in some containers, and with versions of bwrap that lack an option."""
    monkeypatch.setattr(sandbox, "_probed", sandbox._probed.__wrapped__)
    wrong = ("--proc", "/nowhere/"), ("--unknown",)
    monkeypatch.setattr(sandbox, "_FURTHER", (wrong[1], ("--dir", "/proc")))
    assert reason("import os; print(os.listdir('/proc'))", False, "[]") == ""
    monkeypatch.setattr(sandbox, "_FURTHER", wrong[1:])
    with pytest.raises(ValueError, match="bwrap fails here, exit status 1: bwrap: Unknown option"):
        run_tests("print(1)", [ProgramTest("", "1")])
    assert reason("print(1)", True, "1") == ""


@every_isolation
def test_the_folder_is_the_programs_own(unsafe):
    source = """
import os, pathlib, tempfile
pathlib.Path("a").write_text("x"); os.rename("a", "b"); os.mkdir("c"); os.remove("b")
tempfile.TemporaryFile().write(b"x")
print(sorted(os.listdir()), os.environ["HOME"] == os.getcwd(), len(os.environ) < 10)
"""
    assert reason(source, unsafe, "['c', 'solution.py'] True True") == ""


@needs_bubblewrap
def test_what_a_program_started_ends_with_it(tmp_path):
    marker = f"{tmp_path}/marker"
    before = running(marker)
    source = f"""
import subprocess, sys
for _ in range(3):
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)", {marker!r}],
                     start_new_session=True)
print("started")
"""
    assert reason(source, False, "started") == ""
    assert running(marker) == before


@every_isolation
def test_a_program_that_ignores_term_is_killed_in_time(unsafe):
    source = "import signal; signal.signal(15, signal.SIG_IGN)\nprint('on', flush=True)\n"
    source += "import time\nwhile True: time.sleep(9)"
    begin = time.monotonic()
    assert reason(source, unsafe, seconds=0.6) == "time limit of 0.6 s"
    assert 0.6 <= time.monotonic() - begin < 0.6 + sandbox.GRACE + 3


@every_isolation
def test_term_comes_before_kill(unsafe):
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

    def end(process, first):
        sandbox_end(process, first)
        seen["after"] = process.stdout.read()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "GRACE", 5.0)
        patch.setattr(sandbox, "_collect", collect)
        patch.setattr(sandbox, "_end", end)
        assert reason(source, unsafe, seconds=2) == "time limit of 2 s"
    assert (seen["output"][0], seen["after"]) == (b"up\n", b"bye\n")


@every_isolation
def test_closed_output_does_not_hide_a_running_program(unsafe):
    source = "import os, time\nos.close(1); os.close(2)\ntime.sleep(9)"
    assert reason(source, unsafe, seconds=0.6) == "time limit of 0.6 s"


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
    report = judged("import time; time.sleep(9)", tests, total_seconds=0.6)
    assert time.monotonic() - begin < 6
    assert report.reasons[0] == "time limit of 0.6 s"
    assert report.reasons[-1] == "not run: 0.6 s for all tests had passed"


@each(["import os; os._exit(0)", "import sys; sys.exit(0)", "print('0')"])
def test_leaving_early_passes_no_check(source):
    report = judged(source, [FunctionTest("assert False"), FunctionTest("undefined")])
    assert report.passed == (False, False)


ALWAYS_EQUAL = """
class Yes:
    __eq__ = __ne__ = __contains__ = lambda *_: True
    __bool__ = lambda _: True
class Chameleon(int):
    __eq__ = lambda *_: True
    __hash__ = int.__hash__
class Row(list):
    __eq__ = lambda *_: True
def f(x): return {"yes": Yes(), "number": Chameleon(9), "rows": [Row([9])], "in": [Yes()]}[x]
"""


@every_isolation
def test_an_object_that_equals_everything_passes_nothing(unsafe):
    checks = [
        "assert f('yes') == 3",
        "assert 3 == f('yes')",
        "assert f('yes') is True",
        "assert f('number') == 3, 'no'",
        "assert f('rows') == [[3]]",
        "assert f('in') == [3]",
        "three = 1 + 2\nassert f('yes') == three",
        "def check(f):\n    assert f('number') == 3\ncheck(f)",
        "for x in ['yes']:\n    assert f(x) == 3",
    ]
    tests = [FunctionTest(check) for check in checks]
    tests += [ValueTest(f"f({x!r})", 3) for x in ("yes", "number", "rows")]
    report = judged(ALWAYS_EQUAL, tests, unsafe)
    assert not any(report.passed), report
    assert report.reasons[0] == "TypeError: the value is of class Yes, which is not plain data"
    assert report.reasons[3] == "AssertionError: no"
    assert report.reasons[4] == "AssertionError: the value is [[9]], not [[3]]"


def test_what_checks_compare_is_compared_as_python_does():
    source = """
import collections, decimal, enum, fractions
Pair = collections.namedtuple("Pair", "a b")
class Vector:
    def __init__(self, *x): self.x = x
    def __eq__(self, other): return self.x == other.x
values = dict(pair=Pair(1, 2), count=collections.Counter("aab"), half=fractions.Fraction(1, 2),
    deci=decimal.Decimal("2"), third=fractions.Fraction(1, 3), keys={"a": 1}.keys(),
    nested={1: ({2, 3}, [None, 1.5, b"x"])}, j=2j, text="\\ud800 \\n", true=True, big=10**40,
    vector=Vector(1, 2), two=2, both=frozenset([1, (2,), frozenset([3])]))
f = values.get
"""
    right = [
        "assert f('pair') == (1, 2)", "assert f('count') == {'a': 2, 'b': 1}",
        "assert f('half') == 0.5", "assert f('deci') == 2", "assert f('keys') == {'a'}",
        "assert f('nested') == {1: ({3, 2}, [None, 1.5, b'x'])}", "assert f('j') == 2j",
        r"assert f('text') == '\ud800 \n'", "assert f('true') == 1", "assert f('true') is True",
        "assert f('big') == 10000000000000000000000000000000000000000", "assert f('no') is None",
        "assert f('vector') == Vector(1, 2)", "assert f('vector') != Vector(1, 3)",
        "assert f('third') == fractions.Fraction(1, 3)", "assert f('two') == 2.0, 'no'",
        "assert -1 == f('two') - 3", "x = f('two')", "assert x == 2; assert x + 1 == 3",
        "assert f('both') == {1, (2,), frozenset([3])}", "assert len(f('both')) == 3", "# nothing",
        "assert f('two') < 3 and f('two') != 3",
    ]  # fmt: skip
    wrong = [
        "assert f('pair') == [1, 2]", "assert f('two') == 3", "assert f('two') is True",
        "assert f('two') == '2'", "assert f('third') == 0.3", "assert f('vector') == (1, 2)",
        "assert f('two') == 2; assert f('two') == 3", "assert f('two') != 2", "assert",
    ]  # fmt: skip
    report = judged(source, [FunctionTest(check) for check in right + wrong])
    passed = dict(zip(right + wrong, report.passed, strict=True))
    assert passed == dict.fromkeys(right, True) | dict.fromkeys(wrong, False), report.reasons


@each([
    ("[1, 'a', None, True]", [1, "a", None, True], 0, True),
    ("(1, [2.0])", [1, [2]], 0, True),
    ("{'a': (1,)}", {"a": [1]}, 0, True),
    ("{1: 'a'}", {"1": "a"}, 0, False),
    ("[1]", [1, 2], 0, False),
    ("'1'", 1, 0, False),
    ("True", 1, 0, False),
    ("1", True, 0, False),
    ("0", False, 0, False),
    ("None", None, 0, True),
    ("{1}", [1], 0, False),
    ("1 / 3", 0.333, 1e-3, True),
    ("[1 / 3]", [0.333], 1e-4, False),
    ("float('nan')", 1.0, 1, False),
    ("float('inf')", 1e308, 1, False),
    ("10 ** 400", 1.5, 1, False),
    ("10 ** 5000", 1, 0, False),
    (r"'\ud800'", "\ud800", 0, True),
    ("object()", 1, 0, False),
    ("(lambda a: a.append(a) or a)([])", [], 0, False),
    ("1 / 0", 1, 0, False),
])  # fmt: skip
def test_values_are_json(returns, value, tolerance, passes):
    report = judged(f"def f(): return {returns}", [ValueTest(" f()", value, tolerance)])
    assert report.passed == (passes,), report


def test_a_value_is_not_guessed():
    """Code that finds the way out of the sandbox can still say one value only."""
    source = r"""
import os, sys
def f():
    frame = sys._getframe()
    while "work" not in frame.f_locals:
        frame = frame.f_back
    nonce, results = frame.f_locals["work"]["nonce"], frame.f_locals["results"]
    for guess in range(4):
        os.write(results, f"{nonce} 0 {guess}\n".encode())
    return 0
"""
    report = judged(source, [ValueTest("f()", 3)])
    assert report.reasons[0].startswith("several results arrived")


def test_a_check_that_hangs_fails_itself_and_those_after_it():
    checks = ["pass", "import time; time.sleep(9)", "pass"]
    report = judged("", [FunctionTest(check) for check in checks], seconds=2)
    assert report.passed == (True, False, False)
    assert report.reasons[1] == "time limit of 2 s"


def test_the_code_reward():
    tests = [{"stdin": "3", "stdout": "9"}, {"check": "assert square(2) == 4"}]
    tests += [{"call": "square(1.5)", "value": 2.2, "tolerance": 0.1}]
    asked = Problem("Square.", {"tests": tests}, "code")
    right = "```python\ndef square(x): return x * x\nif __name__ == '__main__':"
    right += " print(square(int(input())))\n```\nIt squares."
    unsafe = not KEPT_IN
    assert accuracy(asked, f"<think>easy</think>\n{right}", unsafe) == 1.0
    assert code(asked, right.replace("x * x", "x + x"), seconds=3, unsafe=unsafe) == 0.0
    assert code(asked, "") == 0.0
    with pytest.raises(TypeError, match="minutes"):
        code(asked, right, minutes=1)


@each(
    [
        ([], r"tests is '\[\]'; give a list with at least one test"),
        ("assert", "tests is 'assert'"),
        ([{"check": "pass"}, {"check": 1}], r"test 1 is .*give \{'stdin': text, 'stdout': text\}"),
        ([{"stdin": "", "stdout": "", "check": ""}], "test 0 is"),
        ([{"call": "f(", "value": 1}], r"test 0 is .*\{'call': expression, 'value': JSON\}"),
        ([{"call": "f()", "value": (1,)}], "test 0 is"),
        ([{"call": "f()", "value": {1: 2}}], "test 0 is"),
        ([{"call": "f()", "value": 1, "tolerance": -1}], "test 0 is .*a number, 0 or more"),
        ([{"call": "f()", "value": 1, "tolerance": "1"}], "test 0 is"),
        ([{"call": "f()"}], "test 0 is"),
    ]
)
def test_wrong_tests_are_told(entries, message):
    with pytest.raises(ValueError, match=message):
        read_tests(entries)


def test_wrong_limits_are_told():
    with pytest.raises(ValueError, match="limit seconds is 0; give a number above 0"):
        Limits(seconds=0)
    with pytest.raises(ValueError, match="limit memory_mb is 'all'"):
        Limits(memory_mb="all")


def test_without_bubblewrap_code_is_refused_unless_that_is_accepted(monkeypatch):
    monkeypatch.setattr(sandbox, "_probed", sandbox._probed.__wrapped__)
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: None)
    refusal = r"with your rights: bwrap is not installed\. Install bubblewrap .*--rl\.unsafe-code"
    for refused in (check_isolation, described_isolation, lambda: run_tests("", [])):
        with pytest.raises(ValueError, match=refusal):
            refused()
    assert described_isolation(True).startswith("UNSAFE")
    program = Problem("?", {"tests": [{"check": "pass"}]}, "code")
    with pytest.raises(ValueError, match=refusal):
        accuracy(program, "```python\n1\n```")
    assert accuracy(program, "```python\n1\n```", unsafe=True) == 1
