r"""Mathematical text to a small tree, by our own parser: nothing a model wrote is ever evaluated.

Reads plain and LaTeX notation: numbers (decimals, thousands separators), + - * / ^, parentheses and
braces, |x|, implicit products (2x, 3(x+1), 2\pi), mixed numbers (1\frac{1}{2}), \frac, \sqrt[n]{x},
\cdot, \times, \div, \pi, \infty, n!, \binom{n}{k}, the functions in FUNCTIONS, and variables of one
letter or a Greek name. `e` is Euler's number and `i` the imaginary unit.

Grammar, loosest first: sum = product {(+|-) product}; product = unary {* unary | / unary | power};
unary = {+|-} power; power = postfix [^ exponent]; postfix = atom [!].

Every size is bounded (characters, digits, depth, exponents), so that parsing and exact evaluation
take milliseconds whatever the text is.
"""

import functools
import math
import re
from fractions import Fraction
from typing import NamedTuple

MAX_CHARS = 1000
MAX_DIGITS = 200
"""Digits of one number as written."""
MAX_DEPTH = 40
MAX_EXPONENT = 1000
"""Largest exponent, either sign, that exact evaluation raises to."""
MAX_BITS = 10_000
"""Size of a numerator or denominator that exact evaluation may reach."""
MAX_COUNT = 1000
"""Largest n of n! and of the binomial coefficient of n and k that is evaluated."""

FUNCTIONS = (
    "sqrt", "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh",
    "tanh", "coth", "exp", "ln", "log", "lg", "abs",
)  # fmt: skip
CONSTANTS = ("pi", "infty")
GREEK = (
    "alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "rho", "sigma", "tau",
    "phi", "omega",
)  # fmt: skip

_ALIASES = {
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arctg": "atan", "cosec": "csc",
    "tg": "tan", "ctg": "cot", "dfrac": "frac", "tfrac": "frac", "cfrac": "frac",
    "nicefrac": "frac", "sfrac": "frac", "dbinom": "binom", "tbinom": "binom",
    "cdot": "*", "times": "*", "ast": "*", "div": "/", "infinity": "infty", "inf": "infty",
    "oo": "infty", "lbrace": "{", "rbrace": "}", "vert": "|", "lvert": "|", "rvert": "|",
    "varphi": "phi", "varepsilon": "epsilon", "left": "", "right": "", "displaystyle": "",
    "big": "", "Big": "", "quad": "", "qquad": "",
}  # fmt: skip
_CHARACTERS = {
    "−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "π": r"\pi ", "√": r"\sqrt ",
    "∞": r"\infty ", "**": "^", "²": "^2", "³": "^3", "{,}": ",", r"\!": "",
}  # fmt: skip
_THOUSANDS = re.compile(r"(?<=\d)\\,(?=\d{3}(?!\d))")
_SPACES = re.compile(r"\\[ ,;:]|[~$\s]+")
_TOKEN = re.compile(
    r"(?P<number>[1-9]\d{0,2}(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+\.?\d*|\.\d+)"
    r"|\\(?P<command>[A-Za-z]+)|(?P<word>[A-Za-z]+)|(?P<sign>[-+*/^(){}\[\]|_!])|(?P<space>\s+)"
)


_INVERSE = {"sec": "cos", "csc": "sin", "cot": "tan", "coth": "tanh"}
_EXACT_CALLS = ("abs", "factorial", "binomial")
_CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|"}


class ExpressionError(ValueError):
    """Text that is no expression, or one beyond the limits of this module."""


class Node(NamedTuple):
    """An expression. kind: num (value: Fraction), name (value: str), or an operation on `parts`:
    + and * (any number), ^ (two), neg and inv (one: -x, 1/x), call (value: the function's name, or
    factorial or binomial; one argument, and as second an index for root, a base for log, k for
    binomial)."""

    kind: str
    value: Fraction | str = ""
    parts: tuple["Node", ...] = ()


def parse(text: str) -> Node:
    """The tree of an expression in plain or LaTeX notation; ExpressionError if it is none.

    At most MAX_CHARS characters, MAX_DIGITS digits per number, MAX_DEPTH nested levels.
    """
    if len(text) > MAX_CHARS:
        raise ExpressionError(f"{len(text)} characters; at most {MAX_CHARS} are read")
    parser = _Parser(_tokens(text))
    node = parser.sum(0)
    if parser.kind != "end":
        raise ExpressionError(f"{parser.token!r} is left over after an expression")
    return node


