"""Stages sft and distill: the loss of a student, what is refused, and runs from end to end."""

import dataclasses
import functools
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rl.examples.sampled as traced
import rl.examples.traces
from configs import preset
from configs.schema import RunConfig
from model.blueprint import bind
from model.loss import inputs_and_targets
from model.recipe import Recipe
from rl import stage_sft as tuning
from rl.config import RLConfig, SFTConfig, TaskConfig
from rl.corpus import configured_task
from rl.examples.conversations import Example, ListedExamples
from rl.examples.packing import PackedExamples, sft_batches
from rl.examples.rejection import Attempt, Round, Selection
from rl.examples.teacher import TEACHER, StudentTrainer, Teacher, policy_version
from rl.examples.traces import read_traces, transcript, write_traces
from rl.problems import Problem
from rl.stopping import never
from rl.tasks.characters import character_tokenizer
from rl.verdict.scoring import TaskScorer
from sharding.config import MeshConfig
from sharding.mesh import make_layout
from sharding.partition import place_rows, use_layout
from tests.small_model import CONFIG, hf_folder, run_folder, tensors, weights
from tests.xla_flags import QUICK_XLA
from training.config import OptimizerConfig, TrainConfig
from training.metrics import read_metrics
from training.run import Session
from training.step import Trainer

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = dataclasses.replace(CONFIG, mtp_depth=0, vocab_size=48)
TRAIN = TrainConfig(
    steps=4, seq_len=12, batch_size=4, balance_weight=0.0, optimizer=OptimizerConfig()
)
KNOBS = {name: np.float32(x) for name, x in
         (("learning_rate", 1e-2), ("bias_update_rate", 0.0), ("mtp_weight", 0.0))}  # fmt: skip


def batch():
    """Four rows of packed examples, one micro batch."""
    rng = np.random.default_rng(0)
    examples = []
    for n in (5, 9, 4, 13, 7, 6, 3):
        ids = rng.integers(3, MODEL.vocab_size, n).astype(np.int32)
        examples.append(Example(ids, np.arange(n) >= 2))
    listed = ListedExamples(examples, [str(i) for i in range(len(examples))])
    return sft_batches(PackedExamples(listed, TRAIN.seq_len, 0, 2), 4).batch_at(0, 4)


def layout(**mesh):
    config = MeshConfig(**({"data": 1} | mesh))
    return make_layout(config, jax.devices()[: config.data * config.fsdp * config.expert])


def student(kl_weight: float, on=None, k: int = 7, teacher_seed: int = 1):
    """A trainer, its state, a batch read by a teacher, all placed."""
    on = on or layout()
    trainer = StudentTrainer(MODEL, TRAIN, Recipe("float32"), on, kl_weight)
    state = trainer.init(jax.random.key(0))
    other = trainer.init(jax.random.key(teacher_seed))
    teacher = Teacher(MODEL, other["params"], other["router_bias"], trainer.recipe, on, k)
    placed = place_rows(on, batch(), range(4), 4)
    return trainer, state, teacher.read(placed)


@functools.cache
def one_device_step(kl_weight: float, teacher_seed: int):
    trainer, state, read = student(kl_weight, teacher_seed=teacher_seed)
    state, metrics = trainer.step(state, read, KNOBS)
    return jax.device_get((state["params"], metrics))


