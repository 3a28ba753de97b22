"""Programming problems as public sets have them, read as our own lines of prompts.

MBPP (`test_list`), HumanEval (`test`, `entry_point`), KodCode (`test` in pytest's form), APPS and
TACO (`input_output`), LiveCodeBench (`public_test_cases`), CodeContests (`public_tests`), and lists
of inputs and outputs under `tests` or `test_cases`. Other fields of a record stay as they are, but
lists of solutions, which are long, are left out.
"""

import ast
import base64
import json
import pickletools
import zlib
from typing import Any

_PROMPTS = (
    "problem_description", "prompt", "question", "question_content", "problem", "text",
    "description",
)  # fmt: skip
_SOLUTIONS = ("solutions", "incorrect_solutions")
_HIDDEN = ("private_test_cases", "private_tests", "generated_tests")


def as_own_line(given: dict[str, Any]) -> dict[str, Any]:
    """The fields with "prompt" and "tests" of our own form (`rl/verdict/code_tests.py:read_tests`);
    the same fields if they are no record of a public set. ValueError for one that is broken."""
    kind = given.get("kind") or given.get("reward") or ("" if "answer" in given else "code")
    if kind != "code":
        return given
    fields = {name: value for name, value in given.items() if name not in _SOLUTIONS}
    try:
        tests = _tests(fields)
    except (KeyError, TypeError, AttributeError, SyntaxError, json.JSONDecodeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"the tests of this programming problem cannot be read: {why}") from None
    if tests is None:
        return given
    if not tests:
        raise ValueError("this programming problem has no test")
    if isinstance(fields.get("prompt"), list):
        fields["messages"] = fields.pop("prompt")
    form = next((name for name in _PROMPTS if isinstance(fields.get(name), str)), None)
    if form is None and "messages" not in fields:
        raise ValueError(f"this programming problem has none of the texts {', '.join(_PROMPTS)}")
    if form is not None:
        text, starter = fields.pop(form), fields.get("starter_code") or ""
        text += f"\n\nBegin with this code:\n```python\n{starter}\n```" * bool(starter.strip())
        if asserts := fields.pop("test_list", None):
            text += "\nThe code should pass these tests:\n" + "\n".join(asserts)
        fields["prompt"] = text
    return fields | {"tests": tests} | ({} if "kind" in given else {"reward": "code"})


def _tests(fields: dict[str, Any]) -> list[dict] | None:
    """Our tests from the fields, which lose the set's own; None without any."""
    if "test_list" in fields:
        setup = [*fields.pop("test_imports", []), fields.pop("test_setup_code", "")]
        return [{"check": "\n".join([*setup, one])} for one in fields["test_list"]]
    test = fields.get("test")
    if isinstance(test, str) and ("entry_point" in fields or "def test" in test):
        return [{"check": _called(fields)}]
    if "input_output" in fields:
        return _cases(fields.pop("input_output"))
    for first in ("public_test_cases", "public_tests"):
        if first in fields:
            name = json.loads(fields.get("metadata") or "{}").get("func_name") or ""
            parts = [fields.pop(key) for key in (first, *_HIDDEN) if key in fields]
            return [test for part in parts for test in _cases(part, name)]
    key = "tests" if "tests" in fields else "test_cases"
    tests = fields.get(key)
    foreign = isinstance(tests, dict) or (isinstance(tests, str) and tests.startswith(("[", "{")))
    if isinstance(tests, list):
        foreign = any(isinstance(one, str) or {"input", "output"} <= {*one} for one in tests)
    return _cases(fields.pop(key)) if foreign else None


def _called(fields: dict[str, Any]) -> str:
    """The text of a `test` with the calls that run it."""
    test = fields.pop("test")
    body = ast.parse(test).body
    functions = {one.name: one for one in body if isinstance(one, ast.FunctionDef)}
    if "check" in functions:
        fields["prelude"] = str(fields.get("prompt", ""))
        return f"{test}\ncheck({fields['entry_point']})"
    names = [name for name in functions if name.startswith("test")]
    classes = [one.name for one in body if isinstance(one, ast.ClassDef) and "Test" in one.name]
    if odd := classes + [name for name in names if functions[name].args.args]:
        raise ValueError(f"{odd[0]} needs pytest or unittest, which the sandbox does not run")
    return "\n".join([test, *(f"{name}()" for name in names)])


def _cases(found: Any, name: str = "") -> list[dict]:
    """Tests from texts of JSON (LiveCodeBench's hidden ones are packed), from {"inputs": ..,
    "outputs": ..}, or from a list of {"input": .., "output": ..} or of statements.

    name: function to call; without one the code is a program.
    """
    if isinstance(found, str):
        found = json.loads(found if found.lstrip().startswith(("[", "{")) else _unpacked(found))
    if isinstance(found, list):
        if all(isinstance(one, str) for one in found):
            return [{"check": one} for one in found]
        name = next((one["fn_name"] for one in found if one.get("fn_name")), name)
        inputs, outputs = ([one[key] for one in found] for key in ("input", "output"))
    else:
        name, plural = found.get("fn_name") or name, "s" if "inputs" in found else ""
        inputs, outputs = found[f"input{plural}"], found[f"output{plural}"]
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise ValueError("inputs and outputs are no lists of equal length")
    if not name:
        pairs = zip(map(_printed, inputs), map(_printed, outputs), strict=True)
        return [{"stdin": given, "stdout": printed} for given, printed in pairs]
    if all(isinstance(one, str) for one in inputs):
        outputs = [json.loads(one) if isinstance(one, str) else one for one in outputs]
    elif all(isinstance(one, list) and len(one) == 1 for one in outputs):
        outputs = [one[0] for one in outputs]  # as APPS wraps every value
    pairs = zip(inputs, outputs, strict=True)
    return [{"call": _call(name, given), "value": value} for given, value in pairs]


def _call(name: str, given: Any) -> str:
    """The call of a function or of LeetCode's method of that name."""
    if isinstance(given, str):
        given = [json.loads(line) for line in given.splitlines() if line.strip()]
    chosen = f'(Solution().{name} if "Solution" in globals() else {name})'
    return f"{chosen}({', '.join(map(repr, given))})"


def _printed(text: Any) -> str:
    """Standard input or output, which some sets have as a list of lines."""
    if isinstance(text, list) and all(isinstance(line, str) for line in text):
        return "\n".join(text)
    if not isinstance(text, str):
        raise ValueError(f"{str(text)[:80]!r} is no text of standard input or output")
    return text


def _unpacked(text: str) -> str:
    """The one text in a pickle, compressed, in base64; nothing of the pickle is run."""
    try:
        data = zlib.decompress(base64.b64decode(text))
        (found,) = (value for _, value, _ in pickletools.genops(data) if isinstance(value, str))
    except (ValueError, zlib.error):
        raise ValueError(f"tests are {text[:40]!r}, neither JSON nor a packed text") from None
    return found
