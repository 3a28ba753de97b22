"""Runs code that a model wrote against tests, in a process that is limited and then gone.

R1's code reward compiles and runs tests (R1 report, 2.2.2). What is guaranteed:

Always: limits on CPU and wall time, address space, file size and output, enforced by the kernel and
by this process; a folder and a process group of its own; an empty environment; the standard library
only; TERM, then KILL, and no zombie. A hook of the interpreter refuses sockets that leave the
process, new processes, acts on other processes and writing outside the folder, but code that
reaches into the interpreter can go around it.

With namespaces (Linux user namespaces, 5.12 or newer; "auto" takes them where they are permitted):
the kernel keeps the code from every network and from writing anywhere but in its folder, it holds
no capability and sees no other process, and everything it started dies with it. Never kept from it:
reading what the user can read, sockets of the file system once it is around the hook, and CPU time
up to the limits. The kernel does not count processes of root: as root, a fork bomb ends only with
the time limit.

Tests of standard input and output and values of calls are compared here, out of the code's reach,
and so are checks of the form `assert CALL == LITERAL` (`rl/verdict/sandbox_values.py`). Other
checks are judged inside the code's process: code that searches for it can fake a pass there, and
objects that define arithmetic or order themselves can please `assert abs(f(1) - 0.5) < 0.1`.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Any, Literal, NamedTuple

from rl.verdict.sandbox_enter import NOT_PERMITTED
from rl.verdict.sandbox_values import Unit, is_expression, is_json, units, why_not

Isolation = Literal["auto", "namespaces", "hook"]
GRACE = 0.3
"""Seconds from TERM to KILL."""
_ENTER = pathlib.Path(__file__).with_name("sandbox_enter.py")
_PROGRAM = pathlib.Path(__file__).with_name("sandbox_program.py")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 4.0
    """Wall time of one program."""
    cpu_seconds: float = 4.0
    """CPU time of one process, rounded up to whole seconds."""
    total_seconds: float = 20.0
    """Wall time of all tests of one answer; what is not done by then has failed."""
    memory_mb: int = 512
    """Address space, in 2^20 bytes."""
    file_mb: int = 16
    """Largest file that it may write, in 2^20 bytes."""
    output_kb: int = 64
    """Standard output and standard error together, in 2^10 bytes; more ends the program."""
    processes: int = 16
    """Processes and threads of the program (without namespaces: of the user, above those that run
    when it starts); not counted for root."""
    isolation: Isolation = "auto"
    """namespaces, hook (without them), or auto: namespaces where the system permits them."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "isolation":
                continue
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"limit {field.name} is {value!r}; give a number above 0")
        if self.isolation not in ("auto", "namespaces", "hook"):
            raise ValueError(
                f"isolation is {self.isolation!r}; choose auto, namespaces or hook (without)"
            )


class ProgramTest(NamedTuple):
    """The code is a program: given this standard input, it prints this. White space at the ends of
    lines and of the text does not count."""

    stdin: str
    stdout: str


class FunctionTest(NamedTuple):
    """The code defines functions: this Python statement, run after it, raises nothing."""

    check: str


class ValueTest(NamedTuple):
    """The code defines functions: this Python expression, evaluated after it, has this value."""

    call: str
    value: Any
    """As JSON has it; `rl/verdict/sandbox_values.py:same_value` says what equals it."""
    tolerance: float = 0.0
    """By which every number in it may differ."""


Test = ProgramTest | FunctionTest | ValueTest


class Report(NamedTuple):
    """What became of each test, in their order."""

    passed: tuple[bool, ...]
    reasons: tuple[str, ...]
    """Why a test failed, at most 200 characters; '' if it passed."""
    isolation: Literal["namespaces", "hook"]


class _Outcome(NamedTuple):
    stdout: bytes
    stderr: bytes
    reason: str
    """Why the program counts as failed; '' if it ended by itself with status 0."""


def read_tests(entries: object) -> list[Test]:
    """Tests from JSON: a list of {"stdin": .., "stdout": ..}, {"call": "f(1)", "value": 2} (and
    "tolerance": a number, 0 or more) and {"check": "assert f(1) == 2"}.

    Raises ValueError that names the first entry which is none of these, or if there is none.
    """
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"tests is {str(entries)[:80]!r}; give a list with at least one test")
    tests: list[Test] = []
    for number, entry in enumerate(entries):
        test = _read_test(entry) if isinstance(entry, dict) else None
        if test is None:
            raise ValueError(
                f"test {number} is {str(entry)[:80]!r}; give {{'stdin': text, 'stdout': text}}, "
                "{'call': expression, 'value': JSON} (and 'tolerance': a number, 0 or more) or "
                "{'check': statement}"
            )
        tests.append(test)
    return tests


def _read_test(entry: dict) -> Test | None:
    texts = all(isinstance(entry[key], str) for key in entry.keys() - {"value", "tolerance"})
    tolerance = entry.get("tolerance", 0.0)
    right = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if not texts or not right or not 0 <= tolerance < math.inf:
        return None
    match sorted(entry):
        case ["stdin", "stdout"]:
            return ProgramTest(entry["stdin"], entry["stdout"])
        case ["check"]:
            return FunctionTest(entry["check"])
        case ["call", "value"] | ["call", "tolerance", "value"]:
            if is_expression(entry["call"]) and is_json(entry["value"]):
                return ValueTest(entry["call"], entry["value"], tolerance)
    return None