def exact_value(node: Node) -> Fraction | None:
    """Value of a tree as an exact fraction, None if it has names, fractional powers or calls other
    than |x|, n! and binomial coefficients.

    ExpressionError for a division by zero, n! of n that is no count, or when a result would exceed
    MAX_BITS bits.
    """
    if node.kind == "num":
        assert isinstance(node.value, Fraction)
        return node.value
    if node.kind == "name" or (node.kind == "call" and node.value not in _EXACT_CALLS):
        return None
    values = []
    for part in node.parts:
        value = exact_value(part)
        if value is None:
            return None
        values.append(value)
    if node.kind == "neg":
        return -values[0]
    if node.kind == "inv":
        return _power(values[0], Fraction(-1))
    if node.kind == "^":
        return _power(values[0], values[1])
    if node.kind == "call":
        return abs(values[0]) if node.value == "abs" else _count(*values)
    total = values[0]
    for value in values[1:]:
        total = total + value if node.kind == "+" else total * value
        _bounded(max(total.numerator.bit_length(), total.denominator.bit_length()))
    return total


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        return None
    if abs(exponent) > MAX_EXPONENT:
        raise ExpressionError(f"exponent {exponent}; at most {MAX_EXPONENT} is evaluated")
    if base == 0 and exponent < 0:
        raise ExpressionError("division by zero")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    _bounded(bits * abs(exponent.numerator))
    return base**exponent.numerator


def _count(n: Fraction, k: Fraction | None = None) -> Fraction:
    # n!, or the binomial coefficient of n and k
    for value in (n,) if k is None else (n, k):
        if value.denominator != 1 or not 0 <= value <= MAX_COUNT:
            raise ExpressionError(f"{value} is no count up to {MAX_COUNT}, which n! and binom need")
    return Fraction(math.factorial(int(n)) if k is None else math.comb(int(n), int(k)))


def approximate(node: Node) -> float | None:
    """Value of a tree in floating point, None if it has variables, `i`, infinity or no real value.

    ExpressionError for a division by zero, and for values beyond floating point.
    """
    if node.kind == "name":
        return {"pi": math.pi, "e": math.e}.get(str(node.value))
    exact = node.kind == "num" or (node.kind == "call" and node.value in _EXACT_CALLS[1:])
    values = [] if exact else [approximate(part) for part in node.parts]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    try:
        value = _float(node, known)
    except (OverflowError, ZeroDivisionError) as error:
        raise ExpressionError(f"no finite value: {error}") from None
    except ValueError:
        return None
    if value is not None and not math.isfinite(value):
        raise ExpressionError(f"a value beyond floating point: {value}")
    return value


def _float(node: Node, values: list[float]) -> float | None:
    name = str(node.value)
    if node.kind == "num" or name in _EXACT_CALLS[1:]:
        exact = exact_value(node)
        return None if exact is None else float(exact)
    if node.kind == "call":
        if name == "root":
            return math.pow(values[0], 1 / values[1])
        if name in _INVERSE:
            return 1 / getattr(math, _INVERSE[name])(*values)
        function = {"ln": math.log, "abs": math.fabs}.get(name) or getattr(math, name)
        return function(*values)
    if node.kind in "+*":
        return math.fsum(values) if node.kind == "+" else math.prod(values)
    if node.kind == "neg":
        return -values[0]
    return 1 / values[0] if node.kind == "inv" else math.pow(values[0], values[1])


def _bounded(bits: int) -> None:
    if bits > MAX_BITS:
        raise ExpressionError(f"a result of about {bits} bits; at most {MAX_BITS} are computed")


def _tokens(text: str) -> list[tuple[str, str]]:
    # (kind, token) pairs: number, sign, name, function or command. A space counts only between
    # numbers, where no product is meant.
    for found, meant in _CHARACTERS.items():
        text = text.replace(found, meant)
    text = _SPACES.sub(" ", _THOUSANDS.sub(",", text)).strip()
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            raise ExpressionError(f"{text[position]!r} is no part of an expression")
        position = match.end()
        kind, token = match.lastgroup, match.group(match.lastgroup or 0)
        if kind == "word":
            tokens += _words(token)
        elif kind == "command":
            token = _ALIASES.get(token, token)
            if token:
                tokens.append(("sign" if token in "*/{}|" else _known(token), token))
        elif kind != "space":
            tokens.append((kind, token))
    return tokens


def _known(command: str) -> str:
    if command in FUNCTIONS or command in ("frac", "binom"):
        return "function"
    if command in CONSTANTS or command in GREEK:
        return "name"
    raise ExpressionError(f"the command \\{command} is not known here")


def _words(word: str) -> list[tuple[str, str]]:
    # A word without backslash: a function, a constant, or up to three variables side by side. A
    # longer one is prose: read as a product of letters, 'evil' would equal 'live'.
    word = _ALIASES.get(word, word)
    if word in FUNCTIONS:
        return [("function", word)]
    if word in CONSTANTS or word in GREEK:
        return [("name", word)]
    if len(word) > 3:
        raise ExpressionError(f"{word!r} is a word, no expression")
    return [("name", letter) for letter in word]


