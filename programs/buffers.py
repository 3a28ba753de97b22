"""Bytes of a compiled step by what they are for: weights, gradients, optimizer, stash, exchange.

Read from the scheduled text and from XLA's own list of buffers, at the moment when most is alive.

- The program's parameters carry names: `state['params'][...]` are weights, `state['opt']` and the
  moving average belong to the optimizer.
- What a loop over ticks, micro batches or layers carries unchanged besides parameters are weights
  held to compute with; what it changes are gradients, if they have the shape of weights, or else
  what waits for the backward pass.
- Of the rest, arrays with as many rows as the expert exchange has belong to it.

XLA's own figure for the peak leaves out what loops carry; here all that is alive counts.
"""

import collections
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from programs.collectives import Instruction, Program, Shape

PARTS = ("weights", "gradients", "optimizer", "stash", "exchange", "workspace")


class Carried(NamedTuple):
    """What a step's loops carry, bytes per device."""

    weights: int
    """Held besides the parameters themselves."""
    gradients: int
    stash: int


def parameters(program: Program) -> dict[str, int]:
    """Bytes of the parameters by part: weights, optimizer, other."""
    found = {"weights": 0, "optimizer": 0, "other": 0}
    for instruction in program.computations[program.entry].values():
        if instruction.op == "parameter":
            found[_part(instruction)] += sum(shape.bytes for shape in instruction.shapes)
    return found


def _part(parameter: Instruction) -> str:
    name = re.sub(r"[\\']", "", parameter.source)
    if re.match(r"state\[(params|router_bias)\]", name):
        return "weights"
    return "optimizer" if re.match(r"state\[(opt|ema)\]", name) else "other"


def carried(program: Program, pipeline: bool) -> Carried:
    """What the loops of a step carry; `pipeline`: whether its outer loop is over ticks.

    The loop over ticks of a pipeline, or that over micro batches, whose sums are gradients; inside
    of that, or in the step itself where there is one micro batch, those over layers: what the
    forward ones leave behind waits for the backward ones.
    """
    shapes = _weight_shapes(program)
    body = program.computations[program.entry]
    outer = [i for i in body.values() if i.op == "while"]
    if pipeline and outer:
        return _of_loop(program, body, max(outer, key=_bytes), shapes)
    micro = [i for i in outer if _inner_loops(program, i)]
    sums = Carried(0, 0, 0)
    for loop in micro[:1]:
        found = _of_loop(program, body, loop, shapes)
        sums = Carried(found.weights, found.gradients + found.stash, 0)
        body = program.computations[_body_of(loop)]
    layers = [i for i in body.values() if i.op == "while" and _stacks(program, i)]
    left = {loop.name: _left_behind(program, loop) for loop in layers}
    backward = {loop.name for loop in layers if "transpose(" in loop.source}
    stash = sum(size for name, size in left.items() if name not in backward)
    if not micro:
        sums = Carried(0, sum(left[name] for name in backward), 0)
    return sums._replace(stash=stash)


def _left_behind(program: Program, loop: Instruction) -> int:
    """Bytes that a loop over layers writes, an entry per layer."""
    rounds, changed = _rounds(loop), _changed(program, loop)
    return sum(
        shape.bytes
        for shape, new in zip(loop.shapes, changed, strict=True)
        if new and shape.sizes and shape.sizes[0] == rounds
    )


def _body_of(loop: Instruction) -> str:
    found = re.search(r"\bbody=%?([\w.\-]+)", loop.attributes)
    assert found is not None
    return found.group(1)


def _inner_loops(program: Program, loop: Instruction) -> bool:
    """Whether a loop holds loops over layers, as that over micro batches does."""
    inside = program.computations[_body_of(loop)].values()
    return any(i.op == "while" and _stacks(program, i) for i in inside)


def _stacks(program: Program, loop: Instruction) -> bool:
    """Whether a loop writes arrays with an entry per round, as one over layers does; not that of
    the loss over blocks of tokens, which is a region of its own."""
    if re.search(r"jvp\(\)+/shard_map/while$", loop.source):
        return False
    rounds = _rounds(loop)
    changed = _changed(program, loop)
    return any(
        len(shape.sizes) > 2 and shape.sizes[0] == rounds
        for shape, new in zip(loop.shapes, changed, strict=True)
        if new
    )


def _rounds(loop: Instruction) -> int:
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    return int(found.group(1)) if found else 0


def _bytes(instruction: Instruction) -> int:
    return sum(shape.bytes for shape in instruction.shapes)


def _changed(program: Program, loop: Instruction) -> list[bool]:
    """Of each array that a loop carries, whether a round may change it."""
    body = program.computations[_body_of(loop)]
    root = list(body.values())[-1]
    if root.op != "tuple" or len(root.operands) != len(loop.shapes):
        return [True] * len(loop.shapes)

    def passed(index: int, name: str) -> bool:
        step = body.get(name)
        while step is not None and step.op in ("bitcast", "copy"):
            step = body.get(step.operands[0])
        if step is None or step.op != "get-tuple-element":
            return False
        at = re.search(r"\bindex=(\d+)", step.attributes)
        return at is not None and int(at[1]) == index

    return [not passed(i, name) for i, name in enumerate(root.operands)]


