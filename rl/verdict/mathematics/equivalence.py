r"""Whether an answer is the expected number, or means the expected mathematics.

`expected` comes from the prompt's record, `given` from a model: any text, however long. Texts too
long for a rule are unequal, unless they are the expected text itself. Unicode is brought to its
compatibility form (full-width digits are digits, `x²` is `x^2`).
"""

import re
from fractions import Fraction

from rl.verdict.mathematics.expressions import (
    CONSTANTS,
    MAX_CHARS,
    ExpressionError,
    Node,
    approximate,
    exact_value,
    parse,
)
from rl.verdict.mathematics.notation import (
    SPAN,
    Parts,
    alone,
    formula,
    inequality,
    interval,
    mathematical,
    other_connective,
    parts,
    squeezed,
    unassigned,
)
from rl.verdict.mathematics.quantities import (
    TEXT_COMMAND,
    UNITS,
    Number,
    core,
    decimal_point,
    is_written_number,
    other_angle,
    plain,
    read_number,
    tidy,
    ungrouped,
)
from rl.verdict.mathematics.symbolic import symbolically_equal
from rl.verdict.mathematics.units import other_unit, quantity
from rl.verdict.words import LETTER, changes, clause, doubtful, one_word, pattern, rewritten, says

_ALMOST = 0.02
"""Largest relative difference between the sides of `a \approx b`."""
_CLOSED = frozenset((*CONSTANTS, "e", "i"))
_ROUNDING = 1e-9
"""Relative difference up to which values in floating point may be equal; then sympy is asked."""

_ABOUT = re.compile(r"\\(?:approx|simeq|cong)(?![A-Za-z])|≈")
_EQUALS = re.compile(rf"=+|{pattern('is').pattern}", re.IGNORECASE)
_ORDERED = re.compile(
    r"[<>≤≥≠]|\\(?:[lg]e|[lg]eq|[lg]eqslant|[lg]t|neq?|notin|pm|mp|not)(?![A-Za-z])|\s!="
)
_NAME = re.compile(r"[\w\\{}()|',.:;\s∠△]*")
_NO_NAME = re.compile(
    r"(?<![_({A-Za-z\d])\d|\\[dtc]?frac|\\sqrt|\b[A-Za-z]{1,2}\s*:\s*[A-Za-z]{1,2}\b"
)
_INTERVAL = re.compile(r"[(\[\]].*[,;].*[)\]\[]", re.DOTALL)
_MEMBER = re.compile(r"(\\?[A-Za-z]{1,7})\s*(?:\\in(?![A-Za-z])|∈)")
_SYMBOL = re.compile(r"\\?[A-Za-z]{1,10}(?:_(?:\w|\{\w+\}))?")
_JOINED = re.compile(
    r"(?:[\d)}]|(?<![A-Za-z])[a-z])\s*(?:[-+*×·÷~—]|\\(?:times|cdot|div|pm)\b)[\s$(]*$"
    r"|\d:$|[A-Za-z]\($|(?:±|\\pm)\s*$"
    r"|(?P<name>[A-Za-z]\w{0,5})\s*=[^=]{1,20}(?P=name)\s*=[\s$]*$"
    rf"|[\d)}}]\W*(?:[,;&]|{pattern('and', 'or', 'to').pattern})[\s$\\(.]*$",
    re.IGNORECASE,
)
"""What goes on with the number after it: a sum, a ratio, f(5), values of one name, a list."""
_GOES_ON = re.compile(r"\s*(?:[‰‱…]|\.\.|[-+*/^×·]\s*(?:[a-z](?![a-z])|\d|\\)|([b-z])(?![a-z'’]))")
_NUMBER_IN_TEXT = re.compile(
    r"(?<![A-Za-z\d_.^{])[-+]?\s?[$€£¥]?(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:[.,]\d++)?"
    r"(?:\s*/\s*\d++(?!\.))?(?!\s?(?:[eE]|\^|\*\*)[-+{]?\d|\s*[\^}_]|\s*\\[a-z])(?:\s*%)?"
)


# ---- numbers ------------------------------------------------------------------------------------