class _Parser:
    """Recursive descent over a list of tokens; `depth` counts nested calls."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens, self.position = tokens, 0

    @property
    def kind(self) -> str:
        return self.tokens[self.position][0] if self.position < len(self.tokens) else "end"

    @property
    def token(self) -> str:
        return self.tokens[self.position][1] if self.position < len(self.tokens) else ""

    def take(self, token: str = "") -> str:
        found = self.token
        if token and found != token:
            raise ExpressionError(f"expected {token!r}, found {found or 'the end'!r}")
        self.position += 1
        return found

    def sum(self, depth: int) -> Node:
        terms = [self.product(depth)]
        while self.token in ("+", "-"):
            minus = self.take() == "-"
            term = self.product(depth)
            terms.append(Node("neg", parts=(term,)) if minus else term)
        return terms[0] if len(terms) == 1 else Node("+", parts=tuple(terms))

    def product(self, depth: int) -> Node:
        factors = [self.unary(depth)]
        while True:
            if self.token in ("*", "/"):
                divide = self.take() == "/"
                factor = self.unary(depth)
                factors.append(Node("inv", parts=(factor,)) if divide else factor)
            elif self.kind in ("name", "function") or self.token in ("(", "{"):
                factors.append(self.power(depth))
            else:
                return factors[0] if len(factors) == 1 else Node("*", parts=tuple(factors))

    def unary(self, depth: int) -> Node:
        minus = False
        while self.token in ("+", "-"):
            minus ^= self.take() == "-"
        node = self.power(depth)
        return Node("neg", parts=(node,)) if minus else node

    def power(self, depth: int) -> Node:
        base = self.postfix(depth)
        if self.token == "frac" and base.kind == "num":
            return self.mixed(base, depth)
        if self.token != "^":
            return base
        self.take()
        return Node("^", parts=(base, self.argument(depth)))

    def mixed(self, whole: Node, depth: int) -> Node:
        r"""1\frac{1}{2} is a sum; 2\frac{x}{3} and .5\frac{1}{2} are products."""
        integer = self.tokens[self.position - 1][1].isdigit()
        part = self.fraction(depth)
        digits = part.parts[0].kind == "num" and part.parts[1].parts[0].kind == "num"
        return Node("+" if integer and digits else "*", parts=(whole, part))

    def argument(self, depth: int) -> Node:
        """An exponent, or what a function without parentheses applies to; 2^3^2 is 2^(3^2)."""
        depth, minus = self.deeper(depth), False
        while self.token in ("+", "-"):
            minus ^= self.take() == "-"
        node = self.postfix(depth)
        if self.token == "^":
            self.take()
            node = Node("^", parts=(node, self.argument(depth)))
        return Node("neg", parts=(node,)) if minus else node

    def postfix(self, depth: int) -> Node:
        node = self.atom(depth)
        if self.token != "!":
            return node
        self.take()
        if self.token == "!":  # 5!! is 5*3*1, not (5!)!
            raise ExpressionError("double factorials are not read")
        return Node("call", "factorial", (node,))

    def atom(self, depth: int) -> Node:
        depth = self.deeper(depth)
        if self.kind == "number":
            return Node("num", _number(self.take()))
        if self.kind == "name":
            return Node("name", self.take())
        if self.kind == "function":
            if self.token == "binom":
                self.take()
                return Node("call", "binomial", (self.short(depth), self.short(depth)))
            return self.fraction(depth) if self.token == "frac" else self.call(depth)
        if self.token in _CLOSING:
            opening = self.take()
            node = self.sum(depth)
            self.take(_CLOSING[opening])
            return Node("call", "abs", (node,)) if opening == "|" else node
        raise ExpressionError(f"{self.token or 'the end'!r} where a value is expected")

    def fraction(self, depth: int) -> Node:
        self.take("frac")
        above = self.short(depth)
        return Node("*", parts=(above, Node("inv", parts=(self.short(depth),))))

    def short(self, depth: int) -> Node:
        r"""A group, or as in LaTeX one digit or letter: \frac12, \log_2 8."""
        if self.kind == "number" and len(self.token) > 1 and self.token.isdigit():
            digits = self.token
            self.tokens[self.position] = ("number", digits[1:])
            return Node("num", Fraction(int(digits[0])))
        return self.atom(depth)

    def call(self, depth: int) -> Node:
        name, power, second = self.take(), None, ()
        if name == "sqrt" and self.token == "[":
            name, second = "root", (self.atom(depth),)
        if name == "log" and self.token == "_":
            self.take()
            second = (self.short(depth),)
        if self.token == "^":  # \sin^2 x
            self.take()
            power = self.short(depth)
        if name == "lg":
            name, second = "log", (Node("num", Fraction(10)),)
        inner = self.atom(depth) if self.token in _CLOSING else self.operand(name, depth)
        node = Node("call", name, (inner, *second))
        return node if power is None else Node("^", parts=(node, power))

    def operand(self, function: str, depth: int) -> Node:
        r"""What a function without parentheses applies to: \sin 2x is \sin(2x), not (\sin 2)x."""
        factors = [self.argument(depth)]
        while self.kind == "name" and function != "sqrt":
            factors.append(self.power(depth))
        return factors[0] if len(factors) == 1 else Node("*", parts=tuple(factors))

    def deeper(self, depth: int) -> int:
        if depth >= MAX_DEPTH:
            raise ExpressionError(f"more than {MAX_DEPTH} nested levels")
        return depth + 1


@functools.lru_cache(maxsize=1024)
def _number(text: str) -> Fraction:
    digits = text.replace(",", "")
    if len(digits) > MAX_DIGITS:
        raise ExpressionError(f"a number of {len(digits)} digits; at most {MAX_DIGITS} are read")
    return Fraction(digits.removesuffix("."))