def logits(trainer: Trainer, state, rows) -> np.ndarray:
    """fp64 log-probabilities [B, T, V] of the first micro batch."""
    with use_layout(trainer.layout):
        model = bind(trainer.model, state["params"], state["router_bias"])
        tokens = inputs_and_targets({name: x[0] for name, x in rows.items()})[0]
        hidden = model.forward(tokens, trainer.recipe, None).hidden_BTD
        x = np.asarray(jnp.einsum("BTD,DV->BTV", hidden, model.head_kernel()), np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.slow
def test_a_students_loss_is_the_closed_form():
    """(1 - w) CE + w KL(teacher, student), means over learned tokens, in NumPy float64."""
    k = MODEL.vocab_size
    trainer, state, read = student(0.3, k=k)
    other = trainer.init(jax.random.key(1))
    plain = {name: jnp.asarray(x) for name, x in batch().items()}
    ours, theirs = logits(trainer, state, plain), logits(trainer, other, plain)
    targets, mask = batch()["tokens"][0, :, 1:], batch()["mask"][0]
    nats = -np.take_along_axis(ours, targets[..., None], -1)[..., 0]
    kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
    want = (nats * mask).sum() / mask.sum(), (kl * mask).sum() / mask.sum()
    found = trainer.gradients(state, read, KNOBS)
    means = found.metrics["train/loss"], found.metrics["train/kl"]
    np.testing.assert_allclose(means, want, rtol=2e-5)
    np.testing.assert_allclose(found.loss, 0.7 * want[0] + 0.3 * want[1], rtol=2e-5)


@pytest.mark.slow
def test_a_teacher_that_is_the_student_pulls_nowhere():
    """KL is 0 and has no gradient, so the gradient is (1 - w) that of plain fine-tuning."""
    trainer, state, read = student(0.25, teacher_seed=0)
    plain = {name: x for name, x in read.items() if name not in TEACHER}
    found = trainer.gradients(state, read, KNOBS)
    sft = Trainer(MODEL, TRAIN, trainer.recipe, trainer.layout)
    alone = sft.gradients(state, plain, KNOBS).grads
    assert abs(float(found.metrics["train/kl"])) < 1e-6
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(alone))
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, 0.75 * want, atol=1e-5 * largest),
        found.grads, alone,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 2, "expert": 2}, {"data": 2, "tensor": 2}], ids=str)
def test_a_students_step_is_the_same_on_a_mesh(mesh):
    on = make_layout(MeshConfig(**({"data": 1} | mesh)), jax.devices()[:4])
    trainer, state, read = student(0.5, on)
    state, metrics = jax.device_get(trainer.step(state, read, KNOBS))
    params, want = one_device_step(0.5, 1)
    for name in ("train/loss", "train/kl", "train/grad_norm"):
        np.testing.assert_allclose(metrics[name], want[name], rtol=1e-5, err_msg=name)
    # A first step of AdamW moves every weight by its rate, whatever the gradient's size.
    close = [
        np.mean(np.abs(got - one) < 1e-4)
        for got, one in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(params), strict=True)
    ]
    assert min(close) > 0.99, close


# ---- What is refused -----------------------------------------------------------------------------


def tiny_run(stage="sft", sft: SFTConfig | None = None, **changes) -> RunConfig:
    small = {
        "hidden_size": 32, "num_layers": 1, "num_heads": 2, "dense_ffn_size": 32,
        "expert_ffn_size": 16, "num_experts": 4,
    }  # fmt: skip
    base = preset("r1_base")
    return dataclasses.replace(
        base, stage=stage, sft=sft or SFTConfig(),
        model=dataclasses.replace(base.model, **small),
        task=TaskConfig("permutations", ("length=2", "held_out=0.3")), **changes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (tiny_run(), "nothing to learn"),
        (tiny_run("distill", SFTConfig(demonstrations=3)), "no teacher"),
        (tiny_run("sft", SFTConfig(demonstrations=3, kl_weight=0.5)), "stage distill alone"),
        (
            dataclasses.replace(tiny_run("sft", SFTConfig(policy="runs/x")), task=TaskConfig()),
            "need a task",
        ),
        (
            tiny_run("sft", SFTConfig(demonstrations=3), mesh=MeshConfig(data=1)),
            "",
        ),
    ],
    ids=["nothing", "teacher", "kl in sft", "no task", "fine"],
)
def test_a_stage_that_cannot_work_is_refused_before_it_starts(run, says):
    def make():
        return tuning.make_trainer(run, Recipe("float32"), layout())

    if says:
        with pytest.raises(ValueError, match=says):
            make()
    else:
        assert type(make()) is Trainer
        assert tuning.describe(run)


def test_numbers_that_cannot_be():
    for field, value in (("rounds", 0), ("demonstrations", -1), ("kl_weight", 1.5),
                         ("temperature", 0.0), ("kl_top_k", 0), ("language", 2.0)):  # fmt: skip
        with pytest.raises(ValueError, match=f"sft.{field} is"):
            SFTConfig(**{field: value})


def test_kl_refuses_a_pipeline():
    model = dataclasses.replace(MODEL, num_layers=4)
    rows = dataclasses.replace(TRAIN, micro_batch_size=1)
    piped = make_layout(MeshConfig(data=1, pipe=2), jax.devices()[:2])
    with pytest.raises(ValueError, match="kl_weight does not work over the mesh axes pipe"):
        StudentTrainer(model, rows, Recipe("float32"), piped, 0.5)


