"""Rejection sampling, and traces on disk: chosen, written, resumed, read, trained on."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.packing import PackedRows
from data.store import META, find_store
from data.tokenizer import train_tokenizer
from generation.chat import check_messages
from generation.config import Sampling
from model.config import ModelConfig
from model.costs import count_parameters
from model.recipe import Recipe
from rl.config import RLConfig
from rl.evaluate import lengths
from rl.examples.demonstrations import read_examples
from rl.examples.packing import PackedExamples, sft_batches
from rl.examples.rejection import (
    Attempt,
    Kept,
    Round,
    Selection,
    attempts,
    sampled_round,
    select,
)
from rl.examples.traces import LINES, PROMPTS, read_traces, transcript, write_traces
from rl.problems import Problem
from rl.prompts import Questions, TaskPrompts, encode_prompt
from rl.rollout import PolicySampler, Rollout
from rl.tasks import make_task
from rl.tasks.characters import character_tokenizer
from rl.verdict.scoring import Scores, TaskScorer
from sharding.partition import local_rows
from tests.layout_helpers import ONE_DEVICE, layout_of
from training.config import OptimizerConfig, Phase, TrainConfig
from training.display import Display
from training.loop import Loop
from training.schedule import BatchPlan
from training.step import Trainer
from training.throughput import Throughput

LETTERS = character_tokenizer("abcdefgh:>")
EOS = LETTERS.eos_id
SETTINGS = {"checkpoint": "runs/zero/000100", "sampler": dataclasses.asdict(Sampling())}


def attempt(text, problem="a:", correct=True, end=EOS, reward=1.0):
    ids = np.append(LETTERS.encode(text), np.int32(end))
    prompt = LETTERS.encode_prompt(problem)
    return Attempt(Problem(problem, {}), prompt, ids, text, correct, reward)


# ---- selection ----------------------------------------------------------------------------------


def test_every_answer_has_one_fate():
    found = [
        attempt("b"),
        attempt("c", correct=False),
        attempt("b"),
        attempt("d", end=5),
        attempt("abcdefgh"),
        attempt("hh"),
        attempt("e"),
        attempt("f"),
        attempt("b", problem="b:"),
        attempt("ccccccccc", correct=False, end=5),
    ]
    filters = {"no h": lambda problem, text: "h" not in text}
    chosen, fates = select(found, Selection(2, max_tokens=8), filters, [EOS], Kept())
    assert [id(one) for one in chosen] == [id(found[i]) for i in (0, 6, 8)]
    assert fates == {
        "kept": 3, "wrong": 2, "repeated": 1, "unfinished": 1, "long": 1, "no h": 1, "surplus": 1,
    }  # fmt: skip


ATTEMPTS = st.lists(
    st.builds(
        attempt,
        st.sampled_from(["b", "bb", "c", "cc", "dddd"]),
        st.sampled_from(["a:", "b:", "c:"]),
        st.booleans(),
        st.sampled_from([EOS, EOS, EOS, 5]),
    ),
    max_size=40,
)


@given(ATTEMPTS, st.integers(0, 3), st.integers(0, 4), st.integers(0, 40))
def test_selection_is_the_same_in_rounds_and_keeps_its_promises(found, most, longest, cut):
    selection = Selection(most, longest)
    whole, fates = select(found, selection, {}, [EOS], Kept())
    kept = Kept()
    first, fates_1 = select(found[:cut], selection, {}, [EOS], kept)
    second, fates_2 = select(found[cut:], selection, {}, [EOS], kept)
    assert [id(one) for one in whole] == [id(one) for one in first + second]
    assert fates_1 + fates_2 == fates
    assert fates.total() == len(found)
    # From scratch: distinct finished correct short answers of each prompt, the first few of them.
    expected: dict[str, list[str]] = {}
    for one in found:
        fits = not longest or len(one.answer) <= longest
        texts = expected.setdefault(one.problem.prompt, [])
        if one.correct and one.answer[-1] == EOS and fits and one.text not in texts:
            texts.append(one.text)
    for prompt, texts in expected.items():
        assert [one.text for one in whole if one.problem.prompt == prompt] == texts[: most or None]


def test_texts_that_differ_in_blanks_around_are_one_answer_and_problems_stay_apart():
    one, blank = attempt("ab"), dataclasses.replace(attempt("ab"), text=" ab\n")
    assert one.digest == blank.digest
    assert len({one.digest, attempt("ba").digest, attempt("b", problem="a:a").digest}) == 3
    named = Problem("another wording", {}, name="a:")
    assert dataclasses.replace(one, problem=named).digest == one.digest


# ---- attempts -----------------------------------------------------------------------------------


def test_answers_of_a_rollout_belong_to_their_prompts():
    problems = [Problem("a:", {}), Problem([{"role": "user", "content": "b"}], {})]
    questions = Questions(problems, [LETTERS.encode("a:"), LETTERS.encode("b")])
    answers = [LETTERS.encode(text) for text in ("c", "d", "e", "f")]
    logps = [np.zeros(1, np.float32)] * 4
    rollout = Rollout(answers, logps, np.zeros(4, bool), None, 1.0, 4)
    correct, rewards = np.array([True, False, True, False]), np.array([1.5, 0, 0.5, 0])
    scores = Scores({"own": rewards}, {"own": 1.0}, correct, {})
    found = attempts(questions, rollout, ["c", "d", "e", "f"], scores)
    assert [one.problem for one in found] == [problems[0]] * 2 + [problems[1]] * 2
    assert [(one.text, one.correct, one.reward) for one in found] == [
        ("c", True, 1.5), ("d", False, 0.0), ("e", True, 0.5), ("f", False, 0.0),
    ]  # fmt: skip
    np.testing.assert_array_equal(found[3].answer, answers[3])


# ---- on disk ------------------------------------------------------------------------------------


def a_round(number):
    """Two prompts with three answers each; rounds repeat some answers of earlier ones."""
    rng = np.random.default_rng(number)
    found = []
    for problem in ("ab:", "b:"):
        for _ in range(3):
            text = "".join(rng.choice(list("abc"), rng.integers(1, 3)))
            found.append(attempt(text, problem, bool(rng.random() < 0.8), reward=rng.random()))
    return Round(found, seed=number + 50, step=10 * number)


def write(place, rounds, answer=a_round, selection=None, settings=SETTINGS, **options):
    selection = selection or Selection(3)
    options = {"filters": {}, "say": lambda line: None, **options}
    return write_traces(
        str(place), LETTERS, answer, rounds, selection, settings=settings, **options
    )


def contents(place):
    return {
        path.relative_to(place).as_posix(): path.read_bytes()
        for path in sorted(Path(place).rglob("*"))
        if path.is_file()
    }


def all_chosen(rounds, selection):
    kept, chosen, fates = Kept(), [], Counter()
    for number in range(rounds):
        some, more = select(a_round(number).attempts, selection, {}, [EOS], kept)
        chosen.append(some)
        fates += more
    return chosen, fates


def test_traces_hold_the_chosen_answers_and_where_they_come_from(tmp_path):
    said = []
    traces = write(tmp_path, 3, say=said.append)
    chosen, fates = all_chosen(3, Selection(3))
    assert traces.fates == fates
    assert min(fates["kept"], fates["wrong"], fates["repeated"] + fates["surplus"]) > 0
    assert len(said) == 3
    assert said[0].startswith("traces, round 0: ")
    flat = [(n, one) for n, some in enumerate(chosen) for one in some]
    assert len(traces.examples.lengths) == len(flat)
    for i, ((number, one), line) in enumerate(zip(flat, transcript(traces.stores), strict=True)):
        example = traces.examples[i]
        np.testing.assert_array_equal(example.ids, [*one.prompt, *one.answer])
        np.testing.assert_array_equal(
            example.learned, [*([False] * len(one.prompt)), *([True] * len(one.answer))]
        )
        assert traces.examples.lengths[i] == len(example.ids)
        assert line == {
            "prompt": one.problem.prompt, "completion": one.text, "problem": one.problem.key,
            "task": "", "reward": one.reward, "prompt_tokens": len(one.prompt),
            "answer_tokens": len(one.answer), "digest": one.digest, "round": number,
            "seed": number + 50, "step": 10 * number, **SETTINGS,
        }  # fmt: skip
    assert traces.examples.name(len(chosen[0])) == f"{tmp_path}/00001/traces.jsonl:1"


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_broken_off_run_ends_with_the_same_traces(tmp_path, done):
    write(tmp_path / "whole", 4)

    def until(number):
        if number == done:
            raise KeyboardInterrupt
        return a_round(number)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "broken", 4, until)
    if done:  # killed while round `done` is written: everything is there but its meta.json
        half = tmp_path / "broken" / f"{done:05d}" / LINES
        half.parent.mkdir()
        half.write_text("{}\n")
    asked = []
    write(tmp_path / "broken", 4, lambda n: (asked.append(n), a_round(n))[1])
    assert asked == list(range(done, 4))
    whole, resumed = (contents(tmp_path / name) for name in ("whole", "broken"))
    assert whole.keys() == resumed.keys()
    for name, content in whole.items():
        if name.endswith(META):  # it names its own folder
            content = content.replace(b"/whole/", b"/broken/")
        assert resumed[name] == content, name


def test_finished_rounds_are_not_sampled_again(tmp_path):
    write(tmp_path, 2)
    before = contents(tmp_path)

    def never(number):
        raise AssertionError(number)

    write(tmp_path, 2, never)
    assert contents(tmp_path) == before


def test_a_store_of_traces_is_a_source_of_pretraining(tmp_path):
    write(tmp_path, 1)
    store = find_store(str(tmp_path / "00000"))
    chosen = all_chosen(1, Selection(3))[0][0]
    assert store.train.documents == len(chosen)
    assert store.held_out.documents == 0
    assert store.train.text_bytes == sum(len(one.problem.prompt + one.text) for one in chosen)
    rows = PackedRows(store.train, 7, 0, segments=True)
    documents = {tuple(one.prompt.tolist() + one.answer.tolist()) for one in chosen}
    row = rows[0]
    for segment in range(2, int(row["segments"].max())):  # those that are not cut
        assert tuple(row["tokens"][row["segments"] == segment].tolist()) in documents


def test_a_transcript_is_a_file_of_examples(tmp_path):
    traces = write(tmp_path, 1)
    again = read_examples(tmp_path / "00000" / LINES, LETTERS)
    assert len(again.lengths) == len(traces.examples.lengths)
    for i in range(len(again.lengths)):
        np.testing.assert_array_equal(again[i].ids, traces.examples[i].ids)
        np.testing.assert_array_equal(again[i].learned, traces.examples[i].learned)


def test_sampled_conversations_keep_their_ids_and_read_as_messages(tmp_path):
    tokenizer = train_tokenizer(["why so and how"], 320)
    messages = [{"role": "user", "content": "how"}]
    problem = Problem(messages, {"answer": "so"}, "text", name="p")
    prompt = encode_prompt(tokenizer, problem)
    # "why" letter by letter: no encoding of the text would give these ids.
    spelled = np.concatenate([tokenizer.encode(letter) for letter in "why"])
    end = [tokenizer.token_id("</think>"), *tokenizer.encode("so"), tokenizer.eos_id]
    answer = np.concatenate([spelled, end]).astype(np.int32)
    one = Attempt(problem, prompt, answer, "why</think>so", True, 1.0)
    traces = write_traces(
        str(tmp_path), tokenizer, lambda n: Round([one], 0, 0), 1, Selection(),
        {"any": lambda problem, text: True}, {}, lambda line: None,
    )  # fmt: skip
    np.testing.assert_array_equal(traces.examples[0].ids, [*prompt, *answer])
    (line,) = transcript(traces.stores)
    assert line["messages"] == [
        *messages, {"role": "assistant", "content": "<think>\nwhy</think>so"},
    ]  # fmt: skip
    assert (line["problem"], line["task"]) == ("p", "text")
    check_messages(line["messages"][:1])
    (example,) = (read_examples(tmp_path / "00000" / LINES, tokenizer)[0],)
    ours, theirs = (tokenizer.decode(x.ids) for x in (example, traces.examples[0]))
    assert ours == theirs


def test_rounds_without_a_choice_are_kept_and_a_run_of_nothing_else_is_named(tmp_path):
    def wrong(number):
        return Round([attempt("b", correct=False)], 0, 0)

    with pytest.raises(ValueError, match=r"no answer was chosen in 2 rounds; 2 wrong\. Sample"):
        write(tmp_path, 2, wrong)
    traces = write(tmp_path, 3)
    assert traces.fates["wrong"] >= 2
    assert len(traces.stores) == 3
    assert traces.examples.name(0).endswith("00002/traces.jsonl:1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"checkpoint": "other"}}, "settings .*runs/zero.*; this run has .*other"),
        ({"selection": Selection(9)}, "'per_prompt': 3.*'per_prompt': 9"),
        ({"filters": {"a": bool}}, r"filters \[\]; this run has filters \['a'\]"),
    ],
)
def test_rounds_of_other_settings_are_not_mixed(tmp_path, change, message):
    write(tmp_path, 1)
    with pytest.raises(ValueError, match=message):
        write(tmp_path, 2, **change)


def test_more_rounds_than_asked_for_are_not_cut_in_silence(tmp_path):
    write(tmp_path, 3)
    with pytest.raises(ValueError, match=r"have 3 rounds, and this run has rounds=2; ask for 3"):
        write(tmp_path, 2)


def test_damaged_and_foreign_traces_are_named(tmp_path):
    with pytest.raises(ValueError, match="there are no traces in"):
        read_traces(str(tmp_path / "nowhere"), LETTERS)
    write(tmp_path, 2)
    with pytest.raises(ValueError, match="were made with tokenizer"):
        read_traces(str(tmp_path), character_tokenizer("ab"))
    np.save(tmp_path / "00001" / PROMPTS, np.zeros(99, np.int64))
    with pytest.raises(ValueError, match=r"documents, 99 lengths of prompts in .* damaged"):
        read_traces(str(tmp_path), LETTERS)
    (tmp_path / "00000" / LINES).unlink()
    with pytest.raises(ValueError, match=r"00000: traces\.jsonl is gone"):
        write(tmp_path, 3)


def test_batches_from_traces_and_from_their_examples_are_the_same(tmp_path):
    traces = write(tmp_path, 3)
    rows = PackedExamples(traces.examples, 15, 1, LETTERS.pad_id)
    batch = sft_batches(rows, 2).batch_at(0, 4)
    seen = batch["tokens"][..., 1:][batch["mask"] == 1]
    assert (seen == EOS).sum() == sum(
        int(row["segments"].max()) for row in (rows[i] for i in range(4))
    )
    assert json.loads(json.dumps(traces.fates)) == dict(traces.fates)


# ---- a student ----------------------------------------------------------------------------------


STUDENT = ModelConfig(
    vocab_size=24, hidden_size=64, num_layers=2, num_dense_layers=0, num_heads=4, q_lora_rank=None,
    kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, dense_ffn_size=256,
    expert_ffn_size=40, num_experts=8, num_shared_experts=1, experts_per_token=2, max_position=256,
    init_std=0.125,
)  # fmt: skip
"""Weights start at 1 / sqrt(width): at 0.05 the loss rests for 800 steps where steps are copied."""


class NoCheckpoints:
    """A loop's checkpoints that go nowhere."""

    def save(self, step, state, config, mesh, metrics, batches):
        return False

    def steps(self):
        return []

    def wait(self):
        return True


