"""Two plans side by side, from the JSON that plan.py wrote."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from sharding.config import AXES

FIGURES = (
    "step_seconds",
    "tokens_per_s_per_gpu",
    "mfu_causal",
    "mfu_noncausal",
    "bubble_fraction",
    "gpu_hours",
    "cost",
)


def compare(paths: Sequence[str]) -> list[str]:
    """A table of two plans and their difference, line by line.

    Raises:
        ValueError: not two files, or one that is no plan.
    """
    if len(paths) != 2:
        raise ValueError(f"--compare takes two files, got {len(paths)}")
    first, second = (read(path) for path in paths)
    lines = [f"{'':34} {_short(first, paths[0]):>24} {_short(second, paths[1]):>24} {'change':>10}"]
    rows = {"plan": lambda plan: plan["name"], "layout": _layout, "by": lambda plan: plan["engine"]}
    for name, words in rows.items():
        lines.append(f"{name:34} {words(first)[:24]:>24} {words(second)[:24]:>24}")
    lines.append(
        f"{'fits':34} {'yes' if first['fits'] else 'no':>24} "
        f"{'yes' if second['fits'] else 'no':>24}"
    )
    for section, unit in (("memory_gib", "GiB"), ("parts_seconds", "s")):
        names = dict.fromkeys([*first[section], *second[section]])
        for name in names:
            values = first[section].get(name, 0.0), second[section].get(name, 0.0)
            lines.append(_line(f"{name}, {unit}", *values))
    for name in FIGURES:
        lines.append(_line(name, first[name], second[name]))
    return lines


def read(path: str) -> dict[str, Any]:
    """A plan's JSON; ValueError for what is none."""
    try:
        found = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--compare {path}: {error}") from None
    keys = {"name", "engine", "gpu", "gpus", "layout", "fits", "memory_gib", "parts_seconds"}
    keys |= {*FIGURES}
    missing = keys - set(found) if isinstance(found, dict) else keys
    if missing:
        raise ValueError(f"--compare {path} is no plan: it has no {', '.join(sorted(missing))}")
    return found


def _short(plan: dict[str, Any], path: str) -> str:
    return pathlib.Path(path).stem[:24] or plan["name"][:24]


def _layout(plan: dict[str, Any]) -> str:
    sizes = plan["layout"]
    words = [f"{axis[0]}{sizes[axis]}" for axis in AXES if sizes.get(axis, 1) != 1]
    return f"{plan['gpus']} {plan['gpu']} {' '.join(words)}"


def _line(name: str, first: float, second: float) -> str:
    change = f"{second / first - 1:+10.1%}" if first else f"{'new' if second else '':>10}"
    return f"{name:34} {first:24,.4g} {second:24,.4g} {change}"
