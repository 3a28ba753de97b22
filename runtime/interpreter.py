"""Whether this Python can run the project: checked before anything is imported that it may lack.

Any Python 3 must be able to read this file, and the entry points that begin with it.
"""

import importlib.util
import os
import sys

NEEDED = (3, 12)
PACKAGES = ("jax", "tyro", "flax", "grain", "orbax")
"""Some of the locked packages: enough to tell an environment from a bare Python."""


def check_interpreter(version=sys.version_info[:3], packages=PACKAGES):
    """End the program with one line, status 2, if this Python is too old or lacks packages."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if version >= NEEDED and not missing:
        return
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    python, program = os.path.join(root, ".venv", "bin", "python"), os.path.abspath(sys.argv[0])
    here, needed = (".".join(map(str, numbers)) for numbers in (version, NEEDED))
    lacks = f" without {missing[0]}" if missing else ""
    ready = os.path.exists(os.path.join(root, ".venv", ".base"))
    first = "Run: " if ready else f"Run `make -C {root} env` once, then: "
    sys.stderr.write(
        f"{os.path.basename(program)}: this is Python {here} ({sys.executable}){lacks}; the "
        f"project needs {needed} and its packages. {first}{python} {program}\n"
    )
    raise SystemExit(2)
