"""Stage rl: batches by hand, sampler against trainer, resume, configuration, and that it learns."""

import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from checkpoint.config import CheckpointConfig
from checkpoint.manager import CheckpointManager
from configs import preset
from configs.schema import RunConfig
from data.config import DataConfig
from generation.config import Sampling
from generation.steps import CHUNK
from model.recipe import Recipe
from rl import rollout as rollout_module
from rl import stage_rl as stages
from rl.batches import cut, make_batch
from rl.config import GRPOConfig, RLConfig, TaskConfig
from rl.corpus import configured_task, corpus_data
from rl.evaluate import Transcripts
from rl.metrics import numbers
from rl.plots import plot_rl
from rl.prompts import TaskPrompts, sampler_seed
from rl.rollout import PolicySampler, Rollout
from rl.stopping import RolloutStoppedError
from rl.tasks import make_task
from rl.tasks.characters import character_tokenizer
from rl.trainer import REFERENCE, PolicyTrainer
from rl.verdict.scoring import Scores, TaskScorer
from sharding.config import MeshConfig
from sharding.mesh import make_layout
from sharding.partition import local_rows, place_rows
from training.config import OptimizerConfig, Phase, TrainConfig
from training.metrics import read_metrics
from training.run import Session

ROOT = pathlib.Path(__file__).resolve().parent.parent
TASK = TaskConfig("permutations", ("length=2", "held_out=0.3"))
PROMPT, BUDGET, T = 4, 6, 10


def model(**changes):
    small = {
        "vocab_size": 24, "hidden_size": 32, "num_layers": 1, "num_dense_layers": 0,
        "num_heads": 2, "dense_ffn_size": 32, "expert_ffn_size": 16, "num_experts": 4,
        "init_std": 0.15,
    }  # fmt: skip
    return dataclasses.replace(preset("r1_base").model, **(small | changes))


def tiny_run(run_dir="", **rl):
    """Four steps of 2 prompts x 4 answers."""
    options = {"prompts_per_step": 2, "max_new_tokens": BUDGET, "eval_prompts": 2}
    objective = rl.pop("objective", GRPOConfig(group_size=4))
    batch_size = rl.pop("batch_size", 8)
    eval_every = rl.pop("eval_every", 0)
    return RunConfig(
        model=model(),
        train=TrainConfig(
            steps=4, seq_len=T, batch_size=batch_size, learning_rate=(Phase(0, 1e-2),),
            eval_every=eval_every,
        ),
        data=DataConfig(vocab_size=24),
        stage="rl",
        task=TASK,
        rl=RLConfig(**(options | rl), objective=objective),
        checkpoint=CheckpointConfig(every=0, asynchronous=False),
        run_dir=str(run_dir),
    )  # fmt: skip


def make_trainer(run: RunConfig, recipe: Recipe | None = None) -> PolicyTrainer:
    layout = make_layout(run.mesh, jax.devices()[: run.mesh.data * run.mesh.fsdp * run.mesh.expert])
    return stages.make_trainer(run, recipe or Recipe(run.train.dtype), layout)


def make_loop(run: RunConfig, trainer: PolicyTrainer, compiled=None) -> stages.PolicyLoop:
    """As train.py makes it, from the run's newest checkpoint or from random weights.

    compiled: a loop of the same configuration, whose compiled samplers serve again.
    """
    checkpoints = CheckpointManager(os.path.join(run.run_dir, "checkpoints"), run.checkpoint)
    state = checkpoints.restore(trainer.abstract_state)
    state = trainer.init(jax.random.key(run.seed)) if state is None else state
    tokenizer = stages.policy_tokenizer(run, "")
    prompts = stages.make_prompts(run, tokenizer)
    with stages.open_scorer(run) as scorer:
        loop = stages.make_loop(
            run, trainer, state, checkpoints, prompts, scorer, Session(print, 0.0)
        )
    if compiled is not None:
        loop.sampler, loop.evaluation = compiled.sampler, compiled.evaluation
    return loop


