"""Rewards by rule: hand-made cases, algebra against its own expansion, hostile texts."""

import contextlib
import itertools
import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.problems import Problem
from rl.verdict.answers import after_thought, boxed, chain_of_thought, code_block, final_answer
from rl.verdict.mathematics import symbolic
from rl.verdict.mathematics.equivalence import same_maths
from rl.verdict.mathematics.symbolic import UndecidedError, symbolically_equal
from rl.verdict.rules import (
    KINDS,
    accuracy,
    check_problem,
    format,
    kind_of,
    language,
)
from rl.verdict.scoring import soft_overlong
from rl.verdict.worded_answers import read_items, same_choice, same_sequence, same_set, same_text
from tests.tables import each


def record(answer=None, kind="", prompt="What is it?", **more) -> Problem:
    return Problem(prompt, {"answer": answer, **more}, kind)


# ---- mathematics --------------------------------------------------------------------------------


@each([
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}", True), ("(x+1)^2", "x^2 + 2x + 1", True),
    ("(x+1)^2", "x^2 + 2x + 1.001", False), ("1", r"\sin^2 x + \cos^2 x", True),
    (r"\sin 2x", r"2 \sin x \cos x", True), (r"2\pi", "6.283185307", False),
    (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}", True), ("-1", r"e^{i\pi}", True),
    ("3", r"\log_2 8", True),
    ("3", r"\sqrt[3]{27}", True), ("|x|", r"\sqrt{x^2}", True), ("x", r"\sqrt{x^2}", False),
    (r"\infty", r"-\infty", False), ("5", "x = 5", True), (r"90^\circ", "90", True),
    (r"\{1, 2\}", r"\left\{2, 1\right\}", True), (r"\{1,2\}", r"\{1,1\}", False),
    ("(1,2)", "(2,1)", False), ("(1, 0.5)", r"\left(1, \frac12\right)", True),
    ("[1,2)", "(1,2)", False), (r"(-\infty, 3]", r"x \in (-\infty,3]", True),
    ("1,2", "(1,2)", False),
    ("1234", "(1,234)", False), ("no", "on", False), (r"\text{Paris}", "Paris", True),
    ("Paris", "London", False),
    ("", "", False), ("5", "", False), ("5", "9^{9^{9}}", False), ("5", "x" * 2000, False),
])  # fmt: skip
def test_mathematics(expected, given, same):
    assert same_maths(expected, given) is same
    assert same_maths(given, expected) is same


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=4), st.integers(0, 4), st.integers(-2, 2))
def test_products_equal_their_expansions_and_nothing_beside(roots, place, change):
    coefficients = [1]  # of the expanded product, lowest power first, computed here
    for root in roots:
        up = [0, *coefficients]
        coefficients = [
            a - root * b for a, b in itertools.zip_longest(up, coefficients, fillvalue=0)
        ]
    coefficients[place % len(coefficients)] += change
    product = "".join(f"(y - {root})" if root >= 0 else f"(y+{-root})" for root in roots)
    expanded = " + ".join(f"({c})y^{n}" for n, c in enumerate(coefficients))
    assert same_maths(product, expanded) is (change == 0)


# ---- choices, lists, words ----------------------------------------------------------------------


@each([
    ("B", True), ("(b)", True), ("**B**", True), (r"\text{(B)}", True), ("B.", True),
    ("B. Paris", True), ("B) Paris", True), ("The answer is B.", True), ("Answer: (B)", True),
    ("Option B", True), ("paris", True), ("Paris.", True), ("A", False), ("Because", False),
    ("A or B", False), ("the answer is A or B", False), ("the answer is B or A", False),
    ("Answer: A. Answer: B", False), ("", False), ("B" * 5000, False), ("Rome", False),
])  # fmt: skip
def test_choices(given, same):
    assert same_choice("B", given, ["Rome", "Paris"]) is same


