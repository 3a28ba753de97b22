"""What a resumed run keeps of its past, and which settings may have changed since.

A step is a function of the state and of the position: rows and tokens behind it. The position is
part of a checkpoint (`training/schedule.py:Plateau`), so another batch size or sequence length goes
on from where the run is. A setting that would rewrite the past is refused; every other change is
said.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

_SPLIT = "texts that were trained on would be held out"
_PROMPTS = "prompts that were asked would be asked again, or others left out"

FIXED = {
    "": {
        "stage": "the weights were trained for another stage",
        "model": "the weights are of another model",
        "seed": "the order of the data would be another, and texts of this epoch come again",
    },
    "pretrain": {
        "data.held_out": _SPLIT,
        "data.held_out_tokens": _SPLIT,
    },
    "rl": {
        "train.batch_size": _PROMPTS,
        "rl.prompts_per_step": _PROMPTS,
        "rl.objective.group_size": _PROMPTS,
        "rl.resample": _PROMPTS,
        "rl.held_out": _SPLIT,
    },
}
"""Fields that no resumed run may change, by stage ("": all), with what would happen."""
FREE = ("model.init_std", "model.max_position", "model.yarn", "model.rope_theta")
"""Fields of the model that may change: it is trained to longer texts by them."""
UNSAID = ("run_dir",)
"""Fields whose change is not worth a word: the place of the run."""
NEW_ORDER = ("data", "task", "sft", "images", "rl.prompts", "train.seq_len")
"""Parts of the configuration that say what rows there are, and in which order."""
NO_ORDER = ("data.cache_dir", "data.tokenizer", "data.vocab_size")
"""Fields among these that do not: a run keeps its tokenizer."""
ANOTHER_ORDER = (
    "the rows of the data and their order are others: some text of this epoch may come again, some "
    "not at all"
)


def changes(recorded: Mapping[str, Any], today: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, value then, value now) of all that differs. A field that one side does not know, of
    another version of the program, is no change; a list is one value if its length changed."""
    return list(_changes("", json.loads(json.dumps(recorded)), json.loads(json.dumps(today))))


def check_changes(
    recorded: Mapping[str, Any], today: Mapping[str, Any], step: int, run_dir: str
) -> list[str]:
    """What changed since the checkpoint of `step`, in lines for people.

    Raises ValueError that lists the changes that would rewrite the past.
    """
    changed = [change for change in changes(recorded, today) if change[0] not in UNSAID]
    fixed = FIXED[""] | FIXED.get(today["stage"], {})
    refused = [
        f"{_option(name)} {_shown(then)} -> {_shown(now)}: {why}"
        for name, then, now in changed
        for field, why in fixed.items()
        if _within(name, (field,)) and not _within(name, FREE)
    ]
    if refused:
        raise ValueError(
            f"{run_dir} was trained to step {step} with other settings:\n  "
            + "\n  ".join(refused)
            + "\nSet them back, or start another run from its weights: --init-from "
            f"{run_dir} --run-dir ANOTHER"
        )
    lines = []
    if changed:
        listed = (f"{_option(name)} {_shown(then)} -> {_shown(now)}" for name, then, now in changed)
        lines.append(f"changed since step {step}: {'; '.join(listed)}")
    # The prompts of stage rl are no rows: their order does not know how long a row is.
    same = (*NO_ORDER, "train.seq_len") if today["stage"] == "rl" else NO_ORDER
    if any(_within(name, NEW_ORDER) and not _within(name, same) for name, _, _ in changed):
        lines.append(f"  {ANOTHER_ORDER}")
    return lines


def _changes(name: str, then: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in (key for key in now if key in then):
            yield from _changes(f"{name}.{key}" if name else key, then[key], now[key])
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for index, (a, b) in enumerate(zip(then, now, strict=True)):
            yield from _changes(f"{name}.{index}", a, b)
    elif then != now:
        yield name, then, now


def _within(name: str, fields: tuple[str, ...]) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)
    return text if len(text) <= 60 else text[:60] + ".."
