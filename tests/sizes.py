"""Lines per part against their budgets: `python -m tests.sizes` prints the table.

Also lists files and functions that have grown long: a place to ask for a second idea, no failure.
Reads source text alone; a test in tests/test_structure.py holds the budgets.
"""

import ast
import functools
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
SKIPPED_FOLDERS = {"__pycache__", "build", "cache", "runs"}

CORE = ("model", "sharding", "programs", "runtime", "training", "data", "checkpoint", "generation")
"""Together with the entry points they are one part."""
BUDGETS = {
    "core": 14_500, "pallas_kernels": 6_400, "rl": 8_000, "bench": 3_600, "configs": 950,
    "planning": 3_360, "vision": 3_150,
}  # fmt: skip
"""Lines of Python, docstrings and blank lines included."""
STANDS_AT = {
    "core": 22_690, "pallas_kernels": 7_920, "rl": 10_020, "bench": 5_230, "configs": 1_700,
}  # fmt: skip
"""Lines of the parts that are still above their budgets: these may only shrink."""
TESTS_PER_LINE = 0.6
TOLERANCE = 0.02
"""By how much a part may exceed its budget before a test fails."""

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_UNFORMATTED = 3
"""Files, functions, and tables kept from the formatter in one file: longer asks for a second
idea."""


@functools.cache
def project_files() -> tuple[pathlib.Path, ...]:
    """Files of the project relative to its root; environments, caches and runs left out."""

    def walk(folder: pathlib.Path) -> Iterator[pathlib.Path]:
        for entry in sorted(folder.iterdir()):
            hidden = entry.name.startswith(".") and entry.name != ".ci"
            if entry.is_dir():
                if not (hidden or entry.name in SKIPPED_FOLDERS or entry.suffix == ".egg-info"):
                    yield from walk(entry)
            elif not hidden or entry.suffix in {".yaml", ".yml"}:
                yield entry.relative_to(ROOT)

    return tuple(walk(ROOT))


def product_files() -> list[pathlib.Path]:
    """Python files of packages, entry points and bench: all but tests."""
    return [path for path in project_files() if path.suffix == ".py" and path.parts[0] != "tests"]


@functools.cache
def tree(path: pathlib.Path) -> ast.Module:
    """The parsed source of a file."""
    return ast.parse((ROOT / path).read_text(), filename=str(path))


def part_of(path: pathlib.Path) -> str:
    """The part whose budget a Python file counts in; its folder, if that has no budget."""
    folder = path.parts[0]
    return "core" if len(path.parts) == 1 or folder in CORE else folder


class Size(NamedTuple):
    """One part."""

    part: str
    lines: int
    budget: int

    @property
    def exceeds(self) -> bool:
        """Above its budget by more than the tolerance, and above where it stands."""
        return self.lines > max(self.budget * (1 + TOLERANCE), STANDS_AT.get(self.part, 0))


def sizes() -> list[Size]:
    """Every part; the budget of the tests grows with the others. A folder without one has 0."""
    lines: dict[str, int] = dict.fromkeys(BUDGETS, 0)
    for path in project_files():
        if path.suffix == ".py":
            count = len((ROOT / path).read_text().splitlines())
            lines[part_of(path)] = lines.get(part_of(path), 0) + count
    tests = lines.pop("tests")
    table = [Size(part, count, BUDGETS.get(part, 0)) for part, count in lines.items()]
    return [*table, Size("tests", tests, int(TESTS_PER_LINE * sum(lines.values())))]


def long_places() -> list[str]:
    """Files and functions above the lengths at which to ask for a second idea."""
    found = []
    for path in product_files():
        text = (ROOT / path).read_text()
        length, skips = len(text.splitlines()), text.count("fmt: skip")
        if length > MAX_FILE_LINES:
            found.append(f"{path}: {length} lines")
        if skips > MAX_UNFORMATTED:
            found.append(f"{path}: {skips} statements are kept from the formatter")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    found.append(f"{path}:{node.lineno} {node.name}: {length} lines")
    return found


def main() -> None:
    """Print the table, then the places that have grown long."""
    print(f"{'part':16}{'lines':>8}{'budget':>8}")
    for size in sizes():
        note = "  over" if size.lines > size.budget else ""
        print(f"{size.part:16}{size.lines:8,}{size.budget:8,}{note}")
    places = long_places()
    if places:
        print(f"long ({MAX_FILE_LINES} lines a file, {MAX_FUNCTION_LINES} a function): is there a "
              "second idea in it?")  # fmt: skip
        print("\n".join(f"  {place}" for place in places))


if __name__ == "__main__":
    main()
