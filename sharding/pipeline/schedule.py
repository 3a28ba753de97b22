"""Pipeline schedules: the order of forward and backward passes per rank (V3 report 3.2.1, table 2).

A schedule is data: per rank a tuple of ops in the order of execution. It says nothing of time.
`sharding/pipeline/ticks.py` makes of it the table that an executor runs,
`sharding/pipeline/simulate.py` gives the ops durations. A stage is one of the equal parts that the
model's layers are cut into; a rank holds one or several of them, its chunks. A micro-batch passes
the stages along a route.
"""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

Kind = Literal["F", "B", "FB", "I", "W"]
"""F forward, B full backward, FB a forward and a full backward at once, I gradient of the input
only, W the weight gradient that an earlier I left."""

Name = Literal["gpipe", "1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"]
SCHEDULES: tuple[Name, ...] = get_args(Name)
"""Names that `make_schedule` knows."""

Route = tuple[tuple[int, int], ...]
"""(rank, chunk) from the model's first stage to its last."""


class Op(NamedTuple):
    """One piece of work of a rank. What a kind does not use is -1."""

    kind: Kind
    chunk: int = -1
    """Chunk and micro-batch of the forward pass: F and FB."""
    micro: int = -1
    chunk_b: int = -1
    """Chunk and micro-batch of the backward pass: B, FB, I and W."""
    micro_b: int = -1


class Part(NamedTuple):
    """An op's forward or backward work; FB has both."""

    kind: Literal["F", "B", "I", "W"]
    chunk: int
    micro: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Order of all ops of one training step, on every rank. `check` proves that it can run."""

    name: str
    ranks: int
    chunks: int
    """Stages that a rank holds."""
    micro_batches: int
    routes: tuple[Route, ...]
    route_of: tuple[int, ...]
    """Per micro-batch, the route that it takes."""

    @functools.cached_property
    def orders(self) -> tuple[tuple[Op, ...], ...]:
        """Per rank, its ops in the order of execution."""
        sizes = self.ranks, self.micro_batches, self.chunks
        return tuple(tuple(_order(self.name, rank, *sizes)) for rank in range(self.ranks))

    @property
    def num_stages(self) -> int:
        """Stages of the model: every route passes all of them."""
        return len(self.routes[0])

    @property
    def stage_of(self) -> tuple[tuple[int, ...], ...]:
        """The stage that each rank's chunk holds. With two routes a stage is held by two ranks."""
        held = {place: stage for route in self.routes for stage, place in enumerate(route)}
        return tuple(
            tuple(held[rank, chunk] for chunk in range(self.chunks)) for rank in range(self.ranks)
        )


def parts(op: Op) -> tuple[Part, ...]:
    """The forward part of an op, then its backward part: F and FB have the first, all but F the
    second."""
    forward = (Part("F", op.chunk, op.micro),) if op.kind in ("F", "FB") else ()
    if op.kind == "F":
        return forward
    return (*forward, Part("B" if op.kind == "FB" else op.kind, op.chunk_b, op.micro_b))


