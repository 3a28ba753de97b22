"""Scores answers with a weighted list of rewards in worker processes; nothing stops training.

    with Judge([named("accuracy"), named("format"), named("mine.py:politeness", 0.2)]) as judge:
        judged = judge.score(problems, texts)

A reward that raises, hangs, dies or returns no finite number counts as failed for that answer: its
value is 0.0, it is counted by name and kind of failure, and the first message is kept. Workers are
fresh interpreters, so a reward file can neither fork nor change the training process.

Letters: B answers.
"""

import collections
import contextlib
import dataclasses
import json
import os
import selectors
import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rl.problems import Problem
from rl.stopping import POLL_S, RolloutStoppedError, Stop, never
from rl.verdict.child import GRACE, Child, ChildError

MAX_WORKERS = 8
ORPHAN_SECONDS = 10.0
"""A worker whose judge is gone (killed) stops itself so long after twice the longest deadline, if
it is in a reward; one that is idle stops at once."""
CODE_SECONDS = 25.0
"""Least deadline of the rewards that run code: their tests have Limits.total_seconds."""


@dataclasses.dataclass(frozen=True)
class WeightedReward:
    """One reward of the sum."""

    name: str
    """Its name in results."""
    weight: float = 1.0
    """Factor of its values in the sum."""
    function: str = ""
    """A name in rl.rewards.REWARDS, `path.py:function` or `package.module:function`; '' is the
    name."""
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
    if name in ("code", "accuracy"):
        seconds = max(seconds, CODE_SECONDS)
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


class _Job(NamedTuple):
    """An answer and the numbers of the rewards that it still lacks."""

    answer: int
    rewards: tuple[int, ...]


class _Worker:
    """A child with a folder of its own for what its rewards, if killed, would leave behind."""

    def __init__(self, job: str):
        self._folder = tempfile.mkdtemp(prefix="judge-")
        self.done = 0
        self.job: _Job | None = None
        self.due = 0.0
        try:
            self.child = Child("rl.verdict.judge_worker", job, folder=self._folder)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def end(self, orderly: bool = False, grace: float = GRACE) -> None:
        self.child.close() if orderly else self.child.kill(grace)
        shutil.rmtree(self._folder, ignore_errors=True)


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
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _end_all, self._workers)
        self._start(never)

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
        end = time.monotonic() + self.pool.batch_seconds
        batch = _Batch(self.rewards, problems, texts, end, stop)
        try:
            self._run(batch)
        except BaseException:
            _end_all(self._workers)
            raise
        return batch.judged()

    def _run(self, batch: "_Batch") -> None:
        for worker in list(self._workers):
            if worker.done >= self.pool.answers_per_worker:
                self._drop(worker, orderly=True)
        while batch.jobs or any(worker.job for worker in self._workers):
            if batch.stop():
                raise RolloutStoppedError
            if time.monotonic() >= batch.end:
                batch.give_up()
            self._hand_out(batch)
            self._take_in(batch)

    def _hand_out(self, batch: "_Batch") -> None:
        busy = sum(worker.job is not None for worker in self._workers)
        while len(self._workers) < min(self._count, busy + len(batch.jobs)):
            try:
                self._start(batch.stop)
            except ValueError as error:  # it did start once: memory is short, or a file is gone
                batch.fail_all("died", f"a worker did not start: {error}")
                return
        for worker in list(self._workers):
            if worker.job is None and batch.jobs:
                self._give(worker, batch.jobs.popleft(), batch)

    def _give(self, worker: _Worker, job: _Job, batch: "_Batch") -> None:
        message = batch.message(job)
        worker.job, worker.due = job, self._due(job)
        try:
            worker.child.send(message)
        except ChildError:  # it ended while it had nothing to do: not the reward's fault
            batch.jobs.appendleft(job)
            self._drop(worker)

    def _take_in(self, batch: "_Batch") -> None:
        busy = [worker for worker in self._workers if worker.job]
        if not busy:
            return
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.child, selectors.EVENT_READ, worker)
            first = min(*(worker.due for worker in busy), batch.end)
            ready = selector.select(min(max(0.0, first - time.monotonic()), POLL_S))
        for key, _ in ready:
            self._read(key.data, batch)
        now = time.monotonic()
        for worker in busy:
            if batch.stop():  # ending a worker takes time
                return
            if worker.job and worker.due <= now and worker in self._workers:
                seconds = self.rewards[worker.job.rewards[0]].seconds
                self._lost(worker, batch, "hung", f"no value within {seconds:g} s; stopped")
            elif worker.job and batch.end <= now:
                self._lost(worker, batch, "not reached", "the batch ran out of time")

    def _read(self, worker: _Worker, batch: "_Batch") -> None:
        try:
            outcomes = worker.child.read()
        except ChildError as error:
            self._lost(worker, batch, "died", f"its process ended: {error}")
            return
        for outcome in outcomes:
            assert worker.job
            batch.enter(worker.job, outcome)
            worker.job = _rest(worker.job)
            if worker.job:
                worker.due = self._due(worker.job)
            else:
                worker.done += 1
        if not worker.job and worker.done >= self.pool.answers_per_worker:
            self._drop(worker, orderly=True)

    def _lost(self, worker: _Worker, batch: "_Batch", kind: str, message: str) -> None:
        """The worker's present reward has failed; the answer's others get another worker."""
        assert worker.job
        batch.enter(worker.job, {"kind": kind, "message": message})
        rest = _rest(worker.job)
        if rest:
            batch.jobs.appendleft(rest)
        self._drop(worker)

    def _due(self, job: _Job) -> float:
        return time.monotonic() + self.rewards[job.rewards[0]].seconds

    def _start(self, stop: Stop) -> None:
        try:
            worker = _Worker(self._job)
        except OSError as error:
            raise ValueError(f"a worker cannot be started: {error}") from error
        self._workers.append(worker)
        try:
            wrong = self._first_word(worker.child, stop)
        except (TimeoutError, ChildError) as error:
            wrong = f"a worker with the rewards {[r.name for r in self.rewards]} {error}"
        if wrong:
            self._drop(worker)
            raise ValueError(wrong)

    def _first_word(self, child: Child, stop: Stop) -> str:
        end = time.monotonic() + self.pool.start_seconds
        while time.monotonic() < end:
            if stop():
                raise RolloutStoppedError
            with contextlib.suppress(TimeoutError):
                return child.wait(min(POLL_S, self.pool.start_seconds))
        raise TimeoutError(f"no answer in {self.pool.start_seconds:g} s")

    def _drop(self, worker: _Worker, orderly: bool = False) -> None:
        self._workers.remove(worker)
        worker.end(orderly)


