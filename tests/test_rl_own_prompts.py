"""A user's own prompts and rewards in stage rl; what broken ones do is named, and no more."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from configs import preset
from data.tokenizer import load_tokenizer, train_tokenizer
from model.recipe import Recipe
from rl import stage_rl as stages
from rl.config import RLConfig, TaskConfig
from rl.plots import rl_figure
from rl.problems import Problem
from rl.prompts import file_prompts, judges_code, rewards_of
from rl.tasks import make_task
from rl.verdict.sandbox import described_isolation
from rl.verdict.scoring import judge_scorer
from sharding.config import MeshConfig
from sharding.mesh import make_layout
from tests.test_rl_sandbox import KEPT_IN
from tests.xla_flags import QUICK_XLA
from training.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
QUESTIONS = [
    {"question": f"Ann has {n} apples and eats {n - 2}. How many are left?",
     "answer": f"{n} - {n - 2} = 2\n#### 2"}
    for n in range(3, 43)
]  # fmt: skip
REWARDS = """
import math, os, time

def mixed(problem, text):
    kind = problem.answer["kind"]
    if kind == "raises":
        raise KeyError("no such thing")
    if kind == "loops":
        while True:
            pass
    if kind == "dies":
        os._exit(3)
    return {"nan": math.nan, "text": "one", "none": None}.get(kind, 0.25)

def short(problem, text):
    print("x" * 1_000_000)
    return 1.0 / (1 + len(text))

def raises(problem, text):
    raise RuntimeError("always")

def often(problem, text):
    if len(text) % 3:
        raise RuntimeError("often")
    return len(text)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """prompts.jsonl in GSM8K's form, rewards.py, tokenizer.json."""
    place = tmp_path_factory.mktemp("own")
    (place / "prompts.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (place / "rewards.py").write_text(REWARDS)
    texts = [q["question"] + q["answer"] for q in QUESTIONS]
    (place / "tokenizer.json").write_text(train_tokenizer(texts, 320).json)
    return place


def tokenizer(folder):
    return load_tokenizer(folder / "tokenizer.json")


def test_prompts_of_a_file(folder):
    """Every problem once per epoch in an order of its own; a function of (seed, number)."""
    config = RLConfig(prompts=str(folder / "prompts.jsonl"), held_out=0.2)
    prompts = file_prompts(config, tokenizer(folder), seed=1)
    n = len(prompts.train)
    assert 0 < len(prompts.kept) < n == len(QUESTIONS) - len(prompts.kept)
    asked = [r.key for number in range(4 * n) for r in prompts.rollout(number, 3).problems]
    assert len(asked) == 12 * n
    epochs = [asked[i : i + n] for i in range(0, 12 * n, n)]
    assert all(sorted(epoch) == sorted(r.key for r in prompts.train) for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = file_prompts(config, tokenizer(folder), seed=1)
    assert [r.key for r in again.rollout(5, 3).problems] == asked[15:18]
    held = {r.key for r in prompts.held_out(100).problems}
    assert held == {r.key for r in prompts.kept}
    assert not held & set(asked)


def test_templates(folder):
    place, known = str(folder / "prompts.jsonl"), tokenizer(folder)
    asked = {
        template: file_prompts(RLConfig(prompts=place, template=template), known, 0).train[0]
        for template in ("plain", "r1_zero", "chat")
    }
    assert len({problem.key for problem in asked.values()}) == 1  # the split does not move
    plain = asked["plain"].prompt
    assert asked["r1_zero"].prompt.endswith(f"User: {plain}\nAssistant:")
    assert asked["chat"].prompt == [{"role": "user", "content": plain}]


def test_rewards_as_the_command_line_names_them():
    config = RLConfig(rewards=("accuracy", "format=0.5", "a/b.py:f=-1e-1"))
    assert rewards_of(config) == [("accuracy", 1.0), ("format", 0.5), ("a/b.py:f", -0.1)]
    with pytest.raises(ValueError, match="'format=half'; give NAME=WEIGHT"):
        rewards_of(RLConfig(rewards=("format=half",)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": TaskConfig()}, "no prompts"),
        ({"rl": RLConfig(prompts="x.jsonl", max_new_tokens=28)}, "both task.name"),
        ({"rl": RLConfig(template="chat", max_new_tokens=28)}, "not for a task"),
        ({"rl": RLConfig(language_weight=1, max_new_tokens=28)}, "scripts=2"),
    ],
)
def test_what_asks_and_what_judges_must_be_clear(changes, says):
    run = dataclasses.replace(preset("r1_zero"), **changes)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, batch_size=16, steps=8))
    with pytest.raises(ValueError, match=says):
        stages.make_trainer(run, Recipe("float32"), make_layout(MeshConfig(data=1), one_device()))


