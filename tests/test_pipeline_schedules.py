"""Pipeline schedules: complete, in time, in the right slots, and what the report's table 2 says."""

import dataclasses
import itertools
import pathlib
import re
import shlex
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.pipeline import draw
from sharding.pipeline.schedule import (
    SCHEDULES,
    Op,
    check,
    dualpipe_steps,
    dualpipev_steps,
    make_schedule,
    parts,
    spans,
)
from sharding.pipeline.simulate import Costs, paper_bubble, simulate
from sharding.pipeline.ticks import CODES, IDLE, op_at, tick_table
from tests.pipeline_replay import verify_table

DOC = pathlib.Path(__file__).resolve().parent.parent / "docs" / "pipeline_schedules.md"

EXAMPLES = [
    ("gpipe", 4, 6, 1), ("1f1b", 4, 6, 1), ("interleaved", 4, 8, 2), ("zb1p", 4, 6, 1),
    ("dualpipe", 4, 8, 1), ("dualpipev", 2, 6, 1),
    # two ranks, whose neighbours on both sides are one; one rank, which sends to itself
    ("1f1b", 2, 4, 1), ("interleaved", 2, 4, 3), ("zb1p", 2, 4, 1), ("dualpipe", 2, 4, 1),
    ("gpipe", 1, 3, 1), ("1f1b", 1, 3, 1), ("interleaved", 1, 3, 2), ("zb1p", 1, 3, 1),
    ("dualpipev", 1, 2, 1),
]  # fmt: skip
IDS = [f"{name}-{ranks}" for name, ranks, *_ in EXAMPLES]


@st.composite
def sizes(draw_value):
    """(name, ranks, micro-batches, chunks) that `make_schedule` takes."""
    name = draw_value(st.sampled_from(SCHEDULES))
    ranks = draw_value(st.integers(1, 6))
    micro, chunks = draw_value(st.integers(1, 14)), 1
    if name == "interleaved":
        micro, chunks = ranks * (1 + micro % 3), draw_value(st.integers(2, 4))
    elif name == "dualpipe":
        ranks += ranks % 2
        micro = 2 * (ranks + micro // 2)
    elif name == "dualpipev":
        micro += 2 * ranks - 1
    return name, ranks, micro, chunks


# ---- schedules ----------------------------------------------------------------------------------


@given(sizes())
def test_any_schedule_runs_and_its_table_is_right(size):
    schedule = make_schedule(*size)
    check(schedule)
    table = tick_table(schedule)
    verify_table(schedule, table)
    assert table.num_saved <= max(simulate(schedule).peak)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (("dualpip", 4, 8), ["dualpip", "dualpipev"]),
        (("1f1b", 0, 8), ["ranks=0", "at least 1"]),
        (("1f1b", 4, 8, 2), ["chunks=2", "interleaved"]),
        (("interleaved", 4, 8), ["chunks=1", "1f1b"]),
        (("interleaved", 4, 10, 2), ["10 micro-batches", "4 ranks", "take 12"]),
        (("dualpipe", 3, 8), ["even", "got 3", "take 4"]),
        (("dualpipe", 4, 6), ["got 6", "take 8"]),
        (("dualpipe", 4, 9), ["got 9", "take 10"]),
        (("dualpipev", 3, 5), ["got 5", "take 6"]),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(size, words):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        make_schedule(*size)


def test_fixed_number_of_chunks_may_be_named():
    assert make_schedule("dualpipe", 4, 8, 2) == make_schedule("dualpipe", 4, 8)


def test_stages_and_routes():
    dual = make_schedule("dualpipe", 4, 8)
    assert dual.stage_of == ((0, 3), (1, 2), (2, 1), (3, 0))
    assert dual.routes[1] == ((3, 1), (2, 1), (1, 1), (0, 1))
    assert dual.route_of == (0, 0, 0, 0, 1, 1, 1, 1)
    assert make_schedule("dualpipev", 2, 4).stage_of == ((0, 3), (1, 2))
    assert make_schedule("interleaved", 2, 4, 2).stage_of == ((0, 2), (1, 3))
    assert make_schedule("interleaved", 2, 4, 2).num_stages == 4


def test_orders_of_textbook():
    last = make_schedule("1f1b", 2, 3).orders[1]
    assert [(op.kind, max(op.micro, op.micro_b)) for op in last] == [
        ("F", 0), ("B", 0), ("F", 1), ("B", 1), ("F", 2), ("B", 2),
    ]  # fmt: skip
    first = make_schedule("gpipe", 2, 3).orders[0]
    assert [op.kind for op in first] == ["F"] * 3 + ["B"] * 3


def with_order(schedule, rank: int, order):
    orders = list(schedule.orders)
    orders[rank] = tuple(order)
    changed = dataclasses.replace(schedule)
    vars(changed)["orders"] = tuple(orders)  # where a schedule keeps them once asked
    return changed


@pytest.mark.parametrize("size", EXAMPLES, ids=IDS)
def test_check_sees_a_missing_a_double_and_a_misplaced_op(size):
    schedule = make_schedule(*size)
    order = schedule.orders[0]
    for wrong in (order[1:], (order[0], *order)):
        with pytest.raises(ValueError, match="needs one F"):
            check(with_order(schedule, 0, wrong))
    alien = Op("F", 0, schedule.micro_batches)
    with pytest.raises(ValueError, match="off their routes"):
        check(with_order(schedule, 0, (*order, alien)))


@pytest.mark.parametrize("size", EXAMPLES, ids=IDS)
def test_check_sees_ranks_that_wait_for_ever(size):
    schedule = make_schedule(*size)
    with pytest.raises(ValueError, match=r"wait for ever.*rank 0 at op 0"):
        check(with_order(schedule, 0, reversed(schedule.orders[0])))


def test_nothing_starts_before_what_it_needs():
    """Written out once more, apart from the function that `spans` uses."""
    schedule = make_schedule("dualpipev", 3, 8)
    times = {"F": 3, "B": 5, "FB": 6, "I": 3, "W": 2}
    found = spans(schedule, lambda _, op: times[op.kind])
    span = {}
    for rank, order in enumerate(schedule.orders):
        for op, (start, end) in zip(order, found[rank], strict=True):
            for kind, chunk, micro in parts(op):
                span["B" if kind == "I" else kind, micro, schedule.stage_of[rank][chunk]] = (
                    start,
                    end,
                )
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(found[rank]))
    for micro in range(schedule.micro_batches):
        forward = [span["F", micro, stage] for stage in range(6)]
        backward = [span["B", micro, stage] for stage in reversed(range(6))]
        path = forward + backward
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(path))