def run_tests(code: str, tests: Sequence[Test], limits: Limits | None = None) -> Report:
    """Runs every test: one process per ProgramTest, one process for all tests of functions.

    Whatever the code does, the result is a report. Raises ValueError only if namespaces are asked
    for and the system does not permit them.
    """
    limits = limits or Limits()
    isolation = chosen_isolation(limits.isolation)
    reasons: dict[int, str] = {}
    end = time.monotonic() + limits.total_seconds
    functions = {n: test for n, test in enumerate(tests) if not isinstance(test, ProgramTest)}
    if functions:
        shorter = dataclasses.replace(limits, seconds=min(limits.seconds, limits.total_seconds))
        found = _check_functions(code, list(functions.values()), shorter, isolation)
        reasons.update(zip(functions, found, strict=True))
    for number, test in enumerate(tests):
        if isinstance(test, ProgramTest):
            left = end - time.monotonic()
            if left <= 0:
                reasons[number] = f"not run: {limits.total_seconds:g} s for all tests had passed"
                continue
            shorter = dataclasses.replace(limits, seconds=min(limits.seconds, left))
            reasons[number] = _check_program(code, test, shorter, isolation)
    ordered = [reasons[number][:200] for number in range(len(tests))]
    return Report(tuple(not reason for reason in ordered), tuple(ordered), isolation)


def chosen_isolation(asked: Isolation) -> Literal["namespaces", "hook"]:
    """What `asked` comes to on this system; ValueError if it is namespaces and they are denied."""
    denied = "" if asked == "hook" else _why_no_namespaces()
    if asked == "namespaces" and denied:
        raise ValueError(
            f"isolation is 'namespaces', but the system denies them ({denied}). Permit user "
            "namespaces, or choose 'auto' or 'hook' and know that only a hook keeps the code from "
            "the network and the file system."
        )
    return "hook" if asked == "hook" or denied else "namespaces"


def described_isolation(asked: Isolation = "auto") -> str:
    """What keeps the code in on this system, in words; ValueError as `chosen_isolation`."""
    if chosen_isolation(asked) == "namespaces":
        return "in namespaces: no network, own processes and own folder only"
    why = "chosen" if asked == "hook" else f"the system denies namespaces: {_why_no_namespaces()}"
    return f"behind a hook of the interpreter only, which hostile code can go around ({why})"


@functools.cache
def _why_no_namespaces() -> str:
    if sys.platform != "linux":
        return f"{sys.platform} has none"
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        command = [sys.executable, "-I", "-S", "-c", ""]
        outcome = _run(command, folder, subprocess.DEVNULL, Limits(seconds=30), "namespaces")
    return outcome.reason


def _check_program(code: str, test: ProgramTest, limits: Limits, isolation: str) -> str:
    outcome = _run_solution(code, "program", test.stdin, limits, isolation)
    if outcome.reason:
        return outcome.reason
    printed = outcome.stdout.decode("utf-8", "replace")
    if _lines(printed) != _lines(test.stdout):
        return f"printed {printed[:80]!r}, not {test.stdout[:80]!r}"
    return ""


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _check_functions(
    code: str, tests: list[FunctionTest | ValueTest], limits: Limits, isolation: str
) -> list[str]:
    nonce = secrets.token_hex(16)
    same = f"same_{nonce}"
    parts = [
        [Unit("eval", test.call.strip())]
        if isinstance(test, ValueTest)
        else units(test.check, same)
        for test in tests
    ]
    flat = [[unit.kind, unit.text] for part in parts for unit in part]
    work = json.dumps({"nonce": nonce, "same": same, "tests": flat})
    outcome = _run_solution(code, "functions", work, limits, isolation)
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


def _run_solution(code: str, mode: str, stdin: str, limits: Limits, isolation: str) -> _Outcome:
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as given,
    ):
        # Lone surrogates are no UTF-8; with this handler they stay what they are, and Python
        # refuses them in the code as it would in a file.
        pathlib.Path(folder, "solution.py").write_bytes(code.encode("utf-8", "surrogatepass"))
        given.write(stdin.encode("utf-8", "surrogatepass"))
        given.seek(0)
        command = [sys.executable, "-I", "-S", "-B", str(_PROGRAM), mode]
        return _run(command, folder, given, limits, isolation)


def _run(
    command: list[str], folder: str, stdin: IO[bytes] | int, limits: Limits, isolation: str
) -> _Outcome:
    options = {
        "namespaces": isolation == "namespaces",
        "folder": os.path.realpath(folder),
        "cpu_seconds": math.ceil(limits.cpu_seconds),
        "memory_bytes": int(limits.memory_mb * 2**20),
        "file_bytes": int(limits.file_mb * 2**20),
        "processes": int(limits.processes),
    }
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(_ENTER), json.dumps(options), *command],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONUTF8": "1"},
        start_new_session=True,
    )
    with process:
        try:
            stdout, stderr, reason = _collect(process, limits)
        finally:
            _end(process)
    return _Outcome(stdout, stderr, reason or _why_failed(process.returncode, stderr))


def _collect(process: subprocess.Popen, limits: Limits) -> tuple[bytes, bytes, str]:
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
                texts[key.fileobj] += read[:room]
                room -= len(read)
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


def _end(process: subprocess.Popen) -> None:
    """TERM, then KILL, to the whole group, which is reaped."""
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    if process.poll() is None:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _why_failed(status: int, stderr: bytes) -> str:
    status = 128 - status if status < 0 else status
    said = stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
    if status == 0:
        return ""
    if status == NOT_PERMITTED:
        return said
    if status in (128 + signal.SIGXCPU, 128 + signal.SIGKILL):
        return "killed: CPU time or memory over the limit"
    if status > 128:
        return f"killed by signal {status - 128}"
    return f"exit status {status}: {said}"