def same_number(expected: str, given: str, marked: bool = True, tolerance: float = 0.0) -> bool:
    r"""Whether `given` is the expected number, exactly or within an absolute tolerance.

    A number may be written out (see `read_number`) or be the value of an expression such as
    `\sqrt{16}`, `2^{10}`, `3!`; not of a sum, product or quotient of numbers, which may be the
    question itself. A unit or words around it do not count, as long as they do not change it (see
    `rl.quantities.core`); nor does `x =`. A percent sign on one side only may mean the number or
    its hundredth; 3,14 is 3.14 where no list is meant. Where nothing marks the answer
    (marked=False), prose ends in it: then the last of several numbers is taken, unless a word
    beside it denies it, makes it one of several, or makes it another.

    ValueError if `expected` is no number; rl.verdict.mathematics.symbolic.UndecidedError if sympy
    reaches no verdict.
    """
    wanted = read_number(ungrouped(plain(expected)))
    if wanted is None:
        raise ValueError(f"the expected answer {expected[:80]!r} is no number")
    if len(given) > MAX_CHARS:
        return False
    given = ungrouped(plain(given))
    if other_angle(plain(expected), given) or other_unit(plain(expected), given):
        return False
    if not marked and re.search(LETTER, given):
        given = given.rstrip("!. ")  # the end of a sentence, no factorial
    same = _has_value(wanted, given, Fraction(tolerance))
    if same is None and not marked:
        same = _ends_in(wanted, given, Fraction(tolerance))
    return bool(same)


def _has_value(
    wanted: Number, text: str, tolerance: Fraction, any_form: bool = False
) -> bool | None:
    """Whether a text is one value, and that is wanted; None if it is none that can be read.

    any_form: whether a sum or product of numbers counts, and variables that cancel.
    """
    number = read_number(text)
    if number:
        return _near(wanted, number, tolerance)
    text = decimal_point(tidy(_without_dollars(text)))
    if not text.isascii() and changes(text):
        return None
    if _ABOUT.search(text):
        return _about(wanted, text, tolerance)
    side = _answered(text)
    if side is None:
        return None
    side, factor = core(side.strip().removeprefix("\\{").removesuffix("\\}"))
    number = read_number(side)
    if number:
        return _near(wanted, Number(number.value * factor, number.percent), tolerance)
    if factor != 1 or re.search(r"[(\[][^()\[\]]*,", side):  # (1,234) is a pair
        return None
    try:
        node = parse(side)
        if _is_arithmetic(node) and not any_form:
            return False
        return _node_has_value(wanted, side, node, tolerance, any_form)
    except ExpressionError:
        return None


def _node_has_value(
    wanted: Number, text: str, node: Node, tolerance: Fraction, any_form: bool
) -> bool:
    value = exact_value(node)
    if value is not None:
        return _near(wanted, Number(value, False), tolerance)
    if not any_form and not _names(node) <= _CLOSED:
        return False
    guess = approximate(node)
    targets = [wanted.value, wanted.value / 100] if wanted.percent else [wanted.value]
    if guess is not None:
        slack = Fraction(_ROUNDING) * max(1, abs(wanted.value))
        targets = [v for v in targets if abs(Fraction(guess) - v) <= max(tolerance, slack)]
        if tolerance or not targets:
            return any(abs(Fraction(guess) - v) <= tolerance for v in targets)
    return any(symbolically_equal(str(target), text) for target in targets)


def _near(wanted: Number, found: Number, tolerance: Fraction) -> bool:
    values = [(wanted.value, found.value)]
    if wanted.percent and not found.percent:
        values.append((wanted.value / 100, found.value))
    if found.percent and not wanted.percent:
        values.append((wanted.value, found.value / 100))
    return any(abs(a - b) <= tolerance for a, b in values)


def _names(node: Node) -> set[str]:
    if node.kind == "name":
        return {str(node.value)}
    return set().union(*(_names(part) for part in node.parts))


