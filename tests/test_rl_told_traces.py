"""Traces of a teacher with another tokenizer: texts, in the student's own tokens and template."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from configs import preset
from data.conventions import GENERATION, SETTINGS
from data.tokenizer import Tokenizer, train_tokenizer
from generation.chat import encode_chat
from rl.examples.rejection import Attempt, Round, Selection
from rl.examples.traces import in_tokens_of, read_traces, told_traces, write_traces
from rl.problems import Problem
from rl.prompts import encode_prompt
from rl.stage_sft import teacher_tokenizer
from tests.xla_flags import QUICK_XLA
from training.metrics import read_metrics

TEACHER = train_tokenizer(["how many apples are in the box? seven"], 320)
TEMPLATE = (
    "{% for m in messages %}{% set c = m.content.split('</think>')[-1] %}"
    "<｜User｜>{{ m.role }}\n{{ c if m.role == 'assistant' else m.content }}<|EOT|>\n{% endfor %}"
    "{% if add_generation_prompt %}<｜User｜>assistant\n<think>\n{% endif %}"
)
"""A template of marks on lines of their own, which opens the reasoning, as R1's students have."""


def student() -> Tokenizer:
    plain = train_tokenizer(["a box of apples, seven in all: many"] * 3, 300)
    files = {
        SETTINGS: json.dumps({"chat_template": TEMPLATE}),
        GENERATION: json.dumps({"eos_token_id": [plain.token_id("<|EOT|>")]}),
    }
    return Tokenizer(plain.json, files)


def write(place, problem: Problem, text: str):
    """One trace in the teacher's tokens."""
    prompt = encode_prompt(TEACHER, problem)
    ids = TEACHER.encode(text, special=True)
    answer = np.append(ids, TEACHER.eos_id).astype(np.int32)
    one = Attempt(problem, prompt, answer, text, True, 1.0)
    return write_traces(
        str(place), TEACHER, lambda n: Round([one], 0, 0), 1, Selection(), {}, {}, lambda line: None
    )


def test_a_conversation_goes_through_the_students_template(tmp_path):
    asked = [{"role": "user", "content": "how many?"}]
    write(tmp_path, Problem(asked, {"answer": "seven"}, "text"), "in the box</think>\n\nseven")
    own, said = student(), []
    assert in_tokens_of(str(tmp_path), TEACHER)
    assert not in_tokens_of(str(tmp_path), own)
    with pytest.raises(ValueError, match="were made with tokenizer"):
        read_traces(str(tmp_path), own)
    examples = told_traces(str(tmp_path), own, said.append)
    (example,) = (examples[i] for i in range(len(examples.lengths)))
    prompt = encode_chat(own, asked, think=True)
    np.testing.assert_array_equal(example.ids[: len(prompt)], prompt)
    assert not example.learned[: len(prompt)].any()
    assert example.learned[len(prompt) :].all()
    learned = own.decode(example.ids[len(prompt) :])
    assert learned == "in the box</think>\n\nseven<|EOT|>"
    assert "the texts of 1 are learned, in this run's own tokens and template" in said[0]
    assert examples.name(0).endswith("00000/traces.jsonl:1")


def test_a_text_is_learned_as_it_is(tmp_path):
    write(tmp_path, Problem("apples:", {"answer": "seven"}, "text"), " seven")
    own = student()
    examples = told_traces(str(tmp_path), own, lambda line: None)
    example = examples[0]
    assert own.decode(example.ids[example.learned], skip_special=True) == " seven"
    assert example.ids[-1] == own.end_id


def test_no_traces_are_named(tmp_path):
    with pytest.raises(ValueError, match="there are no traces in"):
        told_traces(str(tmp_path), student())


def test_distributions_need_one_tokenizer(tmp_path):
    """A policy of another tokenizer may be learned from by its texts alone."""
    (tmp_path / "tokenizer.json").write_text(TEACHER.json)
    run = preset("r1_student_dense")
    sft = dataclasses.replace(run.sft, policy=str(tmp_path))
    run = dataclasses.replace(run, sft=sft)
    assert teacher_tokenizer(run, student()).sha256 == TEACHER.sha256
    assert teacher_tokenizer(run, TEACHER) is TEACHER
    pulled = dataclasses.replace(run, sft=dataclasses.replace(sft, kl_weight=0.5))
    with pytest.raises(ValueError, match=r"another tokenizer .*Set sft\.kl_weight to 0"):
        teacher_tokenizer(pulled, student())


@pytest.mark.slow
def test_a_dense_student_learns_from_a_teacher_with_other_tokens(tmp_path):
    """Through train.py: a MoE teacher of characters, a dense student of byte pairs."""
    tokens = tmp_path / "tokenizer.json"
    tokens.write_text(train_tokenizer(["3cab:>4 2abc:c1a4b0>0"] * 3, 290).json)
    short = ["--task.options", "length=1", "held_out=0.1", "share_of_chains=0"]
    short += ["--train.eval-every", "2", "--rl.eval-prompts", "4", "--train.seq-len", "64"]
    short += ["--rl.max-new-tokens", "8", "--model.num-layers", "1", "--model.hidden-size", "16"]
    short += ["--train.batch-size", "4", "--task.documents", "300", "--checkpoint.every", "0"]

    def train(name: str, *words: str) -> str:
        command = [sys.executable, "train.py", "--run-dir", str(tmp_path / name), *words, *short]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": QUICK_XLA}, text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    demonstrated = ["--stage", "sft", "--sft.demonstrations", "60", "--train.steps", "24"]
    train("teacher", "--config", "r1_base", *demonstrated)
    said = train(
        "student", "--config", "r1_student_dense", "--sft.policy", str(tmp_path / "teacher"),
        "--data.tokenizer", str(tokens), "--model.vocab-size", "290", "--train.steps", "4",
        "--model.num-dense-layers", "1", "--sft.max-new-tokens", "8",
        "--sft.rounds", "1", "--sft.prompts-per-round", "64",
    )  # fmt: skip
    assert "in this run's own tokens and template" in said
    assert "train/loss" in read_metrics(Path(tmp_path / "student"))[-1]