def one_device():
    import jax

    return jax.devices()[:1]


def test_rewards_that_fail_count_as_nothing(folder):
    """Raised, hung, died, not finite, not a number: named, counted, and the others go on."""
    kinds = ["good", "raises", "nan", "text", "none", "dies", "loops", "good"]
    problems = [Problem("?", {"answer": "2", "kind": kind}) for kind in kinds]
    texts = ["2"] * 7 + ["9" * 100_000]
    config = RLConfig(rewards=(f"{folder}/rewards.py:mixed=2", f"{folder}/rewards.py:short"))
    scorer = judge_scorer(config, None)
    with scorer.judge:
        scores = scorer(problems, texts, np.array([1] * 8))
    np.testing.assert_array_equal(scores.parts["mixed"], [0.25, 0, 0, 0, 0, 0, 0, 0.25])
    np.testing.assert_allclose(scores.rewards[[0, 7]], [0.5 + 0.5, 0.5 + 1 / 100_001])
    assert scores.failures["mixed"] == {
        "raised": 1, "not finite": 1, "not a number": 2, "died": 1, "hung": 1,
    }  # fmt: skip
    assert re.search(
        r"KeyError: 'no such thing' \(.*rewards\.py, line 7\)", scores.messages["mixed"]["raised"]
    )
    assert scores.correct is None  # nothing says what is right
    assert scores.quality == {}


def test_rewards_beside_a_tasks_verifier(folder):
    task = make_task("permutations", length=2)
    problem = task.prompt(0, 0)
    right = f">{problem.answer['final']}"
    scorer = judge_scorer(RLConfig(rewards=(f"{folder}/rewards.py:short=0.5",)), task)
    with scorer.judge:
        scores = scorer([problem] * 2, [right, "nonsense"], np.array([3, 9]))
    assert scores.correct.tolist() == [True, False]
    np.testing.assert_allclose(scores.rewards, [1 + 0.5 / 3, 0.5 / 9])
    assert scores.weights == {"accuracy": 1.0, "format": 0.0, "short": 0.5}
    with pytest.raises(ValueError, match="judges itself"):
        judge_scorer(RLConfig(rewards=("format",)), task)


def test_accuracy_is_the_rule_for_a_file(folder):
    config = RLConfig(prompts="x", format_weight=0.5, overlong_buffer=4, max_new_tokens=8)
    scorer = judge_scorer(config, None)
    with scorer.judge:
        problem = Problem("What is 1 + 1?", {"answer": "2"})
        texts = ["<think>one and one</think> 2", "3"]
        scores = scorer([problem] * 2, texts, np.array([3, 8]))
    assert scores.correct.tolist() == [True, False]
    np.testing.assert_allclose(scores.rewards, [1.5, -1.0])
    assert scores.quality == {"accuracy": 0.5, "format": 0.5}


@pytest.mark.parametrize(
    ("rewards", "options", "says"),
    [
        (("accuracy", "format=0.5"), {"format_weight": 1.0},
         r"names format and rl\.format_weight=1\.0 adds format too"),
        (("accuracy", "mine.py:format"), {"format_weight": 1.0}, "names mine.py:format and"),
        (("accuracy", "mine.py:overlong=0.3"), {"overlong_buffer": 4},
         r"names mine\.py:overlong and rl\.overlong_buffer=4 adds a reward overlong too"),
    ],
)  # fmt: skip
def test_a_reward_that_an_option_gives_again_is_refused(rewards, options, says):
    """It would be left out, or take the other's place, in silence."""
    with pytest.raises(ValueError, match=says):
        judge_scorer(RLConfig(prompts="x", rewards=rewards, max_new_tokens=8, **options), None)


