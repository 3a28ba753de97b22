"""First program of the sandbox: shuts itself in, then becomes (or starts) the code under test.

Run as `python -I -S sandbox_enter.py OPTIONS COMMAND...`, OPTIONS as JSON: namespaces (bool),
folder (the only one that stays writable), cpu_seconds, memory_bytes, file_bytes, processes. Imports
the standard library only. Exit status: that of the command, 128 + signal, or NOT_PERMITTED.

With namespaces there are three processes: this one, which waits; init, number 1 of a new process
namespace, whose end kills every process in it; and the command. New user (the command's
capabilities are empty), network (no interface is up), mount (everything read-only but `folder`) and
IPC namespaces. /proc shows these processes and no others; where a container keeps us from mounting
it, /proc is empty.
"""

import contextlib
import ctypes
import glob
import json
import os
import resource
import signal
import sys

NOT_PERMITTED = 97
USER_INSIDE = 1000

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_MS_INERT = 1 | 2 | 4 | 8
"""Read-only, without set-user-id programs, devices or programs at all."""
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _READ_ONLY = 442, -100, 0x8000, 1


def main() -> None:
    """Reads the command line, isolates, runs the command."""
    options, command = json.loads(sys.argv[1]), sys.argv[2:]
    if not options["namespaces"]:
        _die_with_parent()
        _become(command, options)
    try:
        _new_namespaces(os.fsencode(options["folder"]))
    except (OSError, AttributeError) as error:
        sys.stderr.write(f"{error}\n")
        os._exit(NOT_PERMITTED)
    _die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # meant for the command; the caller's KILL is not
    init = os.fork()
    if init == 0:
        _die_with_parent()
        try:
            _own_processes_only()
        except OSError as error:
            sys.stderr.write(f"{error}\n")
            os._exit(NOT_PERMITTED)
        inner = os.fork()
        if inner == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _become(command, options)
        os._exit(_status(inner))
    os._exit(_status(init))


def _status(child: int) -> int:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code


def _become(command: list[str], options: dict) -> None:
    # A new user namespace counts from 0; without one the kernel counts all that the user runs.
    others = 0 if options["namespaces"] else _running()
    limits = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, options["cpu_seconds"]),
        (resource.RLIMIT_AS, options["memory_bytes"]),
        (resource.RLIMIT_FSIZE, options["file_bytes"]),
        (resource.RLIMIT_NPROC, options["processes"] + others),
    ]
    for limit, value in limits:
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    _libc("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.execv(command[0], command)


def _running() -> int:
    """Processes and threads that the user has now."""
    count, user = 0, os.getuid()
    for process in glob.glob("/proc/[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if os.stat(process).st_uid == user:
                count += len(os.listdir(f"{process}/task"))
    return count


def _new_namespaces(folder: bytes) -> None:
    uid, gid = os.geteuid(), os.getegid()
    os.unshare(
        os.CLONE_NEWUSER | os.CLONE_NEWNET | os.CLONE_NEWPID | os.CLONE_NEWNS | os.CLONE_NEWIPC
    )
    # Not user 0 inside: a program started by any other user has no capabilities.
    for name, line in [
        ("setgroups", "deny"),
        ("uid_map", f"{USER_INSIDE} {uid} 1"),
        ("gid_map", f"{USER_INSIDE} {gid} 1"),
    ]:
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)
    _libc("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    _libc("mount", folder, folder, None, _MS_BIND, None)
    _set_attributes(b"/", _AT_RECURSIVE, _READ_ONLY, 0)
    _set_attributes(folder, 0, 0, _READ_ONLY)
    os.chdir(folder)  # the folder was entered before it was mounted


def _own_processes_only() -> None:
    """In the new process namespace: its /proc in place of the host's, or nothing in its place."""
    try:
        _libc("mount", b"proc", b"/proc", b"proc", _MS_INERT, None)
    except OSError:  # parts of the host's are hidden, as in most containers: ours would show them
        _libc("mount", b"none", b"/proc", b"tmpfs", _MS_INERT, b"mode=555")


def _set_attributes(path: bytes, flags: int, on: int, off: int) -> None:
    # struct mount_attr: set, clear, propagation, user namespace.
    attributes = (ctypes.c_uint64 * 4)(on, off, 0, 0)
    _libc("syscall", _MOUNT_SETATTR, _AT_FDCWD, path, flags, attributes, ctypes.sizeof(attributes))


def _die_with_parent() -> None:
    _libc("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _libc(name: str, *arguments) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