def evaluated_run(**rl) -> RunConfig:
    run = tiny_run("sft", SFTConfig(demonstrations=3), mesh=MeshConfig(data=1))
    return dataclasses.replace(
        run, train=dataclasses.replace(run.train, eval_every=3), rl=RLConfig(eval_prompts=4, **rl)
    )


def test_answers_of_the_evaluation_have_room_before_anything_is_learned():
    """256 positions and the default of 256 new tokens: an evaluation after training would fail."""
    run = evaluated_run()
    tokenizer = character_tokenizer(configured_task(run.task).vocabulary)
    trainer = tuning.make_trainer(run, Recipe("float32"), layout())
    with pytest.raises(ValueError, match=r"4 of 4 prompts cannot be asked; lower --rl.max-new-tok"):
        tuning.held_out_accuracy(run, trainer, tokenizer, print)
    assert tuning.held_out_accuracy(evaluated_run(max_new_tokens=28), trainer, tokenizer, print)


def test_the_evaluation_is_made_before_the_policy_is_read(monkeypatch, tmp_path):
    run = dataclasses.replace(evaluated_run(), run_dir=str(tmp_path))
    run = dataclasses.replace(run, sft=SFTConfig(policy=str(tmp_path)))
    trainer = tuning.make_trainer(run, Recipe("float32"), layout())
    monkeypatch.setattr(tuning, "load_policy", lambda *_: pytest.fail("the policy was read"))
    with pytest.raises(ValueError, match=r"--rl\.max-new-tokens"):
        tuning.run_stage(run, trainer, Session(print, 0.0))
    assert not list(tmp_path.iterdir())


# ---- What is sampled -----------------------------------------------------------------------------


def sampling_run(policy, **sft) -> RunConfig:
    return tiny_run("sft", SFTConfig(**{"policy": str(policy)} | sft))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A run folder at step 7."""
    place = run_folder(tmp_path_factory.mktemp("policies") / "policy", weights())
    (place / "checkpoints" / "step_00000000").rename(place / "checkpoints" / "step_00000007")
    return place


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 5}, "'run_seed': 0.*'run_seed': 5"),
        ({"task": TaskConfig("search", ("length=2", "held_out=0.3"))}, "permutations.*search"),
        ({"sft": {"prompts_per_round": 9}}, "'prompts_per_round': 256.*'prompts_per_round': 9"),
        ({"sft": {"answers_per_prompt": 9}}, "'answers_per_prompt': 4.*'answers_per_prompt': 9"),
        ({"sft": {"max_new_tokens": 9}}, "'max_new_tokens': 256.*'max_new_tokens': 9"),
        ({"sft": {"language": 0.5}}, "'language': 0.25.*'language': 0.5"),
    ],
)
def test_traces_of_other_settings_are_not_taken(change, says, policy, tmp_path):
    run = sampling_run(policy, language=0.25)
    sft = dataclasses.replace(run.sft, **change.get("sft", {}))
    other = dataclasses.replace(run, **change | {"sft": sft})
    tokenizer = character_tokenizer("ab")

    def write(run):
        settings = traced.trace_settings(run)
        answer = np.append(tokenizer.encode("b"), np.int32(tokenizer.eos_id))
        made = [Attempt(Problem("a", {}), tokenizer.encode("a"), answer, "b", True, 1.0)]
        return write_traces(
            str(tmp_path), tokenizer, lambda _: Round(made, 0, 0), 1, Selection(), {}, settings
        )

    write(run)
    write(run)
    with pytest.raises(ValueError, match=says) as error:
        write(other)
    assert "temperature" not in str(error.value), "what is equal is not listed"


def test_the_version_of_a_policy(policy, tmp_path):
    """A run folder's checkpoint; of a Hugging Face folder what is in the files."""
    assert policy_version(str(policy)) == {"policy_step": 7}
    parts = tensors(weights())
    one = policy_version(str(hf_folder(tmp_path / "one", [parts])))
    again = policy_version(str(hf_folder(tmp_path / "again", [parts])))
    norm = {"model.norm.weight": parts["model.norm.weight"] + 1}
    other = hf_folder(tmp_path / "other", [parts | norm])
    assert one == again != policy_version(str(other))


