"""The command lines: near matches for what is no option, rates that are found, one line each."""

import dataclasses

import pytest

import generate
from configs import PRESETS, preset
from configs.command import parse
from configs.options import option_names
from training.config import Phase
from training.schedule import BatchPlan, check_schedules, ends_elsewhere, knobs_at


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr 1e-4", "unknown option --lr; did you mean --train.peak-learning-rate?"),
        ("--learning_rate=1e-4", "--learning_rate; did you mean --train.peak-learning-rate?"),
        ("--train.lr -1", "unknown option --train.lr; did you mean --train.peak-learning-rate?"),
        ("--trian.steps 3", "unknown option --trian.steps; did you mean --train.steps?"),
        ("--train.stpes 3", "unknown option --train.stpes; did you mean --train.steps?"),
        ("--batch_size 3", "unknown option --batch_size; did you mean --train.batch-size?"),
        ("--weight-decay 1", "did you mean --train.optimizer.weight-decay?"),
        ("--qqqq", "unknown option --qqqq. train.py --help"),
        ("--train.steps 3 tiny", "unexpected word 'tiny'"),
    ],
)
def test_what_is_no_option_is_named_in_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        parse(words.split())
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1)
    assert message in said


def test_generate_names_near_matches(capsys):
    with pytest.raises(SystemExit):
        generate.parse(["--checkpoint", "x", "--temprature", "2"])
    assert "--temprature; did you mean --temperature?" in capsys.readouterr().err


def test_every_option_of_help_can_be_a_near_match(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    names = set(option_names(parse([])))
    assert len(names) > 150
    assert not [name for name in names if f"--{name}" not in shown and f"-{name}" not in shown]


def test_a_peak_scales_the_whole_schedule():
    train = parse(["--train.peak-learning-rate", "6e-3"]).run.train
    plan, old = BatchPlan(train), dataclasses.replace(train, peak_learning_rate=0.0)
    for step in (0, 100, 399):
        rate, before = (knobs_at(t, plan, step)["learning_rate"] for t in (train, old))
        assert rate == pytest.approx(2 * before)
    assert knobs_at(train, plan, 100)["learning_rate"] == 6e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peak_learning_rate": -1.0}, "peak_learning_rate is -1.0; give a number above 0"),
        ({"peak_learning_rate": float("nan")}, "peak_learning_rate is nan"),
        ({"peak_learning_rate": 1.0, "learning_rate": (Phase(0, 0.0),)}, "not 0 throughout"),
        ({"learning_rate": (Phase(0, -1.0),)}, "learning_rate: a phase has the value -1.0"),
        ({"mtp_weight": (Phase(0, float("inf")),)}, "mtp_weight: a phase has the value inf"),
    ],
)
def test_rates_that_cannot_be(change, message):
    train = dataclasses.replace(preset("tiny").train, **change)
    with pytest.raises(ValueError, match=message):
        check_schedules(train, BatchPlan(train))


@pytest.mark.parametrize("name", PRESETS)
def test_schedules_of_presets_end_with_the_run(name):
    train = preset(name).train
    assert ends_elsewhere(train, BatchPlan(train)) == []


@pytest.mark.parametrize(("steps", "odd"), [(100, "is not reached"), (1000, "holds from there on")])
def test_the_remedy_for_a_schedule_that_ends_elsewhere_is_one(steps, odd):
    words = ["--train.steps", str(steps)]
    train = parse(words).run.train
    lines = ends_elsewhere(train, BatchPlan(train))
    assert [line.split()[0].removeprefix("train.") for line in lines] == [
        "learning_rate", "bias_update_rate", "mtp_weight",
    ]  # fmt: skip
    assert all(
        f"ends at step 400 of train.steps={steps:,}" in line and odd in line for line in lines
    )
    mended = [word for line in lines for word in line.partition("run: ")[2].split()]
    train = parse([*words, *mended]).run.train
    assert ends_elsewhere(train, BatchPlan(train)) == []
    check_schedules(train, BatchPlan(train))


def test_a_warm_up_that_is_held_may_end_anywhere_before_the_run_does():
    warm = (Phase(20, 1e-3, "linear", "steps"), Phase(50, 1e-3, "constant", "steps"))
    train = dataclasses.replace(preset("r1_zero").train, learning_rate=warm)
    assert ends_elsewhere(train, BatchPlan(train)) == []
    short = dataclasses.replace(train, steps=10)
    assert "learning_rate ends at step 20" in ends_elsewhere(short, BatchPlan(short))[0]


def test_stage_rl_does_not_take_the_rate_of_pretraining():
    train = parse(["--config", "v2_lite", "--stage", "rl"]).run.train
    rates = [knobs_at(train, BatchPlan(train), step)["learning_rate"] for step in (0, 9, 500)]
    assert rates == pytest.approx([3e-7, 3e-6, 3e-6])
    assert preset("v2_lite").train.learning_rate != train.learning_rate
    # A preset of stage rl keeps its own, and so does whoever names one.
    assert parse(["--config", "r1_zero", "--stage", "rl"]).run.train == preset("r1_zero").train
    own = ["--config", "tiny", "--stage=rl", "--train.learning-rate.1.value", "1e-6"]
    assert parse(own).run.train.learning_rate[1].value == 1e-6
