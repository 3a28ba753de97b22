"""Runs code that a model wrote against tests, in a process that is kept in, limited and then gone.

R1's code reward compiles and runs tests (R1 report, 2.2.2). `bubblewrap` keeps the code in: the
system's `bwrap`, which makes namespaces of the Linux kernel. The code has no network, sees no
process but its own, reads the interpreter and the system's programs but no file of the user, writes
to a folder of its own alone, holds no capability, and everything it started ends with it. Limits of
the kernel stand on CPU time, address space, processes and file size, and this process watches wall
time and output: TERM, then KILL, and no zombie. The environment is empty, and only the standard
library can be imported.

Where bwrap is missing or the kernel denies namespaces, code is refused, unless `Limits.unsafe`
(`--rl.unsafe-code`) asks to run it under the limits alone: it can then do what the user can do.
Never kept from it: CPU time up to the limits, and disk space in its folder. The kernel does not
count processes of root: as root, a fork bomb ends only with the time limit.

Tests of standard input and output and values of calls are compared here, out of the code's reach,
and so are checks of the form `assert CALL == LITERAL` (`rl/verdict/sandbox_values.py`). Other
checks are judged inside the code's process: code that searches for it can fake a pass there, and
objects that define arithmetic or order themselves can please `assert abs(f(1) - 0.5) < 0.1`.
"""

import contextlib
import dataclasses
import functools
import glob
import json
import math
import os
import pathlib
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Any, Literal, NamedTuple

from rl.config import CodeLimits
from rl.verdict.code_tests import FunctionTest, ProgramTest, Test, ValueTest
from rl.verdict.printed import same_text
from rl.verdict.sandbox_values import Unit, units, why_not

_KEPT_OF_STDERR = 2**18
"""Bytes, from the end."""
GRACE = 0.3
"""Seconds from TERM to KILL."""
_PROGRAM = pathlib.Path(__file__).with_name("sandbox_program.py")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/nix/store")
"""What the interpreter may need to start, where it exists."""
_KEPT_IN = (
    "--unshare-all", "--unshare-user", "--uid", "1000", "--gid", "1000", "--cap-drop", "ALL",
    "--new-session", "--die-with-parent", "--as-pid-1", "--dev", "/dev", "--remount-ro", "/dev",
)  # fmt: skip
_PROC = ("--proc", "/proc", "--remount-ro", "/proc")
_FURTHER = (
    (*_PROC, "--disable-userns"), _PROC, ("--dir", "/proc", "--disable-userns"), ("--dir", "/proc"),
)  # fmt: skip
"""What older versions of bwrap lack and containers deny, best first: a /proc of the program's own
processes (read-only: root may write to /proc/sys), or an empty one; no namespaces within."""


@dataclasses.dataclass(frozen=True)
class Limits(CodeLimits):
    """What a program may use, and what keeps it in."""

    unsafe: bool = False
    """Run it under these limits alone, with the user's rights and no bubblewrap."""


class Report(NamedTuple):
    """What became of each test, in their order."""

    passed: tuple[bool, ...]
    reasons: tuple[str, ...]
    """Why a test failed, at most 200 characters; '' if it passed."""
    isolation: Literal["bubblewrap", "limits alone"]


class _Outcome(NamedTuple):
    stdout: bytes
    stderr: bytes
    reason: str
    """Why the program counts as failed; '' if it ended by itself with status 0."""


def run_tests(
    code: str, tests: Sequence[Test], limits: Limits | None = None, every: bool = True
) -> Report:
    """Runs every test: one process per ProgramTest, one process for all tests of functions.

    every: False ends with the first ProgramTest that fails, or before them if another has failed.
    Whatever the code does, the result is a report. Raises ValueError if nothing keeps the code in
    and `limits` do not say that this is accepted (see `check_isolation`).
    """
    limits = limits or Limits()
    check_isolation(limits.unsafe)
    reasons: dict[int, str] = {}
    end = time.monotonic() + limits.total_seconds
    functions = {n: test for n, test in enumerate(tests) if not isinstance(test, ProgramTest)}
    if functions:
        shorter = dataclasses.replace(limits, seconds=min(limits.seconds, limits.total_seconds))
        found = _check_functions(code, list(functions.values()), shorter)
        reasons.update(zip(functions, found, strict=True))
    for number, test in enumerate(tests):
        if isinstance(test, ProgramTest):
            left = end - time.monotonic()
            if not every and any(reasons.values()):
                reasons[number] = "not run: another test had failed"
                continue
            if left <= 0:
                reasons[number] = f"not run: {limits.total_seconds:g} s for all tests had passed"
                continue
            room = limits.output_kb + len(test.stdout) // 2**9  # twice what is expected
            shorter = dataclasses.replace(limits, seconds=min(limits.seconds, left), output_kb=room)
            reasons[number] = _check_program(code, test, shorter)
    ordered = [reasons[number][:200] for number in range(len(tests))]
    isolation = "limits alone" if limits.unsafe else "bubblewrap"
    return Report(tuple(not reason for reason in ordered), tuple(ordered), isolation)


