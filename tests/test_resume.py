"""What a resumed run may change: `training/resume.py`, field by field."""

import dataclasses
import functools
import json

import pytest

from configs import preset
from configs.schema import RunConfig
from training.resume import FIXED, FREE, changes, check_changes


def asdict(run: RunConfig) -> dict:
    return dataclasses.asdict(run)


def changed(run: RunConfig, name: str, value) -> RunConfig:
    first, _, rest = name.partition(".")
    if rest:
        value = changed(getattr(run, first), rest, value)
    return dataclasses.replace(run, **{first: value})


TINY = preset("tiny")
RECORDED = json.loads(json.dumps(asdict(TINY)))


def test_an_unchanged_configuration_says_nothing():
    assert check_changes(RECORDED, asdict(TINY), 9, "runs/x") == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stage", "sft"), ("seed", 1), ("model.experts_per_token", 2),
        ("model.routed_scaling_factor", 1.0), ("model.scoring", "softmax"), ("data.held_out", 0.1),
    ],
)  # fmt: skip
def test_what_would_rewrite_the_past_is_refused_with_values_and_remedy(name, value):
    run = changed(changed(TINY, name, value), "train.steps", 9)
    option = "--" + name.replace("_", "-")
    with pytest.raises(ValueError, match=rf"(?s){option} \S+ -> {value}: .*--init-from runs/x"):
        check_changes(RECORDED, asdict(run), 9, "runs/x")


@pytest.mark.parametrize(
    "name",
    ["train.batch_size", "rl.prompts_per_step", "rl.objective.group_size", "rl.resample"],
)
def test_the_rollouts_of_a_policy_keep_their_size(name):
    """The number of a rollout, and with it its prompts, is computed from the step."""
    now = preset("r1_zero")
    before = asdict(now)
    *groups, last = name.split(".")
    part = functools.reduce(dict.__getitem__, groups, before)
    part[last] += 1
    with pytest.raises(ValueError, match="prompts that were asked"):
        check_changes(before, asdict(now), 9, "runs/x")
    longer = changed(changed(now, "train.seq_len", 999), "rl.max_new_tokens", 900)
    assert len(check_changes(asdict(now), asdict(longer), 9, "runs/x")) == 1


def test_other_changes_are_said_with_both_values():
    run = changed(changed(TINY, "train.batch_size", 16), "model.max_position", 512)
    phases = (
        *TINY.train.learning_rate[:2],
        dataclasses.replace(TINY.train.learning_rate[2], value=1),
    )
    run = changed(changed(run, "train.learning_rate", phases), "run_dir", "elsewhere")
    (line,) = check_changes(RECORDED, asdict(run), 9, "runs/x")
    assert line == (
        "changed since step 9: --model.max-position 256 -> 512; --train.batch-size 8 -> 16; "
        "--train.learning-rate.2.value 0.0003 -> 1"
    )


@pytest.mark.parametrize("stage", ["pretrain", "sft", "distill", "images"])
def test_another_length_goes_on_and_says_that_rows_are_cut_anew(stage):
    run = changed(TINY, "stage", stage)
    said = check_changes(asdict(run), asdict(changed(run, "train.seq_len", 128)), 9, "runs/x")
    assert said[0] == "changed since step 9: --train.seq-len 256 -> 128"
    assert "may come again" in said[1]


def test_another_mixture_says_that_rows_come_in_another_order():
    sources = (*TINY.data.sources, dataclasses.replace(TINY.data.sources[0], path="more"))
    said = check_changes(RECORDED, asdict(changed(TINY, "data.sources", sources)), 9, "runs/x")
    assert "--data.sources" in said[0]
    assert "may come again" in said[1]
    kept = changed(changed(TINY, "data.vocab_size", 9), "data.cache_dir", "other")
    assert len(check_changes(RECORDED, asdict(kept), 9, "runs/x")) == 1


def test_fields_of_another_version_are_no_change():
    old = json.loads(json.dumps(RECORDED))
    del old["train"]["eval_batches"], old["model"]["yarn"]
    old["train"]["gone"] = 1
    assert changes(old, asdict(TINY)) == []


def test_the_tables_name_fields_that_there_are():
    for name in (*FREE, *(name for fields in FIXED.values() for name in fields)):
        value = TINY
        for part in filter(None, name.split(".")):
            value = getattr(value, part)
