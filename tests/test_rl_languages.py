r"""Which answers are right in any language and notation: units, announcements, denials, lists.

The tables are in `tests/rl_answers.toml`; those of English answers in the styles of GSM8K and MATH
in `tests/test_rl_equivalence.py`.
"""

import pathlib
import tomllib

import pytest

from rl.problems import Problem
from rl.verdict import words
from rl.verdict.rules import accuracy
from rl.verdict.worded_answers import same_choice, same_text
from tests.tables import each

TABLES = tomllib.loads(pathlib.Path(__file__).with_name("rl_answers.toml").read_text("utf-8"))


def cases(place: str, side: str) -> list[tuple[str, str]]:
    table = TABLES[place][side]
    return [(expected, given) for expected, answers in table.items() for given in answers]


def values_in_boxes(expected: str, given: str) -> set[float]:
    problem = Problem("?", {"answer": expected})
    texts = (rf"So \boxed{{{given}}}.", f"<answer>{given}</answer>")
    return {accuracy(problem, text) for text in texts}


@each(cases("boxes", "right"))
def test_right_boxes(expected, given):
    assert values_in_boxes(expected, given) == {1}


@each(cases("boxes", "wrong"))
def test_wrong_boxes(expected, given):
    assert values_in_boxes(expected, given) == {0}


@each(cases("texts", "right"))
def test_right_texts(expected, text):
    assert accuracy(Problem("?", {"answer": expected}), text) == 1


@each(cases("texts", "wrong"))
def test_wrong_texts(expected, text):
    assert accuracy(Problem("?", {"answer": expected}), text) == 0


@each([*TABLES["choice"]["right"], *TABLES["choice"]["wrong"]])
def test_choices_in_any_language(given):
    assert same_choice("B", given) is (given in TABLES["choice"]["right"])


def test_words_in_any_language():
    assert same_text("北京", "北京。")
    assert same_text("Москва", "МОСКВА.")
    assert not same_text("北京", "上海")
    assert not same_text("北京", "北京！")


# ---- the table of words -------------------------------------------------------------------------


def test_a_language_is_taught_by_a_section_of_the_table(monkeypatch):
    """Dutch, which the table does not have: `vijf keer niet` and `antwoord`."""
    taught = {
        "answer": ["antwoord"],
        "not": ["niet"],
        "units": ["uur"],
        "scales": {"duizend": 1000},
    }
    known = [("5", "Het antwoord is niet 5.", 0), ("5000", r"\boxed{5 duizend uur}", 1)]
    before = [accuracy(Problem("?", {"answer": answer}), text) for answer, text, _ in known]
    assert before == [1, 0]  # what not knowing a language costs
    words.check({"nl": taught})
    try:
        monkeypatch.setitem(words.TABLE, "nl", taught)
        words.pattern.cache_clear()
        words.scales.cache_clear()
        for answer, text, value in known:
            assert accuracy(Problem("?", {"answer": answer}), text) == value
    finally:
        monkeypatch.undo()
        words.pattern.cache_clear()
        words.scales.cache_clear()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"nots": ["niet"]}, r"\[nl\] nots: no such key; there are .*not"),
        ({"not": ["(niet"]}, r"\[nl\] not: missing \).* in '\(niet'"),
        ({"not": ["(niet)"]}, r"\[nl\] not: '\(niet\)' has a group; begin it with \(\?:"),
        ({"not": "niet"}, r"\[nl\] not: 'niet' is no list"),
        ({"scales": {"duizend": "1000"}}, r"\[nl\] scales: 'str' object cannot be"),
        ({"rewrite": [["procent"]]}, r"\[nl\] rewrite: not enough values"),
        ({"rewrite": [["a", r"\1"]]}, r"\[nl\] rewrite: invalid group reference 1"),
    ],
)
def test_a_mistake_in_the_table_is_told(section, message):
    with pytest.raises(ValueError, match=message):
        words.check({"nl": section})


def test_words_do_not_slow_a_verdict_down():
    """Patterns of the table are words without nesting: a long text takes no long time."""
    for piece in ("不", "5, ", "не ", "x=", r"\boxed{5} and ", "5 或 ", "half of "):
        assert accuracy(Problem("?", {"answer": "7"}), piece * 3000) == 0
