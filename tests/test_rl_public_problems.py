"""Records of public sets of programming problems: gold solutions pass, wrong ones do not."""

import base64
import json
import pathlib
import pickle
import zlib

import pytest

from rl.config import CodeLimits, RLConfig
from rl.problems import Problem
from rl.prompt_files import read_prompts
from rl.verdict.printed import same_text
from rl.verdict.rules import accuracy, check_problem
from rl.verdict.scoring import judge_scorer
from tests.tables import each
from tests.test_rl_sandbox import KEPT_IN

DOUBLE = "print(int(input()) * 2)\n"
FIRST = "def first(xs: List[int]) -> List[int]:\n    return xs[:1]\n"
METHOD = """class Solution:
    def join(self, words: List[str], by: str) -> str:
        return by.join(words)
"""
HUMANEVAL = {
    "task_id": "Own/0", "entry_point": "twice_all",
    "prompt": "from typing import List\n\n\ndef twice(x: int) -> int:\n    return 2 * x\n\n\n"
    'def twice_all(xs: List[int]) -> List[int]:\n    """Every number twice as large."""\n',
    "canonical_solution": "    return [twice(x) for x in xs]\n",
    "test": "METADATA = {'author': 'us'}\n\n\ndef check(candidate):\n"
    "    assert candidate([1, 2]) == [2, 4]\n    assert abs(candidate([1])[0] - 2) < 1e-6\n",
}  # fmt: skip
HIDDEN = base64.b64encode(
    zlib.compress(
        pickle.dumps(json.dumps([{"input": "4\n", "output": "8\n", "testtype": "stdin"}]))
    )
).decode()
RECORDS = {
    "mbpp": ({"text": "Take the first.", "code": FIRST, "test_setup_code": "", "task_id": 1,
              "test_list": ["assert first([1, 2]) == [1]", "assert first([]) == []"]}, FIRST),
    "mbpp, sanitized": (
        {"prompt": "Take the first.", "test_imports": ["import math"],
         "test_list": ["assert math.isclose(first([1.5])[0], 1.5)"]}, FIRST),
    "humaneval": (HUMANEVAL, HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"]),
    "humaneval, helper of the prompt": (
        HUMANEVAL, "def twice_all(xs):\n    return [twice(x) for x in xs]\n"),
    "kodcode": (
        {"question": "Take the first.", "solution": FIRST,
         "test": "from solution import first\n\ndef test_first():\n    assert first([3]) == [3]\n"},
        FIRST),
    "apps": ({"question": "Double.", "starter_code": "", "solutions": json.dumps([DOUBLE]),
              "input_output": json.dumps({"inputs": ["3\n"], "outputs": ["6\n"]})}, DOUBLE),
    "taco, lines": ({"question": "Double.", "input_output": json.dumps(
        {"inputs": [["3"]], "outputs": [["6"]]})}, DOUBLE),
    "apps, method": (
        {"question": "Join.", "starter_code": "class Solution:\n",
         "input_output": json.dumps({"fn_name": "join", "inputs": [[["a", "b"], "-"]],
                                     "outputs": [["a-b"]]})}, METHOD),
    "livecodebench, stdin": (
        {"question_content": "Double.", "starter_code": "", "metadata": "{}",
         "public_test_cases": json.dumps([{"input": "3\n", "output": "6\n", "testtype": "stdin"}]),
         "private_test_cases": HIDDEN}, DOUBLE),
    "livecodebench, functional": (
        {"question_content": "Join.", "starter_code": METHOD,
         "metadata": json.dumps({"func_name": "join"}), "private_test_cases": "[]",
         "public_test_cases": json.dumps(
             [{"input": '["a", "b"]\n"-"', "output": '"a-b"', "testtype": "functional"}])}, METHOD),
    "codecontests": (
        {"name": "double", "description": "Double.", "public_tests":
         {"input": ["1\n"], "output": ["2\n"]}, "private_tests": {"input": [], "output": []},
         "generated_tests": {"input": ["4\n"] * 3, "output": ["8\n"] * 3}}, DOUBLE),
    "list of cases": (
        {"problem": "Double.", "test_cases": [
            {"fn_name": None, "input": "1", "output": "2", "type": "stdin_stdout"}]}, DOUBLE),
    "conversation": ({"prompt": [{"role": "user", "content": "Double."}],
                      "tests": json.dumps({"inputs": ["1"], "outputs": ["2"]})}, DOUBLE),
}  # fmt: skip


def read(folder: pathlib.Path, *records: dict) -> list[Problem]:
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_prompts(path, check=check_problem)


def judged(problem: Problem, source: str) -> float:
    closed = "</think>\n" * (not isinstance(problem.prompt, str))
    return accuracy(problem, f"{closed}```python\n{source}\n```", not KEPT_IN)


WRONG = (
    "exit()", "import os\nos._exit(0)",
    "def first(xs): exit()\ndef twice_all(xs): exit()\n"
    "class Solution:\n    def join(self, words, by): exit()",
    "print(8)\ndef first(xs): return [0, *xs]\ndef twice_all(xs): return [2, 5]\n"
    "class Solution:\n    def join(self, words, by): return ['a-b']",
)  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_a_gold_solution_passes_and_wrong_ones_do_not(name, tmp_path):
    record, gold = RECORDS[name]
    (problem,) = read(tmp_path, record)
    assert problem.task == "code"
    assert "solutions" not in problem.answer
    assert judged(problem, gold) == 1.0
    assert [judged(problem, source) for source in WRONG] == [0.0] * len(WRONG)


def test_the_prompt_says_what_the_record_asks_for(tmp_path):
    """MBPP names the function in its tests alone, LiveCodeBench the method in its starter code."""
    mbpp, method = read(tmp_path, RECORDS["mbpp"][0], RECORDS["livecodebench, functional"][0])
    assert "Take the first." in mbpp.prompt
    assert "assert first([1, 2]) == [1]" in mbpp.prompt
    assert "def join(self, words" in method.prompt


def test_a_text_that_goes_on_in_the_prompt(tmp_path):
    (problem,) = read(tmp_path, HUMANEVAL)
    assert accuracy(problem, str(HUMANEVAL["canonical_solution"]), not KEPT_IN) == 1.0
    assert accuracy(problem, "    return xs\n", not KEPT_IN) == 0.0
    assert accuracy(problem, "", not KEPT_IN) == 0.0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "?", "input_output": "?"}, "line 1: .*neither JSON nor a packed text"),
        ({"question": "?", "input_output": json.dumps({"inputs": ["1"], "outputs": []})},
         "line 1: inputs and outputs are no lists of equal length"),
        ({"question": "?", "input_output": "{}"}, "line 1: .*KeyError: 'input'"),
        ({"question": "?", "input_output": json.dumps({"inputs": [], "outputs": []})},
         "line 1: this programming problem has no test"),
        ({"text": "?", "test_list": ["assert f(1) =="]}, "line 1: .*check .* is no Python"),
        ({"question": "?", "test": "import pytest\ndef test_f():\n    assert f() == 1\n"},
         "line 1: .*imports pytest; the sandbox has Python's standard library alone"),
        ({"prompt": "?", "kind": "code", "tests": [{"check": "def check(f):\n    assert f()"}]},
         "line 1: .*defines check and calls nothing, so that every answer would pass"),
        ({"question": "?", "input_output": json.dumps({"inputs": ["1"] * 601,
                                                       "outputs": ["1"] * 601})},
         r"line 1: .*601 tests start a program each, which may take 60 s; --rl\.code\.total-sec"),
        ({"test_list": ["assert f()"]}, "line 1: .*none of the texts"),
        ({"text": "?", "test_list": [""]}, "line 1: .*is empty, so that every answer would pass"),
        ({"question": "?", "test": "class TestF:\n    def test_f(self):\n        assert f()\n"},
         "line 1: TestF needs pytest or unittest, which the sandbox does not run"),
        ({"question": "?", "test": "def test_f(capsys):\n    assert f()\n"},
         "line 1: test_f needs pytest"),
        ({"prompt": "?", "kind": "code", "tests": [{"check": "'A text.'\nclass A:\n    pass\n"
          "if __name__ == '__main__':\n    assert False"}]}, "defines A and calls nothing"),
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_judged_is_refused_with_its_line(record, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, record)