# ---- DualPipe's eight steps ---------------------------------------------------------------------


def counts(steps) -> list[dict[str, int]]:
    """Number of ops of each kind per step."""
    return [{kind: n for kind in CODES if (n := sum(op.kind == kind for op in step))}
            for step in steps]  # fmt: skip


def expected_counts(outer: int, inner: int, main: int, apart: bool) -> list[dict[str, int]]:
    """The closed formulas, with outer = h-q-1, inner = q+1 and main = n-P+q+1."""
    rows = [
        {"F": 2 * outer},
        {"F": 2 * inner},
        {"F": outer, "I": outer, "W": outer},
        {"F": 1, "B": 1, "FB": 2 * main - 1} if apart else {"FB": 2 * main},
        {"B": outer, "FB": outer},
        {"B": inner, "I": inner},
        {"I": outer, "W": outer},
        {"W": inner},
    ]
    return [{kind: n for kind, n in row.items() if n} for row in rows]


@pytest.mark.parametrize("P", [2, 4, 8, 16])
@pytest.mark.parametrize("extra", [0, 6])
def test_steps_of_dualpipe(P, extra):
    N = 2 * P + extra
    n, h = N // 2, P // 2
    schedule = make_schedule("dualpipe", P, N)
    for p in range(P):
        q = min(p, P - 1 - p)
        steps = dualpipe_steps(p, P, N)
        apart = p in (h - 1, h)
        assert counts(steps) == expected_counts(h - q - 1, q + 1, n - P + q + 1, apart)
        assert sum(map(tuple, steps), ()) == schedule.orders[p]
        # direction 0 enters at the nearer end; its chunk is 0 in the first half of the ranks
        near = 0 if p < h else 1
        assert {op.chunk for op in steps[0]} <= {near}
        assert {op.chunk for op in steps[2] if op.kind == "F"} <= {1 - near}
        assert {op.chunk_b for op in steps[6] if op.kind == "I"} <= {near}


@pytest.mark.parametrize("R", [1, 2, 4, 8])
@pytest.mark.parametrize("extra", [0, 5])
def test_steps_of_dualpipev(R, extra):
    N = 2 * R + extra
    schedule = make_schedule("dualpipev", R, N)
    for r in range(R):
        steps = dualpipev_steps(r, R, N)
        assert counts(steps) == expected_counts(R - r - 1, r + 1, N - 2 * R + r + 1, r == R - 1)
        assert sum(map(tuple, steps), ()) == schedule.orders[r]