def check_isolation(unsafe: bool = False) -> None:
    """Raises ValueError, with the reason and the remedy, if nothing keeps a model's code in.

    unsafe: the limits alone will do.
    """
    if unsafe or not (why := _probed().why):
        return
    raise ValueError(
        f"code that the model writes would run with your rights: {why}. Install bubblewrap "
        "(apt-get install bubblewrap) and permit user namespaces; or set --rl.unsafe-code to run "
        "the code under limits of time and memory alone, where it can read and delete your files "
        "and reach the network"
    )


def described_isolation(unsafe: bool = False) -> str:
    """What keeps the code in, in words; ValueError as `check_isolation`."""
    check_isolation(unsafe)
    if unsafe:
        return "UNSAFE (rl.unsafe_code): your rights, your files and the network, limits alone"
    return "in bubblewrap: no network, own processes and own folder only"


class _Probed(NamedTuple):
    further: tuple[str, ...]
    """The options of _FURTHER that this system takes."""
    why: str
    """Why bubblewrap cannot be used; '' if it can."""


@functools.cache
def _probed() -> _Probed:
    """Tries bubblewrap once."""
    if shutil.which("bwrap") is None:
        return _Probed((), "bwrap is not installed" if sys.platform == "linux" else "no Linux")
    why = ""
    for further in _FURTHER:
        with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
            pathlib.Path(folder, "solution.py").touch()
            work = _command("program", folder, Limits(seconds=30), further)
            outcome = _run(work, folder, subprocess.DEVNULL, Limits(seconds=30))
        if not outcome.reason:
            return _Probed(further, "")
        why = why or f"bwrap fails here, {outcome.reason}"
    return _Probed((), why)


def _command(mode: str, folder: str, limits: Limits, further: Sequence[str] = ()) -> list[str]:
    """The command that runs solution.py of the folder, in bubblewrap unless `limits` are unsafe."""
    given = _kernel_limits(limits, others=_running() if limits.unsafe else 1)
    # The interpreter itself, not the link of a virtual environment: only the standard library.
    python = [os.path.realpath(sys.executable), "-I", "-S", "-B"]
    if limits.unsafe:
        return [*python, str(_PROGRAM), mode, *given]
    bwrap = shutil.which("bwrap")
    assert bwrap
    command = [bwrap, *_KEPT_IN, *further, "--bind", folder, "/tmp", "--chdir", "/tmp"]
    for place in (*_SYSTEM, os.path.realpath(sys.base_prefix), python[0]):
        command += ["--ro-bind-try", place, place]
    command += ["--ro-bind", str(_PROGRAM), "/program.py", "--remount-ro", "/"]
    return [*command, *python, "/program.py", mode, *given]


def _kernel_limits(limits: CodeLimits, others: int) -> list[str]:
    """Limits as the program sets them on itself; a new user namespace counts processes from 0."""
    options = {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": math.ceil(limits.cpu_seconds),
        "RLIMIT_AS": int(limits.memory_mb * 2**20),
        "RLIMIT_FSIZE": int(limits.file_mb * 2**20),
        "RLIMIT_NPROC": int(limits.processes) + others,
    }
    return [f"{name}={value}" for name, value in options.items()]