def test_other_lines_keep_their_fields(tmp_path):
    """Names that a public set uses mean nothing in a line that has an answer."""
    line = {"prompt": "1 + 1?", "answer": "2", "tests": ["a"], "metadata": "x", "test": "train"}
    (problem,) = read(tmp_path, line)
    assert (problem.task, problem.answer["tests"]) == ("", ["a"])


RIGHT = {
    "exit": ("n = input()\nprint(n)\nexit()\nprint('no')", "5\n", "5\n"),
    "quit in a function": ("def f():\n    print(1)\n    quit()\nf()", "", "1\n"),
    "110 KB": ("print(*range(20000))", "", " ".join(map(str, range(20000)))),
    "5,000 digits": ("print(10 ** 5000 - 1)", "", "9" * 5000),
    "reads 5,000 digits": ("print(int(input()) + 1)", "1" + "0" * 5000, "1" + "0" * 4999 + "1"),
    "floats in full": ("a, b = map(float, input().split())\nprint(a + b)", "0.1 0.2", "0.3"),
    "notes for its author": ("import sys\nprint('x' * 10**6, file=sys.stderr)\nprint(1)", "", "1"),
    "names of a judge": ("c: Counter = Counter(input())\nd: Deque = deque(c)\nprint(inf, *d)",
                         "ab", "inf a b"),
    "size of its input": ("import io, os\ns = io.BytesIO(os.read(0, os.fstat(0).st_size))\n"
                          "print(s.readline().decode())", "7\n", "7\n"),
    "deep": ("import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**28)\n"
             "def f(n): return n and 1 + f(n - 1)\n"
             "t = threading.Thread(target=lambda: print(f(50000)))\nt.start()\nt.join()",
             "", "50000"),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_are_right(name):
    source, stdin, stdout = RIGHT[name]
    problem = Problem("?", {"tests": [{"stdin": stdin, "stdout": stdout}]}, "code")
    check_problem(problem)
    assert judged(problem, source) == 1.0


@pytest.mark.slow
def test_a_hundred_and_twenty_tests():
    tests = [{"stdin": f"{i}\n", "stdout": f"{2 * i}\n"} for i in range(120)]
    problem = Problem("?", {"tests": tests}, "code")
    check_problem(problem)
    assert judged(problem, DOUBLE) == 1.0
    assert judged(problem, "n = int(input())\nprint(2 * n if n < 119 else 0)") == 0.0


@each([
    ("def f(): return map(str, [1])", "f()", ["1"], 1.0),
    ("def f(): return range(3)", "f()", [0, 1, 2], 1.0),
    ("def f(): return ({'a': zip([1], [2])},)", "f()", [{"a": [[1, 2]]}], 1.0),
    ("def f(): return 10 ** 5000", "f()", 10**5000, 1.0),
    ("def f(): return 10 ** 5000 + 1", "f()", 10**5000, 0.0),
    ("def f(): return 0.1 + 0.2", "f()", 0.3, 1.0),
    ("def f(): return 0.30001", "f()", 0.3, 0.0),
    ("def f(): return 7.0000001", "f()", 7, 0.0),
    ("def f(): print('debug' * 10**5); return list(range(30000))", "f()", [*range(30000)], 1.0),
    ("class Yes:\n    __eq__ = lambda *_: True\n    __iter__ = lambda _: iter([])\nf = Yes",
     "f()", ["1"], 0.0),
    ("def f(): exit()", "f()", None, 0.0),
])  # fmt: skip
def test_values_of_calls(source, call, value, reward):
    assert (
        judged(Problem("?", {"tests": [{"call": call, "value": value}]}, "code"), source) == reward
    )


def test_an_object_that_equals_everything_is_no_long_integer():
    """A literal of more than 4,300 digits is taken apart as any other."""
    tests = [{"check": f"assert f() == {10**5000}"}]
    problem = Problem("?", {"tests": tests}, "code")
    assert judged(problem, "class f:\n    __eq__ = lambda *_: True") == 0.0
    assert judged(problem, "def f(): return 10 ** 5000") == 1.0


@each([
    ("0.30000000000000004", "0.3", True),
    ("0.3333333333333333", "0.333333", True),
    ("x = [1.5, 2]", "x = [1.50, 2]", True),
    ("a 2.4999999999999996 b\n7", "a 2.5 b\n7\n\n", True),
    ("1e-09", "0.000000001", True),
    ("1234567890.1199999", "1234567890.12", True),
    ("1234567890.13", "1234567890.12", False),
    ("0.333332", "0.333333", False),
    ("0.0", "0.0000000012", False),
    ("3.0", "3", False),
    ("3", "4.0", False),
    ("0.3 0.3", "0.3", False),
    ("0.3\n", "0.3\n0.3", False),
    (" 0.30", "0.3", False),
    ("1.2.30", "1.2.3", False),
    ("nan", "0.3", False),
    ("0.3x", "0.3", False),
    ("", "0.3", False),
])  # fmt: skip
def test_floats_in_a_text(printed, expected, same):
    assert same_text(printed, expected) == same


def test_limits_are_options():
    """Of the run, for every program; too little time is a failure that names the option."""
    limits = CodeLimits(total_seconds=0.5, seconds=0.4)
    rl = RLConfig(prompts="x", code=limits, unsafe_code=not KEPT_IN)
    tests = [{"stdin": "1", "stdout": "2"}] * 30
    scorer = judge_scorer(rl, None)
    with scorer.judge:
        problem = Problem("?", {"tests": tests}, "code")
        sleeps = "import time\ntime.sleep(0.05)\n"
        scores = scorer([problem], [f"```python\n{sleeps}{DOUBLE}```"], [1])  # pyright: ignore
    assert scores.rewards.tolist() == [0.0]
    said = scores.messages["accuracy"]["raised"]
    assert "0.5 s for all tests had passed, and none had failed; give --rl.code.total-sec" in said
    with pytest.raises(ValueError, match="30 tests start a program each"):
        check_problem(problem, limits)
    patient = judge_scorer(RLConfig(prompts="x", code=CodeLimits(total_seconds=300)), None)
    with patient.judge:
        assert [reward.seconds for reward in patient.judge.rewards] == [305]
        assert patient.judge.pool.batch_seconds == 3000
