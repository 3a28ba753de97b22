"""Block sizes timed on a GPU, by device and kernel; elsewhere a kernel chooses by its own formula.

`tuned/<device>/<kernel>.json` maps the shapes of a call, as the kernel spells them, to the fastest
blocks and their time: `{"M4096 K7168 N2048": {"blocks": {"rows": 128, ...}, "ms": 0.14, ...}}`.
`python -m bench.kernels --tune` writes them.
"""

import functools
import json
import pathlib
import re
import typing
from typing import Any

import jax

FOLDER = pathlib.Path(__file__).parent / "tuned"


def tuned_blocks[T](kernel: str, shapes: str, like: type[T]) -> T | None:
    """The blocks measured best for a call on this process's GPU, a `like`; None where none were.

    Raises:
        ValueError: the file holds blocks that are not those of the kernel.
    """
    device = device_name()
    entry = _table(device, kernel).get(shapes) if device else None
    if entry is None:
        return None
    try:
        hints = typing.get_type_hints(like)
        # JSON knows no named tuples: those inside of blocks come back as lists.
        values = entry["blocks"].items()
        return like(**{k: hints[k](*v) if isinstance(v, list) else v for k, v in values})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file_of(device, kernel)}: the entry of {shapes!r} does not hold those of "
            f"{like.__name__} ({error}); tune it again or remove it"
        ) from None


def device_name() -> str:
    """This process's GPU as a folder name, `nvidia_h200`; empty without one."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return ""
    return re.sub(r"[^a-z0-9]+", "_", device.device_kind.lower()).strip("_")


def file_of(device: str, kernel: str) -> pathlib.Path:
    """File of a kernel's figures on a device."""
    return FOLDER / device / f"{kernel}.json"


def record(device: str, kernel: str, shapes: str, entry: dict[str, Any]) -> None:
    """Keep the best blocks of one call; entries of other shapes stay."""
    path = file_of(device, kernel)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {shapes: entry}, indent=1, sort_keys=True) + "\n")
    _table.cache_clear()


@functools.cache
def _table(device: str, kernel: str) -> dict[str, Any]:
    path = file_of(device, kernel)
    return json.loads(path.read_text()) if path.exists() else {}
