"""Stage rl around its programs: prompts measured at the start, errors, signals. No compilation."""

import dataclasses
import itertools
import json
import os
import pathlib
import signal
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from configs import preset
from data.tokenizer import train_tokenizer
from rl import stage_rl as stages
from rl.config import RLConfig, TaskConfig
from rl.evaluate import Evaluation
from rl.loop import PolicyLoop
from rl.problems import Problem
from rl.prompts import FilePrompts, Questions, TaskPrompts, encode_prompt
from rl.rollout import Rollout, RolloutStoppedError
from rl.tasks import make_task
from rl.tasks.characters import character_tokenizer
from rl.verdict.scoring import Scores
from sharding.config import MeshConfig
from sharding.mesh import make_layout
from training.config import TrainConfig
from training.display import Display
from training.metrics import read_metrics

LETTERS = character_tokenizer("abcdefgh 1?")


# ---- prompts ------------------------------------------------------------------------------------


def own_run(place: pathlib.Path, seq_len: int, **rl):
    run = preset("r1_zero")
    train = dataclasses.replace(run.train, seq_len=seq_len, batch_size=8, steps=3)
    options: dict[str, Any] = {
        "prompts": str(place), "max_new_tokens": 8, "prompts_per_step": 2, "held_out": 0.0,
        "objective": dataclasses.replace(run.rl.objective, group_size=4),
    }  # fmt: skip
    rl = RLConfig(**(options | rl))
    return dataclasses.replace(run, train=train, task=TaskConfig(), rl=rl)


def write_prompts(place: pathlib.Path, texts) -> pathlib.Path:
    lines = [json.dumps({"prompt": text, "answer": "1"}) + "\n" for text in texts]
    place.write_text("".join(lines))
    return place


def test_one_long_prompt_of_a_file_is_found_at_the_start(tmp_path):
    """Wherever it stands, in the first rollout or not; those held out need no row to train in."""
    texts = [f"{a}{b}{c}?" for a, b, c in itertools.product("abcdefgh", repeat=3)]
    place = write_prompts(tmp_path / "p.jsonl", [*texts, "abc " * 10, "def " * 20])
    run = own_run(place, seq_len=40)
    with pytest.raises(ValueError, match=r"2 of 514 prompts cannot be asked") as error:
        stages.make_prompts(run, LETTERS)
    said = str(error.value)
    assert "'abc abc abc abc abc abc abc abc abc abc ' has 41 tokens, with" in said
    assert "rl.max_new_tokens=8 89; train.seq_len has room for 41" in said
    assert "--rl.max-new-tokens" in said
    stages.make_prompts(own_run(place, seq_len=90), LETTERS)
    with pytest.raises(ValueError, match=r"\n  and 492 more$"):
        stages.make_prompts(own_run(write_prompts(place, texts), seq_len=10), LETTERS)


def test_prompts_held_out_need_room_in_the_model_alone(tmp_path):
    prompts = FilePrompts([Problem("ab?", {})], [Problem("a" * 60, {})], LETTERS, 0)
    run = own_run(tmp_path, seq_len=40)
    stages.check_prompts(run, prompts)
    near = dataclasses.replace(run, model=dataclasses.replace(run.model, max_position=64))
    with pytest.raises(ValueError, match=r"1 of 2 [\s\S]* 69; model.max_position has room for 64"):
        stages.check_prompts(near, prompts)


def test_a_task_of_mixed_lengths_is_measured_beyond_the_first_rollout():
    task = make_task("permutations", shortest=1, length=40)
    prompts = TaskPrompts(task, character_tokenizer(task.vocabulary), seed=0)
    run = own_run(pathlib.Path(), seq_len=45)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=600, eval_every=0))
    assert max(len(ids) for ids in prompts.rollout(0, 2).ids) + 8 <= 46
    with pytest.raises(ValueError, match=r"of 1000 prompts cannot be asked"):
        stages.check_prompts(run, prompts)


