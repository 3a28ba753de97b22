"""The command lines: near matches for what is no option, rates that are found, one line each."""

import ast
import dataclasses
import pathlib
import subprocess
import sys

import pytest

import generate
import plan
import train
from configs import PRESETS, preset
from configs.command import parse
from configs.options import option_names
from runtime.interpreter import check_interpreter
from training.config import Phase
from training.schedule import BatchPlan, check_schedules, ends_elsewhere, knobs_at
from training.summary import room


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


@pytest.mark.parametrize(
    ("field", "value"),
    [("log_every", 0), ("eval_every", -1), ("eval_batches", -1),
     ("max_skipped_in_row", -1), ("balance_weight", -1.0), ("balance_weight", float("nan")),
     ("ema_decay", 1.0), ("ema_decay", -0.1)],
)  # fmt: skip
def test_numbers_of_a_run_that_cannot_be(field, value):
    train = dataclasses.replace(preset("tiny").train, **{field: value})
    with pytest.raises(ValueError, match=f"train.{field} is {value}; it must be"):
        check_schedules(train, BatchPlan(train))


@pytest.mark.parametrize(("field", "value"), [("every", -1), ("keep", 0), ("keep_best", -1)])
def test_numbers_of_checkpoints_that_cannot_be(capsys, field, value):
    with pytest.raises(SystemExit):
        parse([f"--checkpoint.{field.replace('_', '-')}", str(value)])
    assert f"checkpoint.{field}={value}; it must be" in " ".join(capsys.readouterr().err.split())


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
        "learning_rate",
        "bias_update_rate",
        "mtp_weight",
    ]
    assert all(
        f"ends at step 400 of train.steps={steps:,}" in line and odd in line for line in lines
    )
    options = [word for line in lines for word in line.partition("run: ")[2].split()]
    train = parse([*words, *options]).run.train
    assert ends_elsewhere(train, BatchPlan(train)) == []
    check_schedules(train, BatchPlan(train))


def test_a_warm_up_that_is_held_may_end_anywhere_before_the_run_does():
    warm = (Phase(20, 1e-3, "linear", "steps"), Phase(50, 1e-3, "constant", "steps"))
    train = dataclasses.replace(preset("r1_zero").train, learning_rate=warm)
    assert ends_elsewhere(train, BatchPlan(train)) == []
    short = dataclasses.replace(train, steps=10)
    assert "learning_rate ends at step 20" in ends_elsewhere(short, BatchPlan(short))[0]


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (plan.main, "tiny --json none/a.json"),
        (plan.main, "tiny --html none/a.html"),
        (generate.main, "--checkpoint none --prompt a --save-expert-load none/a.npy"),
        (generate.main, "--checkpoint none --draw a --ids-out none/a.npy"),
    ],
)
def test_a_file_that_cannot_be_written_at_the_end_is_told_at_the_start(main, words, capsys):
    assert main(words.split()) == 2
    option = words.split()[-2]
    assert f"{option} none/a" in (said := capsys.readouterr().err)
    assert "there is no folder" in said


@pytest.mark.parametrize("stage", ["sft", "distill"])
def test_weights_that_are_tuned_do_not_take_the_rate_of_pretraining(stage):
    tuned = parse(["--config", "v2_lite", "--stage", stage, "--init-from", "x"]).run.train
    assert knobs_at(tuned, BatchPlan(tuned), 500)["learning_rate"] == 5e-5
    from_random = parse(["--config", "v2_lite", "--stage", stage]).run.train
    assert from_random == preset("v2_lite").train
    own = parse(["--config", "r1_cold", "--stage", stage, "--init-from", "x"]).run.train
    assert own == preset("r1_cold").train


def test_stage_rl_does_not_take_the_rate_of_pretraining():
    train = parse(["--config", "v2_lite", "--stage", "rl"]).run.train
    rates = [knobs_at(train, BatchPlan(train), step)["learning_rate"] for step in (0, 9, 500)]
    assert rates == pytest.approx([3e-7, 3e-6, 3e-6])
    assert preset("v2_lite").train.learning_rate != train.learning_rate
    # A preset of stage rl keeps its own, and so does whoever names one.
    assert parse(["--config", "r1_zero", "--stage", "rl"]).run.train == preset("r1_zero").train
    own = ["--config", "tiny", "--stage=rl", "--train.learning-rate.1.value", "1e-6"]
    assert parse(own).run.train.learning_rate[1].value == 1e-6


# ---- what a run would be ------------------------------------------------------------------------


def printed(capsys, words: str) -> list[str]:
    assert train.main([*words.split(), "--print-config", "--compilation-cache="]) == 0
    return capsys.readouterr().out.splitlines()


