"""Sampling as the folder of the weights asks for it: its generation_config.json.

Ends of an answer are read there too, with the tokenizer (data/conventions.py).
"""

import json
from pathlib import Path
from typing import Any

from generation.config import Sampling

NAME = "generation_config.json"
_FIELDS = ("temperature", "top_k", "top_p")
_NEUTRAL = {
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_p": 0.0, "typical_p": 1.0,
    "num_beams": 1, "penalty_alpha": 0.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "diversity_penalty": 0.0, "length_penalty": 1.0, "suppress_tokens": [], "bad_words_ids": [],
}  # fmt: skip
"""Fields that would change which token is drawn, and do not here, with the value that changes
nothing."""


def folder_sampling(folder: Path) -> Sampling:
    """Sampling of a Hugging Face folder, or of the one that a run was imported from; ours where it
    says nothing.

    As transformers reads it: without `do_sample` the other fields are idle. ValueError for values
    that no sampling can have.
    """
    file, given = _read(folder)
    if not isinstance(given.get("do_sample", True), bool):
        raise ValueError(f"{file}: do_sample is {given['do_sample']!r}; it must be true or false")
    if "do_sample" not in given:
        return Sampling()
    if not given["do_sample"]:
        return Sampling(temperature=0.0)
    found = {name: given[name] for name in _FIELDS if given.get(name) is not None}
    for name, value in found.items():
        whole = name == "top_k"
        if type(value) is not int and (whole or type(value) is not float):
            wanted = "an integer" if whole else "a number"
            raise ValueError(f"{file}: {name} is {value!r}; it must be {wanted}")
    try:
        typed: dict[str, Any] = {k: v if k == "top_k" else float(v) for k, v in found.items()}
        return Sampling(**typed)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{file}: {error}") from None


def said_of_sampling(folder: Path, used: Sampling) -> list[str]:
    """Lines for people: what comes from the folder, and what of it is not followed."""
    file, given = _read(folder)
    fields = {name: getattr(folder_sampling(folder), name) for name in _FIELDS}
    same = all(getattr(used, name) == value for name, value in fields.items())
    lines = []
    if "do_sample" in given and same:
        words = ", ".join(f"{name} {value:g}" for name, value in fields.items())
        lines.append(f"sampling: {words}, as {file} says; options of the command line go before it")
    idle = {
        name: given[name]
        for name, plain in _NEUTRAL.items()
        if given.get(name) not in (None, plain)
    }
    if idle:
        words = ", ".join(f"{name}={value}" for name, value in idle.items())
        lines.append(f"warning: {file} has {words}, which is not followed here")
    return lines


def _read(folder: Path) -> tuple[Path, dict[str, Any]]:
    for file in (folder / "hf" / NAME, folder / NAME):
        if file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file} is not JSON ({error})") from None
            if not isinstance(found, dict):
                raise ValueError(f"{file} holds no object {{..}}")
            return file, found
    return folder / NAME, {}
