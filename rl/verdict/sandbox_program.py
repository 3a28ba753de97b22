"""What runs in the sandbox: limits itself, then runs solution.py of the current folder.

Run as `python -I -S -B sandbox_program.py MODE LIMIT..`, every LIMIT as RLIMIT_AS=VALUE. MODE
program: the code is the main program; standard input and output are its own. MODE functions: the
code defines functions; tests arrive on standard input once it has run, and what the code prints
goes to standard error. For each test that raises nothing, one line goes to standard output: `NONCE
NUMBER` for a statement, `NONCE NUMBER JSON` for an expression, with its value as `wire` writes it.
Names that the code uses and nobody defines, as `List` in an answer for LeetCode, come from the
modules that judges of such problems import. Imports the standard library only, and little of it:
every test pays for that.

As number 1 of its processes it starts the code in another process, passes TERM on, and ends with
its exit status, 128 + signal if a signal ended it: the kernel spares number 1 most signals.
"""

import builtins
import ctypes
import os
import resource
import signal
import symtable
import sys

_JUDGES_IMPORT = (
    "typing", "collections", "itertools", "functools", "heapq", "bisect", "math", "string", "re",
    "operator", "random", "copy", "datetime", "statistics", "io", "json", "time", "sys", "os",
)  # fmt: skip
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38


def main() -> None:
    """Runs the code in the mode and within the limits that the command line names."""
    mode, limits = sys.argv[1], [text.split("=") for text in sys.argv[2:]]
    prctl = ctypes.CDLL(None).prctl
    for name, text in limits:
        hard = resource.getrlimit(getattr(resource, name))[1]
        value = int(text) if hard == resource.RLIM_INFINITY else min(int(text), hard)
        resource.setrlimit(getattr(resource, name), (value, value))
    prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getpid() == 1 and (child := os.fork()):
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status if status >= 0 else 128 - status)
    prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    with open("solution.py", encoding="utf-8", errors="surrogateescape", newline="") as file:
        source = file.read()
    sys.argv = ["solution.py"]
    sys.set_int_max_str_digits(0)
    builtins.exit = builtins.quit = sys.exit  # python -S leaves them out
    {"program": run_program, "functions": run_functions}[mode](source)


def run_program(source: str) -> None:
    """The code as `__main__`; its exit status is the process's."""
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    run(source, module)


def run(source, module):
    """The code in the module, which knows the names of _JUDGES_IMPORT that it does not define."""
    code = compile(source, "solution.py", "exec")
    table = symtable.symtable(source, "solution.py", "exec")
    own = [one for one in table.get_symbols() if one.is_assigned() or one.is_imported()]
    known = {one.get_name() for one in own} | vars(builtins).keys()
    for name in sorted(_global_names(table) - known):
        if name in _JUDGES_IMPORT:
            setattr(module, name, __import__(name))
            continue
        for place in map(__import__, _JUDGES_IMPORT):
            if hasattr(place, name) and not name.startswith("_"):
                setattr(module, name, getattr(place, name))
                break
    exec(code, module.__dict__)


def _global_names(table):
    used = {
        one.get_name()
        for one in table.get_symbols()
        if one.is_referenced() and (one.is_global() or table.get_type() == "module")
    }
    return used.union(*map(_global_names, table.get_children()))


def run_functions(source: str) -> None:
    """The code as a module, then every test in its namespace; failures go to standard error."""
    import json  # not for programs, which would start 5 ms later

    tests_file, results = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    module = type(sys)("solution")
    sys.modules["solution"] = module
    write, loads, dumps, fdopen = os.write, json.loads, json.dumps, os.fdopen
    run(source, module)
    with fdopen(tests_file, encoding="utf-8") as file:
        work = loads(file.read())
    module.__dict__[work["same"]] = same
    for number, (kind, text) in enumerate(work["tests"]):
        try:
            compiled = compile(text, f"check {number}", "exec" if kind == "exec" else "eval")
            found = eval(compiled, module.__dict__)
            line = "" if kind == "exec" else f" {dumps(wire(plain(found, kind == 'json')))}"
        except BaseException as error:
            try:
                sys.stderr.write(f"check {number}: {type(error).__name__}: {error}\n")
                sys.stderr.flush()
            except BaseException:
                continue
        else:
            write(results, f"{work['nonce']} {number}{line}\n".encode())


# ---- values -------------------------------------------------------------------------------------


def plain(value, lists=False):
    """The value in exact built-in types, read past whatever its class defines; TypeError if it is
    none. Numbers that are exactly an int or a float, such as Fraction(1, 2), become that.

    lists: whatever else can be iterated, as map, range or deque, is the list of its items."""
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
            return base(plain(item, lists) for item in base.__iter__(value))
    if issubclass(kind, dict):
        return {plain(key): plain(item, lists) for key, item in dict.items(value)}
    if lists and not issubclass(kind, set | frozenset) and hasattr(kind, "__iter__"):
        return [plain(item, lists) for item in value]
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
    if kind is int and value.bit_length() > 64:
        return {"int": hex(value)}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    return value


def same(left, right) -> bool:
    """left == right as Python has it for plain data, whatever their classes define. Plain data is
    equal to nothing else; two objects that are none compare as their classes define."""
    found = []
    for value in (left, right):
        try:
            found.append(plain(value))
        except Exception:
            continue
    if len(found) == 2:
        return found[0] == found[1]
    return not found and left == right


if __name__ == "__main__":
    main()