def test_print_config_begins_with_what_follows_and_what_differs(capsys):
    words = "--layout cube --train.batch-size 16 --rl.max-new-tokens 7"
    lines = printed(capsys, words)
    assert lines[0] == "devices      8 x cpu (emulated): fsdp 2 x expert 2 x tensor 2"
    start = lines.index("differs from the preset tiny:")
    assert lines[start + 1 : lines.index("", start)] == [
        "  train.batch_size=16 (preset: 8)",
        "  rl.max_new_tokens=7 (preset: 256), which stage pretrain does not read",
        "  mesh.fsdp=2 (preset: -1)",
        "  mesh.expert=2 (preset: 1)",
        "  mesh.tensor=2 (preset: 1)",
    ]
    fields = lines[lines.index("every field that stage pretrain reads:") :]
    assert "train.batch_size=16" in fields
    assert not [line for line in fields if line.startswith(("rl.", "sft."))]


def test_a_state_that_no_gpu_holds_is_said(capsys):
    lines = printed(capsys, "--config v3_671b --mesh.expert 8 --mesh.fsdp 1")
    warning = next(line for line in lines if "the state alone is more than" in line)
    assert "H200 (141 GB)" in warning
    assert "--mesh.fsdp" in warning
    assert not [x for x in printed(capsys, "--layout cube") if "warning" in x or "room" in x]


@pytest.mark.parametrize(
    ("held", "gpu", "line"),
    [
        (100e9, "", "of A100 (80 GB), L40S (48 GB), H100 (80 GB), H800 (80 GB); spread"),
        (100e9, "h100", "memory of H100 (80 GB); spread"),
        (41e9, "h200", "93.1 GiB of an H200"),
    ],
)
def test_room_of_a_gpu(held, gpu, line):
    assert line in room(int(held), gpu)[0]


def test_micro_batches_of_a_ramp_name_the_option_that_mends_them(capsys):
    """DualPipe halves the micro batches; a ramp that adds one at a time comes by odd numbers."""
    sizes = ["--train.batch-size", "64", "--train.micro-batch-size", "4", "--mesh.fsdp", "1"]
    ramp = ["--train.batch-ramp-from", "32", "--train.batch-ramp-tokens", "1e5"]
    pipe = ["--mesh.pipe", "2", "--mesh.data", "4", "--mesh.schedule", "dualpipe"]
    words = [*sizes, *ramp, *pipe, "--model.num-layers", "5", "--compilation-cache="]
    assert train.main([*words, "--print-config"]) == 2
    error = capsys.readouterr().err
    assert "got 9" in error
    assert "train.batch_ramp_from=32 to batch_size=64 in micro batches of 4" in error
    assert "--train.batch-ramp-step 2 adds 2" in error
    assert train.main([*words, "--train.batch-ramp-step", "2", "--print-config"]) == 0
    without = [*sizes, *pipe, "--model.num-layers", "5", "--compilation-cache=", "--print-config"]
    assert train.main([*without, "--train.batch-size", "36"]) == 2
    assert "(train.batch_size=36 over train.micro_batch_size=4)" in capsys.readouterr().err


# ---- the wrong Python, the wrong folder ----------------------------------------------------------

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENTRIES = ("train.py", "generate.py", "convert.py")


@pytest.mark.parametrize("name", [*ENTRIES, "runtime/interpreter.py", "runtime/__init__.py"])
def test_any_python_3_can_read_what_comes_before_the_check(name):
    """An older one would otherwise answer with a syntax error."""
    ast.parse((ROOT / name).read_text(), feature_version=(3, 8))


@pytest.mark.parametrize("name", ENTRIES)
def test_the_check_of_python_comes_first(name):
    """Before any import that a bare Python lacks."""
    _, imported, call, *_ = ast.parse((ROOT / name).read_text()).body
    assert ast.unparse(imported) == "from runtime.interpreter import check_interpreter"
    assert ast.unparse(call) == "check_interpreter()"


@pytest.mark.parametrize(
    ("version", "packages", "says"),
    [
        ((3, 11, 7), (), "this is Python 3.11.7 ("),
        ((3, 13, 0), ("no_such_package",), ") without no_such_package; the project needs 3.12"),
    ],
)
def test_the_wrong_python_is_told_the_right_command(capsys, monkeypatch, version, packages, says):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        check_interpreter(version, packages)
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1)
    assert error.startswith("generate.py: ")
    assert says in error
    assert f"{ROOT}/.venv/bin/python " in error
    check_interpreter((3, 12, 0), ("jax",))


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_point_without_packages_in_another_folder(name, tmp_path):
    """This Python with its own library alone."""
    program = (
        "import runpy, sys; sys.path.insert(0, sys.argv[1]); sys.argv = sys.argv[2:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-I", "-S", "-c", program, str(ROOT), str(ROOT / name)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "without jax" in done.stderr


def test_make_in_another_folder_says_where(tmp_path):
    command = ["make", "-f", str(ROOT / "Makefile"), "train"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"make -C {ROOT} train" in done.stderr
    assert not list(tmp_path.iterdir())
