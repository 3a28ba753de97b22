"""Scores answers with a weighted list of rewards in worker processes; nothing stops training.

    with Judge([named("accuracy"), named("format"), named("mine.py:politeness", 0.2)]) as judge:
        judged = judge.score(problems, texts)

A reward that raises, hangs, dies or returns no finite number counts as failed for that answer: its
value is 0.0, it is counted by name and kind of failure, and the first message is kept. Workers are
fresh interpreters, so a reward file can neither fork nor change the training process.
A thread of this process waits for each.

Letters: B answers.
"""

import dataclasses
import json
import math
import os
import signal
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rl.config import CodeLimits
from rl.problems import Problem
from rl.stopping import POLL_S, RolloutStoppedError, Stop, never
from rl.verdict.child import GRACE, Child, ChildError

MAX_WORKERS = 8
ORPHAN_SECONDS = 10.0
"""A worker whose judge is gone (killed) stops itself so long after twice the longest deadline, if
it is in a reward; one that is idle stops at once."""
CODE_MARGIN = 5.0
"""Seconds that a reward which runs code has beyond CodeLimits.total_seconds."""
CODE = ("accuracy", "code")
"""Names of the rewards that may run code."""


@dataclasses.dataclass(frozen=True)
class WeightedReward:
    """One reward of the sum."""

    name: str
    """Its name in results."""
    weight: float = 1.0
    """Factor of its values in the sum."""
    function: str = ""
    """A name in `rl/verdict/rules.py:REWARDS`, `path.py:function` or `package.module:function`; ''
    is the name."""
    seconds: float = 5.0
    """Deadline for one answer; then the worker is killed and the reward has failed."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of the function, as JSON has them."""

    def __post_init__(self):
        if not abs(self.weight) < float("inf"):
            raise ValueError(f"reward {self.name}: weight is {self.weight}; give a finite number")
        if not 0 < self.seconds < float("inf"):
            raise ValueError(
                f"reward {self.name}: a deadline of {self.seconds} s; give more than 0"
            )


def named(
    function: str, weight: float = 1.0, seconds: float = WeightedReward.seconds
) -> WeightedReward:
    """A reward as the command line names it: `accuracy`, or `path.py:function`, which goes by the
    function's name in results."""
    name = function.rpartition(":")[2]
    if name in CODE:
        seconds = max(seconds, CodeLimits.total_seconds + CODE_MARGIN)
    return WeightedReward(name, weight, function, seconds)


