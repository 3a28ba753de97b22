"""Files that a command writes at its end: whether they can be is known at its start."""

from collections.abc import Mapping
from pathlib import Path


def check_outputs(places: Mapping[str, str | Path | None]) -> None:
    """Raise ValueError for a file (by its option; '' or None is none) whose folder is not there."""
    for option, place in places.items():
        if place and not Path(place).absolute().parent.is_dir():
            raise ValueError(
                f"{option} {place}: there is no folder {Path(place).absolute().parent}; make it, "
                "or give another place"
            )