def test_an_order_of_dualpipe_written_out():
    """Rank 0 of 4 with 8 micro-batches: steps as the report's figure of 8 ranks has them."""
    steps = dualpipe_steps(0, 4, 8)
    shown = [" ".join("".join(f"{k}{m}{chr(39) * c}" for k, c, m in parts(op)) for op in step)
             for step in steps]  # fmt: skip
    assert shown == [
        "F0 F1", "F2 F4'", "I4' W4' F5'", "F3B5' F6'B0", "B6' F7'B1", "B7' I2", "W2 I3", "W3",
    ]  # fmt: skip


# ---- the table of ticks -------------------------------------------------------------------------


def test_two_ranks_and_one_rank_use_few_ways():
    def ways(*size):
        channels = tick_table(make_schedule(*size)).channels
        return {way for way, used in channels._asdict().items() if used}

    assert ways("1f1b", 4, 8) == {"x_up", "dy_down"}
    assert ways("interleaved", 4, 8, 2) == {"x_up", "dy_down"}
    assert ways("dualpipe", 4, 8) == {"x_up", "x_down", "dy_up", "dy_down"}
    assert ways("dualpipev", 3, 8) == {
        "x_up", "x_down", "x_same", "dy_up", "dy_down", "dy_same",
    }  # fmt: skip
    assert ways("dualpipe", 2, 4) == {"x_up", "dy_up"}
    assert ways("interleaved", 1, 2, 2) == {"x_same", "dy_same"}
    assert ways("1f1b", 1, 2) == set()


@pytest.mark.parametrize("size", EXAMPLES, ids=IDS)
def test_slots_are_as_few_as_are_in_use_at_once(size):
    """Counted from the replay of the order: a slot is in use from its F until its B or W."""
    schedule = make_schedule(*size)
    table = tick_table(schedule)
    most = 0
    for rank in range(schedule.ranks):
        held = 0
        for tick in range(table.ticks):
            op = op_at(table, tick, rank)
            done = [part.kind for part in parts(op)] if op else []
            held += ("F" in done) - ("B" in done or "W" in done)
            most = max(most, held)
    assert table.num_saved == most
    assert table.num_saved == len(set(table.f_saved[table.f_saved < table.num_saved].tolist()))


def test_columns_are_int32_and_codes_are_those_that_occur():
    table = tick_table(make_schedule("zb1p", 4, 6))
    assert {column.dtype for column in table.columns().values()} == {np.dtype(np.int32)}
    assert {column.shape for column in table.columns().values()} == {(table.ticks, 4)}
    assert table.codes == {IDLE, CODES["F"], CODES["I"], CODES["W"]}


def trash(table, name: str) -> int:
    if name == "code":
        return IDLE
    if "chunk" in name or "micro" in name:
        return -1
    sizes = {"saved": table.num_saved, "x": table.num_x, "cotangents": table.num_cotangents}
    return next((size for part, size in sizes.items() if part in name.split("_")), table.num_dy)