def test_traces_name_the_step_of_their_policy(policy, tmp_path, monkeypatch):
    run = dataclasses.replace(sampling_run(policy), run_dir=str(tmp_path))
    seen = {}

    def write(place, tokenizer, answer, rounds, selection, filters, settings, say):
        seen.update(settings, step=answer(0))
        return SimpleNamespace(examples=None)

    monkeypatch.setattr(
        traced, "PolicySampler", lambda *_, **__: SimpleNamespace(publish=lambda *_: None)
    )
    monkeypatch.setattr(traced, "sampled_round", lambda *_, step, **__: step)
    monkeypatch.setattr(traced, "write_traces", write)
    trainer = tuning.make_trainer(run, Recipe("float32"), layout())
    tokenizer = character_tokenizer(configured_task(run.task).vocabulary)
    traced.sampled_traces(run, trainer, tokenizer, (run.model, {}, {}), print)
    assert seen["step"] == seen["policy_step"] == 7
    # With several processes: traces that are there are read, others are not sampled.
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"0 of sft.rounds=4 rounds; start this run with one"):
        traced.sampled_traces(run, trainer, tokenizer, (run.model, {}, {}), print)
    monkeypatch.setattr(traced, "count_rounds", lambda _: 4)
    monkeypatch.setattr(traced, "anyone", bool)
    traced.sampled_traces(run, trainer, tokenizer, (run.model, {}, {}), print)


class AllRight(TaskScorer):
    """Takes every answer for right: weights that have learned nothing write no right one."""

    def __call__(self, records, texts, lengths, stop=never):
        """Scores of the answers, all correct."""
        scores = super().__call__(records, texts, lengths, stop)
        return dataclasses.replace(scores, correct=np.ones(len(texts), bool))


def traces_of(run: RunConfig) -> dict[str, bytes]:
    """Every file of the run's traces, which name their own folder."""
    files = [path for path in pathlib.Path(run.run_dir, "traces").rglob("*") if path.is_file()]
    own = run.run_dir.encode()
    return {str(f.relative_to(run.run_dir)): f.read_bytes().replace(own, b"") for f in files}


def trace_run(run_dir: pathlib.Path, policy: str) -> RunConfig:
    run = sampling_run(policy, rounds=3, prompts_per_round=4, max_new_tokens=12)
    train = dataclasses.replace(run.train, eval_every=0)
    return dataclasses.replace(run, train=train, run_dir=str(run_dir))