@given(st.lists(st.integers(-50, 50), max_size=6), st.randoms(use_true_random=False))
def test_sequences_and_sets_against_python(items, random):
    text = ", ".join(f"{n}.0" for n in items)
    mixed = random.sample(items, len(items))
    assert same_sequence(items, f"[{text}]")
    assert same_sequence(items, " ".join(map(str, mixed))) is (mixed == items)
    assert same_set(mixed + items, rf"\{{{text}\}}")
    assert not same_set([*items, 99], text)
    assert not same_sequence([*items, 0], text)


def test_items_are_numbers_or_words():
    assert read_items('{ "Red", blue; 1/2, 1e2 }') == ["red", "blue", Fraction(1, 2), 100]
    assert read_items("a b  c.") == ["a", "b", "c"]
    assert read_items("1" * 30_000) == []
    assert same_set("1,2", "2 1")


def test_words():
    assert same_text("New  York", "new york.\n")
    assert not same_text("New York", "newyork")
    assert not same_text("", "")


# ---- where the answer is ------------------------------------------------------------------------


@each([
    (r"\boxed{1} then \boxed{2}", "2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{a \boxed{b} c}", r"a \boxed{b} c"), (r"\boxed{\{1\}}", r"\{1\}"),
    (r"\boxed{1} \boxed{2", "1"), (r"\boxed{\boxed{2}", "2"), (r"\boxed {3}", "3"),
    (r"\boxed{}", ""), (r"\boxed", None), ("{1}", None), (r"\fbox{1} \fboxed{2}", "2"),
])  # fmt: skip
def test_the_last_box_wins_with_its_braces(text, content):
    assert boxed(text) == content


@each([
    (r"<think>\boxed{1}</think> It is \boxed{2}.", "2", True),
    (r"<think>\boxed{1}</think> It is 2.", "It is 2.", False),
    (r"<think>\boxed{1}", "", False), (r"so \boxed{3}</think> 4", "4", False),
    ("<think>x</think> <answer> 5 </answer>", "5", True), ("a\n#### 1,000\n", "1,000", True),
    (r"<answer>It is \boxed{6}</answer> or \boxed{7}", "6", True),
    ("<answer>8", "<answer>8", False), ("a\nb\n\n", "b", False), ("", "", False),
])  # fmt: skip
def test_final_answers(text, answer, marked):
    assert final_answer(text) == (answer, marked)


@each([
    ("<think>a</think>b", "a", "b"), ("a</think>b", "a", "b"), ("<think>a", "a", ""),
    ("a", "a", "a"), ("<answer>a</answer>", "", "<answer>a</answer>"),
    ("<think>a</think>b</think>c", "a", "c"),
])  # fmt: skip
def test_thought_and_what_follows(text, thought, after):
    assert (chain_of_thought(text), after_thought(text)) == (thought, after)


def test_code_is_the_last_python_block():
    two = "```python\na = 1\n```\nor\n```\nb = 2\n```\nrun\n```bash\nls\n```"
    assert code_block(two) == "b = 2\n"
    assert code_block("<think>```python\nx\n```</think>\nx = 1") == "x = 1"
    assert code_block("```bash\nls\n```") == ""


# ---- the rewards --------------------------------------------------------------------------------


@each([
    (record("1234"), "so 1,000 + 234 makes 1,234 apples", 1.0),
    (record(1234), r"\boxed{1235}", 0.0),
    (record(r"\frac12"), r"<think>\boxed{3}</think>\boxed{0.5}", 1.0),
    (record("x^2-1"), r"$\boxed{(x-1)(x+1)}$", 1.0),
    (record("C", "choice"), "<answer>C</answer>", 1.0),
    (record("C", "choice", choices=["p", "q", "r"]), "<answer>r</answer>", 1.0),
    (record([3, 1, 2], "sequence"), r"\boxed{3, 1, 2}", 1.0),
    (record([3, 1, 2], "sequence"), r"\boxed{1, 2, 3}", 0.0),
    (record([3, 1, 2], "set"), r"\boxed{\{1, 2, 3\}}", 1.0),
    (record("Ada Lovelace", "text"), "By\nada lovelace", 1.0),
    (record(2.5, "number", tolerance=0.1), "about 2.6", 1.0),
    (record(2.5, "number"), "about 2.6", 0.0),
])  # fmt: skip
def test_accuracy(asked, text, value):
    check_problem(asked)
    assert accuracy(asked, text) == value