def _of_loop(
    program: Program,
    outside: Mapping[str, Instruction],
    loop: Instruction,
    weights: Collection[tuple[int, ...]],
) -> Carried:
    """What a loop over ticks or micro batches carries."""
    start = outside.get(loop.operands[0])
    sources = start.operands if start is not None and start.op == "tuple" else ()
    found: collections.Counter[str] = collections.Counter()
    changed = _changed(program, loop)
    held = set(weights) | {
        squeezed(shape) for shape, new in zip(loop.shapes, changed, strict=True) if not new
    }
    for index, (shape, new) in enumerate(zip(loop.shapes, changed, strict=True)):
        if not shape.sizes:
            continue
        if new:
            is_gradient = squeezed(shape) in held and shape.dtype == "f32"
            found["gradients" if is_gradient else "stash"] += shape.bytes
        elif not (sources and _is_parameter(outside, sources[index])):
            found["weights"] += shape.bytes
    return Carried(found["weights"], found["gradients"], found["stash"])


def squeezed(shape: Shape) -> tuple[int, ...]:
    """Sizes without those of 1, in order of size: of arrays that differ by a transposition alone
    they are the same."""
    return tuple(sorted(size for size in shape.sizes if size > 1))


def _is_parameter(outside: Mapping[str, Instruction], name: str) -> bool:
    """Whether a value is a parameter of the program, perhaps with another shape."""
    step = outside.get(name)
    while step is not None and step.op in ("bitcast", "get-tuple-element"):
        step = outside.get(step.operands[0]) if step.operands else None
    return step is not None and step.op == "parameter"


def _weight_shapes(program: Program) -> set[tuple[int, ...]]:
    entry = program.computations[program.entry].values()
    return {
        squeezed(shape)
        for i in entry
        if i.op == "parameter" and _part(i) == "weights"
        for shape in i.shapes
    }


# ---- what is alive ------------------------------------------------------------------------------


class Buffer(NamedTuple):
    """A value's place in the memory of temporaries."""

    offset: int
    size: int
    shape: Shape | None


def alive_at_peak(buffers: str, live_ranges: str) -> list[Buffer]:
    """Places of temporaries that are in use at the moment when their sum is largest.

    Args:
        buffers: text of XLA's buffer assignment.
        live_ranges: text of its live ranges.
    """
    places = _places(buffers)
    events: dict[int, list[tuple[int, Buffer]]] = collections.defaultdict(list)
    for name, start, end in re.findall(
        r"^    (\S+\{[\d,]*\}):(\d+)-(\d+)$", live_ranges, re.MULTILINE
    ):
        place = places.get(name)
        if place is not None:
            events[int(start)].append((1, place))
            events[int(end) + 1].append((-1, place))
    alive: collections.Counter[tuple[int, int]] = collections.Counter()
    shapes: dict[tuple[int, int], Buffer] = {}
    total = most = 0
    best: list[Buffer] = []
    for time in sorted(events):
        for step, place in sorted(events[time], key=lambda event: event[0]):
            key = place.offset, place.size
            before = alive[key]
            alive[key] += step
            total += place.size * ((alive[key] > 0) - (before > 0))
            if alive[key] > 0 and not (place.shape is None and key in shapes):
                shapes[key] = place
        if total > most:
            most, best = total, [shapes[key] for key, count in alive.items() if count > 0]
    return best


def _places(buffers: str) -> dict[str, Buffer]:
    """Place of every value in the allocation of temporaries, by its name and index."""
    found: dict[str, Buffer] = {}
    inside = False
    for line in buffers.splitlines():
        if line.startswith("allocation "):
            inside = "preallocated-temp" in line
            continue
        value = inside and re.match(
            r" value: <\d+ ([^\s{]+)(\{[\d,]*\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): "
            r"(\S+)",
            line,
        )
        if value:
            name, index, size, offset, shape = value.groups()
            kind = re.match(r"([a-z]+\d*\w*)\[([\d,]*)\]", shape)
            array = None
            if kind:
                sizes = tuple(int(n) for n in kind.group(2).split(",") if n)
                array = Shape(kind.group(1), sizes)
            found[name + (index or "{}")] = Buffer(int(offset), int(size), array)
    return found


Ranges = Collection[tuple[int, int]]
"""Numbers of rows, from and to, both included."""


def parts(
    program: Program,
    arguments: int,
    temporaries: int,
    alive: Collection[Buffer],
    rows: Ranges,
    pipeline: bool,
) -> dict[str, int]:
    """Bytes of a step by PARTS; they add up to arguments and temporaries.

    rows: how many rows the expert exchange's arrays have. pipeline: see `carried`.
    """
    of_state, loops = parameters(program), carried(program, pipeline)
    exchange = sum(place.size for place in alive if _has_rows(place.shape, rows))
    held = loops.weights + loops.gradients + loops.stash
    found = {
        "weights": of_state["weights"] + loops.weights,
        "gradients": loops.gradients,
        "optimizer": of_state["optimizer"],
        "stash": loops.stash,
        "exchange": min(exchange, max(0, temporaries - held)),
    }
    return found | {"workspace": arguments + temporaries - sum(found.values())}


def _has_rows(shape: Shape | None, rows: Ranges) -> bool:
    """Whether an array holds rows of the exchange: as many as one of the ranges, in a dimension
    that is not its last."""
    if shape is None or len(shape.sizes) < 2:
        return False
    return any(low <= size <= high for size in shape.sizes[-2:-1] for low, high in rows)