@pytest.mark.parametrize("prompt", ["ab xyz?", [{"role": "user", "content": "ab xyz?"}]])
def test_a_character_without_a_token_is_named(prompt):
    tokenizer = LETTERS
    if not isinstance(prompt, str):
        tokenizer = character_tokenizer(["<｜User｜>", "<｜Assistant｜>", "<think>", *"ab \n?"])
    with pytest.raises(ValueError, match=r"prompt '.*ab xyz\?.*tokenizer has no token for 'x'"):
        encode_prompt(tokenizer, Problem(prompt, {}))


def test_unreadable_prompts_are_listed_at_the_start(tmp_path):
    place = write_prompts(tmp_path / "p.jsonl", ["abc?", "Ann?", "b?", "c×d?"])
    with pytest.raises(ValueError, match="2 of 4 prompts cannot be asked") as error:
        stages.make_prompts(own_run(place, seq_len=40), LETTERS)
    assert "prompt 'Ann?' cannot be read: the tokenizer has no token for 'A'" in str(error.value)
    assert "no token for '×'" in str(error.value)


def test_the_documented_command_has_room(tmp_path):
    """R1-Zero's template around a question, in the lengths that docs/r1.md gives."""
    question = "Ann has 5 apples, eats 3 and buys a dozen more. How many are left?" * 4
    place = write_prompts(tmp_path / "p.jsonl", [question])
    run = own_run(place, seq_len=1024, template="r1_zero", max_new_tokens=768)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, max_position=2048))
    stages.make_prompts(run, train_tokenizer([question], 320))


# ---- the loop -----------------------------------------------------------------------------------


class Saved:
    """Checkpoints in memory."""

    def __init__(self):
        self.at: list[int] = []

    def save(self, step, state, config, mesh, metrics, batches):
        self.at.append(step)
        return True

    def steps(self):
        return self.at

    def wait(self):
        return True


class Steps(PolicyLoop):
    """A loop whose rollouts only count; `during` is what happens in one, before its updates."""

    during: Any = staticmethod(lambda step: None)

    def advance(self, step, transcripts, stop):
        """Counts the updates."""
        self.during(step)
        self.state = {"step": np.int64(step + self.updates)}
        return {"policy/reward": 0.0}