@functools.lru_cache(maxsize=64)
def make_schedule(name: str, ranks: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """The schedule of this name.

    `chunks` is the number of stages per rank of `interleaved`. The others fix theirs (two for
    `dualpipe` and `dualpipev`, one for the rest); 1 stands for that.
    Errors: ValueError for numbers that the schedule cannot take, with those that it can.
    """
    if name not in SCHEDULES:
        raise ValueError(f"no pipeline schedule {name!r}; there are {', '.join(SCHEDULES)}")
    if min(ranks, micro_batches, chunks) < 1:
        raise ValueError(
            f"schedule {name}: ranks={ranks}, micro_batches={micro_batches} and chunks={chunks} "
            "must all be at least 1"
        )
    held = 2 if name.startswith("dualpipe") else chunks if name == "interleaved" else 1
    if chunks not in (1, held):
        raise ValueError(
            f"schedule {name}: a rank holds {held} chunk(s), got chunks={chunks}; leave it at 1, "
            "or take the schedule interleaved"
        )
    _check_sizes(name, ranks, micro_batches, chunks)
    if name == "dualpipe":
        there = tuple((rank, 0) for rank in range(ranks))
        back = tuple((rank, 1) for rank in reversed(range(ranks)))
        routes, half = (there, back), micro_batches // 2
        route_of = (0,) * half + (1,) * half
    elif name == "dualpipev":
        down = tuple((rank, 0) for rank in range(ranks))
        routes = ((*down, *((rank, 1) for rank in reversed(range(ranks)))),)
        route_of = (0,) * micro_batches
    else:
        routes = (tuple((rank, chunk) for chunk in range(held) for rank in range(ranks)),)
        route_of = (0,) * micro_batches
    return Schedule(name, ranks, held, micro_batches, routes, route_of)


def _check_sizes(name: str, ranks: int, micro_batches: int, chunks: int) -> None:
    """Refuse what only one schedule refuses."""
    if name == "interleaved" and chunks < 2:
        raise ValueError(
            f"schedule interleaved: chunks={chunks} leaves nothing to interleave; give every rank "
            "2 or more, or take the schedule 1f1b"
        )
    if name == "interleaved" and micro_batches % ranks:
        nearest = -(-micro_batches // ranks) * ranks
        raise ValueError(
            f"schedule interleaved: {micro_batches} micro-batches are no multiple of {ranks} "
            f"ranks; take {nearest}"
        )
    if name == "dualpipe" and ranks % 2:
        raise ValueError(
            f"schedule dualpipe: the two directions mirror each other, so ranks must be even, got "
            f"{ranks}; take {ranks + 1}, or the schedule dualpipev"
        )
    if name == "dualpipe" and (micro_batches % 2 or micro_batches < 2 * ranks):
        nearest = max(2 * ranks, micro_batches + micro_batches % 2)
        raise ValueError(
            f"schedule dualpipe: micro-batches must be even (half per direction) and at least "
            f"2 x {ranks} ranks, got {micro_batches}; take {nearest}"
        )
    if name == "dualpipev" and micro_batches < 2 * ranks:
        raise ValueError(
            f"schedule dualpipev: needs at least 2 x {ranks} micro-batches to fill its "
            f"{2 * ranks} stages, got {micro_batches}; take {2 * ranks}"
        )


def _order(name: str, rank: int, ranks: int, micro_batches: int, chunks: int) -> Iterator[Op]:
    if name == "dualpipe":
        return itertools.chain.from_iterable(dualpipe_steps(rank, ranks, micro_batches))
    if name == "dualpipev":
        return itertools.chain.from_iterable(dualpipev_steps(rank, ranks, micro_batches))
    if name == "zb1p":
        return _zb1p(rank, ranks, micro_batches)
    if name == "gpipe":
        warm = micro_batches
    elif name == "1f1b":
        warm = ranks - rank - 1
    else:
        warm = 2 * (ranks - rank - 1) + (chunks - 1) * ranks
    return _one_by_one(warm, ranks, micro_batches, chunks)


# ---- one direction ------------------------------------------------------------------------------


def _one_by_one(warm: int, ranks: int, micro_batches: int, chunks: int) -> Iterator[Op]:
    """`warm` forward passes, then one forward and one backward in turn, then what is left.

    With several chunks, groups of as many micro-batches as ranks pass one chunk after the other
    (interleaved 1F1B as Megatron-LM defines it); with one chunk that is the plain order.
    """

    def place(k: int) -> tuple[int, int]:
        group, within = divmod(k, ranks * chunks)
        return within // ranks, group * ranks + within % ranks

    total = micro_batches * chunks
    # One chunk needs no groups, so there the micro-batches need not be a multiple of the ranks.
    places = [place(k) if chunks > 1 else (0, k) for k in range(total)]
    forward = [Op("F", chunk, micro) for chunk, micro in places]
    backward = [Op("B", chunk_b=chunks - 1 - chunk, micro_b=micro) for chunk, micro in places]
    warm = min(warm, total)
    yield from forward[:warm]
    for f, b in zip(forward[warm:], backward, strict=False):
        yield from (f, b)
    yield from backward[total - warm :]


def _zb1p(rank: int, ranks: int, micro_batches: int) -> Iterator[Op]:
    """ZB-H1 of zero-bubble pipelining, which table 2 of the V3 report calls ZB1P.

    1F1B whose backward is split. Rank p leaves the weight gradients of p micro-batches undone
    while gradients of inputs are awaited by others, and does them when nobody waits any more. It
    has p forward passes fewer in flight than rank 0, so all ranks hold as much as 1F1B's rank 0.
    """
    forward = iter(range(micro_batches))
    for micro in itertools.islice(forward, ranks - rank):
        yield Op("F", 0, micro)
    for micro in range(micro_batches):
        yield Op("I", chunk_b=0, micro_b=micro)
        if micro >= rank:
            yield Op("W", chunk_b=0, micro_b=micro - rank)
        for following in itertools.islice(forward, 1):
            yield Op("F", 0, following)
    for micro in range(max(0, micro_batches - rank), micro_batches):
        yield Op("W", chunk_b=0, micro_b=micro)


# ---- two directions -----------------------------------------------------------------------------


class _Queue:
    """Hands out a rank's ops of two directions, each direction's micro-batches in order."""

    def __init__(self, chunk_of: tuple[int, int], first_micro: tuple[int, int]):
        self._chunk_of = chunk_of
        self._forward = [itertools.count(first) for first in first_micro]
        self._backward = [itertools.count(first) for first in first_micro]
        self._deferred: list[Op] = []

    def f(self, direction: int) -> Op:
        return Op("F", self._chunk_of[direction], next(self._forward[direction]))

    def b(self, direction: int) -> Op:
        chunk, micro = self._chunk_of[direction], next(self._backward[direction])
        return Op("B", chunk_b=chunk, micro_b=micro)

    def i(self, direction: int) -> Op:
        op = self.b(direction)._replace(kind="I")
        self._deferred.append(op)
        return op

    def w(self) -> Op:
        return self._deferred.pop(0)._replace(kind="W")

    def fb(self, forward: int, backward: int) -> Op:
        f, b = self.f(forward), self.b(backward)
        return Op("FB", f.chunk, f.micro, b.chunk_b, b.micro_b)


def dualpipe_steps(rank: int, ranks: int, micro_batches: int) -> list[list[Op]]:
    """The eight steps of DualPipe on one rank (V3 report 3.2.1); one after the other they are its
    order.

    The first half of the micro-batches enters at rank 0 and takes chunk 0 of every rank, the other
    half enters at the last rank and takes chunk 1.
    """
    half = micro_batches // 2
    near = min(rank, ranks - 1 - rank)
    flip = rank >= ranks // 2
    queue = _Queue(
        chunk_of=(1, 0) if flip else (0, 1), first_micro=(half, 0) if flip else (0, half)
    )
    return _eight_steps(queue, ranks // 2, near, half)


def dualpipev_steps(rank: int, ranks: int, micro_batches: int) -> list[list[Op]]:
    """The eight steps of DualPipeV on one rank: DualPipe folded, so that one rank does the work of
    two that mirror each other, and no parameter is held twice.

    Every micro-batch takes chunk 0 of all ranks, and then chunk 1 back from the last to rank 0.
    """
    queue = _Queue(chunk_of=(0, 1), first_micro=(0, 0))
    return _eight_steps(queue, ranks, rank, micro_batches)


def _eight_steps(queue: _Queue, half: int, near: int, per_direction: int) -> list[list[Op]]:
    """Steps of the rank that is `near` ranks, of `half`, from the entry of direction 0."""
    outer, inner = half - near - 1, near + 1
    main = per_direction - 2 * half + near + 1
    steps: list[list[Op]] = [[queue.f(0) for _ in range(2 * outer)]]
    steps.append([queue.f(direction) for _ in range(inner) for direction in (0, 1)])
    steps.append([op for _ in range(outer) for op in (queue.i(1), queue.w(), queue.f(1))])
    steps.append([])
    for turn in range(main):
        # Where the directions meet, the first backward needs what the rank beside has only just
        # computed: a forward pass alone fills the time.
        alone = turn == 0 and near == half - 1
        steps[3] += (queue.f(0), queue.b(1)) if alone else (queue.fb(0, 1),)
        steps[3].append(queue.fb(1, 0))
    steps.append([op for _ in range(outer) for op in (queue.b(1), queue.fb(1, 0))])
    # The second half of these leaves its weight gradients to fill the waiting of the last steps.
    steps.append(
        [
            queue.b(direction) if 2 * turn + direction_index < inner else queue.i(direction)
            for turn in range(inner)
            for direction_index, direction in enumerate((1, 0))
        ]
    )
    steps.append([op for _ in range(outer) for op in (queue.w(), queue.i(0))])
    steps.append([queue.w() for _ in range(inner)])
    return steps


# ---- running an order ---------------------------------------------------------------------------


def spans(
    schedule: Schedule, duration: Callable[[int, Op], float]
) -> tuple[tuple[tuple[float, float], ...], ...]:
    """(start, end) of each rank's ops: each as early as the rank and what it needs allow. An op's
    duration is asked for once, a rank's in their order.

    A forward pass needs that of the stage before; a backward pass needs its own forward pass and
    the backward pass (I or B) of the stage after; W needs its I. Messages take no time.
    Errors: ValueError when ranks wait for each other without end, with what each waits for.
    """
    stage_of, last = schedule.stage_of, schedule.num_stages - 1
    ended: dict[tuple[str, int, int], float] = {}
    found: list[list[tuple[float, float]]] = [[] for _ in range(schedule.ranks)]
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(schedule.orders):
            for op in order[len(found[rank]) :]:
                needs = _needs(op, stage_of[rank], last)
                if not needs <= ended.keys():
                    break
                free = found[rank][-1][1] if found[rank] else 0
                start = max([free, *(ended[need] for need in needs)])
                end = start + duration(rank, op)
                found[rank].append((start, end))
                for kind, chunk, micro in parts(op):
                    # I and B send the same; W sends nothing and nothing needs it
                    done = "B" if kind == "I" else kind
                    ended[done, micro, stage_of[rank][chunk]] = end
                moved = True
    stuck = [
        f"rank {rank} at op {len(done)}, {order[len(done)]}"
        for rank, (done, order) in enumerate(zip(found, schedule.orders, strict=True))
        if len(done) < len(order)
    ]
    if stuck:
        raise ValueError(f"schedule {schedule.name}: ranks wait for ever: {'; '.join(stuck)}")
    return tuple(map(tuple, found))


def _needs(op: Op, stages: tuple[int, ...], last: int) -> set[tuple[str, int, int]]:
    """(kind, micro-batch, stage) of what must have ended before an op starts."""
    needs = set()
    for kind, chunk, micro in parts(op):
        stage = stages[chunk]
        if kind == "F" and stage:
            needs.add(("F", micro, stage - 1))
        elif kind == "W":
            needs.add(("B", micro, stage))
        elif kind != "F":
            needs.add(("F", micro, stage))
            if stage < last:
                needs.add(("B", micro, stage + 1))
    return needs


def check(schedule: Schedule) -> None:
    """Prove that a schedule is complete and can run.

    Every micro-batch has, at every stage of its route and on the rank of that stage, exactly one
    forward and one backward pass, the latter whole or as I and W; and no rank waits without end.
    Errors: ValueError that names the micro-batch and stage, or the ranks that wait.
    """
    done: Counter[tuple[str, int, int, int]] = Counter()
    for rank, order in enumerate(schedule.orders):
        for op in order:
            done.update((part.kind, part.micro, rank, part.chunk) for part in parts(op))
    for micro, route in enumerate(schedule.route_of):
        for stage, place in enumerate(schedule.routes[route]):
            counts = {kind: done.pop((kind, micro, *place), 0) for kind in ("F", "B", "I", "W")}
            if tuple(counts.values()) not in ((1, 1, 0, 0), (1, 0, 1, 1)):
                raise ValueError(
                    f"schedule {schedule.name}: micro-batch {micro}, stage {stage} has {counts}; "
                    "needs one F, and one B or one I and one W"
                )
    if done:
        raise ValueError(f"schedule {schedule.name}: passes off their routes: {sorted(done)}")
    spans(schedule, lambda *_: 1)