def _is_arithmetic(node: Node) -> bool:
    """Whether a sum or product of numbers is in a tree, other than a number as written."""
    if is_written_number(node):
        return False
    if node.kind in "+*" and all(exact_value(part) is not None for part in node.parts):
        return True
    return any(map(_is_arithmetic, node.parts))


def _answered(text: str) -> str | None:
    """The last side of `x = 2 + 3 = 5`, `the answer is 5`, `5 = x`; None if sides differ in value
    or one is neither a name nor a value, and for inequalities."""
    if _ORDERED.search(text) or says(text, "not", "unsure", "wrong"):
        return None
    sides = [side.strip(" \n\t:,") for side in _EQUALS.split(text)]
    sides = [side for side in sides if side]
    if len(sides) == 2 and _SYMBOL.fullmatch(sides[1]) and _value(sides[0]) is not None:
        sides.pop()
    while len(sides) > 1 and _NAME.fullmatch(sides[0]) and not _NO_NAME.search(sides[0]):
        if _of_variable(sides[0]):
            return None
        del sides[0]
    values = [_value(side) for side in sides[:-1]]
    last = _value(sides[-1]) if values else 0.0
    if last is None or any(v is None or abs(v - last) > _ROUNDING * abs(last) for v in values):
        return None
    return sides[-1] if sides else None


def _value(text: str) -> float | None:
    text, factor = core(text)
    number = read_number(text)
    try:
        value = float(number.value) if number else approximate(parse(text))
    except (ExpressionError, OverflowError):
        return None
    return None if value is None else value * factor


def _about(wanted: Number, text: str, tolerance: Fraction) -> bool | None:
    """`\\frac{22}{7} \\approx 3.14` is either, if they are near each other."""
    sides = [side for side in (_answered(side) for side in _ABOUT.split(text)) if side]
    sides = [side for side in sides if not _SYMBOL.fullmatch(side)]
    values = [_value(side) for side in sides]
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    if max(known) - min(known) > _ALMOST * max(map(abs, known)):
        return False
    return any(_has_value(wanted, side, tolerance) for side in sides)


def _ends_in(wanted: Number, text: str, tolerance: Fraction) -> bool:
    """Whether the last number of a text is the wanted one, and no word says otherwise: neither a
    `not` or `or` in its clause, nor a half or a root beside it, nor `wrong` after it."""
    text = rewritten(_without_dollars(text))
    numbers = list(_NUMBER_IN_TEXT.finditer(text))
    if not numbers:
        return False
    found = numbers[-1]
    before, after = clause(text, found.start(), found.end())
    others = re.split(rf"\d|{_EQUALS.pattern}", before, flags=re.IGNORECASE)[:-1]
    digits = found.end() - len(found.group().lstrip("+- $€£¥"))
    more = _GOES_ON.match(text, found.end())
    if _JOINED.search(text[max(0, digits - 40) : digits]) or (more and more[1] not in UNITS):
        return False
    if _ORDERED.search(before) or any(map(_of_variable, others[-1:])):
        return False
    if doubtful(before, after) or pattern("wrong").search(text[found.end() :]):
        return False
    asked = rf"[^.!\d]{{0,20}}[?？]\s*{pattern('no', 'not').pattern}"
    if re.match(asked, text[found.end() :], re.IGNORECASE):
        return False  # 5? No.
    unit = re.match(r"[A-Za-z]+|\s+[A-Za-z]+", text[found.end() :])
    if unit:
        number, factor = core(found.group().strip() + unit.group())
        if factor != 1 or not unit.group()[0].isspace():
            return bool(_has_value(wanted, number + unit.group() * (factor != 1), tolerance))
    number = read_number(decimal_point(re.sub(r"[$€£¥\s]", "", found.group())))
    return number is not None and _near(wanted, number, tolerance)


def _of_variable(side: str) -> bool:
    """Whether words on the left of `is` say something of a variable: twice x, the root of n."""
    variable = re.search(r"(?<![A-Za-z\\'])(?!a\b)[a-z](?![A-Za-z'])", side)
    return variable is not None and says(side, "changes")


def _without_dollars(text: str) -> str:
    return SPAN.sub(lambda match: f" {match[1] or match[2] or match[3]} ", text)


