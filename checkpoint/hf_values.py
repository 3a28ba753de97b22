"""Values of a Hugging Face `config.json`, checked one by one: errors name the key and the value."""

import math
from typing import Any


def require(ok: bool, key: str, value: Any, why: str) -> None:
    """Raise ValueError that names the key, its value and `why`, unless `ok`."""
    if not ok:
        raise ValueError(f"config.json: {key} is {value!r}; {why}")


def number(key: str, value: Any, above: float = -math.inf, least: float = -math.inf) -> float:
    """A finite number above `above` and not below `least`."""
    bound = f" above {above:g}" if above > -math.inf else ""
    bound += f" of {least:g} or more" if least > -math.inf else ""
    try:
        ok = type(value) in (int, float) and math.isfinite(value) and least <= value > above
        found = float(value) if ok else 0.0
    except OverflowError:
        ok, found = False, 0.0
    require(ok, key, value, f"must be a number{bound}")
    return found
