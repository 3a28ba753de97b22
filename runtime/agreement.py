"""Do the processes of a run compute the same thing? Compared before anything is computed.

Process 0 says what it has, as text by name; the others answer in what they differ, and all of them
refuse with the same words.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax

from runtime.config import RuntimeOptions
from runtime.processes import exchange

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "numpy", "ml_dtypes", "optax", "flax", "grain",
    "tensorstore", "orbax-checkpoint", "tokenizers",
)  # fmt: skip
"""Packages that decide numbers or files."""
NUMERICS = (
    "jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl",
    "jax_threefry_partitionable", "jax_numpy_dtype_promotion",
)  # fmt: skip
WHOLE = 64 << 20
"""Bytes up to which a file is read whole; of a larger one its size, start and end count."""
SHOWN = 8
"""Differences that a message names."""


def agree(topic: str, facts: Callable[[], Mapping[str, Any]]) -> None:
    """Raise ValueError, on every process, that names the `facts` in which processes differ.

    All processes call it, once for each topic; a single one asks for no facts. They are compared
    as text.
    """
    if jax.process_count() == 1:
        return
    index, mine = jax.process_index(), {name: str(value) for name, value in facts().items()}
    first = json.loads(exchange(f"{topic} of process 0", "" if index else json.dumps(mine))[0])
    lines = [
        f"{name}: {first.get(name, 'nothing')} in process 0, {mine.get(name, 'nothing')} in "
        f"process {index}"
        for name in sorted({*first, *mine})
        if first.get(name) != mine.get(name)
    ]
    lines = lines[:SHOWN] + [f"... and {len(lines) - SHOWN} more"] * (len(lines) > SHOWN)
    wrong = [said for said in exchange(topic, "\n  ".join(lines)) if said]
    if wrong:
        more = f"\n  ... and {len(wrong) - 1} more processes differ" if len(wrong) > 1 else ""
        raise ValueError(
            f"the processes of this run differ in their {topic}:\n  {wrong[0]}{more}\n"
            "Start all of them with one command, from the same code and files"
        )


def agree_on_command(
    command: RuntimeOptions, unnamed: Collection[str], besides: Collection[str]
) -> None:
    """`agree` on the options of an entry point, the files they name, the code and the libraries.

    Args:
      unnamed: fields that group options without being part of their names.
      besides: beginnings of options that each process may have its own of, as it may of those
        in RuntimeOptions.
    """
    agree("options", lambda: option_facts(command, unnamed, besides))
    agree("code", code_facts)


def option_facts(
    command: RuntimeOptions, unnamed: Collection[str], besides: Collection[str]
) -> dict[str, str]:
    """Every option as people type it; one that names a file counts with the file's content."""
    own = {field.name for field in dataclasses.fields(RuntimeOptions)}
    given = {k: v for k, v in dataclasses.asdict(command).items() if k not in own}
    leaves = jax.tree_util.tree_leaves_with_path(given, is_leaf=lambda x: x is None)
    facts = {}
    for path, value in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        group, _, rest = name.partition(".")
        name = (rest if group in unnamed else name).replace("_", "-")
        if not name.startswith(tuple(besides)):
            facts[f"--{name}"] = _with_content(value)
    return facts


def code_facts() -> dict[str, str]:
    """Digest of each source file of the program; versions and switches of what it stands on."""
    packages = [init.parent for init in ROOT.glob("*/__init__.py")]
    kinds = "*.py", "*.toml"
    inside = (file for folder in packages for kind in kinds for file in folder.rglob(kind))
    files = [*ROOT.glob("*.py"), *inside]
    facts = {str(file.relative_to(ROOT)): _digest(file) for file in files}
    installed = {str(d.name): d.version for d in importlib.metadata.distributions()}
    facts |= {name: installed[name] for name in LIBRARIES if name in installed}
    facts |= {name: str(jax.config.values[name]) for name in NUMERICS}
    flags = os.environ.get("XLA_FLAGS", "").split()
    switches = sorted(flag for flag in flags if not flag.startswith("--xla_dump"))
    return facts | {"Python": platform.python_version(), "XLA_FLAGS": " ".join(switches)}


def _with_content(value: Any) -> str:
    """The value, and a digest of the file that it names, if it names one."""
    text = str(value)
    for place in (text, text.partition(":")[0]):  # FILE.py:FUNCTION
        try:
            if place and Path(place).is_file():
                return f"{text} ({_digest(Path(place))})"
        except (OSError, ValueError):  # too long, or unreadable: whoever opens it says so
            pass
    return text


def _digest(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as content:
        if size <= WHOLE:
            digest.update(content.read())
        else:
            digest.update(content.read(WHOLE // 2))
            content.seek(-WHOLE // 2, os.SEEK_END)
            digest.update(content.read())
    return digest.hexdigest()[:12]
