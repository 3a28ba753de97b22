"""Schedules and the batch plan against closed forms and the published V2/V3 numbers."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import deepseek as published
from training.config import Phase, TrainConfig
from training.schedule import BatchPlan, check_schedules, knobs_at, past_batches, value_at

V3 = TrainConfig(
    steps=1,
    seq_len=4096,
    **published.V3_BATCH,
    micro_batch_size=48,
    learning_rate=published.v3_learning_rate(),
    bias_update_rate=published.v3_bias_update_rate(),
    mtp_weight=published.v3_mtp_weight(),
)


def constant(batch_size: int = 4, seq_len: int = 10) -> BatchPlan:
    return BatchPlan(TrainConfig(steps=100, seq_len=seq_len, batch_size=batch_size))


def test_v3_batch_ramp_has_the_derived_length():
    # Continuous linear-in-tokens ramp: dt/ds = b(t) * T, so steps = tokens/T/(b1-b0) * ln(b1/b0).
    plan = BatchPlan(V3)
    closed_form = 469e9 / 4096 / (15360 - 3072) * math.log(15360 / 3072)
    assert plan.steps_at(469e9) == pytest.approx(closed_form, rel=1e-3)
    assert plan.steps_at(469e9) == pytest.approx(15_000, rel=2e-3)
    assert math.ceil(plan.steps_at(14.8e12)) - math.ceil(plan.steps_at(469e9)) == pytest.approx(
        227_800, rel=1e-3
    )
    assert plan.at(0).batch_size == 3072
    assert plan.at(100_000).batch_size == 15360


def test_plan_agrees_with_a_loop_over_steps():
    train = TrainConfig(
        steps=1, seq_len=8, batch_size=24, micro_batch_size=4,
        batch_ramp_from=8, batch_ramp_tokens=4000,
    )  # fmt: skip
    plan, sequences = BatchPlan(train), 0
    pairs = BatchPlan(dataclasses.replace(train, batch_ramp_step=2))
    assert pairs.micro_batch_counts() == (2, 4, 6)
    assert pairs.steps_at(4000) == pytest.approx(plan.steps_at(4000), rel=0.05)
    for step in range(60):
        exact = 8 + 16 * min(1.0, sequences * 8 / 4000)
        expected = 4 * math.floor(exact / 4 + 0.5)
        assert plan.at(step) == (expected, expected // 4, sequences, sequences * 8)
        sequences += expected
    assert plan.at(59).batch_size == 24
    assert plan.micro_batch_counts() == (2, 3, 4, 5, 6)


@settings(deadline=None, max_examples=50)
@given(
    micro=st.integers(1, 5),
    start=st.integers(1, 6),
    more=st.integers(0, 12),
    ramp=st.floats(1, 1e5),
    step=st.integers(0, 3000),
)
def test_plan_is_consistent(micro, start, more, ramp, step):
    train = TrainConfig(
        steps=1, seq_len=16, batch_size=(start + more) * micro, micro_batch_size=micro,
        batch_ramp_from=start * micro, batch_ramp_tokens=ramp,
    )  # fmt: skip
    plan = BatchPlan(train)
    now, after = plan.at(step), plan.at(step + 1)
    assert after.first_sequence == now.first_sequence + now.batch_size  # no gap, no overlap
    assert after.batch_size >= now.batch_size == now.micro_batches * micro
    assert plan.steps_at(now.tokens_before) == pytest.approx(step, abs=1e-6)
    if now.tokens_before >= ramp:
        assert now.batch_size == train.batch_size


def test_v3_learning_rate_at_its_corners():
    plan = BatchPlan(V3)
    rate = lambda tokens: value_at(V3.learning_rate, plan, math.ceil(plan.steps_at(tokens)))  # noqa: E731
    assert value_at(V3.learning_rate, plan, 1) == pytest.approx(2.2e-4 / 2000)
    assert value_at(V3.learning_rate, plan, 2000) == pytest.approx(2.2e-4)
    assert rate(5e12) == 2.2e-4
    assert rate(12.15e12) == pytest.approx((2.2e-4 + 2.2e-5) / 2, rel=1e-4)  # half of the cosine
    assert rate(14.299e12) == pytest.approx(2.2e-5, rel=1e-4)
    assert rate(14.5e12) == 2.2e-5
    assert rate(14.7e12) == 7.3e-6
    assert rate(20e12) == 7.3e-6  # the last value holds


def test_v3_knobs():
    plan = BatchPlan(V3)
    check_schedules(V3, plan)
    early, late, last = (math.ceil(plan.steps_at(t)) for t in (1e12, 12e12, 14.5e12))
    assert knobs_at(V3, plan, early) == {
        "learning_rate": 2.2e-4, "bias_update_rate": 0.001, "mtp_weight": 0.3,
    }  # fmt: skip
    assert knobs_at(V3, plan, late)["mtp_weight"] == 0.1
    assert knobs_at(V3, plan, late)["bias_update_rate"] == 0.001
    assert knobs_at(V3, plan, last)["bias_update_rate"] == 0.0


def test_v2_step_decay():
    train = dataclasses.replace(V3, **published.V2_BATCH, micro_batch_size=0)
    train = dataclasses.replace(train, micro_batch_size=256)
    plan, phases = BatchPlan(train), published.v2_learning_rate()
    values = [
        value_at(phases, plan, math.ceil(plan.steps_at(share * 8.1e12)))
        for share in (0.5, 0.7, 0.95)
    ]
    assert values == pytest.approx([2.4e-4, 2.4e-4 * 0.316, 2.4e-4 * 0.316**2])
    lite = published.v2_lite_learning_rate()
    at = constant(4608, 4096)
    values = [
        value_at(lite, at, math.ceil(at.steps_at(share * 5.7e12))) for share in (0.7, 0.85, 0.95)
    ]
    assert values == pytest.approx([4.2e-4, 4.2e-4 * 0.316, 4.2e-4 * 0.316**2])


def test_a_linear_phase_starts_where_the_other_unit_ended():
    # Warm-up to step 10 = token 400 at 40 tokens a step, then linear to 0 at token 800 = step 20.
    phases = (Phase(10, 1.0, "linear", "steps"), Phase(800, 0.0, "linear", "tokens"))
    values = [value_at(phases, constant(), steps) for steps in (0, 5, 10, 15, 20, 30)]
    assert values == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0, 0.0])
    # And the other way round: tokens first, then steps.
    phases = (Phase(400, 1.0, "linear"), Phase(20, 0.0, "linear", "steps"))
    values = [value_at(phases, constant(), steps) for steps in (5, 10, 15, 20)]
    assert values == pytest.approx([0.5, 1.0, 0.5, 0.0])


def test_a_single_phase_at_zero_is_a_constant():
    train = TrainConfig(steps=3, seq_len=8, batch_size=2, learning_rate=(Phase(0, 0.5),))
    assert knobs_at(train, BatchPlan(train), 0) == {
        "learning_rate": 0.5, "bias_update_rate": 0.001, "mtp_weight": 0.3,
    }  # fmt: skip


def test_the_last_step_reaches_the_final_value_and_the_first_moves():
    train = TrainConfig(
        steps=10, seq_len=8, batch_size=2,
        learning_rate=(Phase(4, 1.0, "linear", "steps"), Phase(10, 0.1, "cosine", "steps")),
    )  # fmt: skip
    plan = BatchPlan(train)
    rates = [knobs_at(train, plan, step)["learning_rate"] for step in range(10)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[9] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 10, "micro_batch_size": 4}, "batch_size=10.*micro batches of 4.*divisor"),
        ({"batch_ramp_from": 32, "batch_ramp_tokens": 9.0}, "batch_ramp_from=32.*batch_size=8"),
        ({"batch_ramp_from": 2, "batch_ramp_tokens": 9.0}, "batch_ramp_from=2 .*divisor of 2"),
        ({"batch_ramp_from": 4, "micro_batch_size": 4}, "needs both"),
        ({"batch_ramp_tokens": 10.0}, "needs both"),
        ({"steps": 0}, "steps is 0"),
        ({"micro_batch_size": -1}, "train.micro_batch_size is -1"),
        ({"learning_rate": ()}, "learning_rate has no phases"),
        (
            {"learning_rate": (Phase(100, 1.0, "linear", "steps"), Phase(99, 1.0))},
            "phase 2 ends at 99 tokens .step 1.5.*phase 1, which ends at 100 steps",
        ),
        ({"mtp_weight": (Phase(0, 1.0, "linear"),)}, "mtp_weight: phase 1 .linear. ends at 0"),
        ({"mtp_weight": (Phase(5, 1.0), Phase(5, 2.0))}, "mtp_weight: phase 2"),
    ],
)
def test_errors_name_the_numbers(changes, words):
    good = TrainConfig(steps=5, seq_len=8, batch_size=8, learning_rate=(Phase(0, 1.0),))
    train = dataclasses.replace(good, **changes)
    with pytest.raises(ValueError, match=words):
        check_schedules(train, BatchPlan(train))


def test_negative_step_is_an_error():
    with pytest.raises(ValueError, match="step is -1"):
        constant().at(-1)


def test_a_ramp_that_misses_its_end_is_refused():
    train = TrainConfig(
        steps=1, seq_len=8, batch_size=24, micro_batch_size=4, batch_ramp_from=8,
        batch_ramp_tokens=4000, batch_ramp_step=3,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"batch_ramp_step=3 does not lead from .* a divisor of 4"):
        BatchPlan(train)


# ---- Resumed -------------------------------------------------------------------------------------

RAMP = TrainConfig(
    steps=100,
    seq_len=8,
    batch_size=24,
    micro_batch_size=4,
    batch_ramp_from=8,
    batch_ramp_tokens=4096 / 3,
)


@pytest.mark.parametrize("done", range(1, 30))
def test_an_unchanged_run_that_is_resumed_has_the_plan_of_one_that_was_not(done):
    whole = BatchPlan(RAMP)
    resumed = BatchPlan(RAMP, json.loads(json.dumps(whole.history(done))), done)
    assert [resumed.at(step) for step in range(60)] == [whole.at(step) for step in range(60)]
    assert resumed.steps_at(1234.5) == whole.steps_at(1234.5)
    assert resumed.history(60) == whole.history(60)
    again = BatchPlan(RAMP, resumed.history(done + 7), done + 7)
    assert again.history(60) == whole.history(60)


@pytest.mark.parametrize(("size", "length"), [(16, 10), (1, 10), (4, 20), (4, 10)])
def test_another_batch_goes_on_from_the_tokens_and_rows_behind_it(size, length):
    """4 rows of 10 tokens for 10 steps, then other sizes, then the first again."""
    past = constant().history(10)
    plan = BatchPlan(TrainConfig(steps=100, seq_len=length, batch_size=size), past, 10)
    rows = 400 // length  # of the new length
    assert [plan.at(step).first_sequence for step in (0, 9, 10, 12)] == [
        0,
        36,
        rows,
        rows + 2 * size,
    ]
    assert plan.tokens_before(10) == 400
    assert plan.tokens_before(12) == 400 + 2 * size * length
    assert plan.steps_at(200) == 5
    assert plan.steps_at(400 + size * length) == 11
    assert plan.tokens_at(9.5) == 380
    back = BatchPlan(TrainConfig(steps=100, seq_len=10, batch_size=4), plan.history(12), 12)
    assert back.at(13).first_sequence == 40 + 2 * size * length // 10 + 4
    assert back.tokens_before(13) == 400 + 2 * size * length + 40
    assert back.at(5) == constant().at(5)  # the past stays
    uneven = BatchPlan(TrainConfig(steps=100, seq_len=7, batch_size=4), past, 10)
    assert (uneven.at(10).first_sequence, uneven.tokens_before(10)) == (58, 400)


def test_a_schedule_in_tokens_goes_on_and_a_warm_up_in_steps_keeps_its_tokens():
    phases = (
        Phase(10, 1.0, "linear", "steps"),
        Phase(2000, 0.0, "linear", "tokens"),
    )
    grown = TrainConfig(steps=100, seq_len=10, batch_size=16)
    plan = BatchPlan(grown, constant().history(20), 20)
    assert value_at(phases, plan, 20) == value_at(phases, constant(), 20) == 1 - 400 / 1600
    assert value_at(phases, plan, 21) == 1 - (400 + 160) / 1600  # the warm-up ended at 400 tokens


def test_a_ramp_goes_on_from_the_tokens_that_were_trained_on():
    before = TrainConfig(steps=100, seq_len=8, batch_size=4)
    plan = BatchPlan(RAMP, BatchPlan(before).history(10), 10)
    whole = BatchPlan(RAMP)
    tokens = plan.tokens_before(10)
    assert tokens == 320
    assert plan.at(10).batch_size == whole.at(int(whole.steps_at(tokens))).batch_size
    assert plan.at(60).batch_size == 24
    assert min(plan.micro_batch_counts()) >= 2


def test_the_past_of_an_old_checkpoint_is_what_its_own_configuration_says():
    trained = json.loads(json.dumps(dataclasses.asdict(RAMP)))
    assert past_batches(trained, 12) == BatchPlan(RAMP).history(12)
    assert past_batches({"steps": 9, "seq_len": 10, "batch_size": 4}, 5) == constant().history(5)
