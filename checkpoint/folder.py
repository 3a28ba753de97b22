"""Contents of a checkpoint folder: steps, unfinished saves, and reasons not to trust one."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

FORMAT = 1
"""Version of the layout of a checkpoint folder, in every `meta`."""

_STEP = re.compile(r"step_(\d{8,})")
_META_KEYS = frozenset({"format", "step", "config", "mesh", "metrics", "checksums"})


def find_steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything named like a checkpoint, oldest step first, good or not."""
    if not folder.is_dir():
        return []
    found = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def step_of(path: Path) -> int:
    """The step of a folder that `find_steps` has found."""
    match = _STEP.fullmatch(path.name)
    assert match, path
    return int(match[1])


def unfinished(folder: Path) -> list[Path]:
    """Folders of saves that were interrupted: Orbax gives them their name at the very end."""
    return sorted(folder.glob("step_*.orbax-checkpoint-tmp*"))


def read_meta(path: Path) -> Any:
    """The JSON saved with the arrays. Errors: OSError, ValueError as the file gives them."""
    return json.loads((path / "meta" / "metadata").read_text(encoding="utf-8"))


def unreadable_reason(path: Path) -> str | None:
    """Reason why `path` is no checkpoint of this program, by its small files; None: it may be."""
    try:
        meta = read_meta(path)
    except FileNotFoundError:
        return "not a checkpoint of this program (it has no meta/metadata)"
    except (OSError, ValueError) as error:
        return f"its meta/metadata cannot be read ({error})"
    if not isinstance(meta, dict) or not meta.keys() >= _META_KEYS:
        return "not a checkpoint of this program (meta/metadata lacks its fields)"
    if meta["format"] != FORMAT:
        return f"saved in format {meta['format']}; this version reads format {FORMAT}"
    return None


def how_to_resume(folder: Path) -> str:
    """Message about `folder` when a run broke off."""
    good = [step for step, path in find_steps(folder) if unreadable_reason(path) is None]
    if not good:
        return f"there is no checkpoint in {folder} yet; run again to start from the beginning"
    return (
        f"the last checkpoint is step {good[-1]} in {folder}; run again, with any number of "
        f"processes, to resume from step {good[-1]}"
    )


def checkpoint_bytes(state: Any) -> int:
    """Bytes of the arrays of a state, or of a tree of jax.ShapeDtypeStruct, before compression."""
    import jax

    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


def no_room(folder: Path, needed: int) -> str | None:
    """Reason why `needed` bytes do not fit onto the disk of a folder; None: they do."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return f"{needed:,} bytes do not fit onto the disk of {folder}, which has {free:,} bytes free"