def mutations(schedule, table, name: str):
    """Tables that differ in one entry of a column which the tick's op uses."""
    column = getattr(table, name)
    used = column != trash(table, name)
    if "chunk" in name or "micro" in name:
        seen = (
            [CODES["F"], CODES["FB"]] if name[0] == "f" else [CODES[k] for k in CODES if k != "F"]
        )
        used &= np.isin(table.code, seen)
    places = np.argwhere(used)
    for tick, rank in places[:: max(1, len(places) // 6)]:
        for value in (column[tick, rank] + 1, column[tick, rank] - 1, trash(table, name)):
            changed = column.copy()
            changed[tick, rank] = value
            yield table._replace(**{name: changed})


@pytest.mark.parametrize("size", [e for e in EXAMPLES if e[1] != 1], ids=lambda size: size[0])
def test_a_wrong_entry_is_seen(size):
    schedule = make_schedule(*size)
    table = tick_table(schedule)
    verify_table(schedule, table)
    tried = 0
    for name in table.columns():
        for wrong in mutations(schedule, table, name):
            with pytest.raises(ValueError, match=r"table of|tick"):
                verify_table(schedule, wrong)
            tried += 1
    assert tried > 100


def test_an_undeclared_way_and_an_undeclared_code_are_seen():
    schedule = make_schedule("1f1b", 4, 6)
    table = tick_table(schedule)
    for wrong in (
        table._replace(channels=table.channels._replace(x_up=False)),
        table._replace(codes=table.codes - {IDLE}),
    ):
        with pytest.raises(ValueError, match=r"channels|codes"):
            verify_table(schedule, wrong)


# ---- table 2 of the report ----------------------------------------------------------------------

F_IS_INPUT_GRADIENT = [
    Costs(1, 2, 1, 3), Costs(2, 4, 2, 5), Costs(10, 18, 8, 21), Costs(20, 24, 4, 24),
    Costs(Fraction(7, 3), Fraction(11, 3), Fraction(4, 3), Fraction(11, 2)),
]  # fmt: skip
"""W <= F = B - W and max(F, B) <= F&B <= F + B: where all four formulas hold."""
UNLIKE = [Costs(5, 9, 2, 11), Costs(3, 10, 3, 13), Costs(9, 10, 4, 15)]
"""W <= F, W <= B - W, and F unlike B - W."""


def stages_and_sizes(name: str):
    """(PP, ranks, micro-batches): DualPipeV has two stages on a rank."""
    for PP in (2, 4, 6, 8):
        ranks = PP // 2 if name == "dualpipev" else PP
        for micro in (2 * PP, 2 * PP + 4, 5 * PP):
            yield PP, ranks, micro


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_bubble_is_the_papers(name):
    more = UNLIKE if name in ("1f1b", "zb1p") else []
    for PP, ranks, micro in stages_and_sizes(name):
        for costs in F_IS_INPUT_GRADIENT + more:
            result = simulate(make_schedule(name, ranks, micro), costs)
            assert max(result.bubble) == paper_bubble(name, PP, costs), (PP, micro, costs)


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_peak_activations_are_the_papers(name):
    for PP, ranks, micro in stages_and_sizes(name):
        expected = PP + 1 if name.startswith("dualpipe") else PP
        peak = simulate(make_schedule(name, ranks, micro)).peak
        assert max(peak) == expected
        if name != "1f1b":
            assert set(peak) == {expected}


@pytest.mark.parametrize(("ranks", "chunks"), [(1, 2), (2, 3), (4, 2), (8, 4)])
def test_peak_of_the_interleaved_schedule(ranks, chunks):
    for micro in (2 * ranks, 5 * ranks):
        peak = simulate(make_schedule("interleaved", ranks, micro, chunks)).peak
        assert max(peak) == peak[0] == ranks * (chunks + 1) - 1


def test_peak_is_the_papers_too_if_an_activation_ends_with_its_input_gradient():
    """The report does not say which; held until W is what an executor needs, and the larger."""
    for name, ranks, most in (("zb1p", 8, 8), ("dualpipe", 8, 9), ("dualpipev", 4, 9)):
        held, peak = [0] * ranks, 0
        for rank, order in enumerate(make_schedule(name, ranks, 20).orders):
            for op in order:
                done = [part.kind for part in parts(op)]
                held[rank] += "F" in done
                peak = max(peak, held[rank])
                held[rank] -= "B" in done or "I" in done
        assert peak == most


@pytest.mark.parametrize("name", ["zb1p", "dualpipe", "dualpipev"])
def test_ranks_are_idle_alike_unless_pairs_save_time(name):
    ranks = 4 if name == "dualpipev" else 8
    schedule = make_schedule(name, ranks, 24)
    assert len(set(simulate(schedule, Costs(1, 2, 1, 3)).bubble)) == 1
    uneven = simulate(schedule, Costs(2, 4, 2, 5)).bubble
    middle = uneven[-1] if name == "dualpipev" else uneven[3]
    assert middle == max(uneven)
    assert (len(set(uneven)) == 1) == (name == "zb1p")


@pytest.mark.parametrize("costs", [*F_IS_INPUT_GRADIENT, *UNLIKE, Costs(5, 3, 2, 7)])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved"])
def test_bubble_without_split_or_pair_needs_no_conditions(name, costs):
    """Of interleaved stages F and B are shorter by the number of chunks, and so is the bubble."""
    for ranks, micro in ((1, 3), (3, 3), (4, 12)):
        schedule = make_schedule(name, ranks, micro, 3 if name == "interleaved" else 1)
        assert set(simulate(schedule, costs).bubble) == {(ranks - 1) * (costs.F + costs.B)}


def test_where_the_papers_formulas_end():
    """Outside of the conditions that `simulate.py` states the figures are others.

    A forward pass longer than the input gradient costs DualPipe its full length.
    """
    longer = Costs(F=9, B=10, W=4, FB=15)
    bubble = max(simulate(make_schedule("dualpipe", 8, 16), longer).bubble)
    assert bubble == 3 * (longer.FB + longer.F - 2 * longer.W)
    assert bubble > paper_bubble("dualpipe", 8, longer)
    wide = Costs(F=4, B=9, W=5, FB=11)
    assert max(simulate(make_schedule("zb1p", 4, 8), wide).bubble) > paper_bubble("zb1p", 4, wide)
    few = Costs(1, 2, 1, 3)
    assert max(simulate(make_schedule("zb1p", 4, 2), few).bubble) > paper_bubble("zb1p", 4, few)


def test_durations_and_names_are_checked():
    with pytest.raises(ValueError, match="between 0 and B"):
        simulate(make_schedule("1f1b", 2, 2), Costs(1, 1, 1, 2))
    with pytest.raises(ValueError, match="not gpipe"):
        paper_bubble("gpipe", 4, Costs(1, 2, 1, 3))


# ---- figures ------------------------------------------------------------------------------------


def test_text_of_a_table_is_that_of_its_schedule():
    schedule = make_schedule("interleaved", 2, 4, 3)
    shown = draw.text(schedule)
    assert shown == draw.text(tick_table(schedule))
    assert "F0''" in shown
    assert "and so on" in shown


def test_picture_is_the_same_bytes_each_time(tmp_path):
    schedule = make_schedule("dualpipe", 2, 4)
    for suffix in ("svg", "png"):
        files = [tmp_path / f"{i}.{suffix}" for i in range(2)]
        for file in files:
            draw.picture(schedule, file)
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--schedule dualpipe --ranks 3 --micro-batches 8", "must be even"),
        ("--schedule 1f1b --ranks 3 --micro-batches 8 --out x.doc", ".svg or .png"),
    ],
)
def test_command_line_refuses_without_a_traceback(capsys, words, message):
    with pytest.raises(SystemExit):
        draw.main(words.split())
    assert message in capsys.readouterr().err


