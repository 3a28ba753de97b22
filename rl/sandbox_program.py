"""Second program of the sandbox: runs solution.py of the current folder under an audit hook.

Run as `python -I -S -B sandbox_program.py program` (the code is the main program; standard input
and output are its own) or `... functions` (the code defines functions; checks arrive on standard
input once it has run, and `NONCE NUMBER` is written to standard output for each that holds; what
the code prints goes to standard error). Imports the standard library only.

The hook refuses sockets, processes, signals, ctypes, changed limits, and writing outside the
folder. It stops accidents and plain attempts. It is no wall: code that reaches into the
interpreter can go around it, and a wall is what the namespaces are.
"""

import contextlib
import json
import os
import sys
import types

REFUSED = (
    "socket.", "subprocess.", "ctypes.", "pty.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn",
    "os.system", "os.kill", "os.link", "os.symlink", "os.chmod", "os.chown", "os.lchown",
    "os.lchmod", "os.chflags", "os.setxattr", "os.removexattr", "os.utime", "os.chroot",
    "resource.", "signal.pthread_kill", "syslog.", "gc.get_", "code.__new__",
)  # fmt: skip
CHANGES = ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.truncate")
"""Allowed in the folder only; their text arguments are paths."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    """Runs the code in the mode that the command line names."""
    with open("solution.py", encoding="utf-8", errors="surrogateescape", newline="") as file:
        source = file.read()
    run = {"program": run_program, "functions": run_functions}[sys.argv[1]]
    folder = os.getcwd()
    sys.argv = ["solution.py"]
    run(source, folder)


def run_program(source: str, folder: str) -> None:
    """The code as `__main__`; its exit status is the process's."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    guard(folder)
    exec(compile(source, "solution.py", "exec"), module.__dict__)


def run_functions(source: str, folder: str) -> None:
    """The code as a module, then every check in its namespace; failures go to standard error."""
    checks_file, results = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    write, loads, fdopen = os.write, json.loads, os.fdopen
    guard(folder)
    exec(compile(source, "solution.py", "exec"), module.__dict__)
    with fdopen(checks_file, encoding="utf-8") as file:
        work = loads(file.read())
    for number, check in enumerate(work["checks"]):
        try:
            exec(compile(check, f"check {number}", "exec"), module.__dict__)
        except BaseException as error:
            with contextlib.suppress(BaseException):
                sys.stderr.write(f"check {number}: {type(error).__name__}: {error}\n")
                sys.stderr.flush()
        else:
            write(results, f"{work['nonce']} {number}\n".encode())


def guard(folder: str) -> None:
    """Installs the hook; it stays for the life of the process."""
    # Bound here, so that replacing a function of a module does not change what the hook calls.
    realpath, fsdecode, separator = os.path.realpath, os.fsdecode, os.sep
    null, kinds = os.devnull, (str, bytes)

    def outside(path) -> bool:
        path = realpath(fsdecode(path))
        return path != folder and not path.startswith(folder + separator) and path != null

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            refused = flags & WRITING and isinstance(path, kinds) and outside(path)
        elif event in CHANGES:
            refused = any(isinstance(path, kinds) and outside(path) for path in arguments)
        elif event == "import":
            refused = arguments[0] in ("ctypes", "_ctypes")
        else:
            refused = event.startswith(REFUSED)
        if refused:
            what = ascii(arguments[0])[:80] if arguments else ""
            raise PermissionError(f"the sandbox refuses {event} {what}")

    _no_processes()
    sys.addaudithook(hook)


def _no_processes() -> None:
    # The C function under `subprocess` and `multiprocessing` raises no event of its own.
    import _posixsubprocess

    def refused(*_):
        raise PermissionError("the sandbox refuses to start processes")

    _posixsubprocess.fork_exec = refused


if __name__ == "__main__":
    main()