def test_code_as_a_reward_needs_tests_in_every_line(tmp_path, folder):
    place = tmp_path / "code.jsonl"
    tested = {"prompt": "f?", "tests": [{"check": "assert f(1) == 1"}], "reward": "code"}
    lines = [tested, {"prompt": "g?", "answer": "5"}, {"prompt": "h?", "tests": []}]
    place.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for rewards in (("code",), ("accuracy", "code=0.5")):
        config = RLConfig(prompts=str(place), rewards=rewards, held_out=0)
        with pytest.raises(ValueError, match="2 of 3 lines cannot be used") as caught:
            file_prompts(config, tokenizer(folder), 0)
        assert "line 2: reward code: tests is 'None'; give a list" in str(caught.value)
    place.write_text(json.dumps(tested) + "\n")
    config = RLConfig(prompts=str(place), rewards=("accuracy", "code"), held_out=0)
    assert len(file_prompts(config, tokenizer(folder), 0).train) == 1


def test_the_deadline_of_a_reward_is_an_option(folder):
    (folder / "slow.py").write_text(
        "import time\ndef slow(problem, text):\n    time.sleep(1)\n    return 1.0\n"
    )
    found = []
    for seconds in (0.2, 20.0):
        config = RLConfig(rewards=(f"{folder}/slow.py:slow",), reward_timeout=seconds)
        scorer = judge_scorer(config, None)
        with scorer.judge:
            scores = scorer([Problem("?", {})], [""], np.array([1]))
        found.append((scores.parts["slow"].tolist(), scores.failures))
        assert scorer.judge.pool.batch_seconds == max(600, 120 * seconds)
    assert found == [([0.0], {"slow": {"hung": 1}}), ([1.0], {})]
    for seconds in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"rl\.reward_timeout is .*; give seconds above 0"):
            RLConfig(reward_timeout=seconds)


def test_a_run_that_judges_code_says_what_keeps_it_in(folder):
    """If a reward runs programs, and not otherwise."""
    code = {
        "prompt": "Write f.", "kind": "code",
        "tests": [{"call": "half(3)", "value": 1.5, "tolerance": 1e-9}, {"check": "pass"}],
    }  # fmt: skip
    plain = {"prompt": "1 + 1?", "answer": "2"}
    place = folder / "code.jsonl"

    def judged(lines, *rewards) -> bool:
        place.write_text("".join(json.dumps(line) + "\n" for line in lines))
        rl = RLConfig(prompts=str(place), rewards=rewards, held_out=0)
        return judges_code(rl, file_prompts(rl, tokenizer(folder), 0))

    assert judged([plain, code])
    assert judged([plain, code], "accuracy", "format")
    assert not judged([plain, code], "format")
    assert not judged([plain])
    assert judged([code], "code=0.5")
    words = described_isolation(unsafe=not KEPT_IN)
    assert words.startswith("in bubblewrap" if KEPT_IN else "UNSAFE")


# ---- Through train.py ----------------------------------------------------------------------------


def train_command(folder: pathlib.Path, name: str, *options: str) -> list[str]:
    return [
        sys.executable, "train.py", "--config", "r1_zero", "--run-dir", str(folder / name),
        "--task.name", "", "--data.tokenizer", str(folder / "tokenizer.json"),
        "--model.vocab-size", "320", "--data.vocab-size", "320", "--model.hidden-size", "32",
        "--model.num-layers", "1", "--model.num-heads", "2", "--model.expert-ffn-size", "16",
        "--model.num-experts", "4", "--train.steps", "2", "--train.seq-len", "96",
        "--train.batch-size", "8", "--rl.prompts-per-step", "2", "--rl.objective.group-size", "4",
        "--rl.max-new-tokens", "16", "--rl.eval-prompts", "4", "--train.eval-every", "2",
        "--compilation-cache", str(folder / "programs"), *options,
    ]  # fmt: skip