# ---- mathematics --------------------------------------------------------------------------------


def same_maths(expected: str, given: str, marked: bool = True) -> bool:
    r"""Whether two mathematical texts mean the same: equal text, equal number, or equal by sympy.

    `x = 5` is 5, and equations are equal if the differences of their sides are, up to the sign, or
    (of several variables) up to a factor; inequalities, read from either end, if their sides are,
    or if they say an interval. Degrees are not converted to radians. Tuples, intervals and matrices
    are compared part by part, with their brackets; sets in braces, lists without brackets, unions
    and \pm without order, values with names by name. From a given text that is prose with one
    $formula$, or (marked=False) several, the last formula is taken, with those that `and`, `or` or
    a comma joins to it, and none that the words beside it deny.

    Raises rl.verdict.mathematics.symbolic.UndecidedError if sympy reaches no verdict in time.
    """
    if max(len(expected), len(given)) > 2 * MAX_CHARS:
        return squeezed(expected) == squeezed(given[: 2 * len(expected) + MAX_CHARS]) != ""
    expected, given = ungrouped(expected), ungrouped(formula(given, marked))
    if re.search(r"\\neq?(?![A-Za-z])|≠", expected):
        given = given.replace("!=", r"\ne ")
    plain_a, plain_b = plain(expected), plain(given)
    if other_angle(plain_a, plain_b) or other_unit(plain_a, plain_b):
        return False
    if other_connective(expected, given):
        return False
    known = [one_word(TEXT_COMMAND.sub(r"\1", plain(text))) for text in (expected, given)]
    if all(known):
        return known[0] == known[1]
    a, b = mathematical(expected), mathematical(given)
    parts_a = parts(a) or inequality(a)
    if parts_a and len(parts_a.letters) > 1 and says(given, "or"):
        return False  # x = 1 or y = 2
    if squeezed(a) == squeezed(b) or _same_word(a, b) or _spelled(expected) == _spelled(given):
        return bool(squeezed(a))
    if r"\emptyset" in (squeezed(unassigned(a)), squeezed(unassigned(b))):
        return squeezed(unassigned(a)) == squeezed(unassigned(b))
    if max(len(a), len(b)) > MAX_CHARS:
        return False
    wanted = read_number(a) or (read_number(core(a)[0]) if quantity(plain_a) else None)
    if wanted and (found := read_number(decimal_point(b))):
        return _near(wanted, found, Fraction(0))
    for one, other in ((expected, b), (given, a)):
        if _INTERVAL.search(other) and (span := interval(plain(one))):
            member = _MEMBER.match(other)
            return (not member or member[1] == span[0]) and same_maths(span[1], other)
    parts_b = parts(b) or inequality(b)
    if parts_a or parts_b:
        return _same_parts(parts_a or alone(a), parts_b or alone(b))
    if wanted:
        return bool(_has_value(wanted, b, Fraction(0), any_form=True))
    if (found := read_number(b)) and not _has_variables(a):
        return bool(_has_value(found, a, Fraction(0), any_form=True))
    bare_a, bare_b = unassigned(a), unassigned(b)
    if (bare_a, bare_b) != (a, b) and not _other_name(a, b) and same_maths(bare_a, bare_b):
        return True
    if "=" in a and "=" in b:
        return _same_equation(a, b)
    bare, factor = core(b)
    return _same_expression(a, bare if factor == 1 and not _has_variables(a) else b)


def _same_expression(a: str, b: str) -> bool:
    try:
        value_a, value_b = exact_value(parse(a)), exact_value(parse(b))
    except ExpressionError:
        return False
    if value_a is not None and value_b is not None:
        return value_a == value_b
    if _only_names(a) and _only_names(b):
        return False
    return symbolically_equal(a, b)


def _has_variables(text: str) -> bool:
    # 5m is a product here: in what is expected, a unit stands in \text{}
    try:
        return not _names(parse(text)) <= _CLOSED
    except ExpressionError:
        return False


def _spelled(text: str) -> str:
    r"""Without \text{} and spaces: 3\text{ hours }20\text{ minutes} is 3 hours 20 minutes."""
    return squeezed(TEXT_COMMAND.sub(r"\1", plain(text))).strip("$.")