def lines_of(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def same(a, b) -> bool:
    equal = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return all(jax.tree.leaves(equal))


# ---- batches ------------------------------------------------------------------------------------


def hand_made() -> tuple[list[np.ndarray], Rollout]:
    prompts = [np.array([5, 6], np.int32), np.array([7, 8, 9], np.int32)]
    tokens = [[11, 1], [12], [13, 14, 1], [15, 16]]
    lengths = [4, 3, 6, 5]
    routes = [np.arange(2 * (n - 1)).reshape(-1, 2).astype(np.int16) for n in lengths]
    return prompts, Rollout(
        tokens=[np.array(ids, np.int32) for ids in tokens],
        logps=[-np.array(ids, np.float32) / 10 for ids in tokens],
        truncated=np.array([False, True, False, True]),
        routes=routes, seconds=1.0, passes=8,
    )  # fmt: skip


def test_tokens_that_were_kept_by_hand():
    """Of a token's position what it was drawn from; elsewhere the token alone, which is certain."""
    prompts, rollout = hand_made()
    kept = [np.stack([ids, ids + 1, np.full(len(ids), -1)], axis=1) for ids in rollout.tokens]
    batch = make_batch(prompts, dataclasses.replace(rollout, kept=kept), seq_len=6)
    alone = lambda *ids: [[i, -1, -1] for i in ids]  # noqa: E731
    assert batch["kept"].dtype == np.int32
    assert batch["kept"][0].tolist() == [[6, -1, -1], [11, 12, -1], [1, 2, -1], *alone(0, 0, 0)]
    assert batch["kept"][3].tolist() == [*alone(8, 9), [15, 16, -1], [16, 17, -1], *alone(0, 0)]


def test_a_batch_by_hand():
    """Position t predicts token t + 1; the last prompt position predicts the first answer token."""
    batch = make_batch(*hand_made(), seq_len=6)
    assert batch["tokens"].tolist() == [
        [5, 6, 11, 1, 0, 0, 0],
        [5, 6, 12, 0, 0, 0, 0],
        [7, 8, 9, 13, 14, 1, 0],
        [7, 8, 9, 15, 16, 0, 0],
    ]
    assert batch["lengths"].tolist() == [4, 3, 6, 5]
    assert batch["mask"].tolist() == [
        [0, 1, 1, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 1, 1, 0, 0],
    ]
    np.testing.assert_allclose(
        batch["sampler_logp"],
        [
            [0, -1.1, -0.1, 0, 0, 0],
            [0, -1.2, 0, 0, 0, 0],
            [0, 0, -1.3, -1.4, -0.1, 0],
            [0, 0, -1.5, -1.6, 0, 0],
        ],
        rtol=1e-6,
    )
    assert batch["routes"][1].tolist() == [[0, 1], [2, 3]] + [[-1, -1]] * 4
    assert batch["routes"][2].tolist() == [[2 * i, 2 * i + 1] for i in range(5)] + [[-1, -1]]


def test_a_batch_without_routes_and_without_room():
    prompts, rollout = hand_made()
    assert "routes" not in make_batch(prompts, dataclasses.replace(rollout, routes=None), 5)
    with pytest.raises(ValueError, match="prompt of 3 tokens with an answer of 3 has 6"):
        make_batch(prompts, rollout, seq_len=4)


def test_cutting_keeps_the_order_of_answers():
    parts = cut({"x": np.arange(12), "y": np.arange(24).reshape(12, 2)}, 3, 2)
    assert [part["x"].tolist() for part in parts] == [
        [[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]],
    ]  # fmt: skip
    assert parts[1]["y"].shape == (2, 2, 2)


# ---- sampler and trainer ------------------------------------------------------------------------


def scored(trainer, state, sampler, prompts, group, replay, seed=3):
    """A rollout, and the trainer's log-probabilities of it."""
    sampler.publish(state["params"], state["router_bias"])
    return gap_of(trainer, state, prompts, sampler(prompts, group, seed), replay)


def gap_of(trainer, state, prompts, rollout, replay=True):
    batch = make_batch(prompts, rollout, trainer.train.seq_len)
    if not replay:
        batch.pop("routes", None)
    names = ("tokens", "lengths", "kept", "routes")
    inputs = {name: batch[name][None] for name in names if name in batch}
    rows = local_rows(trainer.layout, len(batch["tokens"]))
    inputs = place_rows(trainer.layout, inputs, rows, len(batch["tokens"]))
    logp_AT = np.asarray(trainer.logps(state["params"], state["router_bias"], inputs))[0]
    return np.abs(logp_AT - batch["sampler_logp"])[batch["mask"] > 0], rollout


def ids(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 24, rng.integers(2, 5)).astype(np.int32) for _ in range(count)]