def _running() -> int:
    """Processes and threads that the user has now: without a user namespace the kernel counts
    them all."""
    count, user = 0, os.getuid()
    for process in glob.glob("/proc/[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if os.stat(process).st_uid == user:
                count += len(os.listdir(f"{process}/task"))
    return count


def _check_program(code: str, test: ProgramTest, limits: Limits) -> str:
    outcome = _run_solution(code, "program", test.stdin, limits)
    if outcome.reason:
        return outcome.reason
    printed = outcome.stdout.decode("utf-8", "replace")
    if not same_text(printed, test.stdout):
        return f"printed {printed[:80]!r}, not {test.stdout[:80]!r}"
    return ""


def _check_functions(code: str, tests: list[FunctionTest | ValueTest], limits: Limits) -> list[str]:
    nonce = secrets.token_hex(16)
    same = f"same_{nonce}"
    parts = [
        [Unit("json", test.call.strip())]
        if isinstance(test, ValueTest)
        else units(test.check, same)
        for test in tests
    ]
    flat = [[unit.kind, unit.text] for part in parts for unit in part]
    work = json.dumps({"nonce": nonce, "same": same, "tests": flat})
    outcome = _run_solution(code, "functions", work, limits)
    results = _Results(outcome, nonce)
    reasons, number = [], 0
    for test, part in zip(tests, parts, strict=True):
        found = [(unit, *results.of(number + i)) for i, unit in enumerate(part)]
        number += len(part)
        reasons.append(next(filter(None, (_why(test, *one) for one in found)), ""))
    return reasons


def _why(test: FunctionTest | ValueTest, unit: Unit, value: str, reason: str) -> str:
    """Why a part of a test failed; '' if it did not. value: JSON."""
    if reason or unit.kind == "exec":
        return reason
    if isinstance(test, ValueTest):
        return why_not(value, test.value, test.tolerance)
    return unit.why_wrong(value)


class _Results:
    """What the sandbox said of each part, by number."""

    def __init__(self, outcome: _Outcome, nonce: str):
        self._reason = outcome.reason or "the check was not reached"
        self._values: dict[str, list[str]] = {}
        self._said: dict[str, str] = {}
        for line in outcome.stdout.decode("utf-8", "replace").split("\n"):
            start, number, value = [*line.split(" ", 2), "", ""][:3]
            if start == nonce:
                self._values.setdefault(number, []).append(value)
        for line in outcome.stderr.decode("utf-8", "replace").splitlines():
            start, _, said = line.partition(": ")
            self._said[start] = said

    def of(self, number: int) -> tuple[str, str]:
        """Its value, and why there is none."""
        values = self._values.get(str(number), [])
        if len(values) > 1:
            return "", "several results arrived, and only one of them can be the test's own"
        if not values:
            return "", self._said.get(f"check {number}") or self._reason
        return values[0], ""


def _run_solution(code: str, mode: str, stdin: str, limits: Limits) -> _Outcome:
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as given,
    ):
        # Lone surrogates are no UTF-8; with this handler they stay what they are, and Python
        # refuses them in the code as it would in a file.
        pathlib.Path(folder, "solution.py").write_bytes(code.encode("utf-8", "surrogatepass"))
        given.write(stdin.encode("utf-8", "surrogatepass"))
        given.seek(0)
        further = () if limits.unsafe else _probed().further
        return _run(_command(mode, folder, limits, further), folder, given, limits)


def _run(command: list[str], folder: str, stdin: IO[bytes] | int, limits: Limits) -> _Outcome:
    home = folder if limits.unsafe else "/tmp"
    told, tells = os.pipe()
    if not limits.unsafe:
        command = [command[0], "--info-fd", str(tells), *command[1:]]
    with open(told, "rb") as info:
        try:
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env={"HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "PYTHONUTF8": "1"},
                pass_fds=() if limits.unsafe else (tells,),
                start_new_session=True,
            )
        finally:
            os.close(tells)
        with process:
            first = None
            try:
                first = _first_process(info.read())
                stdout, stderr, reason = _collect(process, limits)
            finally:
                _end(process, first)
    return _Outcome(stdout, stderr, reason or _why_failed(process.returncode, stderr))


def _first_process(info: bytes) -> int | None:
    """A descriptor of number 1 of the sandbox's processes, whose end is the end of all of them;
    None if it has ended, or there is none. info: what bwrap says."""
    with contextlib.suppress(ValueError, ProcessLookupError):
        return os.pidfd_open(json.loads(info)["child-pid"])
    return None


def _collect(process: subprocess.Popen, limits: CodeLimits) -> tuple[bytes, bytes, str]:
    """Output until both streams close, or the reason to stop before that."""
    end, room = time.monotonic() + limits.seconds, int(limits.output_kb * 2**10)
    texts: dict[Any, bytearray] = {process.stdout: bytearray(), process.stderr: bytearray()}
    reason = ""
    with selectors.DefaultSelector() as selector:
        for stream in texts:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map() and not reason:
            left = end - time.monotonic()
            for key, _ in selector.select(max(left, 0)):
                read = os.read(key.fd, 65536)
                texts[key.fileobj] += read
                if key.fileobj is process.stderr:  # what it says for its author: the end is kept
                    del texts[key.fileobj][:-_KEPT_OF_STDERR]
                room -= len(read) * (key.fileobj is process.stdout)
                if not read:
                    selector.unregister(key.fileobj)
            if room < 0:
                reason = f"more than {limits.output_kb} KiB of output"
            elif left <= 0:
                reason = f"time limit of {limits.seconds:.3g} s"
    if not reason:  # both streams are closed; the process may still run
        try:
            process.wait(max(end - time.monotonic(), 0.05))
        except subprocess.TimeoutExpired:
            reason = f"time limit of {limits.seconds:.3g} s"
    stdout, stderr = (bytes(text) for text in texts.values())
    return stdout, stderr, reason


def _end(process: subprocess.Popen, first: int | None) -> None:
    """TERM, then KILL, to the first process in bubblewrap or to the whole group, which is reaped.

    bwrap itself gets no signal: it reaps the first process and ends.
    """
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                if first is None:
                    os.killpg(process.pid, number)
                else:
                    signal.pidfd_send_signal(first, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
    if first is not None:
        os.close(first)


def _why_failed(status: int, stderr: bytes) -> str:
    status = 128 - status if status < 0 else status
    said = stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
    if status == 0:
        return ""
    if status in (128 + signal.SIGXCPU, 128 + signal.SIGKILL):
        return "killed: CPU time or memory over the limit"
    if status > 128:
        return f"killed by signal {status - 128}"
    return f"exit status {status}: {said}"