# ---- docs ---------------------------------------------------------------------------------------

FIGURE = re.compile(
    r"```bash\n[.]venv/bin/python -m sharding[.]pipeline[.]draw ([^\n]*)\n```\n\n"
    r"```text\n(.*?)\n```",
    re.DOTALL,
)


def test_docs_show_what_the_code_draws(capsys):
    figures = FIGURE.findall(DOC.read_text())
    shown = [shlex.split(line)[1] for line, _ in figures]
    assert shown == list(SCHEDULES), "one figure for each schedule, in order"
    for line, figure in figures:
        draw.main(shlex.split(line))
        printed = capsys.readouterr().out.rstrip("\n")
        assert figure == printed, f"python -m sharding.pipeline.draw {line} prints\n{printed}"


def paper_table() -> list[str]:
    """The formulas of table 2 beside the simulation, for PP = 8 and two sets of costs."""
    formulas = {
        "1f1b": ("(PP-1)(F+B)", "1x", "PP", "PP"),
        "zb1p": ("(PP-1)(F+B-2W)", "1x", "PP", "PP"),
        "dualpipe": ("(PP/2-1)(F&B+B-3W)", "2x", "PP+1", "PP"),
        "dualpipev": ("(PP/2-1)(F&B+B-3W)", "2x", "PP+1", "PP/2"),
    }
    rows = [
        "| schedule | bubble | parameters | activations | ranks | bubble, F&B = F+B | bubble, "
        "F&B = 2.5 F | peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, cells in formulas.items():
        schedule = make_schedule(name, 4 if name == "dualpipev" else 8, 20)
        plain, saved = (simulate(schedule, Costs(2, 4, 2, FB)) for FB in (6, 5))
        bubbles = [f"{max(result.bubble) / 2:g} F" for result in (plain, saved)]
        simulated = " | ".join([*bubbles, str(max(plain.peak))])
        rows.append(f"| `{name}` | {' | '.join(cells)} | {simulated} |")
    return rows


def test_docs_table_is_simulated():
    expected = "\n".join(paper_table())
    assert f"\n\n{expected}\n\n" in DOC.read_text(), f"{DOC.name} should hold:\n{expected}"
