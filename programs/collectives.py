"""What a compiled step sends: its collectives by mesh axis, count and bytes, read from its text.

    print(table(read_collectives(step.lower(...).compile().as_text(), layout.mesh)))

Counted is what one device does in one run of the program. Instructions of a loop count as often as
the loop runs, if XLA knows how often (`known_trip_count`); otherwise once, and are marked open.
All branches of a conditional count as executed.

Bytes are those of the whole array: the result of an all-gather, the operand of an all-reduce, a
reduce-scatter or an all-to-all (the own block included), what a permute passes on. For a ragged
all-to-all it is the send buffer, a bound. So on an axis of n devices about (n-1)/n of it leaves the
device, and twice that for an all-reduce. An asynchronous pair counts as one collective.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

OPS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
NAME = r"%?([\w.\-]+)"
CALLED = re.compile(
    rf"\b(calls|to_apply|body|condition|true_computation|false_computation)={NAME}"
    r"|\b(branch_computations|called_computations)=\{([^}]*)\}"
)


class Shape(NamedTuple):
    """An array's type as HLO spells it, and its sizes."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the array; 4-bit and Boolean entries count as a whole one."""
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.sizes) * (max(8, int(bits.group())) // 8 if bits else 1)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.sizes))}]"


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shapes: tuple[Shape, ...]
    """Of the result; several for a tuple."""
    op: str
    operands: tuple[str, ...]
    attributes: str
    """The rest of the line."""

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that the instruction runs."""
        found = (one or listed for _, one, _, listed in CALLED.findall(self.attributes))
        return tuple(name for text in found for name in re.findall(NAME, text))

    @property
    def source(self) -> str:
        """Where it comes from, as JAX named it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


class Program(NamedTuple):
    """The computations of a module, each its instructions by name, and which one is the entry."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str


class Run(NamedTuple):
    """An instruction as it is executed."""

    instruction: Instruction
    operands: tuple[Shape, ...]
    times: int
    """Executions, with every loop of unknown length counted once."""
    is_open: bool
    """Whether such a loop is around it."""


class Collective(NamedTuple):
    """One collective instruction of a program."""

    op: str
    axes: tuple[str, ...]
    """Mesh axes along which the devices of a group differ."""
    whole: bool
    """Whether a group spans these axes; otherwise it is a part of them or no ring."""
    times: int
    """Executions in one step."""
    bytes: int
    """Of all executions, per device; see the module's docstring."""
    arrays: tuple[Shape, ...]
    """What one execution moves: whole arrays, as bytes are counted."""
    is_open: bool
    """Whether it is in a loop of unknown length, which counts once."""
    instruction: Instruction

    @property
    def largest(self) -> Shape:
        """The largest array."""
        return max(self.arrays, key=lambda shape: (shape.bytes, shape))


# ---- text ---------------------------------------------------------------------------------------


def parse(text: str) -> Program:
    """Computations and instructions of optimised HLO, as `Compiled.as_text()` prints it, or as XLA
    dumps it: there `%x#2` stands for the third element of `%x`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    results: dict[str, str] = {}
    for line in text.splitlines():
        head = re.match(rf"(ENTRY )?{NAME} \(.*\{{\s*$", line)
        if head:
            current, results = computations.setdefault(head.group(2), {}), {}
            entry = head.group(2) if head.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            instruction = parse_instruction(line)
            if instruction is not None:
                for operand in instruction.operands:
                    if "#" in operand and operand not in current:
                        _add_element(operand, current, results)
                current[instruction.name] = instruction
                results[instruction.name] = line.split(" = ", 1)[1]
    if not entry:
        raise ValueError("no ENTRY computation in the text; pass what compile().as_text() returns")
    return Program(computations, entry)


def parse_instruction(line: str) -> Instruction | None:
    """One line of a computation; None for what is none, such as a line of a long constant."""
    found = re.match(rf"\s+(?:ROOT )?{NAME} = (.*)", line)
    if found is None:
        return None
    name, rest = found.groups()
    rest = re.sub(r"/\*.*?\*/", "", rest)
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shapes, rest = rest[:end], rest[end:].lstrip()
    op, _, _ = rest.partition("(")
    close = _closing(rest)
    inner = rest[len(op) + 1 : close]
    operands = re.findall(r"%([\w.\-]+(?:#\d+)*)", inner)
    return Instruction(name, _shapes(shapes), op, tuple(operands), rest[close + 1 :])


def _add_element(name: str, computation: dict[str, Instruction], results: dict[str, str]) -> None:
    """The get-tuple-element that the operand `name`, such as x#2 or x#0#1, stands for."""
    base, _, index = name.rpartition("#")
    if base not in results:
        _add_element(base, computation, results)
    text = re.sub(r"/\*.*?\*/", "", results[base])
    depth, parts = 0, [""]
    for letter in text[1 : _closing(text)]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    results[name] = parts[int(index)].strip()
    element = Instruction(
        name, _shapes(results[name]), "get-tuple-element", (base,), f", index={index}"
    )
    computation[name] = element


def _closing(text: str) -> int:
    """Place of the parenthesis that closes the first one; the end if none does."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(map(int, filter(None, sizes.replace("<=", "").split(",")))))
        for dtype, sizes in re.findall(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]", text)
    )


def executed(program: Program) -> Iterator[Run]:
    """Every instruction that runs, with how often."""

    def visit(name: str, times: int, is_open: bool) -> Iterator[Run]:
        computation = program.computations[name]
        for instruction in computation.values():
            shapes = (computation[o].shapes for o in instruction.operands if o in computation)
            yield Run(instruction, tuple(itertools.chain(*shapes)), times, is_open)
            inside, opens = times, is_open
            if instruction.op == "while":
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes)
                inside, opens = times * int(known.group(1) if known else 1), is_open or not known
            if collective_op(instruction) is None:
                for called in instruction.called:
                    yield from visit(called, inside, opens)

    yield from visit(program.entry, 1, False)


# ---- collectives --------------------------------------------------------------------------------


def collective_op(instruction: Instruction) -> str | None:
    """Which collective an instruction starts, if it does."""
    op = instruction.op.removesuffix("-start")
    return op if op in OPS else None


def read_collectives(hlo_text: str, mesh: Mesh) -> tuple[Collective, ...]:
    """The collectives of a compiled program over `mesh`, in the order of its text.

    Those among single devices, which move nothing, are left out.

    Raises:
        ValueError: the text is no compiled module, or spells groups of devices in an unknown way.
    """
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    found = (_collective(run, sizes) for run in executed(parse(hlo_text)))
    return tuple(one for one in found if one is not None)


def _collective(run: Run, sizes: dict[str, int]) -> Collective | None:
    op = collective_op(run.instruction)
    if op is None:
        return None
    attributes, arrays, gathered = run.instruction.attributes, run.operands, 1
    if op == "ragged-all-to-all":
        arrays = arrays[:1]
    if op == "collective-permute":
        groups = tuple(p for p in _lists(attributes, "source_target_pairs") if p[0] != p[1])
        axes, whole = permuted_axes(groups, sizes)
    else:
        groups = replica_groups(attributes, math.prod(sizes.values()))
        axes, whole = group_axes(groups, sizes)
        gathered = len(groups[0]) if op == "all-gather" else 1
    if not axes:
        return None
    if op == "all-gather":
        arrays = tuple(_gathered(shape, attributes, gathered) for shape in arrays)
    size = run.times * sum(shape.bytes for shape in arrays)
    return Collective(op, axes, whole, run.times, size, arrays, run.is_open, run.instruction)


def _gathered(shape: Shape, attributes: str, times: int) -> Shape:
    found = re.search(r"\bdimensions=\{(\d+)\}", attributes)
    sizes = list(shape.sizes)
    sizes[int(found.group(1)) if found else 0] *= times
    return Shape(shape.dtype, tuple(sizes))


Groups = tuple[tuple[int, ...], ...]


def _lists(attributes: str, name: str) -> Groups:
    found = re.search(rf"\b{name}=\{{((?:\{{[\d,]*\}},?)*)\}}", attributes)
    inner = re.findall(r"\{([\d,]+)\}", found.group(1)) if found else ()
    return tuple(tuple(map(int, group.split(","))) for group in inner)


def replica_groups(attributes: str, num_devices: int) -> Groups:
    """Groups of devices, in any of XLA's spellings: lists, iota, or axes of a mesh of its own.

    {{0,1},{2,3}}; [2,4]<=[4,2]T(1,0); mesh['a'=2,'b'=4] {'b'}, with 'b':(2)2 for a part of an axis.
    """
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes)
    if iota:
        count, size, grid, order = iota.groups()
        ids = np.arange(int(count) * int(size)).reshape([int(n) for n in grid.split(",")])
        if order:
            ids = ids.transpose([int(n) for n in order.split(",")])
        return _rows(ids.reshape(int(count), int(size)))
    if named:
        return _named_groups(*named.groups())
    if re.search(r"replica_groups=\{\{", attributes):
        return _lists(attributes, "replica_groups")
    if re.search(r"replica_groups=\{\}|^(?!.*replica_groups=)", attributes):
        return (tuple(range(num_devices)),)
    raise ValueError(f"replica groups in an unknown spelling: {attributes[:200]}")


def _rows(ids: np.ndarray) -> Groups:
    return tuple(tuple(int(n) for n in row) for row in ids)


def _named_groups(mesh: str, axes: str) -> Groups:
    sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts = {axis: (1, size) for axis, size in sizes.items()}
    chosen = []
    for axis, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        chosen.append(axis)
        parts[axis] = (int(before), int(size)) if size else (1, sizes[axis])
    grid = [(before, size, sizes[a] // before // size) for a, (before, size) in parts.items()]
    ids = np.arange(math.prod(sizes.values())).reshape(list(itertools.chain(*grid)))
    places = [3 * list(sizes).index(axis) + 1 for axis in chosen]
    ids = np.moveaxis(ids, places, range(-len(places), 0))
    return _rows(ids.reshape(-1, math.prod(parts[axis][1] for axis in chosen)))


def group_axes(groups: Groups, sizes: Mapping[str, int]) -> tuple[tuple[str, ...], bool]:
    """Axes along which the devices of a group differ, and whether the groups span them.

    `sizes` are the axes of the mesh, outermost first; devices are numbered in its order.
    """
    axes = _varying(((group[0], device) for group in groups for device in group), sizes)
    span = math.prod(sizes[axis] for axis in axes)
    return axes, all(len(group) == span for group in groups)


def permuted_axes(pairs: Groups, sizes: Mapping[str, int]) -> tuple[tuple[str, ...], bool]:
    """Axes that a permutation crosses, and whether it moves every device alike: along a ring."""
    axes = _varying(pairs, sizes)
    grid = tuple(sizes.values())
    steps = {
        tuple((b - a) % n for a, b, n in zip(*_places(pair, grid), grid, strict=True))
        for pair in pairs
    }
    return axes, len(steps) == 1


def _places(pair: tuple[int, ...], grid: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return (tuple(map(int, np.unravel_index(device, grid))) for device in pair)


def _varying(pairs: Iterable[tuple[int, ...]], sizes: Mapping[str, int]) -> tuple[str, ...]:
    grid = tuple(sizes.values())
    places = [tuple(_places(pair, grid)) for pair in pairs]
    return tuple(
        axis for i, axis in enumerate(sizes) if any(first[i] != other[i] for first, other in places)
    )


def by_op_and_axes(collectives: Iterable[Collective]) -> dict[tuple[str, str], Collective]:
    """Collectives of the same kind added up, by op and axes; of the arrays the largest is kept.

    Axes are joined by `+`. `~` before them: groups are parts of the axes, or no ring. `?` after
    them: in a loop of unknown length, counted once.
    """

    def label(one: Collective) -> str:
        return "~" * (not one.whole) + "+".join(one.axes) + "?" * one.is_open

    def add(a: Collective, b: Collective) -> Collective:
        arrays = (max(a.largest, b.largest, key=lambda shape: (shape.bytes, shape)),)
        return a._replace(times=a.times + b.times, bytes=a.bytes + b.bytes, arrays=arrays)

    groups: dict[tuple[str, str], list[Collective]] = {}
    for one in collectives:
        groups.setdefault((one.op, label(one)), []).append(one)
    return {key: functools.reduce(add, groups[key]) for key in sorted(groups)}


def table(collectives: Iterable[Collective]) -> str:
    """A line per op and axes (`by_op_and_axes`): executions and bytes per step and device, and the
    largest array that one execution moves."""
    rows = [("op", "axes", "count", "bytes", "largest")]
    for (op, axes), one in by_op_and_axes(collectives).items():
        rows.append((op, axes, str(one.times), str(one.bytes), str(one.largest)))
    a, b, c, d, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "".join(
        f"{op:{a}}  {axes:{b}}  {count:>{c}}  {size:>{d}}  {largest}\n"
        for op, axes, count, size, largest in rows
    )


# ---- FLOPs --------------------------------------------------------------------------------------


def read_flops(hlo_text: str, open_trips: float = 0.0) -> float:
    """FLOPs of the matrix products of one run on one device: 2 M N K each.

    Products are `dot` instructions, which XLA:CPU leaves inside its library fusions and XLA:GPU
    inside Triton's, and calls of cuBLAS. Kernels of our own (custom calls) are not seen.

    Args:
        hlo_text: text of a compiled module.
        open_trips: how often a loop of unknown length runs. Those of a train step are the loops
            over tiles of routed experts, whose work depends on the routing. 0 leaves them out, to
            be counted from the number of tokens; 1 counts one round of each.
    """
    total = 0.0
    for run in executed(parse(hlo_text)):
        total += run.times * (open_trips if run.is_open else 1) * _product_flops(run)
    return total


def _product_flops(run: Run) -> int:
    attributes = run.instruction.attributes
    if run.instruction.op == "dot":
        reduced = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
    elif run.instruction.op == "custom-call":
        reduced = re.search(r'"lhs_contracting_dimensions":\[([\d",]*)\]', attributes)
    else:
        return 0
    if reduced is None:
        return 0
    dims = [int(n) for n in re.findall(r"\d+", reduced.group(1))]
    inner = math.prod(run.operands[0].sizes[dim] for dim in dims)
    return 2 * math.prod(run.instruction.shapes[0].sizes) * inner