@dataclasses.dataclass(frozen=True)
class Pool:
    """The worker processes."""

    workers: int = 0
    """How many; 0 takes one per CPU, at most MAX_WORKERS."""
    answers_per_worker: int = 2000
    """Answers after which a worker is replaced, so that what rewards leak does not add up."""
    memory_mb: int = 4096
    """Address space of a worker, in 2^20 bytes."""
    start_seconds: float = 60.0
    """Deadline for a worker to start and to import the rewards."""
    batch_seconds: float = 600.0
    """Wall time for one batch; rewards that have not come by then have failed."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "workers" else 1
            if not least <= value < float("inf"):
                raise ValueError(f"pool: {field.name} is {value}; give at least {least}")


@dataclasses.dataclass(frozen=True)
class Judged:
    """Values of a batch, in the order of the answers."""

    rewards_B: np.ndarray
    """Weighted sum of the parts, float64 [B]."""
    parts: dict[str, np.ndarray]
    """Values of each reward before weighting, float64 [B]; 0.0 where it failed."""
    failures: dict[str, dict[str, int]]
    """Reward -> kind of failure -> answers. Kinds: raised, hung, died, not a number, not finite,
    not reached (the batch ran out of time)."""
    examples: dict[str, dict[str, str]]
    """Reward -> kind of failure -> message of the first."""

    def with_part(self, name: str, values_B: np.ndarray, weight: float = 1.0) -> "Judged":
        """The same with one more part, which something else computed: length in tokens, a reward
        model. ValueError if the name is taken, the shape differs or a value is not finite."""
        values_B = np.asarray(values_B, np.float64)
        if name in self.parts:
            raise ValueError(f"reward {name!r} is there already; give the part another name")
        if values_B.shape != self.rewards_B.shape:
            raise ValueError(
                f"part {name!r} has shape {values_B.shape} for {self.rewards_B.shape} answers"
            )
        if not np.isfinite(values_B).all():
            raise ValueError(
                f"part {name!r} has {(~np.isfinite(values_B)).sum()} values not finite"
            )
        parts = {**self.parts, name: values_B}
        return dataclasses.replace(self, rewards_B=self.rewards_B + weight * values_B, parts=parts)


class Judge:
    """A pool of workers that know the same rewards. Not for several threads at once."""

    def __init__(self, rewards: Sequence[WeightedReward], pool: Pool | None = None):
        """Starts one worker, so that wrong rewards are known now: ValueError says which and why."""
        names = [reward.name for reward in rewards]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"rewards are {names}; give at least one, and each name once")
        self.rewards, self.pool = tuple(rewards), pool or Pool()
        slowest = max(reward.seconds for reward in rewards)
        self._job = json.dumps(
            {
                "rewards": [[r.function or r.name, dict(r.options)] for r in rewards],
                "memory_bytes": self.pool.memory_mb << 20,
                "seconds": 2 * slowest + ORPHAN_SECONDS,
            }
        )
        cpus = len(os.sched_getaffinity(0))
        self._count = self.pool.workers or min(cpus, MAX_WORKERS)
        self._workers: dict[int, Child] = {}
        self._finalizer = weakref.finalize(self, _end_all, self._workers)
        self._worker(0, _Batch([], [], [], math.inf))

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. A closed judge starts new ones when it is used again."""
        _end_all(self._workers, orderly=True)

    def score(
        self, problems: Sequence[Problem], texts: Sequence[str], stop: Stop = never
    ) -> Judged:
        """Scores text b as an answer to problem b, for all b; see Judged.

        Raises ValueError if there are not as many problems as texts, RolloutStoppedError within a
        second or two after `stop()` says true, and nothing because of what a reward does. If it is
        interrupted, the workers are ended.
        """
        if len(problems) != len(texts):
            raise ValueError(
                f"{len(problems)} problems for {len(texts)} answers; give one for each"
            )
        batch = _Batch(self.rewards, problems, texts, time.monotonic() + self.pool.batch_seconds)
        threads = [
            threading.Thread(target=self._work, args=(number, batch), daemon=True)
            for number in range(min(self._count, len(texts)))
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    if stop():
                        raise RolloutStoppedError
                    thread.join(POLL_S)
        except BaseException:
            self._stop(batch, threads)
            raise
        if batch.error:
            raise batch.error
        return batch.judged()

    def _stop(self, batch: "_Batch", threads: Sequence[threading.Thread]) -> None:
        """Ends the workers, and with them what the threads wait for."""
        with batch.lock:  # no worker starts after this
            batch.stopped = True
        end = time.monotonic() + GRACE  # for all of them together
        for number in (signal.SIGTERM, signal.SIGKILL):
            for worker in list(self._workers.values()):
                worker.signal(number)
            for thread in threads:
                if thread.is_alive():
                    thread.join(max(0.0, end - time.monotonic()))
        for thread in threads:
            if thread.is_alive():
                thread.join()
        _end_all(self._workers)

    def _work(self, number: int, batch: "_Batch") -> None:
        """One thread's part of a batch, by worker `number`."""
        share = self.pool.answers_per_worker * len(self.rewards)
        try:
            while (answer := batch.next()) is not None:
                for reward in range(len(self.rewards)):
                    outcome = self._outcome(number, batch, answer, reward)
                    if batch.stopped:
                        return
                    batch.enter(answer, reward, outcome)
                if number in self._workers and self._workers[number].asked >= share:
                    self._workers.pop(number).end(orderly=True)
        except BaseException as error:
            batch.error = error

    def _outcome(self, number: int, batch: "_Batch", answer: int, reward: int) -> dict[str, Any]:
        """{"value": float} or {"kind", "message"} of one reward for one answer. A worker that gave
        none is ended; the answer's other rewards get another."""
        failure = {"kind": "not reached", "message": "the batch ran out of time"}
        if time.monotonic() >= batch.end:
            return failure
        try:
            worker = self._worker(number, batch)
        except ValueError as error:  # one did start once: memory is short, or a file is gone
            if time.monotonic() >= batch.end:
                return failure
            return {"kind": "died", "message": f"a worker did not start: {error}"}
        own, left = self.rewards[reward].seconds, batch.end - time.monotonic()
        try:
            return worker.ask(batch.message(answer, reward), min(own, left))
        except TimeoutError:
            if own <= left:
                failure = {"kind": "hung", "message": f"no value within {own:g} s; stopped"}
        except ChildError as error:
            failure = {"kind": "died", "message": f"its process ended: {error}"}
        self._workers.pop(number).end()
        return failure

    def _worker(self, number: int, batch: "_Batch") -> Child:
        """The worker of this number, which is started if there is none or it has ended."""
        with batch.lock:
            worker = self._workers.get(number)
            if worker and (worker.status is None or batch.stopped):
                return worker
            if worker:  # it ended while it had nothing to do: not the reward's fault
                worker.end()
            if batch.stopped:
                raise ValueError("the batch is stopped")
            try:
                worker = self._workers[number] = Child("rl.verdict.pool_worker", self._job)
            except OSError as error:
                raise ValueError(f"a worker cannot be started: {error}") from error
        wrong = "it was interrupted"
        try:
            wrong = worker.wait(min(self.pool.start_seconds, batch.end - time.monotonic()))
        except (TimeoutError, ChildError) as error:
            wrong = f"a worker with the rewards {[r.name for r in self.rewards]}: {error}"
        finally:
            if wrong:
                self._workers.pop(number).end()
        if wrong:
            raise ValueError(wrong)
        return worker


class _Batch:
    """Answers that wait, and the values and failures so far; shared by the threads."""

    def __init__(self, rewards: Sequence[WeightedReward], problems, texts, end: float):
        self.end, self.stopped, self.lock = end, False, threading.Lock()
        self.error: BaseException | None = None
        self._answers = iter(range(len(texts)))
        self._rewards, self._problems, self._texts = rewards, problems, texts
        self._parts = {reward.name: np.zeros(len(texts)) for reward in rewards}
        self._failures: dict[str, dict[str, int]] = {}
        self._examples: dict[str, dict[str, str]] = {}

    def next(self) -> int | None:
        """The next answer that nobody has; None if there is none."""
        with self.lock:
            return next(self._answers, None)

    def message(self, answer: int, reward: int) -> dict[str, Any]:
        problem = dataclasses.asdict(self._problems[answer])
        return {"problem": problem, "text": self._texts[answer], "reward": reward}

    def enter(self, answer: int, reward: int, outcome: dict[str, Any]) -> None:
        name = self._rewards[reward].name
        if "value" in outcome:
            self._parts[name][answer] = outcome["value"]
            return
        with self.lock:
            counts = self._failures.setdefault(name, {})
            counts[outcome["kind"]] = counts.get(outcome["kind"], 0) + 1
            messages = self._examples.setdefault(name, {})
            messages.setdefault(outcome["kind"], outcome["message"])

    def judged(self) -> Judged:
        total_B = np.zeros(len(self._texts))
        for reward in self._rewards:
            total_B += reward.weight * self._parts[reward.name]
        return Judged(total_B, self._parts, self._failures, self._examples)


def _end_all(workers: dict[int, Child], orderly: bool = False) -> None:
    for worker in workers.values():
        if not orderly:
            worker.signal(signal.SIGTERM)
    while workers:
        workers.popitem()[1].end(orderly)
