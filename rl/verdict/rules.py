"""Rewards by rule: functions of (problem, text) -> float, text being what the model wrote.

R1-Zero adds accuracy and format with equal weight; R1 adds language consistency (R1 report, 2.2.2
and 2.3.2). Nothing here depends on state, clock or chance, but for the time limits of
sympy and of the code that is run. A problem's `task` says how answers are compared, one of KINDS,
and its `answer` with what:

    answer     the expected answer: text or number, or a list for sequence and set
    choices    texts of the choices A, B, ... (choice)
    tolerance  largest absolute error (number)
    tests      what code must pass, see `rl/verdict/code_tests.py:read_tests` (code)
    language   language of the chain of thought, one of LANGUAGES (language); without it `en`

Length in tokens is no function of text: see `rl/verdict/scoring.py:soft_overlong`.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from rl.config import CodeLimits
from rl.problems import Problem
from rl.verdict import worded_answers
from rl.verdict.answers import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    CLOSE,
    OPEN,
    all_boxed,
    chain_of_thought,
    code_block,
    final_answer,
    opened,
)
from rl.verdict.code_tests import ProgramTest, read_tests
from rl.verdict.mathematics import equivalence
from rl.verdict.mathematics.quantities import read_number
from rl.verdict.sandbox import Limits, run_tests

_START_SECONDS = 0.1
"""To start a program, with what a busy machine adds."""
Reward = Callable[..., float]
"""(problem, text, **options) -> float."""

KINDS = ("math", "number", "choice", "sequence", "set", "text", "code")
"""How accuracy compares. A problem with task '' has kind number if its answer is one, else math."""

LANGUAGES = {
    "en": "[A-Za-z]",
    "zh": "[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]",
    "ja": "[\u3040-\u30ff\u31f0-\u31ff\u4e00-\u9fff]",
    "ko": "[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]",
    "ru": "[\u0400-\u04ff]",
    "el": "[\u0370-\u03ff\u1f00-\u1fff]",
    "ar": "[\u0600-\u06ff\u0750-\u077f]",
    "he": "[\u0590-\u05ff]",
}
"""Letters of each language. A script, not a dictionary: `en` counts Dutch as English."""

_UNSPACED = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}_\d])\w)+")
_NO_PROSE = re.compile(r"^ {0,3}```.*?(?:^ {0,3}```|\Z)|\\[A-Za-z]+", re.MULTILINE | re.DOTALL)


def accuracy(problem: Problem, text: str, unsafe: bool = False, **limits: Any) -> float:
    """1.0 if the final answer is right, otherwise 0.0 (R1 report, 2.2.2: rule-based accuracy).

    unsafe, limits: of code, fields of `rl/verdict/sandbox.py:Limits`.
    Raises ValueError if the problem does not say what is right (see `check_problem`), and
    rl.verdict.mathematics.symbolic.UndecidedError if sympy reaches no verdict in time.
    """
    kind = kind_of(problem)
    if kind == "code":
        return code(problem, text, unsafe=unsafe, **limits)
    expected = _expected(problem, kind)
    answer, marked = final_answer(text, opened(problem))
    match kind:
        case "number":
            same = equivalence.same_number(expected, answer, marked, _tolerance(problem))
        case "choice":
            same = worded_answers.same_choice(expected, answer, _choices(problem))
        case "sequence":
            same = worded_answers.same_sequence(expected, answer)
        case "set":
            same = worded_answers.same_set(expected, answer)
        case "text":
            same = worded_answers.same_text(expected, answer)
        case _:
            same = equivalence.same_maths(expected, answer, marked)
            if not same and answer and 1 < len(every := all_boxed(text, opened(problem))) < 10:
                same = equivalence.same_maths(expected, ", ".join(every))
    return float(same)


def code(problem: Problem, text: str, **limits: Any) -> float:
    """1.0 if the last code block passes every test of the problem, otherwise 0.0.

    A problem's "prelude" comes before the code, which may go on in it. limits: fields of
    `rl/verdict/sandbox.py:Limits`. ValueError for wrong limits or tests, and where nothing keeps
    the code in; TimeoutError if no test failed, but not all could be run in time.
    """
    tests = read_tests(problem.answer.get("tests"))
    source = code_block(text, opened(problem))
    prelude = problem.answer.get("prelude", "")
    if source and prelude and "__future__" not in source:
        goes_on = "```" not in text and CLOSE not in text  # with the indentation that it has
        source = f"{prelude}\n{text if goes_on else source}"
    allowed = Limits(**limits)
    report = run_tests(source, tests, allowed, every=False)
    failed = [reason for reason in report.reasons if reason]
    # A program stopped before its own limit had no more left of the time for all.
    late = f"time limit of {allowed.seconds:.3g} s"
    unjudged = failed and all(reason.startswith(("not run", "time limit")) for reason in failed)
    if source and unjudged and late not in failed:
        raise TimeoutError(
            f"{allowed.total_seconds:g} s for all tests had passed, and none had failed; give "
            "--rl.code.total-seconds more, or fewer tests"
        )
    return float(bool(source) and not failed)


def format(problem: Problem, text: str, answer_tags: bool = False) -> float:
    """1.0 for `<think>reasoning</think>answer`, neither of them blank, each tag once, nothing
    before it; otherwise 0.0. A prompt may have opened it already (see `rl.answers.opened`).

    answer_tags: ask for `<think>..</think> <answer>..</answer>`, nothing around it, the template of
    R1-Zero (R1 report, table 1).
    """
    if opened(problem):
        text = OPEN + text
    text = text.strip()
    tags = (OPEN, CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
    counts = [text.count(tag) for tag in tags]
    if counts != [1, 1, int(answer_tags), int(answer_tags)] or not text.startswith(OPEN):
        return 0.0
    thought, _, answer = text.removeprefix(OPEN).partition(CLOSE)
    answer = answer.strip()
    if answer_tags:
        if not answer.startswith(ANSWER_OPEN) or not answer.endswith(ANSWER_CLOSE):
            return 0.0
        answer = answer.removeprefix(ANSWER_OPEN).removesuffix(ANSWER_CLOSE)
    return float(bool(thought.strip()) and bool(answer.strip()))


def language(problem: Problem, text: str) -> float:
    """Share of the chain of thought's words that are in the target language, 0..1 (R1 report,
    2.3.2: words in the target language / words).

    A word is a run of letters; where a script puts no spaces (Chinese, Japanese) each
    character is one. Numbers, single letters (variables), LaTeX commands and fenced code are no
    words. A chain without words has 0: it must not be the best chain.
    """
    name = problem.answer.get("language", "en")
    if name not in LANGUAGES:
        raise ValueError(f"language {name!r} is not known; choose one of {', '.join(LANGUAGES)}")
    prose = _NO_PROSE.sub(" ", chain_of_thought(text))
    words = [word for word in _WORD.findall(prose) if len(word) > 1 or not word.isascii()]
    inside = re.compile(f"{LANGUAGES[name]}+")
    return sum(inside.fullmatch(word) is not None for word in words) / max(len(words), 1)


REWARDS: dict[str, Reward] = {
    "accuracy": accuracy,
    "code": code,
    "format": format,
    "language": language,
}
"""Rewards that go by a name."""


def kind_of(problem: Problem) -> str:
    """How the problem's answer is compared, one of KINDS; ValueError if its task is another."""
    if problem.task == "":
        return "number" if read_number(str(problem.answer.get("answer"))) else "math"
    if problem.task not in KINDS:
        raise ValueError(
            f"task {problem.task!r} is no kind of answer; choose one of {', '.join(KINDS)}"
        )
    return problem.task


