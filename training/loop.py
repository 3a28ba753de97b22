"""The loop around the step: batches in, records out, evaluation and checkpoints when due."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from runtime.signals import StopRequest
from sharding.devices import mesh_shape
from sharding.partition import place_rows
from training.check import Check
from training.display import Display
from training.metrics import MetricsWriter
from training.plots import plot_run
from training.schedule import BatchPlan, knobs_at
from training.step import State, Trainer
from training.throughput import Throughput, peak_memory_gib
from training.trace import Trace


class Checkpoints(Protocol):
    """Calls that the loop makes of checkpoint/manager.py."""

    def save(
        self, step: int, state: Any, config: Any, mesh: Any, metrics: Any, batches: Any
    ) -> bool: ...

    def steps(self) -> list[int]: ...

    def wait(self) -> bool: ...


@dataclasses.dataclass
class Loop:
    """Runs a trainer from the step of its state to the last one."""

    trainer: Trainer
    plan: BatchPlan
    state: State
    run_dir: Path
    config: dict[str, Any]
    """The run's configuration as plain data, stored with every checkpoint."""
    checkpoints: Checkpoints
    save_every: int
    """Steps between checkpoints; 0 saves at the end and on a signal only."""
    evaluate: Callable[[State], dict[str, float]] | None
    """Held-out metrics of a state; None without held-out text."""
    throughput: Throughput
    display: Display
    read_first: Callable[[dict[str, jax.Array]], dict[str, jax.Array]] = lambda batch: batch
    """Adds to a placed batch what the step needs besides: what a teacher says of it."""
    check: Check | None = None
    """Compares a micro batch with the plain path every `train.check_every` steps."""
    profile: range = range(0)
    """Steps to trace, counted from the first that runs."""
    started: float = dataclasses.field(default_factory=time.monotonic)
    """When the process started, by time.monotonic."""

    def __post_init__(self):
        self.first_step = int(self.state["step"])
        self.pictures = Pictures(self.run_dir)
        self._compiled: set[int] = set()  # numbers of micro batches, a program each
        self._evaluated = False

    @property
    def complete(self) -> bool:
        """Whether `run` has nothing left to do."""
        return self.first_step >= self.trainer.train.steps

    def run(self, batches: Iterator[Mapping[str, np.ndarray]], rows: range) -> str:
        """Train on `batches`, of which this process holds `rows` of every micro batch.

        SIGTERM or SIGINT ends it after the step in progress. Saves at the end either way. Returns
        the signal's name, or "" when the last step was reached.
        """
        last, stopped = self.trainer.train.steps, ""
        with (
            MetricsWriter(self.run_dir, self.first_step) as writer,
            StopRequest(self.display.note) as stop,
            self.display,
            Trace(self.profile, self.run_dir, self.display) as trace,
        ):
            for step, batch in zip(range(self.first_step, last), batches, strict=False):
                begun = step - self.first_step
                trace.before(range(begun, begun + 1), self.state)
                record = self.advance(step, batch, rows)
                if record:
                    writer.write(step, record)
                    self.display.show(step, record)
                    if any(name.startswith("eval/") for name in record):
                        with self.throughput.paused():
                            self.pictures.draw()
                if self.save_every and (step + 1) % self.save_every == 0:
                    with self.throughput.paused():
                        self.save(record)
                if anyone(stop.requested):
                    stopped = stop.signal_name or "a signal to another process"
                    break
            jax.block_until_ready(self.state)
        self.save({})
        if stopped:
            self.pictures.draw(last=True)
        return stopped

    def advance(self, step: int, batch: Mapping[str, np.ndarray], rows: range) -> dict[str, float]:
        """One step; its record if the step is to be logged or evaluated, else {}."""
        train, done = self.trainer.train, step + 1
        knobs = knobs_at(train, self.plan, step)
        placed = place_rows(self.trainer.layout, dict(batch), rows, self.plan.micro_batch_size)
        scalars = {name: np.float32(value) for name, value in knobs.items()}
        at, checked = self.plan.at(step), self._checked(step, placed, scalars)
        if at.micro_batches in self._compiled:
            self.state, metrics = self.trainer.step(self.state, self.read_first(placed), scalars)
            self.throughput.add(at.batch_size * train.seq_len)
        else:
            self._compiled.add(at.micro_batches)
            micro = f" for {at.micro_batches} micro batches" * (len(self._compiled) > 1)
            self.display.note(f"compiling the step{micro} …")
            jax.block_until_ready(self.state)  # steps before it are not part of the pause
            with self.throughput.paused():
                read = self.read_first(placed)
                self.state, metrics = self.trainer.step(self.state, read, scalars)
                jax.block_until_ready(metrics)
        final = done == train.steps
        evaluated = train.eval_every and (final or done % train.eval_every == 0)
        logged = done % train.log_every == 0 or step == self.first_step
        if not (final or evaluated or logged or checked):
            return {}
        # Reading the metrics waits for the step; unlogged steps run ahead of Python.
        metrics = jax.device_get(metrics)
        if step == self.first_step:
            self.display.note(f"first step: {time.monotonic() - self.started:.1f} s after start")
        in_row = int(metrics.pop("skipped_in_row"))
        check_skipped(self, step, in_row, "or look at the data")
        record = {f"train/{name}": value for name, value in knobs.items()}
        record |= self._expert_loads(metrics.pop("counts_LE"))
        record |= {name: float(value) for name, value in metrics.items()}
        record |= {"train/tokens": float(self.plan.tokens_before(done))}
        record |= checked
        record |= self.throughput.lap() | {"mem/peak_gib": peak_memory_gib()}
        if evaluated and self.evaluate is not None:
            if not self._evaluated:
                self.display.note("compiling the evaluation …")
            self._evaluated = True
            with self.throughput.paused():
                record |= self.evaluate(self.state)
        return record

    def _checked(self, step: int, batch: dict[str, jax.Array], knobs: Mapping) -> dict[str, float]:
        """The comparison with the plain path, on the weights before the step; {} if none is due."""
        every = self.trainer.train.check_every
        if self.check is None or not every or (step + 1) % every:
            return {}
        inputs = self.state["params"], self.state["router_bias"], batch, knobs["mtp_weight"]
        with self.throughput.paused():
            return self.check(*inputs, lambda line: self.display.note(f"step {step}: {line}"))

    def save(self, record: Mapping[str, float]) -> bool:
        """Checkpoint the state; a held-out loss in `record` was measured on it."""
        measured = {name: value for name, value in record.items() if name.startswith("eval/")}
        mesh, step = mesh_shape(self.trainer.layout), int(self.state["step"])
        past = self.plan.history(step)
        return self.checkpoints.save(step, self.state, self.config, mesh, measured, past)

    def _expert_loads(self, counts_LE: np.ndarray) -> dict[str, float]:
        """Busiest expert over the mean, by layer; dense layers come first in the numbering."""
        first = self.trainer.model.num_dense_layers
        return {
            f"moe/load_max_over_mean/layer_{first + i:02d}": float(row.max() / max(row.mean(), 1.0))
            for i, row in enumerate(counts_LE)
        }