def sample(run: RunConfig, say=lambda line: None) -> int:
    """The stage up to its training, which is LookupError."""

    def training_begins(*_):
        raise LookupError

    trainer = tuning.make_trainer(run, Recipe("float32"), layout())
    with mock.patch.object(tuning, "open_loop", training_begins):
        return tuning.run_stage(run, trainer, Session(say, 0.0))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A run that was not stopped, when its traces are sampled."""
    folder = tmp_path_factory.mktemp("sampled")
    config = tiny_run().model
    policy = run_folder(folder / "policy", weights(config), config)
    run = trace_run(folder / "run", str(policy))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traced, "TaskScorer", AllRight)
        with pytest.raises(LookupError):
            sample(run)
    return run


@pytest.mark.parametrize(
    ("owner", "name", "call", "kept"),
    [
        pytest.param(traced.PolicySampler, "__call__", 0, 0, marks=pytest.mark.slow),
        pytest.param(AllRight, "__call__", 1, 1, marks=pytest.mark.slow),
        pytest.param(rl.examples.traces, "seal_store", 2, 3, marks=pytest.mark.slow),
    ],
    ids=["answers", "scores", "last round written"],
)
def test_a_signal_ends_the_sampling_of_traces(
    owner, name, call, kept, sampled, tmp_path, monkeypatch
):
    """Rounds before it stay, nothing else; run again, the traces are those of a run in one go."""
    run = trace_run(tmp_path / "run", sampled.sft.policy)
    monkeypatch.setattr(traced, "TaskScorer", AllRight)
    inner, calls = getattr(owner, name), itertools.count()

    def interrupted(*arguments):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*arguments)

    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        assert sample(run, said.append) == 0
    assert said[-1] == (
        f"SIGTERM: stopped before training; {kept} of 3 rounds of traces are kept whole in "
        f"{tmp_path}/run/traces; run again to go on after these, to the same traces"
    )
    want = traces_of(sampled)
    rounds = tuple(f"traces/{n:05d}/" for n in range(kept))
    assert traces_of(run) == {name: x for name, x in want.items() if name.startswith(rounds)}
    with pytest.raises(LookupError):
        sample(run)
    assert traces_of(run) == want
    assert sum(name.endswith("traces.jsonl") and len(x) > 0 for name, x in want.items()) == 3


def test_a_teachers_padding_is_left_out(monkeypatch):
    """More logits than the student has: none of them is kept, and the others sum to 1."""
    run = tiny_run("distill", SFTConfig(policy="x", kl_weight=0.5), mesh=MeshConfig(data=1))
    trainer = tuning.make_trainer(run, Recipe("float32"), layout())
    wide = dataclasses.replace(run.model, vocab_size=64)
    hidden = jnp.ones((2, 3, 4))
    head = jnp.arange(64.0)[None].repeat(4, 0) / 64
    fake = SimpleNamespace(
        forward=lambda *_: SimpleNamespace(hidden_BTD=hidden),
        head_kernel=lambda: head,
    )
    monkeypatch.setattr("rl.examples.teacher.bind", lambda *_: fake)
    teacher = tuning.make_teacher(run, trainer, (wide, {}, {}))
    found = teacher._top_k({}, {}, {"tokens": jnp.zeros((1, 2, 4), jnp.int32)})
    assert int(found.ids_BTK.max()) == run.model.vocab_size - 1 == 23
    total = jnp.exp(found.logp_BTK).sum(-1) + jnp.exp(found.rest_BT)
    np.testing.assert_allclose(total, 1, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("teacher_vocab", "mesh"), [(40, {}), (64, {"tensor": 2})], ids=str)
def test_kl_to_a_teacher_that_is_padded_otherwise(teacher_vocab, mesh):
    """Finite, and the teacher's tokens are the student's, on a mesh that cuts the vocabulary."""
    on = make_layout(MeshConfig(**({"data": 1} | mesh)), jax.devices()[: 2 if mesh else 1])
    trainer = StudentTrainer(MODEL, TRAIN, Recipe("float32"), on, 0.5)
    other = dataclasses.replace(MODEL, vocab_size=teacher_vocab)
    weights_of = Trainer(other, TRAIN, Recipe("float32"), on).init(jax.random.key(1))
    run = dataclasses.replace(
        tiny_run("distill", SFTConfig(policy="x", kl_weight=0.5)), model=MODEL
    )
    policy = other, weights_of["params"], weights_of["router_bias"]
    rows = dict(batch()) | {"tokens": np.minimum(batch()["tokens"], 39)}
    read = tuning.make_teacher(run, trainer, policy).read(place_rows(on, rows, range(4), 4))
    assert int(read[TEACHER[0]].max()) < MODEL.vocab_size
    _, metrics = trainer.step(trainer.init(jax.random.key(0)), read, KNOBS)
    assert 0 < float(metrics["train/kl"]) < 10


# ---- Runs ----------------------------------------------------------------------------------------

SMALL = [
    "--model.hidden-size", "32", "--model.num-layers", "1", "--model.num-heads", "2",
    "--model.dense-ffn-size", "32", "--model.expert-ffn-size", "16", "--model.num-experts", "4",
    "--train.seq-len", "40", "--train.batch-size", "4", "--task.options", "length=1",
    "held_out=0.1", "share_of_chains=0", "--rl.eval-prompts", "4", "--rl.max-new-tokens", "6",
    "--compilation-cache", "", "--checkpoint.no-asynchronous", "--sft.max-new-tokens", "8",
]  # fmt: skip


def run_train(folder: pathlib.Path, *options: str) -> str:
    """What train.py prints."""
    command = [sys.executable, "train.py", "--config", "r1_base", "--run-dir", str(folder), *SMALL]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, env=os.environ | {"XLA_FLAGS": QUICK_XLA}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def teach(folder: pathlib.Path, *options: str) -> str:
    """A model that has learned to answer, from 60 demonstrations."""
    return run_train(
        folder, "--stage", "sft", "--sft.demonstrations", "60", "--train.steps", "24",
        "--checkpoint.every", "12", *options,
    )  # fmt: skip


EVALUATED = {
    f"eval/{name}" for name in (
        "accuracy", "accuracy_greedy", "format", "step_accuracy", "length", "length_correct",
        "truncated", "failed_rewards",
    )
}  # fmt: skip


def last_record(folder: pathlib.Path, said: str, *also: str) -> dict[str, float]:
    """Of a run that printed `said`: in the live line, the file and TensorBoard alike."""
    last = read_metrics(folder)[-1]
    assert {"train/loss", "train/grad_norm", "perf/tokens_per_s", *also} <= last.keys()
    assert {name for name in last if name.startswith("eval/")} == EVALUATED
    line = next(x for x in said.splitlines() if x.startswith(f"step {last['step'] + 1}/"))
    assert f"loss {last['train/loss']:.3f}  " in line
    shown = f"held-out {last['eval/accuracy']:.1%}  greedy {last['eval/accuracy_greedy']:.1%}  "
    assert shown in line
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    for name in last.keys() - {"step"}:
        event = events.Scalars(name)[-1]
        assert event.step == last["step"]
        np.testing.assert_allclose(event.value, last[name], rtol=1e-6, err_msg=name)
    return last


@pytest.mark.slow
def test_fine_tuning_then_distillation(tmp_path):
    """From demonstrations to a teacher, from its traces to a student; stopped runs go on."""
    teacher = tmp_path / "teacher"
    last = last_record(teacher, teach(teacher, "--train.eval-every", "24"))

    # Weights of step 12, and what was learned after it, come back bit for bit.
    shutil.copytree(teacher, again := tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "step_00000024")
    assert "resuming at step 12 of 24" in teach(again, "--train.eval-every", "24")
    for name in ("train/loss", "train/grad_norm", "eval/accuracy"):
        assert read_metrics(again)[-1][name] == last[name], name

    distil = [
        "--stage", "distill", "--sft.policy", str(teacher), "--sft.kl-weight", "0.5",
        "--sft.prompts-per-round", "128", "--sft.rounds", "2", "--train.steps", "2",
        "--model.hidden-size", "16", "--sft.per-prompt", "0", "--train.eval-every", "2",
    ]  # fmt: skip
    student_run = tmp_path / "student"
    last_record(student_run, run_train(student_run, *distil), "train/kl")
    tokenizer = tuning.load_tokenizer(student_run / "tokenizer.json")
    traces = read_traces(str(student_run / "traces"), tokenizer)
    lines = list(transcript(traces.stores))
    assert len(lines) == traces.fates["kept"] == len(traces.examples.lengths) > 0
    assert {line["policy"] for line in lines} == {str(teacher)}
    assert {line["reward"] for line in lines} == {1.0}
    assert all(line["completion"].rstrip()[-1] in "01234" for line in lines)

    # The texts of the traces are examples of another run, of one with another tokenizer too.
    (texts,) = list((student_run / "traces").glob("00000/traces.jsonl"))
    options = ["--sft.examples", str(texts), str(student_run / "traces"), "--train.steps", "1"]
    run_train(tmp_path / "third", "--stage", "sft", *options)


# ---- Recipes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_recipe(tmp_path):
    """Every stage of R1 in small, from random weights to the student."""
    short = [
        "--train.steps", "24", "--rl.prompts-per-step", "2", "--rl.objective.group-size", "2",
        "--train.eval-every", "24", "--checkpoint.every", "0", "--task.documents", "300",
        "--task.options", "scripts=2", "length=1", "held_out=0.1", "share_of_chains=0",
        "--model.vocab-size", "34", "--data.vocab-size", "34", "--sft.prompts-per-round", "60",
        "--sft.rounds", "1", "--sft.language", "0", "--sft.demonstrations", "60",
    ]  # fmt: skip
    stages = "base", "zero", "cold", "reasoning", "sft", "r1", "student"
    command = [sys.executable, "train.py", "--recipe", "r1", "--run-dir", str(tmp_path)]
    done = subprocess.run(
        [*command, *SMALL, *short],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": QUICK_XLA},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in stages:
        assert (tmp_path / stage / "config.json").is_file(), stage
    assert "policy/reward/language" in read_metrics(tmp_path / "reasoning")[0]
