"""A judge's worker process: loads reward functions, then scores one answer after another.

Run as `python -m rl.verdict.pool_worker JOB`, JOB as JSON: rewards (list of [function, options]),
memory_bytes, seconds. First line out: "" or what is wrong with the functions. Then for each line
in, {"problem", "text", "reward": number of the reward}, one line out: {"value": float} or
{"kind": kind of failure, "message": text}.
"""

import importlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from rl.problems import Problem
from rl.verdict.child import serve
from rl.verdict.rules import REWARDS

MESSAGE = 300
"""Characters of an error's message that are kept."""


def load_reward(function: str) -> Callable[..., Any]:
    """A reward by name, as `path.py:function`, or as `package.module:function`.

    Raises ValueError that says whether the name, the file, the module or the function is missing,
    or what importing it raised. The folder of the file goes onto the import path.
    """
    if ":" not in function:
        if function not in REWARDS:
            raise ValueError(
                f"reward {function!r} is not known; choose one of {', '.join(REWARDS)}, or give "
                "your own as path.py:function"
            )
        return REWARDS[function]
    place, _, name = function.rpartition(":")
    try:
        module = _load_file(place) if place.endswith(".py") else importlib.import_module(place)
    except ValueError:
        raise
    except BaseException as error:  # sys.exit() in the file would end the worker without a word
        raise ValueError(
            f"reward {function!r}: importing {place} failed: {_described(error)}"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(
            f"reward {function!r}: {place} has no function {name!r}; it has "
            f"{', '.join(_functions(module)) or 'none'}"
        )
    return found


def _load_file(place: str) -> Any:
    path = pathlib.Path(place).expanduser()
    if not path.is_file():
        raise ValueError(f"reward file {path.absolute()} does not exist")
    sys.path.insert(0, str(path.parent.absolute()))
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except ValueError as error:  # the file's own, not ours
        raise ImportError(_described(error)) from error
    return module


def _functions(module: Any) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and not name.startswith("_")
    ]


def check_call(function: str, reward: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raises ValueError unless reward(problem, text, **options) is a call it can take."""
    try:
        inspect.signature(reward).bind(None, "", **options)
    except TypeError as error:
        raise ValueError(
            f"reward {function!r} is called with (problem, text{', **options' if options else ''})"
            f", options {dict(options)}: {error}"
        ) from None


def outcome(
    reward: Callable[..., Any], options: Mapping[str, Any], problem: Problem, text: str
) -> dict[str, Any]:
    """{"value": float} of one reward, or {"kind", "message"} of its failure; raises nothing."""
    try:
        value = reward(problem, text, **options)
    except BaseException as error:
        return {"kind": "raised", "message": _described(error) + _place(error, reward)}
    value = _plain(value)
    if not isinstance(value, numbers.Real):
        what = f"{type(value).__name__} {str(value)[:MESSAGE]!r}"
        return {"kind": "not a number", "message": f"returned {what}"}
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        return {"kind": "not finite", "message": f"returned {value}"}
    return {"value": value}


def _plain(value: Any) -> Any:
    """A scalar of NumPy or JAX as Python's; anything else as it is."""
    try:
        return value.item() if getattr(value, "shape", None) == () else value
    except Exception:
        return value


def _described(error: BaseException) -> str:
    try:
        said = str(error)
    except BaseException:
        said = "(its message raises)"
    return f"{type(error).__name__}: {said}"[:MESSAGE]


def _place(error: BaseException, reward: Callable[..., Any]) -> str:
    """Where it was raised, in words: the last line in the reward's own file, if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = getattr(inspect.unwrap(reward), "__code__", None)
    found = [one for one in frames if own and one.filename == own.co_filename] or frames[-1:]
    return "".join(f" ({one.filename}, line {one.lineno})" for one in found[-1:])


def _main() -> None:
    job = json.loads(sys.argv[1])
    # Before any code of the user runs: what it prints must not be taken for an answer.
    answers = os.dup(1)
    os.dup2(2, 1)
    rewards, wrong = [], ""
    try:
        for function, options in job["rewards"]:
            reward = load_reward(function)
            check_call(function, reward, options)
            rewards.append((reward, options))
    except ValueError as error:
        wrong = str(error)
    sys.stdout.flush()
    os.dup2(answers, 1)
    os.close(answers)
    print(json.dumps(wrong), flush=True)
    if wrong:
        return

    def score(work: dict):
        problem = Problem(**work["problem"])
        reward, options = rewards[work["reward"]]
        return outcome(reward, options, problem, work["text"])

    serve(score, job["memory_bytes"], job["seconds"])


if __name__ == "__main__":
    _main()
