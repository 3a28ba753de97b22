"""The judge: rewards that raise, hang, die or return nonsense; workers that leave no trace."""

import dataclasses
import gc
import os
import pathlib
import signal
import tempfile
import time

import numpy as np
import pytest

import rl.verdict.pool as pool_module
from rl.problems import Problem
from rl.stopping import RolloutStoppedError
from rl.verdict.child import ChildError
from rl.verdict.pool import Judge, Pool, WeightedReward, named

MINE = """
import os, signal, sys, time

def moody(record, text, times=1):
    if text == "hang":
        while True:
            time.sleep(0.01)
    if text == "ignore TERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    if text == "die":
        os._exit(3)
    if text == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "exit":
        raise SystemExit("bye")
    if text == "raise":
        raise KeyError(record.answer["answer"])
    if text == "memory":
        return float(len(bytearray(10**11)))
    if text == "leave":
        open(os.path.join(os.environ["TMPDIR"], "left"), "w").close()
        os._exit(0)
    print("not an answer", flush=True)
    values = {"nan": float("nan"), "inf": float("-inf"), "text": "1.0", "none": None,
              "huge": 10**400, "bool": True, "list": [1.0]}
    return values.get(text, times * len(text))

def process(record, text):
    return os.getpid()

def narrow(record):
    return 1.0
"""
FAILED = {
    "hang": "hung", "ignore TERM": "hung", "die": "died", "kill": "died", "exit": "raised",
    "raise": "raised", "memory": "raised", "leave": "died", "nan": "not finite",
    "inf": "not finite",
    "text": "not a number", "none": "not a number", "huge": "not finite", "list": "not a number",
}  # fmt: skip


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(MINE)
    return str(path)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path, monkeypatch):
    """No child of this process, zombies included, no folder, no open file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files = len(os.listdir("/proc/self/fd"))
    before = children()
    yield
    gc.collect()
    assert children() == before
    assert not list(tmp_path.glob("child-*"))
    assert len(os.listdir("/proc/self/fd")) == files


def children() -> list[str]:
    """Of every thread."""
    tasks = pathlib.Path("/proc/self/task").glob("*/children")
    return sorted(child for task in tasks for child in task.read_text().split())


def records(n: int) -> list[Problem]:
    return [Problem(f"Question {i}", {"answer": str(i)}) for i in range(n)]


def test_what_fails_is_counted_and_what_works_is_in_order(mine):
    texts = [r"\boxed{0}", "a" * 100_000, *FAILED, "bool", r"<think>\ud800</think> 17"]
    moody = WeightedReward("moody", 0.5, f"{mine}:moody", seconds=1.5, options={"times": 2})
    with Judge([named("accuracy"), moody, named("format", 0.1)], Pool(workers=2)) as judge:
        judged = judge.score(records(len(texts)), texts)
        again = judge.score(records(2), ["1", "1"])
    accuracy = np.zeros(len(texts))
    accuracy[[0, -1]] = 1
    form = np.zeros(len(texts))
    form[-1] = 1
    moods = np.array(
        [0.0 if text in FAILED else 1.0 if text == "bool" else 2 * len(text) for text in texts]
    )
    np.testing.assert_array_equal(judged.parts["accuracy"], accuracy)
    np.testing.assert_array_equal(judged.parts["format"], form)
    np.testing.assert_array_equal(judged.parts["moody"], moods)
    np.testing.assert_array_equal(judged.rewards_B, accuracy + 0.5 * moods + 0.1 * form)
    kinds = list(FAILED.values())
    assert judged.failures == {"moody": {kind: kinds.count(kind) for kind in set(kinds)}}
    examples = judged.examples["moody"]
    assert examples.keys() == set(kinds)
    assert examples["hung"] == "no value within 1.5 s; stopped"
    assert examples["died"] in (
        "its process ended: exit status 3",
        "its process ended: killed by signal 9",
        "its process ended: exit status 0",
    )
    np.testing.assert_array_equal(again.rewards_B, [1, 2])
    assert again.failures == again.examples == {}


def test_workers_are_replaced_after_their_share(mine):
    reward = WeightedReward("process", 1.0, f"{mine}:process")
    with Judge([reward], Pool(workers=1, answers_per_worker=3)) as judge:
        first = judge.score(records(5), [""] * 5).rewards_B
        second = judge.score(records(1), [""]).rewards_B
    workers = [*first, *second]
    assert workers[0] == workers[1] == workers[2] != workers[3]
    assert workers[3] == workers[4] == workers[5]


def test_a_worker_that_ended_between_batches_is_replaced(mine):
    with Judge([WeightedReward("process", 1.0, f"{mine}:process")], Pool(workers=1)) as judge:
        (pid,) = judge.score(records(1), [""]).rewards_B
        os.kill(int(pid), 9)
        assert judge._workers[0]._process.wait(10) == -9
        judged = judge.score(records(2), ["", ""])
    assert judged.failures == {}
    assert pid not in judged.rewards_B
    assert judged.rewards_B[0] == judged.rewards_B[1] > 0


def test_a_worker_outlives_a_pause_but_not_a_hang_that_nobody_ends(mine, monkeypatch):
    monkeypatch.setattr(pool_module, "ORPHAN_SECONDS", 0.0)
    rewards = [
        WeightedReward("process", 1.0, f"{mine}:process", seconds=1),
        WeightedReward("moody", 0.0, f"{mine}:moody", seconds=1),
    ]
    with Judge(rewards, Pool(workers=1)) as judge:
        first = judge.score(records(1), [""]).rewards_B
        time.sleep(2.2)
        assert judge.score(records(1), [""]).rewards_B == first
        child = judge._workers[0]
        with pytest.raises(ChildError, match=f"killed by signal {signal.SIGALRM}"):
            child.ask({"problem": dataclasses.asdict(*records(1)), "text": "hang", "reward": 1}, 20)


def test_a_batch_has_an_end(mine):
    rewards = [WeightedReward("moody", 1.0, f"{mine}:moody", seconds=30), named("format")]
    begin = time.monotonic()
    with Judge(rewards, Pool(workers=1, batch_seconds=1)) as judge:
        judged = judge.score(records(3), ["abc", "hang", "<think>a</think>b"])
    assert time.monotonic() - begin < 20
    np.testing.assert_array_equal(judged.rewards_B, [3, 0, 0])
    assert judged.failures == {"moody": {"not reached": 2}, "format": {"not reached": 2}}
    assert judged.examples["format"] == {"not reached": "the batch ran out of time"}


def test_an_interrupted_batch_ends_its_workers(mine):
    judge = Judge([WeightedReward("moody", 1.0, f"{mine}:moody")], Pool(workers=1))

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge.score(records(1), ["hang"], interrupt)
    assert not judge._workers
    assert judge.score(records(1), ["abc"]).rewards_B == [3]  # and it goes on
    del judge  # without close: the finalizer ends the worker


@pytest.mark.parametrize("text", ["hang", "ignore TERM"])
def test_a_batch_that_is_stopped_ends_its_workers_soon(text, mine):
    """All together, not one after the other; the judge goes on afterwards."""
    reward = WeightedReward("moody", 1.0, f"{mine}:moody", 60)
    with Judge([reward], Pool(workers=3)) as judge:
        judge.score(records(9), ["abc"] * 9)  # all workers are up
        begin = time.monotonic()
        with pytest.raises(RolloutStoppedError):
            judge.score(records(9), [text] * 9, lambda: time.monotonic() > begin + 0.5)
        assert time.monotonic() - begin < 0.5 + 2
        assert not judge._workers
        assert judge.score(records(1), ["abc"]).rewards_B == [3]


def test_a_worker_that_is_slow_to_start_does_not_keep_a_batch_from_stopping(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, time\n"
        f"if os.path.exists({str(tmp_path / 'marker')!r}): time.sleep(30)\n"
        "def slow(problem, text):\n"
        "    time.sleep(0.3)\n"  # the worker that is ready does not finish the batch alone
        "    return 1.0\n"
    )
    with Judge([named(f"{tmp_path}/slow.py:slow")], Pool(workers=2)) as judge:
        (tmp_path / "marker").touch()
        begin = time.monotonic()
        with pytest.raises(RolloutStoppedError):
            judge.score(records(9), ["a"] * 9, lambda: time.monotonic() > begin + 0.5)
        assert time.monotonic() - begin < 0.5 + 2
    with (
        pytest.raises(ValueError, match="no answer in 1 s"),
        Judge([named(f"{tmp_path}/slow.py:slow")], Pool(start_seconds=1)),
    ):
        pass


def test_deadlines_of_rewards_that_go_by_name():
    assert [named(name).seconds for name in ("format", "a.py:mine", "code")] == [5, 5, 65]
    assert [named(name, 1, 60).seconds for name in ("a.py:mine", "accuracy")] == [60, 65]
    assert [named(name, 1, 2).seconds for name in ("a.py:mine", "accuracy")] == [2, 65]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("acuracy", "'acuracy' is not known; choose one of accuracy, code, format, language"),
        ("nowhere.py:f", "reward file .*nowhere.py does not exist"),
        ("MINE:absent", "mine.py has no function 'absent'; it has moody, process, narrow"),
        ("MINE:narrow", r"narrow' is called with \(problem, text\), .*too many positional"),
        ("rl.nowhere:f", "importing rl.nowhere failed: ModuleNotFoundError"),
        ("BROKEN:f", "importing .*broken.py failed: ImportError: ValueError: no luck"),
        ("LEAVING:f", "importing .*leaving.py failed: SystemExit: 5"),
    ],
)
def test_rewards_that_cannot_be_had_are_told_at_once(function, message, mine, tmp_path):
    (tmp_path / "broken.py").write_text("raise ValueError('no luck')")
    (tmp_path / "leaving.py").write_text("print('noise'); raise SystemExit(5)")
    function = function.replace("MINE", mine)
    for name in ("broken", "leaving"):
        function = function.replace(name.upper(), str(tmp_path / f"{name}.py"))
    with pytest.raises(ValueError, match=message):
        Judge([named(function)], Pool(workers=1))


def test_wrong_options_are_told(mine):
    with pytest.raises(ValueError, match="unexpected keyword argument 'tag'"):
        Judge([WeightedReward("format", options={"tag": True})])
    with pytest.raises(ValueError, match=r"rewards are \['format', 'format'\]"):
        Judge([named("format"), named("format")])
    with pytest.raises(ValueError, match=r"rewards are \[\]; give at least one"):
        Judge([])
    with pytest.raises(ValueError, match="weight is nan; give a finite number"):
        named("format", float("nan"))
    with pytest.raises(ValueError, match="a deadline of 0 s; give more than 0"):
        WeightedReward("format", seconds=0)
    with pytest.raises(ValueError, match="workers is -1; give at least 0"):
        Pool(workers=-1)
    with (
        Judge([named("format")], Pool(workers=1)) as judge,
        pytest.raises(ValueError, match="2 problems for 1 answers"),
    ):
        judge.score(records(2), [""])


def test_a_part_from_elsewhere_joins_the_sum():
    with Judge([named("format")], Pool(workers=1)) as judge:
        judged = judge.score(records(2), ["<think>a</think>b", "b"])
        assert judge.score([], []).rewards_B.shape == (0,)
    more = judged.with_part("length", np.array([-0.5, -1]), 2.0)
    np.testing.assert_array_equal(more.rewards_B, [0, -2])
    np.testing.assert_array_equal(judged.rewards_B, [1, 0])
    assert list(more.parts) == ["format", "length"]
    with pytest.raises(ValueError, match="'length' is there already"):
        more.with_part("length", np.zeros(2))
    with pytest.raises(ValueError, match=r"shape \(3,\) for \(2,\) answers"):
        judged.with_part("length", np.zeros(3))
    with pytest.raises(ValueError, match="1 values not finite"):
        judged.with_part("length", np.array([np.nan, 0]))