def demonstrated(task, tokenizer):
    """A teacher that follows every chain without a mistake."""

    def answer(number):
        found = []
        for i in range(1000):
            problem = task.prompt(number, i, "train")
            text = task.demonstrate(problem, np.random.default_rng((number, i)))
            prompt = encode_prompt(tokenizer, problem)  # begins as a question to the student
            answer = np.append(tokenizer.encode(text), np.int32(tokenizer.eos_id))
            reward = task.verify(problem, text)
            found.append(Attempt(problem, prompt, answer, text, reward == 1.0, reward))
        return Round(found, number, 0)

    return answer


@pytest.mark.slow
def test_a_small_student_learns_from_traces_what_its_teacher_does(tmp_path):
    """0.2M random weights; the first answers of the trained student are traces in their turn."""
    assert count_parameters(STUDENT).total == 206_224
    task = make_task("permutations", noise=0.0, share_of_chains=1.0)
    tokenizer = character_tokenizer(task.vocabulary)
    say = []
    traces = write_traces(
        str(tmp_path / "teacher"), tokenizer, demonstrated(task, tokenizer), 4, Selection(1), {},
        {"checkpoint": "permutations"}, say.append,
    )  # fmt: skip
    assert traces.fates["kept"] > 3900
    train = TrainConfig(
        steps=250, seq_len=192, batch_size=6, eval_every=0, log_every=50,
        optimizer=OptimizerConfig(weight_decay=0.01),
        learning_rate=(
            Phase(20, 3e-3, "linear", "steps"), Phase(150, 3e-3, "constant", "steps"),
            Phase(250, 3e-4, "cosine", "steps"),
        ),
    )  # fmt: skip
    layout, plan = layout_of(ONE_DEVICE), BatchPlan(train)
    trainer = Trainer(STUDENT, train, Recipe(), layout)
    loop = Loop(
        trainer=trainer, plan=plan, state=trainer.init(jax.random.key(0)), run_dir=tmp_path / "run",
        config={}, checkpoints=NoCheckpoints(), save_every=0, evaluate=None,
        throughput=Throughput(1.0, 1, "cpu"), display=Display(train.steps),
    )  # fmt: skip
    rows = PackedExamples(traces.examples, train.seq_len, 0, tokenizer.pad_id)
    local = local_rows(layout, plan.micro_batch_size)
    batches = sft_batches(rows, plan.micro_batch_size, local)

    def span(step):
        return plan.at(step).first_sequence, plan.at(step).batch_size

    assert loop.run(batches.batches(span, loop.first_step, train.steps), local) == ""
    prompts, scorer = TaskPrompts(task, tokenizer, 0), TaskScorer(task, RLConfig())
    questions = prompts.held_out(256)
    sampler = PolicySampler(
        STUDENT, Recipe(), layout, Sampling(0.0), rows=64, max_new_tokens=32,
        eos_ids=(tokenizer.eos_id,),
    )  # fmt: skip
    sampler.publish(loop.state["params"], loop.state["router_bias"])
    rollout = sampler(questions.ids, 1, 0)
    scores = scorer(questions.problems, prompts.texts(rollout.tokens), lengths(rollout))
    print(f"held-out greedy accuracy {scores.correct.mean():.3f}")
    assert scores.correct.mean() > 0.9

    def answer(number):
        return sampled_round(
            number, prompts, sampler, scorer, count=32, group_size=2, step=train.steps
        )

    own = write_traces(
        str(tmp_path / "own"), tokenizer, answer, 2, Selection(1), {}, {}, say.append
    )
    # Greedy answers to one prompt are equal: half of them repeat the other half.
    assert own.fates["repeated"] >= 50
    assert own.fates["repeated"] + own.fates["kept"] + own.fates["wrong"] == 128
    for i, line in enumerate(transcript(own.stores)):
        problem = Problem(line["prompt"], task_answer(task, line["prompt"]), task.name)
        assert task.verify(problem, line["completion"]) == 1.0
        text = tokenizer.decode(own.examples[i].ids, skip_special=True)
        assert text == line["prompt"] + line["completion"]


def task_answer(task, prompt):
    """Start, moves and final state of a chain, from its prompt."""
    start, moves = int(prompt[0]), list(prompt[1:-1])
    state = start
    for move in moves:
        state = task.moves[move][state]
    return {"start": start, "moves": moves, "final": state}
