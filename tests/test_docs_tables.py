"""Tables in docs/ are the tables in the code, row for row."""

import pathlib

import pytest

from sharding.config import AXES, LAYOUTS
from sharding.rules import COMPUTED, STORED
from training.metrics import METRICS

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"


def metrics() -> list[str]:
    rows = [f"| `{name}` | {unit} | {meaning} |" for name, (unit, meaning) in METRICS.items()]
    return ["| name | unit | meaning |", "|---|---|---|", *rows]


def rules() -> list[str]:
    def cell(table, name: str) -> str:
        if name not in table:
            return "-"
        return ", ".join(f"`{axis}`" for axis in table[name]) or "whole"

    names = dict.fromkeys([*COMPUTED, *STORED])
    rows = [f"| `{name}` | {cell(STORED, name)} | {cell(COMPUTED, name)} |" for name in names]
    return ["| logical axis | stored | computed |", "|---|---|---|", *rows]


def layouts() -> list[str]:
    def axes(config) -> str:
        sizes = {axis: getattr(config, axis) for axis in AXES if getattr(config, axis) != 1}
        parts = [f"{axis} {'*' if size == -1 else size}" for axis, size in sizes.items()]
        return " x ".join(parts) or "one device"

    rows = [f"| `{name}` | {axes(config)} |" for name, config in LAYOUTS.items()]
    return ["| layout | axes |", "|---|---|", *rows]


@pytest.mark.parametrize(
    ("doc", "table"),
    [("metrics.md", metrics), ("parallelism.md", rules), ("parallelism.md", layouts)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_table_is_the_code(doc, table):
    expected = "\n".join(table())
    assert f"\n\n{expected}\n\n" in (DOCS / doc).read_text(), f"docs/{doc} should hold:\n{expected}"