def test_the_kind_of_an_answer():
    assert [kind_of(record("x", kind)) for kind in KINDS] == list(KINDS)
    assert (kind_of(record("1/2")), kind_of(record("x"))) == ("number", "math")


@each([
    (record("a", "maths"), "task 'maths' is no kind of answer; choose one of math, number"),
    (record(None), "the answer is 'None'; kind math needs a text or a number"),
    (record(True), "the answer is 'True'"),
    (record([1]), "kind math needs a text or a number"),
    (record({}, "set"), "kind set needs a list or a text"),
    (record("many", "number"), "'many' is no number"),
    (record("AB", "choice"), "'AB' is no letter"),
    (record("C", "choice", choices=["a"]), "'C' is no letter among 1 choices"),
    (record("C", "choice", choices="abc"), "choices is 'abc'; give a list of texts"),
    (record(1, "number", tolerance=-1), "tolerance is '-1'; give a number, 0 or more"),
    (record(1, "number", tolerance=math.nan), "tolerance is 'nan'"),
    (record(kind="code"), "tests is 'None'; give a list with at least one test"),
    (record(kind="code", tests=[{"stdin": ""}]), "test 0 is .*give {'stdin': text, 'stdout'"),
])  # fmt: skip
def test_records_without_a_judgement_are_told(asked, message):
    with pytest.raises(ValueError, match=message):
        check_problem(asked)
    with pytest.raises(ValueError, match=message):
        accuracy(asked, "")


@each([
    ("<think>a</think>b", 1, 0), ("\n<think>a</think>\n b\n", 1, 0),
    ("<think>a</think> <answer>b</answer>", 0, 1),
    ("<think>a</think> <answer>b</answer>c", 0, 0),
    ("<think>a</think>c <answer>b</answer>", 0, 0),
    ("<think>a</think><answer> </answer>", 0, 0),
    ("<think></think>b", 0, 0), ("<think>a</think>", 0, 0), ("a</think>b", 0, 0), ("a", 0, 0),
    ("<think>a", 0, 0), ("x<think>a</think>b", 0, 0), ("<think>a</think>b</think>", 0, 0),
    ("</think>a<think>b", 0, 0), ("<think>a<think></think>b", 0, 0), ("", 0, 0),
    ("<answer>b</answer><think>a</think>", 0, 0),
])  # fmt: skip
def test_format(text, plain, tagged):
    assert format(record(), text) == plain
    assert format(record(), text, answer_tags=True) == tagged


def test_format_knows_that_the_prompt_opened_the_thought():
    for prompt in ("Think.\n<think>\n", [{"role": "user", "content": "Why?"}]):
        asked = record(prompt=prompt)
        assert format(asked, "a</think>b") == 1
        assert format(asked, "<think>a</think>b") == 0
        assert format(asked, "a</think> <answer>b</answer>", answer_tags=True) == 1
        assert format(asked, "b") == 0


CHAT = [{"role": "user", "content": "What is 2 + 3?"}]


@pytest.mark.parametrize("prompt", [CHAT, "What is 2 + 3?\n<think>\n"], ids=["chat", "text"])
def test_a_thought_that_the_prompt_opened_is_never_searched(prompt):
    asked = record("5", prompt=prompt)
    cut_off = r"I reason so maybe \boxed{5} hmm wait"
    assert accuracy(asked, cut_off) == 0
    assert accuracy(asked, "I reason <answer>5</answer>") == 0
    assert accuracy(asked, cut_off + r"</think>\boxed{5}") == 1
    assert accuracy(record("5"), cut_off) == 1  # a prompt that opened nothing
    program = record(kind="code", prompt=prompt, tests=[{"check": "assert f() == 5"}])
    draft = "```python\ndef f(): return 5\n```\n"
    assert accuracy(program, draft) == 0
    assert accuracy(program, "draft</think>" + draft) == 1