def _other_name(a: str, b: str) -> bool:
    """Whether two texts say two variables of an expression: z = 2x is not y = 2x, y = 2x is 2x."""
    names = [
        text.partition("=")[0].strip()
        for text in (a, b)
        if "=" in text and _has_variables(unassigned(text))
    ]
    return (
        len(names) == 2
        and names[0] != names[1]
        and all(re.fullmatch("[a-z]", name) for name in names)
    )


def _same_equation(a: str, b: str) -> bool:
    sides_a, sides_b = a.split("="), b.split("=")
    if len(sides_a) != 2 or len(sides_b) != 2:
        return False
    if unassigned(a) != a and not _has_variables(unassigned(a)):
        return False  # x + 1 = 6 is x = 5, unsolved
    left, right = ("({})-({})".format(*sides) for sides in (sides_a, sides_b))
    try:  # 2x + 2y = 2 is x + y = 1; but 2x = 10, as it stands, is not x = 5
        if len(_names(parse(left)) - _CLOSED) > 1:
            return symbolically_equal(left, right, scaled=True)
    except ExpressionError:
        return False
    return _same_expression(left, right) or _same_expression(left, f"-({right})")


def _only_names(text: str) -> bool:
    # Words of up to three letters: as products of variables, 'no' would equal 'on'.
    return re.fullmatch(r"[A-Za-z\s]+", text) is not None


def _same_word(a: str, b: str) -> bool:
    # Yes is yes; A and a are names of two things, and so may be Ab and ab.
    if not (a + b).isascii():
        return a.casefold() == b.casefold() and a.replace(" ", "").isalpha()
    words = [
        [word if len(word) == 1 else word[0].lower() + word[1:] for word in text.split()]
        for text in (a, b)
    ]
    known = all(re.fullmatch(r"[A-Za-z][a-z]*", word) for word in words[0]) and len(a) > 2
    return known and any(len(word) > 2 for word in words[0]) and words[0] == words[1]


def _same_named(a: Parts, b: Parts) -> bool:
    """Whether x = 1, y = 2 has the values of another list of names, of a point (by the order of
    the names), or of a list without names (in its order, where the names tell what is what)."""
    if a.names and b.names and sorted(a.names) != sorted(b.names):
        return False
    named, bare = (a, b) if a.names else (b, a)
    if not bare.names and bare.brackets != "()":
        letter = min(named.letters)
        roots = len(named.letters) == 1 and (named is b or f"{letter}=" in squeezed(bare.items[0]))
        own = {item.partition("=")[0].strip() for item in bare.items if "=" in item}
        if not own <= {letter} or not (roots or (bare.brackets == "," and not own)):
            return False
        kind = "{}" if roots else "list"
        return _same_parts(Parts(kind, a.items), Parts(kind, b.items))
    if len(named.letters) == 1 and not bare.names:
        return False
    sides = []
    for side in (a, b):
        pairs = sorted(zip(side.names, side.items, strict=True)) if side.names else ()
        sides.append(tuple(item for _, item in pairs) or side.items)
    return _same_parts(Parts("list", sides[0]), Parts("list", sides[1]))


def _same_parts(a: Parts, b: Parts) -> bool:
    if len(a.items) != len(b.items):
        return False
    if (a.names or b.names) and {a.brackets, b.brackets} - {"{}", ",", "()"} <= {
        side.brackets for side in (a, b) if side.names
    }:
        return _same_named(a, b)
    kinds = {"{}" if side.brackets == "," else side.brackets for side in (a, b)}
    if len(kinds) > 1 and not (":" in kinds and all(kind[0] == ":" for kind in kinds)):
        return False
    if kinds.isdisjoint(("{}", "{} !=", "cup")):
        return all(same_maths(x, y) for x, y in zip(a.items, b.items, strict=True))
    left = list(b.items)
    for item in a.items:
        match = next((n for n, other in enumerate(left) if same_maths(item, other)), None)
        if match is None:
            return False
        del left[match]
    return True