def check_problem(problem: Problem, limits: CodeLimits | None = None) -> None:
    """Raises ValueError if `accuracy` could not judge any answer to this problem."""
    kind = kind_of(problem)
    if kind == "code":
        check_tests(problem, limits)
        return
    expected = _expected(problem, kind)
    if kind == "number":
        equivalence.same_number(str(expected), "0", tolerance=_tolerance(problem))
    if kind == "choice":
        worded_answers.same_choice(str(expected), "A", _choices(problem))


def check_tests(problem: Problem, limits: CodeLimits | None = None) -> None:
    """Raises ValueError if `code` could not judge answers to this problem, whatever they are."""
    limits = limits or CodeLimits()
    try:
        tests = read_tests(problem.answer.get("tests"))
    except ValueError as error:
        raise ValueError(f"reward code: {error}") from None
    programs = sum(isinstance(test, ProgramTest) for test in tests)
    if (needed := programs * _START_SECONDS) > limits.total_seconds:
        raise ValueError(
            f"reward code: {programs} tests start a program each, which may take {needed:.0f} s; "
            f"--rl.code.total-seconds is {limits.total_seconds:g}: raise it, or give fewer tests"
        )


def _expected(problem: Problem, kind: str) -> Any:
    """The problem's answer: a list or a text for sequence and set, a text otherwise."""
    value, lists = problem.answer.get("answer"), kind in ("sequence", "set")
    if lists and isinstance(value, list):
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        wanted = "a list or a text" if lists else "a text or a number"
        raise ValueError(f"the answer is {str(value)[:80]!r}; kind {kind} needs {wanted}")
    return str(value)


def _tolerance(problem: Problem) -> float:
    value = problem.answer.get("tolerance", 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"tolerance is {str(value)[:80]!r}; give a number, 0 or more")
    return value


def _choices(problem: Problem) -> list[str]:
    value = problem.answer.get("choices", [])
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise ValueError(f"choices is {str(value)[:80]!r}; give a list of texts")
    return value
