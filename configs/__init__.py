"""Presets by name. A preset is a function without arguments that returns a RunConfig."""

import difflib
import importlib

from configs.schema import RunConfig

PRESETS = (
    "tiny",
    "small",
    "v2_lite",
    "moonlight_16b",
    "v2",
    "v3_671b",
    "kimi_k2",
    "r1_base",
    "r1_zero",
    "r1_base2",
    "r1_cold",
    "r1_reasoning",
    "r1_sft",
    "r1",
    "r1_student",
    "search_base",
    "search_zero",
)
"""Names of presets; each is the module of that name in this package."""


def preset(name: str) -> RunConfig:
    """The preset called `name`; ValueError with near matches if there is none."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown preset {name!r}{hint} Known: {', '.join(PRESETS)}")
    return importlib.import_module(f"configs.{name}").config()


def summary(name: str) -> str:
    """First line of the preset's docstring."""
    return (importlib.import_module(f"configs.{name}").__doc__ or "").strip().splitlines()[0]