AGREE = {
    "one": (MeshConfig(data=1), False),
    "one, drafts": (MeshConfig(data=1), True),
    "data": (MeshConfig(data=8), False),
    "expert, fsdp": (MeshConfig(expert=4, fsdp=2), False),
    "fsdp, tensor": (MeshConfig(fsdp=4, tensor=2), False),
    "data, expert, tensor": (MeshConfig(data=2, expert=2, tensor=2), False),
    "expert, tensor, drafts": (MeshConfig(expert=2, tensor=2), True),
}


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "speculate"), AGREE.values(), ids=AGREE)
def test_sampler_and_trainer_agree(mesh, speculate):
    """fp32: every token's log-probability within 1e-4, on every layout, from a distribution that
    temperature, top-k and top-p have changed; without the list of kept tokens far from it."""
    run = tiny_run(temperature=0.8, top_k=5, top_p=0.9)
    run = dataclasses.replace(run, mesh=mesh, model=model(mtp_depth=int(speculate)))
    layout = make_layout(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.expert * mesh.tensor])
    trainer = stages.make_trainer(run, Recipe(), layout)
    state = trainer.init(jax.random.key(0))
    sampler = PolicySampler(
        run.model, trainer.recipe, trainer.layout, Sampling(0.8, top_k=5, top_p=0.9), rows=3,
        max_new_tokens=BUDGET, eos_ids=[1], speculate=speculate, replay=True,
    )  # fmt: skip
    gap, rollout = scored(trainer, state, sampler, ids(2), 4, replay=True)
    assert len(gap) == rollout.num_tokens > 8
    assert rollout.kept is not None
    kept = np.concatenate(rollout.kept)
    assert kept.shape == (rollout.num_tokens, 5)
    assert (kept == np.concatenate(rollout.tokens)[:, None]).sum() == rollout.num_tokens
    assert gap.max() < 1e-4
    if mesh == MeshConfig(data=1):
        gap, _ = gap_of(trainer, state, ids(2), dataclasses.replace(rollout, kept=None))
        assert gap.min() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=1), MeshConfig(expert=2, fsdp=2)], ids=["one", "four"]
)
def test_the_last_answers_go_on_in_fewer_rows(mesh, monkeypatch):
    """As they would have in all rows."""
    run = dataclasses.replace(tiny_run(), mesh=mesh)
    layout = make_layout(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.expert])
    trainer = stages.make_trainer(run, Recipe(), layout)
    state = trainer.init(jax.random.key(0))
    results, widths = [], []
    call = rollout_module._Session._call

    def watched(self, program, *arguments, **options):
        if program is self._s._steps.keep:
            widths.append(len(arguments[1]))
        return call(self, program, *arguments, **options)

    monkeypatch.setattr(rollout_module._Session, "_call", watched)
    for long in (2 * CHUNK, 10**9):
        monkeypatch.setattr(rollout_module, "LONG", long)
        sampler = PolicySampler(
            run.model, trainer.recipe, layout, Sampling(top_k=12), rows=16, max_new_tokens=100,
            eos_ids=[1], replay=True,
        )  # fmt: skip
        sampler.publish(state["params"], state["router_bias"])
        results.append(sampler(ids(8), 2, 5))
    assert widths == [4]
    narrow, wide = results
    assert max(map(len, wide.tokens)) > 2 * min(map(len, wide.tokens))
    for name in ("tokens", "kept", "routes"):
        for a, b in zip(getattr(narrow, name), getattr(wide, name), strict=True):
            np.testing.assert_array_equal(a, b)
    for a, b in zip(narrow.logps, wide.logps, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_replayed_routing_closes_the_gap_of_bf16():
    """Without it, tokens go to other experts in the trainer than in the sampler's cache."""
    run = tiny_run(max_new_tokens=40)
    wide = model(num_layers=4, num_dense_layers=0, num_experts=8, hidden_size=64, init_std=0.2)
    train = dataclasses.replace(run.train, seq_len=48, batch_size=32, dtype="bfloat16")
    run = dataclasses.replace(run, model=wide, train=train)
    trainer = PolicyTrainer(
        wide, train, Recipe("bfloat16"), make_layout(run.mesh, jax.devices()[:1])
    )
    state = trainer.init(jax.random.key(0))
    sampler = PolicySampler(
        wide, trainer.recipe, trainer.layout, Sampling(), rows=32, max_new_tokens=40, eos_ids=[1],
        replay=True,
    )  # fmt: skip
    free, _ = scored(trainer, state, sampler, ids(4), 8, replay=False)
    held, _ = scored(trainer, state, sampler, ids(4), 8, replay=True)
    print(f"mean {free.mean():.4f} -> {held.mean():.4f}, max {free.max():.3f} -> {held.max():.3f}")
    assert held.mean() < free.mean() / 2
    assert held.max() < free.max() / 2


def test_seeds_differ_by_purpose_and_number():
    seeds = {sampler_seed(s, p, n) for s in range(3) for p in range(3) for n in range(50)}
    assert len(seeds) == 450
    assert sampler_seed(0, 1, 2) == sampler_seed(0, 1, 2)
    assert max(seeds) < 2**31


# ---- the loop -----------------------------------------------------------------------------------


OBJECTIVE = GRPOConfig(group_size=4, kl_coef=0.1, kl_estimator="k3")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four steps in one go: two rollouts of two updates each, with reference and sampling masks."""
    run = tiny_run(
        tmp_path_factory.mktemp("whole"), objective=OBJECTIVE, batch_size=4, reference_every=2,
        eval_every=2, top_k=6, top_p=0.95,
    )  # fmt: skip
    trainer = make_trainer(run)
    loop = make_loop(run, trainer)
    # Samplers of their own would be four more programs to compile; the slow tests have them.
    loop.evaluation = dataclasses.replace(loop.evaluation, drawn=loop.sampler, greedy=loop.sampler)
    before = jax.device_get(loop.state)
    assert loop.run() == ""
    return run, trainer, loop, before


def test_two_rollouts_of_two_updates(whole):
    run, _, loop, before = whole
    assert int(loop.state["step"]) == 4
    assert not same(before["params"], loop.state["params"])
    assert same(loop.state[REFERENCE]["params"], loop.state["params"]), "renewed after step 4"
    lines = read_metrics(run.run_dir)
    assert [line["step"] for line in lines] == [1, 3, 4]
    assert all("eval/accuracy_greedy" in line for line in lines)
    first, second = lines[0], lines[1]
    assert first["policy/kl"] >= 0
    assert first["policy/sampler_gap_max"] < 1e-4
    assert first["policy/old_kl"] > 0, "the second update starts from a policy that has moved"
    assert first["perf/rollout_share"] + first["perf/reward_share"] + first[
        "perf/update_share"
    ] == (pytest.approx(1))
    assert first["policy/reward/accuracy"] == first["policy/accuracy"] == first["policy/reward"]
    assert 1 <= second["policy/length"] <= BUDGET


def test_transcripts_and_plot(whole):
    run, *_ = whole
    lines = lines_of(os.path.join(run.run_dir, "samples.jsonl"))
    assert [line["step"] for line in lines] == [0] * 4 + [2] * 4
    task = configured_task(TASK)
    for line in lines:
        assert line["tokens"] <= BUDGET
        assert line["prompt"].endswith(":")
        assert line["reward"] == line["correct"]
    assert {line["prompt"] for line in lines[:4]} == {task.prompt(0, 0).prompt}
    assert [path.name for path in plot_rl(run.run_dir)] == ["rl.png"]


@pytest.mark.parametrize(
    ("inside", "call", "step"),
    [("sampler", 1, 2), ("scorer", 5, 2), ("evaluation", 2, 2), ("evaluation", 5, 4)],
    ids=["sampler", "scorer", "evaluation", "last evaluation"],
)
def test_stopped_and_resumed_is_not_stopped(inside, call, step, whole, tmp_path, monkeypatch):
    """SIGTERM inside the second rollout, or in the evaluation after it: what it came in is lost,
    and nothing differs in the end."""
    run, trainer, uncut, _ = whole
    run = dataclasses.replace(run, run_dir=str(tmp_path))
    loop = make_loop(run, trainer, uncut)
    patched = type(loop.scorer if inside == "scorer" else loop.sampler)
    inner, calls = patched.__call__, itertools.count()

    def interrupted(self, given, also, more, *stop):
        mine = inside == "scorer" or (also > 1) == (inside == "sampler")  # also: group
        if mine and next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, given, also, more, *stop)

    monkeypatch.setattr(patched, "__call__", interrupted)
    assert loop.run() == "SIGTERM"
    assert int(loop.state["step"]) == step
    monkeypatch.undo()
    resumed = make_loop(run, trainer, uncut)
    assert resumed.first_step == step
    assert not resumed.complete
    assert resumed.run() == ""
    assert same(resumed.state, uncut.state)
    mine, theirs = read_metrics(run.run_dir), read_metrics(uncut.run_dir)
    timeless = [
        [{k: v for k, v in r.items() if not k.startswith(("perf/", "mem/"))} for r in lines]
        for lines in (mine, theirs)
    ]
    assert repr(timeless[0]) == repr(timeless[1])


def test_rounds_are_asked_until_groups_differ(whole, tmp_path):
    """At most 1 + resample of them, with prompts and draws of their own, until enough differ."""
    run, trainer, uncut, _ = whole
    objective = dataclasses.replace(OBJECTIVE, dynamic_sampling=True)
    rl = dataclasses.replace(run.rl, objective=objective, resample=2)
    loop = make_loop(dataclasses.replace(run, rl=rl, run_dir=str(tmp_path)), trainer, uncut)
    asked, worth = [], [[0] * 8, [0, 1, 0, 0, 0, 0, 0, 0], [0] * 8, [0, 1, 0, 0, 1, 0, 0, 0]]

    def scorer(problems, texts, lengths, stop):
        asked.append([problem.prompt for problem in problems[::4]])
        rewards = np.array(worth[len(asked) - 1], float)
        return Scores({"accuracy": rewards}, {"accuracy": 1.0}, rewards > 0, {"accuracy": 0.1})

    loop.scorer, loop.evaluation = scorer, None
    transcripts = Transcripts(tmp_path, 0, 8)
    lines = [loop.advance(step, transcripts, lambda: False) for step in (0, 2)]
    assert [line["policy/rounds"] for line in lines] == [3, 1]
    prompts = [p for one in asked for p in one]
    assert prompts == [r.prompt for r in loop.prompts.rollout(0, 8).problems], "one list, in order"
    assert [line["policy/zero_variance_groups"] for line in lines] == [0.5, 0]
    lines = lines_of(str(tmp_path / "samples.jsonl"))
    assert [line["prompt"] for line in lines[0:8:4]] == [asked[1][0], asked[0][0]]
    assert [line["reward"] for line in lines[:8]] == [0, 1, 0, 0, 0, 0, 0, 0]


def test_a_rollout_can_be_stopped(whole):
    _, _, loop, _ = whole
    asked = itertools.count()
    with pytest.raises(RolloutStoppedError):
        loop.sampler(ids(2), 4, 0, stop=lambda: next(asked) >= 1)
    assert len(loop.sampler(ids(2), 4, 0).tokens) == 8


def test_rewards_of_a_task():
    """Format and length count by their weights; the accuracy's is 1."""
    task = make_task("permutations", length=2)
    problem = task.prompt(0, 0)
    right = task.demonstrate(problem, np.random.default_rng(0))
    texts = [f">{problem.answer['final']}", right, "nothing"]
    rl = RLConfig(max_new_tokens=10, format_weight=0.5, overlong_buffer=4)
    scores = TaskScorer(task, rl)([problem] * 3, texts, np.array([3, 8, 11]))
    assert scores.parts["accuracy"][0] == 1
    assert scores.parts["accuracy"][2] == scores.parts["format"][2] == 0
    np.testing.assert_allclose(scores.parts["overlong"], [0, -0.5, -1])
    expected = scores.parts["accuracy"] + 0.5 * scores.parts["format"] + scores.parts["overlong"]
    np.testing.assert_allclose(scores.rewards, expected)


def test_prompts_of_training_are_not_held_out():
    task = configured_task(TASK)
    prompts = TaskPrompts(task, character_tokenizer(task.vocabulary), seed=0)
    held = {problem.prompt for problem in prompts.held_out(8).problems}
    seen = {r.prompt for i in range(20) for r in prompts.rollout(i, 4).problems}
    assert len(held) == 8
    assert not held & seen
    first = [r.prompt for i in (2, 3) for r in prompts.rollout(i, 4).problems]
    assert first == [r.prompt for r in prompts.rollout(1, 8).problems], "one list, whatever the cut"


def test_corpus_is_written_once(tmp_path):
    config = TaskConfig("permutations", ("length=2",), documents=20)
    said: list[str] = []
    data = corpus_data(config, DataConfig(cache_dir=str(tmp_path)), 0, said.append)
    again = corpus_data(config, DataConfig(cache_dir=str(tmp_path)), 0, said.append)
    assert data == again
    assert len(said) == 1
    lines = [line["text"] for line in lines_of(data.sources[0].path)]
    task = make_task("permutations", length=2)
    assert lines == list(itertools.islice(task.corpus(0, end=""), 20))
    other = corpus_data(config, DataConfig(cache_dir=str(tmp_path)), 1, said.append)
    assert other.sources != data.sources


# ---- bad input ----------------------------------------------------------------------------------


def change(**changes):
    run = tiny_run()
    return {
        name: dataclasses.replace(getattr(run, name), **values) for name, values in changes.items()
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"name": "permutation"}}, "task is 'permutation'; did you mean 'permutations'"),
        ({"task": {"name": ""}}, "stage rl has no prompts"),
        ({"task": {"options": ("lenght=3",)}}, "is 'lenght'; did you mean 'length'"),
        ({"task": {"options": ("length",)}}, "has no '='"),
        ({"task": {"options": ("length=x",)}}, "'length=x'; give a whole number"),
        ({"task": {"options": ("length=2", "length=3")}}, "given twice"),
        ({"train": {"batch_size": 5}}, "8 answers, which train.batch_size=5 does not divide"),
        ({"train": {"batch_size": 4, "steps": 3}}, "2 updates, which does not divide"),
        ({"train": {"seq_len": 5}}, "rl.max_new_tokens=6 and a prompt do not fit"),
        ({"rl": {"speculate": True}}, "needs an MTP module"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    run = dataclasses.replace(tiny_run(), **change(**changes))
    with pytest.raises(ValueError, match=message):
        make_trainer(run)


@pytest.mark.parametrize(
    ("rl", "message"),
    [
        ({"temperature": 0.0}, "greedy answers to one prompt are all the same"),
        ({"prompts_per_step": 0}, "rl.prompts_per_step is 0"),
        ({"reference_every": 4}, "without kl_coef there is no reference"),
        ({"overlong_buffer": 300}, "rl.overlong_buffer is 300"),
        ({"format_weight": -1.0}, "rl.format_weight is -1.0"),
        ({"rollout_rows": -1}, "rl.rollout_rows is -1"),
        ({"top_k": 1}, "rl.top_k is 1; give 2 or more"),
        ({"top_k": 4, "top_p": 0.0}, "rl.top_p is 0.0"),
        ({"top_p": 0.9}, "0.9 without rl.top_k: training needs the list"),
        ({"top_k": 4, "server": "http://localhost", "server_model": "m"}, "does not tell what it"),
    ],
)
def test_options_that_contradict(rl, message):
    with pytest.raises(ValueError, match=message):
        RLConfig(**rl)


def test_answers_longer_than_there_is_room():
    run, task = tiny_run(), configured_task(TASK)
    prompts = TaskPrompts(task, character_tokenizer(task.vocabulary), seed=0)
    stages.check_prompts(run, prompts)
    short = dataclasses.replace(run.train, seq_len=PROMPT + BUDGET - 2)
    with pytest.raises(ValueError, match=r"has 5 tokens, with rl.max_new_tokens=6 11; train.seq_l"):
        stages.check_prompts(dataclasses.replace(run, train=short), prompts)
    near = dataclasses.replace(run, model=model(max_position=9))
    with pytest.raises(ValueError, match=r"model.max_position has room for 9"):
        stages.check_prompts(near, prompts)


def test_a_vocabulary_that_is_too_small(tmp_path):
    run = dataclasses.replace(tiny_run(tmp_path), model=model(vocab_size=8))
    with pytest.raises(ValueError, match=r"tokenizer has 21 ids, model.vocab_size is 8"):
        stages.policy_tokenizer(run, "")


# ---- slow ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_first_gradient_on_eight_devices():
    """expert 4 x fsdp 2 against one device. Adam's first moments are the gradient, times 0.1."""
    run = tiny_run()
    exact = dataclasses.replace(run.train, optimizer=OptimizerConfig(moment_dtype="float32"))
    run = dataclasses.replace(run, train=exact)
    batch = make_batch(*hand_made(), seq_len=T)
    batch = {k: np.concatenate([x, x]) for k, x in batch.items() if k != "routes"}
    batch["advantages"] = np.linspace(-1, 1, 8).astype(np.float32)
    results = []
    for mesh in (MeshConfig(data=1), MeshConfig(expert=4, fsdp=2)):
        layout = make_layout(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.expert])
        trainer = stages.make_trainer(run, Recipe(), layout)
        state = trainer.init(jax.random.key(0))
        rows = local_rows(layout, 8)
        placed = place_rows(layout, {k: x[None] for k, x in batch.items()}, rows, 8)
        knobs = {"learning_rate": np.float32(0.1), "bias_update_rate": np.float32(0)}
        state, out = trainer.step(state, placed, knobs)
        results.append((jax.device_get(state["opt"]), out))
    (one, out_one), (many, out_many) = results
    moments = [jax.tree.leaves(opt) for opt in (one, many)]
    for a, b in zip(*moments, strict=True):
        scale = np.abs(a).max() if a.size else 0
        np.testing.assert_allclose(b, a, atol=1e-4 * max(float(scale), 1e-12), rtol=0)
    assert numbers(out_one["objective"])["policy_loss"] == pytest.approx(
        numbers(out_many["objective"])["policy_loss"], abs=1e-5
    )


@pytest.mark.slow
def test_it_learns(tmp_path):
    """From random weights: 30 rollouts turn a base that is right in a third into two thirds.

    In processes of their own, with one device.
    """
    base, run = str(tmp_path / "base"), tmp_path / "run"
    train("r1_base", base, "--data.cache-dir", str(tmp_path / "cache"))
    rollouts = "--train.steps", "30", "--train.eval-every", "30"
    train("r1_zero", str(run), "--init-from", base, *rollouts)
    lines = read_metrics(run)
    before, after = [line for line in lines if "eval/accuracy" in line]
    assert before["eval/accuracy"] < 0.45
    assert after["eval/accuracy"] >= 0.65
    assert after["eval/accuracy_greedy"] >= 0.65
    assert after["eval/length"] > before["eval/length"] + 5
    assert (run / "rl.png").exists()


def train(config: str, folder: str, *options: str) -> None:
    own_devices = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "train.py", "--config", config, "--run-dir", folder, *options]
    subprocess.run(command, cwd=ROOT, env=own_devices, check=True)