def run_train(folder: pathlib.Path, name: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        train_command(folder, name, *options),
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": QUICK_XLA},
        text=True,
        capture_output=True,
        check=False,
    )


@pytest.mark.slow
def test_own_prompts_and_rewards_train(folder):
    """Without accuracy the mean reward is told; a reward that fails stays in sight."""
    done = run_train(
        folder, "own", "--rl.prompts", str(folder / "prompts.jsonl"), "--rl.held-out", "0.2",
        "--rl.rewards", f"{folder}/rewards.py:short=0.5", f"{folder}/rewards.py:often=0.01",
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    named = r"reward often failed \(raised\), counted as 0: RuntimeError: often "
    named += rf"\({folder}/rewards\.py, line 24\)"
    assert len(re.findall(named, said)) == 1
    assert re.search(r"step 2/2 .*REWARDS FAILED \d+%", said)
    assert re.search(
        r"REWARDS FAILED, each counted as 0: [\d.]+ per answer, in 2 of 2 rollouts", said
    )
    assert re.search(
        r"held out, 4 prompts: mean reward at temperature 1: [\d.]+ -> [\d.]+; greedy", said
    )
    assert "accuracy" not in said.partition("first step")[2]
    lines = read_metrics(folder / "own")
    assert all(0 < r["policy/failed_rewards"] < 1 for r in lines if "policy/reward" in r)
    assert all(0 < r["policy/reward/short"] < 1 for r in lines if "policy/reward" in r)
    assert "eval/reward_greedy" in lines[-1]
    assert not [name for line in lines for name in line if "accuracy" in name or "correct" in name]
    samples = [json.loads(x) for x in (folder / "own" / "samples.jsonl").read_text().splitlines()]
    assert all("apples" in line["prompt"] for line in samples)
    for line in samples:
        assert line["parts"].keys() == {"short", "often"}
        worth = 0.5 * line["parts"]["short"] + 0.01 * line["parts"]["often"]
        assert line["reward"] == pytest.approx(worth)
    figure = rl_figure(lines)
    assert [axis.get_title() for axis in figure.axes] == [
        "reward",
        "length (tokens)",
        "entropy (nats/token)",
        "groups without variance (share)",
        "parts of the reward",
    ]
    assert all(
        axis.lines and all(len(one.get_xdata()) for one in axis.lines) for axis in figure.axes
    )
    assert (folder / "own" / "rl.png").exists()


@pytest.mark.slow
def test_the_lines_of_the_document_for_own_prompts(tmp_path):
    """As they stand in docs/r1.md, with a narrower model and fewer steps behind them."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/r1.md").read_text(), re.DOTALL)
    block, talks = (block for block in blocks if "runs/own_base" in block)
    base = "--train.eval-every 0 --train.steps 2 --train.seq-len 64"
    narrow = (
        "--model.hidden-size 32 --model.num-layers 2 --model.num-heads 2 --model.dense-ffn-size 32 "
        f"--model.expert-ffn-size 16 --compilation-cache {tmp_path}/programs"
    )
    lines = (block + talks).replace(
        "--run-dir runs/own_base", f"--run-dir runs/own_base {narrow} {base}"
    )
    lines = lines.replace("--train.steps 20", f"--train.steps 2 {narrow}").replace(
        "eval-every 10", "eval-every 2"
    )
    lines = lines.replace("runs/", f"{tmp_path}/").replace("python ", f"{sys.executable} ")
    done = subprocess.run(
        ["bash", "-ec", lines],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": QUICK_XLA},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"held out, \d+ prompts: mean reward at temperature 1: [01]\.", done.stdout)
    assert (tmp_path / "own" / "rl.png").exists()
    assert "3 examples of" in done.stdout
    assert (tmp_path / "own_sft" / "loss.png").exists()


def test_the_document_shows_what_a_reward_gets(tmp_path, folder):
    """Its Problem is the one that a reward is called with."""
    text = (ROOT / "docs/r1.md").read_text()
    (shown,) = re.findall(r"```python\n(Problem\(.*?\n\))\n```", text, re.DOTALL)
    (line,) = re.findall(r'^\{"prompt": "What is 17 .*\}$', text, re.MULTILINE)
    (tmp_path / "one.jsonl").write_text(line + "\n")
    config = RLConfig(prompts=str(tmp_path / "one.jsonl"), template="r1_zero", held_out=0)
    (problem,) = file_prompts(config, tokenizer(folder), 0).train
    before, after = eval(shown, {"Problem": Problem}).prompt.split("[..]")
    assert problem.prompt.startswith(before.rstrip())
    assert problem.prompt.endswith(after)
    assert dataclasses.replace(eval(shown, {"Problem": Problem}), prompt=problem.prompt) == problem


@pytest.mark.slow
def test_a_reward_that_fails_on_a_whole_first_rollout_ends_the_run(folder):
    done = run_train(
        folder,
        "failing",
        "--rl.prompts",
        str(folder / "prompts.jsonl"),
        "--rl.held-out",
        "0.2",
        "--rl.rewards",
        "accuracy",
        f"{folder}/rewards.py:raises",
    )
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "a reward failed on all 8 answers of the first rollout" in last
    assert f"reward raises: RuntimeError: always ({folder}/rewards.py, line 20)" in last


HANGS = """
import pathlib, time
def hangs(problem, text):
    pathlib.Path(__file__).with_name("hanging").touch()
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_run_with_a_reward_that_hangs_stops_on_sigterm(folder):
    """Within seconds, with code to judge; what keeps it in was said at the start."""
    (folder / "hangs.py").write_text(HANGS)
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    lines = [json.dumps(line | {"tests": [{"check": "pass"}]}) + "\n" for line in lines]
    (folder / "tested.jsonl").write_text("".join(lines))
    command = train_command(
        folder, "hanging_run", "--rl.prompts", str(folder / "tested.jsonl"), "--rl.held-out",
        "0.2", "--rl.rewards", f"{folder}/hangs.py:hangs", "code=0", "--rl.reward-timeout", "500",
        "--train.eval-every", "0", *["--rl.unsafe-code"] * (not KEPT_IN),
    )  # fmt: skip
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": QUICK_XLA},
        text=True,
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            while not (folder / "hanging").exists():
                time.sleep(0.1)
                assert process.poll() is None
            process.terminate()
            begin = time.monotonic()
            said, _ = process.communicate(timeout=60)
            assert time.monotonic() - begin < 10
        finally:
            process.kill()
    assert process.returncode == 0
    assert said.count("\ncode         runs ") == 1
    assert "SIGTERM: stopped and saved at step 0" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "rewards", "says"),
    [
        ('{"prompt": "1+1?"}\nnot json\n{"prompt": "1+2?", "answer": "3"}\n', "accuracy",
         ["2 of 3 lines cannot be used", "line 1:", "line 2:"]),
        ("", "missing.py:f", ["missing.py"]),
        ("", "broken.py:f", ["broken.py", "SyntaxError"]),
        ("", "rewards.py:nothing", ["nothing", "mixed"]),
        ("", "acuracy", ["acuracy"]),
        ('{"prompt": "%s", "answer": "3"}\n' % ("long " * 300), "accuracy",
         ["tokens, with rl.max_new_tokens"]),
    ],
    ids=["lines", "no file", "syntax", "no function", "no such reward", "too long"],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_the_first_rollout(folder, prompts, rewards, says):
    (folder / "broken.py").write_text("def f(problem, text:\n    return 1\n")
    place = folder / "bad.jsonl"
    place.write_text(prompts or (folder / "prompts.jsonl").read_text())
    reward = str(folder / rewards) if ".py" in rewards else rewards
    done = run_train(
        folder, "refused", "--rl.prompts", str(place), "--rl.rewards", reward, "--rl.held-out",
        "0" if prompts else "0.2",
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    for words in says:
        assert words in done.stderr
    assert not (folder / "refused" / "metrics.jsonl").exists()