@each([
    ("en", "<think>We add 3 and x, so</think> 答案", 1.0),
    ("en", "<think>one 二 three 四</think>", 0.5),
    ("zh", "<think>我们 think 答</think>", 3 / 4),
    ("zh", "<think>设 x = 3, \\frac{1}{2}</think>", 1.0),
    ("en", "<think>1 + 2 = 3</think> words outside", 0.0), ("en", "", 0.0),
    ("ru", "да нет yes", 2 / 3),
    ("en", "naïve word", 0.5), ("ja", "これは test", 3 / 4),
    ("en", "a\n```python\nx = 名前\n```\nword", 1.0),
    ("en", "<answer>deux</answer>", 0.0),
])  # fmt: skip
def test_language(name, text, share):
    assert language(record(language=name), text) == pytest.approx(share)


def test_an_unknown_language_is_told():
    with pytest.raises(ValueError, match="'xx' is not known; choose one of en, zh"):
        language(record(language="xx"), "word")


def test_soft_overlong_is_dapos_equation_13():
    def by_cases(length, most, buffer):
        if length <= most - buffer:
            return 0.0
        return (most - buffer - length) / buffer if length <= most else -1.0

    for most, buffer in [(20, 5), (20, 20), (7, 1)]:
        lengths = np.arange(1, 40)
        expected = [by_cases(int(n), most, buffer) for n in lengths]
        np.testing.assert_allclose(soft_overlong(lengths, most, buffer), expected, atol=1e-15)
    for buffer in (0, 21):
        with pytest.raises(ValueError, match=f"buffer is {buffer} and max_tokens is 20"):
            soft_overlong(np.array([1]), 20, buffer)


# ---- hostile texts ------------------------------------------------------------------------------

LONG = 100_000
PIECES = [
    "{", "\\boxed{", "<think>", "</think>", "<answer>", "####", "```", "```a", "```python\n",
    "\\text{",
    "1,111,", "1 ", "9", "9^", "-", "(", "|", "\\frac", "\\\\", "A or ", "answer is ", " ", "\n",
    "é", "中",
    "\ud800", "\u0301", "\x00", "{,}", "x=", "$", "%", "1/", "__", "\\left\\{", ",", "1e",
    "\\sqrt[",
]  # fmt: skip
ASKED = [
    record("5"), record("x+1"), record("(1,2)"), record("B", "choice", choices=["p", "q"]),
    record([1, 2], "sequence"), record([1, 2], "set"), record("word", "text"),
]  # fmt: skip


def test_answers_of_100k_characters_are_judged_at_once():
    slowest = 0.0
    for piece in PIECES:
        text = piece * (LONG // len(piece))
        begin = time.process_time()
        for asked in (ASKED[0], ASKED[3]):
            assert accuracy(asked, text) == 0.0
        for asked in (ASKED[2], ASKED[5]):
            assert accuracy(asked, f"\\boxed{{{text}}}") == 0.0
        assert format(ASKED[0], text) == 0.0
        assert 0.0 <= language(record(), text) <= 1.0
        code_block(text)
        slowest = max(slowest, time.process_time() - begin)
    assert slowest < 2.0  # quadratic time would take minutes


@given(
    st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join),
    st.sampled_from(ASKED),
)
def test_any_text_has_a_reward(text, asked):
    with contextlib.suppress(UndecidedError):
        assert accuracy(asked, text) in (0.0, 1.0)
    assert format(asked, text) in (0.0, 1.0)
    assert 0.0 <= language(asked, text) <= 1.0


# ---- the helper process, last: it is started once for all of the above -------------------------


def test_a_comparison_without_end_is_stopped_and_the_next_one_works():
    before = time.monotonic()
    with pytest.raises(UndecidedError, match=r"no answer in 0\.3 s"):
        symbolically_equal("x*9^(9^8)", "x", seconds=0.3)
    assert symbolic._helper is None
    assert time.monotonic() - before < 20
    assert symbolically_equal("2x", "x+x")
    helper = symbolic._helper
    assert helper is not None
    symbolic.stop()
    assert helper.status is not None
    assert symbolic._helper is None
