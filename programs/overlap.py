"""What a schedule computes while a collective is under way, read from a compiled program's text.

    for span in read_spans(step.lower(...).compile().as_text()):
        print(span)

XLA's text of a scheduled module lists instructions in the order in which they are issued. What
stands between the start and the done of an asynchronous collective runs beside it. Of the matrix
products there, those count as another micro batch's that come from other values of the loop: a loop
over layers carries one activation per micro batch, and a product belongs to those that it can be
traced back to, within one round.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from programs.collectives import OPS, Instruction, Program, parse

Computation = dict[str, Instruction]
Counter = Callable[[Instruction], int]


class Span(NamedTuple):
    """An asynchronous collective and what is issued between its start and its done."""

    op: str
    source: str
    """Where the collective comes from, as JAX named it."""
    products: tuple[str, ...]
    """Instructions in between that multiply matrices, themselves or in what they call."""
    of_others: tuple[str, ...]
    """Those of them that come from other values of the loop than the collective."""


def read_spans(hlo_text: str) -> tuple[Span, ...]:
    """Every asynchronous collective of a scheduled module, in the order of its text.

    Raises:
        ValueError: the module is not scheduled, so its text says nothing about order.
    """
    if "is_scheduled=true" not in hlo_text.split("\n", 1)[0]:
        raise ValueError("the module is not scheduled; pass what compile().as_text() returns")
    program = parse(hlo_text)
    count = product_counter(program)
    bodies = program.computations.values()
    return tuple(span for body in bodies for span in _spans(program, dict(body), count))


def started(program: Program, instruction: Instruction) -> str | None:
    """The collective that an instruction starts without waiting for it."""
    if not instruction.op.endswith("-start"):
        return None
    op = instruction.op.removesuffix("-start")
    if op in OPS:
        return op
    inner = (i for name in instruction.called for i in program.computations[name].values())
    return next((one.op for one in inner if one.op in OPS), None)


def _spans(program: Program, body: Computation, count: Counter) -> Iterator[Span]:
    starts = {i.name: op for i in body.values() if (op := started(program, i))}
    if not starts:
        return
    order, origins = list(body.values()), carried_origins(body)
    place = {instruction.name: i for i, instruction in enumerate(order)}
    ends = {
        operand: place[instruction.name]
        for instruction in order
        if instruction.op.endswith("-done")
        for operand in instruction.operands
    }
    for start, op in starts.items():
        between = order[place[start] + 1 : ends.get(start, place[start] + 1)]
        found = [i.name for i in between if count(i)]
        others = [n for n in found if _apart(origins[n], origins[start])]
        yield Span(op, body[start].source, tuple(found), tuple(others))


def _apart(a: frozenset[int], b: frozenset[int]) -> bool:
    return bool(a and b and not a & b)


def carried_origins(body: Computation) -> dict[str, frozenset[int]]:
    """The carried arrays, by their place in the loop's state, that each instruction depends on.

    Carried is what one round changes for the next: not weights, which pass through, nor counters.
    """
    state = {i.name for i in body.values() if i.op == "parameter"}
    taken: dict[str, int] = {}
    for instruction in body.values():
        index = re.search(r"\bindex=(\d+)", instruction.attributes)
        if instruction.op == "get-tuple-element" and instruction.operands[0] in state and index:
            taken[instruction.name] = int(index.group(1))
    root = list(body.values())[-1]
    passed = {i for i, name in enumerate(root.operands) if taken.get(name) == i}
    origins: dict[str, frozenset[int]] = {}
    for instruction in body.values():
        name = instruction.name
        if name in taken:
            is_array = any(shape.sizes for shape in instruction.shapes)
            new = is_array and taken[name] not in passed and root.op == "tuple"
            origins[name] = frozenset({taken[name]} if new else ())
        else:
            parts = (origins.get(operand, frozenset()) for operand in instruction.operands)
            origins[name] = frozenset().union(*parts)
    return origins


def product_counter(program: Program) -> Counter:
    """Counts the matrix products in an instruction's text, those of what it calls included."""

    @functools.cache
    def within(name: str) -> int:
        return sum(map(count, program.computations.get(name, {}).values()))

    def count(instruction: Instruction) -> int:
        if instruction.op == "dot" or 'custom_call_target="__cublas' in instruction.attributes:
            return 1
        return sum(map(within, instruction.called))

    return count