def loop(folder, first: int = 0, evaluation: Any = None, updates: int = 2) -> Steps:
    train = TrainConfig(steps=8, seq_len=8, batch_size=8 // updates, eval_every=8)
    on = make_layout(MeshConfig(data=1), jax.devices()[:1])
    rl = RLConfig(prompts_per_step=2, objective=dataclasses.replace(GROUPS, group_size=4))
    unused: Any = None
    trainer: Any = SimpleNamespace(train=train, layout=on)
    sampler: Any = SimpleNamespace(publish=lambda *_: None)
    return Steps(
        trainer=trainer, rl=rl, state={"step": np.int64(first), "params": 0, "router_bias": 0},
        run_dir=folder, config={}, prompts=unused, scorer=unused, sampler=sampler,
        evaluation=evaluation, checkpoints=Saved(), save_every=0, display=Display(8),
    )  # fmt: skip


GROUPS = preset("r1_zero").rl.objective


def measured(step, sampler, stop, failed):
    return {"eval/accuracy": 0.5, "eval/accuracy_greedy": 0.5, "eval/length": 2.0}


def test_an_error_between_rollouts_loses_nothing(tmp_path):
    def broken(step):
        if step == 4:
            raise ConnectionError("the server is gone")

    run = loop(tmp_path)
    run.during = broken
    with pytest.raises(ConnectionError, match=r"^the server is gone$"):
        run.run()
    assert run.checkpoints.steps() == [4]


@pytest.mark.parametrize(
    ("at", "error", "whole"),
    [
        (0, ConnectionError(), True),
        (4, FloatingPointError(), True),
        (4, KeyboardInterrupt(), True),
        (4, ConnectionError(), False),
    ],
    ids=["nothing learned", "not finite", "a second interrupt", "between updates"],
)
def test_a_state_that_must_not_be_kept_is_not_saved(at, error, whole, tmp_path):
    run = loop(tmp_path)

    def broken(step):
        if step == at:
            if not whole:
                run.state = {"step": np.int64(step + 1)}
            raise error

    run.during = broken
    with pytest.raises(type(error)):
        run.run()
    assert run.checkpoints.steps() == []


def test_an_error_of_saving_does_not_hide_the_first(tmp_path):
    def broken(step):
        if step == 2:
            raise ConnectionError("the server is gone")

    def full(*_):
        raise OSError("no space")

    run = loop(tmp_path)
    run.during, run.checkpoints.save = broken, full
    with pytest.raises(ConnectionError, match=r"^the server is gone$"):
        run.run()


def test_the_last_evaluation_is_made_by_the_next_run(tmp_path):
    """A signal in the last rollout skips it; then it is all that is left to do."""

    def interrupted(step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    run = loop(tmp_path, evaluation=measured)
    run.during = interrupted
    assert run.run() == "SIGTERM"
    assert [sorted(r) for r in read_metrics(tmp_path)] == [["policy/reward", "step"]] * 4
    again = loop(tmp_path, first=8, evaluation=measured)
    assert not again.complete
    assert again.run() == ""
    assert read_metrics(tmp_path)[-1]["step"] == 8
    assert "eval/accuracy" in read_metrics(tmp_path)[-1]
    assert len(read_metrics(tmp_path)) == 5
    assert loop(tmp_path, first=8, evaluation=measured).complete
    assert loop(tmp_path / "other", first=8).complete, "without an evaluation nothing is missing"


def test_a_signal_ends_the_last_evaluation(tmp_path):
    """After the last rollout was saved; the next run makes it, or is stopped in it in its turn."""

    def endless(step, sampler, stop, failed):
        assert run.checkpoints.steps() == [8], "saved before it is measured"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        raise RolloutStoppedError

    for first in (0, 8):
        run = loop(tmp_path, first, evaluation=endless)
        assert not run.complete
        assert run.run() == "SIGTERM"
        assert [sorted(r) for r in read_metrics(tmp_path)] == [["policy/reward", "step"]] * 4
    run = loop(tmp_path, first=8, evaluation=measured)
    assert not run.complete
    assert run.run() == ""
    assert read_metrics(tmp_path)[-1] == {"step": 8, **measured(8, None, None, None)}
    assert loop(tmp_path, first=8, evaluation=measured).complete


def test_a_rollout_given_up_is_no_error(tmp_path):
    def stopped(step):
        raise RolloutStoppedError

    run = loop(tmp_path)
    run.during = stopped
    assert run.run() == ""
    assert run.checkpoints.steps() == [0]


# ---- evaluation ---------------------------------------------------------------------------------


class Writes:
    """A sampler that always writes the same."""

    def borrow(self, other):
        """Takes nothing."""

    def publish(self, params, router_bias):
        """Takes nothing."""

    def __call__(self, prompts, group_size, seed, stop=lambda: False):
        tokens = [np.array([3, 1], np.int32) for _ in prompts]
        logps = [np.zeros(2, np.float32) for _ in prompts]
        return Rollout(tokens, logps, np.zeros(len(prompts), bool), None, 1.0, 1)


def test_failed_rewards_of_an_evaluation_are_counted_and_named_once(tmp_path):
    def scorer(records, texts, lengths, stop):
        zeros = np.zeros(len(texts))
        return Scores(
            {"mine": zeros}, {"mine": 1.0}, zeros > 0, {"accuracy": 0.0},
            {"mine": {"raised": 3, "hung": 1}},
            {"mine": {"raised": "KeyError: 'x'", "hung": "10 s"}},
        )  # fmt: skip

    task = make_task("permutations", length=2)
    prompts = TaskPrompts(task, character_tokenizer(task.vocabulary), 0)
    records = [task.prompt(0, i) for i in range(8)]
    questions = Questions(records, [encode_prompt(prompts.tokenizer, r) for r in records])
    evaluation = Evaluation(questions, prompts, scorer, Writes(), Writes())
    run, notes = loop(tmp_path, evaluation=evaluation), []
    run.display.note = notes.append
    run.run()
    assert read_metrics(tmp_path)[-1]["eval/failed_rewards"] == 0.5
    assert sorted(note for note in notes if note.startswith("reward")) == [
        "reward mine failed (hung), counted as 0: 10 s",
        "reward mine failed (raised), counted as 0: KeyError: 'x'",
    ]
