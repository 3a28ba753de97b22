"""Second program of the sandbox: runs solution.py of the current folder under an audit hook.

Run as `python -I -S -B sandbox_program.py program` (the code is the main program; standard input
and output are its own) or `... functions` (the code defines functions; tests arrive on standard
input once it has run, and what the code prints goes to standard error). For each test that raises
nothing, one line goes to standard output: `NONCE NUMBER` for a statement, `NONCE NUMBER JSON` for
an expression, with its value as `wire` writes it. Imports the standard library only.

The hook refuses sockets that leave the process, processes, signals and other ways to act on
processes, native code but the standard library's, changed limits and clocks, and writing outside
the folder. Functions that the interpreter does not report to hooks are replaced (`SEALED`), modules
of such functions are not imported (`UNSAFE`). It stops accidents and plain attempts. It is no wall:
code that reaches into the interpreter can go around it, and a wall is what the namespaces are.
"""

import contextlib
import functools
import json
import os
import sys
import types

REFUSED = (
    "socket.", "subprocess.", "ctypes.", "pty.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn",
    "os.system", "os.kill", "os.link", "os.symlink", "os.chmod", "os.chown", "os.lchown",
    "os.lchmod", "os.chflags", "os.lockf", "os.setxattr", "os.removexattr", "os.utime", "fcntl.",
    "resource.", "signal.pthread_kill", "syslog.", "gc.get_", "code.__new__", "sqlite3.",
    "sys.remote_exec", "cpython.PyInterpreterState_New",
)  # fmt: skip
CHANGES = {
    "os.mkdir": ((0, 2),), "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.truncate": ((0, 9),),
    "os.rename": ((0, 2), (1, 3)),
}  # fmt: skip
"""Allowed in the folder only: places of a path and of the folder that it is relative to."""
LOCAL_SOCKETS = 1
"""AF_UNIX: sockets of this family may be made, asyncio needs a pair, but not bound or connected."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
SEALED = {
    "posix": (
        "chroot", "grantpt", "initgroups", "login_tty", "mkfifo", "mknod", "nice", "openpty",
        "pidfd_open", "posix_openpt", "sched_setaffinity", "sched_setparam", "sched_setscheduler",
        "setegid", "seteuid", "setgid", "setgroups", "setns", "setpgid", "setpgrp", "setpriority",
        "setregid", "setresgid", "setresuid", "setreuid", "setsid", "setuid", "sync", "tcsetpgrp",
        "unlockpt", "unshare",
    ),
    "_signal": ("pidfd_send_signal",),
    "time": ("clock_settime", "clock_settime_ns"),
    "sys": ("activate_stack_trampoline",),
    "_posixsubprocess": ("fork_exec",),
    "_imp": (),
}  # fmt: skip
"""Functions that act outside the folder or on other processes and raise no event of their own; and
modules that are not imported a second time."""
UNSAFE = (
    "_ctypes", "ctypes", "_dbm", "_gdbm", "_interp", "_multiprocessing", "_posixshmem",
    "_remote_debugging", "_sqlite3", "_ssl", "_test", "_tkinter", "_xx", "nis", "ossaudiodev",
    "readline", "termios", "xx",
)  # fmt: skip
"""Starts of names of modules whose functions start programs, run without the hook, open files or
reach other processes, without an event."""


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
    """The code as a module, then every test in its namespace; failures go to standard error."""
    tests_file, results = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    write, loads, dumps, fdopen = os.write, json.loads, json.dumps, os.fdopen
    guard(folder)
    exec(compile(source, "solution.py", "exec"), module.__dict__)
    with fdopen(tests_file, encoding="utf-8") as file:
        work = loads(file.read())
    module.__dict__[work["same"]] = same
    for number, (kind, text) in enumerate(work["tests"]):
        try:
            compiled = compile(text, f"check {number}", kind)
            found = eval(compiled, module.__dict__)
            line = f" {dumps(wire(plain(found)))}" if kind == "eval" else ""
        except BaseException as error:
            with contextlib.suppress(BaseException):
                sys.stderr.write(f"check {number}: {type(error).__name__}: {error}\n")
                sys.stderr.flush()
        else:
            write(results, f"{work['nonce']} {number}{line}\n".encode())


# ---- values -------------------------------------------------------------------------------------


def plain(value):
    """The value in exact built-in types, read past whatever its class defines; TypeError if it is
    none. Numbers that are exactly an int or a float, such as Fraction(1, 2), become that."""
    kind = type(value)
    if value is None or kind is bool:
        return value
    for base, read in (
        (int, int.__int__), (float, float.__float__), (str, str.__str__), (bytes, bytes.__bytes__),
        (complex, complex.__complex__), (bytearray, bytes),
    ):  # fmt: skip
        if issubclass(kind, base):
            return read(value)
    for base in (list, tuple):
        if issubclass(kind, base):
            return base(plain(item) for item in base.__iter__(value))
    if issubclass(kind, dict):
        return {plain(key): plain(item) for key, item in dict.items(value)}
    for base in (set, frozenset, type({}.keys()), type({}.items())):
        if issubclass(kind, base):
            return frozenset(plain(item) for item in base.__iter__(value))
    return _ratio(value)


def _ratio(value):
    if not hasattr(value, "as_integer_ratio"):
        raise TypeError(f"the value is of class {type(value).__name__}, which is not plain data")
    above, below = map(plain, value.as_integer_ratio())
    if type(above) is int and type(below) is int and below == 1:
        return above
    if (above / below).as_integer_ratio() == (above, below):
        return above / below
    raise TypeError(f"the value is of class {type(value).__name__}, and not exactly a float")


def wire(value):
    """What `plain` returns as JSON has it: {"KIND": ..} for what JSON does not tell apart."""
    kind = type(value)
    if kind is list:
        return [wire(item) for item in value]
    if kind in (tuple, frozenset):
        return {kind.__name__: [wire(item) for item in value]}
    if kind is dict:
        return {"dict": [[wire(key), wire(item)] for key, item in value.items()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    return value


def same(left, right) -> bool:
    """left == right as Python has it for plain data, whatever their classes define. Plain data is
    equal to nothing else; two objects that are none compare as their classes define."""
    found = []
    for value in (left, right):
        with contextlib.suppress(Exception):
            found.append(plain(value))
    if len(found) == 2:
        return found[0] == found[1]
    return not found and left == right


# ---- the hook -----------------------------------------------------------------------------------


def guard(folder: str) -> None:
    """Installs the hook and replaces functions; both stay for the life of the process."""
    # Bound here, so that replacing a function of a module does not change what the hook calls.
    realpath, fsdecode, readlink, join = os.path.realpath, os.fsdecode, os.readlink, os.path.join
    null, kinds, refused = os.devnull, (str, bytes), refusal
    library = tuple(realpath(place) + os.sep for place in sys.path)  # -I: the standard library's
    processes = realpath("/proc/self")

    def within(path: str, place: str) -> bool:
        return path == place or path.startswith(place + "/")

    def forbidden(path, flags: int, base: int = -1) -> bool:
        """Whether it may not be opened so: writing outside, or anything of another process."""
        path = fsdecode(path)
        path = realpath(path if base < 0 else join(readlink(f"/proc/self/fd/{base}"), path))
        if path.startswith("/proc/") and path.split("/")[2].isdigit():
            return bool(flags & WRITING) or not within(path, processes)
        return bool(flags & WRITING) and not within(path, folder) and path != null

    def changes(event: str, arguments: tuple) -> bool:
        for place, base in CHANGES[event]:
            start = arguments[base] if base < len(arguments) else -1
            if isinstance(arguments[place], kinds) and forbidden(arguments[place], WRITING, start):
                return True
        return False

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            bad = isinstance(path, kinds) and forbidden(path, flags)
        elif event == "socket.__new__":
            bad = arguments[1] != LOCAL_SOCKETS
        elif event in CHANGES:
            bad = changes(event, arguments)
        elif event == "import":
            name, file = arguments[:2]
            bad = name in SEALED or name.rpartition(".")[2].startswith(UNSAFE)
            bad = bad or (file is not None and not realpath(file).startswith(library))
        else:
            bad = event.startswith(REFUSED)
        if bad:
            refused(event, *arguments[:1])

    _seal(forbidden)
    sys.addaudithook(hook)


def refusal(event: str, *what: object) -> None:
    """Raises the error; ImportError for a module, so that who can do without it does."""
    kind = ImportError if event == "import" else PermissionError
    raise kind(f"the sandbox refuses {event} {ascii(what[0])[:80] if what else ''}".rstrip())


def _seal(forbidden) -> None:
    """Replaces the functions of SEALED wherever a module has them; `os.open` and the making of
    built-in modules, which tell the hook too little; and what asyncio needs and the hook refuses.
    """
    replaced = {}
    for module, names in SEALED.items():
        functions = vars(__import__(module))
        public = {"posix": "os", "_signal": "signal"}.get(module, module)
        for name in names:
            if name in functions:
                replaced[functions[name]] = _refused(f"{public}.{name}")
    opens, makes, refused = os.open, sys.modules["_imp"].create_builtin, refusal
    wraps, partial = types.coroutine, functools.partial

    def open(path, flags, mode=0o777, *, dir_fd=None):
        if dir_fd is not None and forbidden(path, flags, dir_fd):
            refused("open", path)
        return opens(path, flags, mode, dir_fd=dir_fd)

    def create_builtin(spec):
        if spec.name in SEALED:
            refused("import", spec.name)
        return makes(spec)

    def coroutine(func):
        try:
            return wraps(func)
        except PermissionError:  # new code is refused; of what is no plain function it makes none
            return wraps(partial(func))

    replaced |= {opens: open, makes: create_builtin, wraps: coroutine}
    by_id = {id(function): other for function, other in replaced.items()}
    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items()):
            if id(value) in by_id:
                setattr(module, name, by_id[id(value)])
    for known in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
        known.difference_update(replaced)
    os.supports_dir_fd.add(open)


def _refused(name: str):
    def function(*_, **__):
        refusal(name)

    return function


if __name__ == "__main__":
    main()
