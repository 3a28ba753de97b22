"""Expressions and numbers in text: random ones against exact arithmetic, and by hand."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.verdict.mathematics.equivalence import same_number
from rl.verdict.mathematics.expressions import ExpressionError, approximate, exact_value, parse
from rl.verdict.mathematics.quantities import read_number
from tests.tables import each

# ---- expressions --------------------------------------------------------------------------------


def unbounded(text: str) -> Fraction | None:
    try:
        return exact_value(parse(text))
    except ExpressionError:
        return None


def joined(pair):
    """Text and value of two random expressions under a random operation; None divides by zero."""
    operation, (a, x), (b, y) = pair
    if None in (x, y) or (operation in ("/", "frac") and y == 0):
        return "1/0", None
    return {
        "+": (f"({a})+({b})", x + y),
        "-": (f"({a}) - [{b}]", x - y),
        "*": (f"({a})\\cdot({b})", x * y),
        "implicit": (f"({a})({b})", x * y),
        "/": (f"{{{a}}}/({b})", x / y if y else None),
        "frac": (f"\\dfrac{{{a}}}{{{b}}}", x / y if y else None),
        "^": (f"({a})^{{2}}-({b})**3", x**2 - y**3),
    }[operation]


NUMBERS = st.one_of(
    st.integers(0, 10**6).map(lambda n: (f"{n:,}", Fraction(n))),
    st.integers(0, 999).map(lambda n: (f"-{n / 8}", Fraction(-n, 8))),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)).map(
        lambda n: (rf"{n[0]}\frac{{{n[1]}}}{n[2]}", n[0] + Fraction(n[1], n[2]))
    ),
)
OPERATIONS = st.sampled_from(["+", "-", "*", "implicit", "/", "frac", "^"])
EXPRESSIONS = st.recursive(
    NUMBERS, lambda inner: st.tuples(OPERATIONS, inner, inner).map(joined), max_leaves=8
)


@given(EXPRESSIONS)
def test_expressions_have_their_exact_value(expression):
    text, value = expression
    assert unbounded(text) == value


@each([
    ("2^3^2", 512), ("-2^2", -4), ("2^-1", "1/2"), ("--3", 3), ("1/2/2", "1/4"), ("8/2(4)", 16),
    (r"\frac12", "1/2"), (r"-1\frac{1}{2}", "-3/2"), (r"2^3\frac{1}{2}", 4),
    (r"\left(\tfrac34\right)^2", "9/16"), ("1{,}234", 1234), (r"12\,345", 12345),
    ("1,23", None),
    ("1,2345", None), ("3 4", None), ("", None), ("()", None), ("(1", None), ("1)", None),
    ("9^9^9", None), ("9^999", 9**999), ("1/0", None), ("0^-1", None), ("evil", None),
    ("__import__('os')", None), ("1;2", None), ("0x10", None), ("1e5", None), ("7" * 201, None),
    ("(" * 500 + "1" + ")" * 500, None), ("-" * 999 + "1", -1), ("1+" * 499 + "1", 500),
    ("1" * 1001, None), (r"\sqrt4", None), ("x", None), ("٣", 3),
    ("3!", 6), ("-3!", -6), ("2^3!", 64), ("0!", 1), ("(2+1)!", 6), ("3!!", None),
    ("(3!)!", 720), ("(1/2)!", None), ("(-1)!", None), ("1001!", None), ("!3", None),
    (r"\binom{5}{2}", 10), (r"\dbinom52", 10), ("|-3|", 3), ("|2-|-5||", 3), ("|x|", None),
])  # fmt: skip
def test_expressions_by_hand(text, value):
    assert unbounded(text) == (None if value is None else Fraction(value))


@given(NUMBERS)
def test_floating_point_is_near_the_exact_value(number):
    text, value = number
    assert approximate(parse(text)) == pytest.approx(float(value))


@each([
    (r"\sqrt{16}", 4), (r"\sqrt[3]{27}", 3), (r"\log_2 8", 3), (r"\ln e", 1),
    (r"2\pi", 6.28318531), (r"\sin\frac{\pi}{6}", 0.5), (r"\arctan 1", 0.785398163),
    ("4^{1/2}", 2), ("5!", 120), (r"\sqrt{-4}", None), ("x", None), ("i", None),
    (r"\infty", None), ("(-8)^{1/3}", None),
])  # fmt: skip
def test_floating_point_by_hand(text, value):
    assert approximate(parse(text)) == (value if value is None else pytest.approx(value))


@pytest.mark.parametrize("text", ["1/0", r"\sqrt{9^{9^9}}", "9^{999}", "171!", "2/(1-1)"])
def test_no_finite_value_is_an_error(text):
    with pytest.raises(ExpressionError):
        approximate(parse(text))


@given(
    st.text(max_size=60)
    | st.text(alphabet="0123456789+-*/^(){}[]|_.,\\ efracsqrtlogxπ²√", max_size=60)
)
def test_any_text_is_an_expression_or_an_error(text):
    unbounded(text)
    read_number(text)


# ---- numbers ------------------------------------------------------------------------------------


@given(st.integers(-(10**15), 10**15), st.integers(0, 6))
def test_a_number_is_read_as_python_writes_it(n, places):
    value = Fraction(n, 10**places)
    text = f"{n // abs(n or 1) * (abs(n) // 10**places)}" if not places else None
    text = text or f"{'-' * (n < 0)}{abs(n) // 10**places:,}.{abs(n) % 10**places:0{places}}"
    assert read_number(text) == (value, False)
    assert read_number(f"({text})") is None
    assert read_number(f"$\\${text}$" if n >= 0 else f"${text}$") == (value, False)
    assert same_number(str(value), text)
    assert not same_number(str(value + Fraction(1, 10**9)), text)


@each([
    ("1234", "1,234 dollars", True), ("3/4", r"\frac{3}{4}", True), ("0.75", "3/4", True),
    ("-1.5", "-1 1/2", True), ("-1.5", r"-1\frac{1}{2}", True), ("1500", "1.5e3", True),
    ("0.0015", r"1.5 \times 10^{-3}", True), ("12", "12.", True), ("12", r"12\text{ cm}", True),
    ("7", "x = 7", True), ("-7", "x=-7", True), ("5", "10-5", False), ("12", "3*4", False),
    ("12", "11 or 12", False), ("12", "", False), ("12", "twelve", False), ("2", "R2D2", False),
    ("0.5", "50%", True), ("50%", "50", True), ("50%", r"50\%", True), ("50%", "0.5", True),
    ("50%", "0.5%", False), ("50", "50%", True), ("1", "1e9999", False), ("5", "5/0", False),
    ("2", "10^2", False), ("2", "12e5", False), ("5", "5" * 5000, False), ("12", "１２", True),
])  # fmt: skip
def test_numbers(expected, given, same):
    assert same_number(expected, given) is same


def test_of_several_numbers_the_last_counts_where_nothing_marks_the_answer():
    text = "3 boxes of 4 make 12 apples"
    assert same_number("12", text, marked=False)
    assert not same_number("3", text, marked=False)
    assert not same_number("12", text, marked=True)


def test_tolerance_is_absolute_and_exact_at_its_edge():
    assert same_number("1", "1.25", tolerance=0.25)
    assert not same_number("1", "1.2500001", tolerance=0.25)