class _Batch:
    """Jobs that wait, and the values and failures so far."""

    def __init__(self, rewards: Sequence[WeightedReward], problems, texts, end: float, stop: Stop):
        every = tuple(range(len(rewards)))
        self.jobs = collections.deque(_Job(n, every) for n in range(len(texts)))
        self.end, self.stop = end, stop
        self._rewards, self._records, self._texts = rewards, problems, texts
        self._parts = {reward.name: np.zeros(len(texts)) for reward in rewards}
        self._failures: dict[str, dict[str, int]] = {}
        self._examples: dict[str, dict[str, str]] = {}

    def message(self, job: _Job) -> dict:
        problem = dataclasses.asdict(self._records[job.answer])
        return {"problem": problem, "text": self._texts[job.answer], "rewards": job.rewards}

    def enter(self, job: _Job, outcome: dict) -> None:
        name = self._rewards[job.rewards[0]].name
        if "value" in outcome:
            self._parts[name][job.answer] = outcome["value"]
            return
        counts = self._failures.setdefault(name, {})
        counts[outcome["kind"]] = counts.get(outcome["kind"], 0) + 1
        messages = self._examples.setdefault(name, {})
        messages.setdefault(outcome["kind"], outcome["message"])

    def give_up(self) -> None:
        self.fail_all("not reached", "the batch ran out of time")

    def fail_all(self, kind: str, message: str) -> None:
        while self.jobs:
            job: _Job | None = self.jobs.popleft()
            while job:
                self.enter(job, {"kind": kind, "message": message})
                job = _rest(job)

    def judged(self) -> Judged:
        total_B = np.zeros(len(self._texts))
        for reward in self._rewards:
            total_B += reward.weight * self._parts[reward.name]
        return Judged(total_B, self._parts, self._failures, self._examples)


def _rest(job: _Job) -> _Job | None:
    return _Job(job.answer, job.rewards[1:]) if len(job.rewards) > 1 else None


def _end_all(workers: list[_Worker], orderly: bool = False) -> None:
    if not orderly:
        for worker in workers:
            worker.child.terminate()
    end = time.monotonic() + GRACE  # for all of them together
    while workers:
        workers.pop().end(orderly, max(0.0, end - time.monotonic()))
