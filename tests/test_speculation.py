"""Speculation on trial: what is measured, what is decided, and that the text does not notice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from generation import engine, payoff
from generation.config import Sampling
from generation.payoff import FEWEST_DRAFTS, ROUNDS, agreed, measure, pays
from generation.stats import Stats
from generation.steps import CHUNK
from sharding.config import MeshConfig
from tests.test_generation import GREEDY, ONE, PROMPTS, generator, good_draft, prepared, texts

SAMPLED = Sampling(temperature=1.0, seed=5)
CUBE = MeshConfig(fsdp=2, expert=2, tensor=2)


@pytest.fixture(autouse=True)
def nothing_measured_yet():
    """The generator is shared; what an earlier test gave it as a cost is forgotten."""
    for mesh in (ONE, CUBE):
        generator(mesh).pass_steps.clear()


@pytest.fixture
def cost(monkeypatch):
    """Let a speculative pass cost so many steps, without a trial."""
    return lambda steps: monkeypatch.setattr(engine, "measure", lambda seconds: steps)


# ---- the decision --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pass_steps", "accepted", "drafted", "expected"),
    [
        (2.0, 0, 0, False),  # no acceptance repays it
        (2.3, 0, 0, False),
        (1.9, 0, 0, True),
        (1.9, 0, FEWEST_DRAFTS - 1, True),  # too few to tell
        (1.9, 0, FEWEST_DRAFTS, False),
        (1.62, 91, 100, True),
        (1.8, 86, 100, False),  # within the margin
        (1.7, 41, 100, False),
        (1.0, 5, 100, True),
        (0.9, 0, 100, True),
    ],
)
def test_what_pays(pass_steps, accepted, drafted, expected):
    assert pays(pass_steps, accepted, drafted) is expected


@pytest.mark.parametrize(("step", "steps"), [(1e-4, CHUNK), (0.006, 3), (1.0, 1), (0.0, CHUNK)])
def test_a_trial_is_as_long_as_it_must_be(step, steps):
    """A clock that hangs in one call of either program, and in the first calls."""
    calls = []

    def seconds(drafts, count):
        calls.append((drafts, count))
        hangs = 100 * step * (len(calls) in (1, 4, 9))
        return count * step * (2.5 if drafts else 1) + hangs + 1e-12

    assert measure(seconds) == pytest.approx(2.5 if step else 1.0)
    assert calls == [(False, 1), (True, 1)] + ROUNDS * [(False, steps), (True, steps)]


def test_several_processes_take_the_first_ones_value(monkeypatch):
    assert agreed(1.7) == 1.7
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(payoff.multihost_utils, "broadcast_one_to_all", lambda x: 0 * x + 7)
    assert agreed(1.7) == 7


# ---- the text ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_drafts_that_cannot_pay_are_never_made(cost):
    cost(3.0)
    rows, stats = texts(GREEDY, speculate="auto")
    assert rows == texts(GREEDY)[0]
    assert stats.stopped
    assert stats.drafted == 0
    assert stats.report().endswith("speculation off: a pass costs 3.00 steps")
    assert texts(SAMPLED, speculate="auto")[0] == texts(SAMPLED)[0]


@pytest.mark.slow
def test_bad_drafts_stop_after_the_first_chunk(cost):
    cost(1.9)
    rows, stats = texts(GREEDY, speculate="auto")
    assert rows == texts(GREEDY)[0]
    assert stats.stopped
    assert stats.drafted == len(PROMPTS) * CHUNK
    assert stats.main_passes > stats.drafted
    assert f"speculation stopped after {stats.drafted} drafts: " in stats.report()


@pytest.mark.parametrize("steps", [1.0, 1.9])
def test_good_drafts_go_on(cost, steps):
    cost(steps)
    made = generator(ONE)
    weights = made.prepare(jax.tree.map(jnp.asarray, good_draft()))
    session = made.start(weights, PROMPTS, GREEDY, 81, (), "auto")
    while not session.done:
        session.advance()
    stats = session.stats
    assert not stats.stopped
    assert stats.drafted == stats.main_passes > len(PROMPTS) * CHUNK


@pytest.mark.slow
def test_after_the_switch_the_text_is_that_of_plain_sampling(cost):
    """The random numbers of a position are those of a session that begins right before it."""
    cost(1.9)
    session = generator(ONE).start(prepared(ONE), PROMPTS, SAMPLED, 57, (), "auto")
    before = [ids.tolist() for ids in session.advance()]
    while not session.stats.stopped:
        for row, ids in zip(before, session.advance(), strict=True):
            row += ids.tolist()
    assert not {"mtp_cache", "draft_B", "q_BV"} & session._state.keys()
    after = [[] for _ in PROMPTS]
    while not session.done:
        for row, ids in zip(after, session.advance(), strict=True):
            row += ids.tolist()
    assert all(after)
    longer = [np.append(p, row).astype(np.int32) for p, row in zip(PROMPTS, before, strict=True)]
    plain, _ = texts(SAMPLED, prompts=longer, new=41)
    assert after == [row[: len(rest)] for row, rest in zip(plain, after, strict=True)]


@pytest.mark.slow
def test_a_trial_leaves_the_session_as_it_is(monkeypatch):
    """Every draft counts as paying here, so that sampled text must be that of `on`."""
    monkeypatch.setattr(engine, "measure", lambda seconds: 0 * measure(seconds) + 0.5)
    rows, stats = texts(SAMPLED, speculate="auto")
    assert rows == texts(SAMPLED, speculate=True)[0]
    assert stats.trial_seconds > 0
    assert not stats.stopped


@pytest.mark.parametrize("mesh", [ONE, pytest.param(CUBE, marks=pytest.mark.slow)])
def test_a_measured_cost_is_kept_for_the_next_batch(mesh):
    rows, first = texts(GREEDY, speculate="auto", mesh=mesh)
    assert rows == texts(GREEDY)[0]
    assert first.trial_seconds > 0
    assert first.pass_steps > 0
    again, second = texts(GREEDY, speculate="auto", mesh=mesh)
    assert again == rows
    assert second.pass_steps == first.pass_steps
    assert second.trial_seconds == 0


def test_a_batch_that_ends_with_its_first_tokens_needs_no_trial():
    _, stats = texts(GREEDY, speculate="auto", new=1)
    assert stats == dataclasses.replace(
        Stats(), **{name: getattr(stats, name) for name in ("prefill_tokens", "prefill_seconds")},
        compile_seconds=stats.compile_seconds,
    )  # fmt: skip