class Pictures:
    """Pictures of a run, drawn again after evaluations by process 0, for 2% of the time at most:
    they read all records."""

    def __init__(self, run_dir: Path, draw: Callable[[Path], object] = plot_run):
        self._run_dir, self._draw, self._next = run_dir, draw, 0.0

    def draw(self, last: bool = False) -> None:
        """Draw if there is time for it; always for the last time."""
        begin = time.monotonic()
        if jax.process_index() or not (last or begin >= self._next):
            return
        self._draw(self._run_dir)
        now = time.monotonic()
        self._next = now + 50 * (now - begin)


def check_skipped(loop: Any, step: int, in_row: int, advice: str) -> None:
    """Say that updates were skipped; FloatingPointError when they are too many in a row.

    `loop` is whatever trains: it has `trainer`, `display`, `checkpoints` and `run_dir`.
    """
    limit = loop.trainer.train.max_skipped_in_row
    if in_row:
        loop.display.note(
            f"step {step}: loss or gradient is not finite; update skipped ({in_row} in a row)"
        )
    if limit and in_row >= limit:
        loop.checkpoints.wait()
        good = loop.checkpoints.steps()
        last = f"step {good[-1]} in {loop.run_dir}/checkpoints" if good else "none"
        raise FloatingPointError(
            f"{in_row} updates in a row were not finite, the last at step {step}; last good "
            f"checkpoint: {last}. Lower the learning rate {advice}"
        )


def anyone(flag: bool) -> bool:
    """True if any process of the run says so; all of them ask."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())
