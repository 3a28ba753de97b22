"""A run in its folder: opened or resumed, trained to its end or to a signal, and reported.

Every stage goes through here: pre-training, sft, distill and rl. A stage says what it trains and
what it leaves in the folder; when a run is complete, resumes or was stopped is said here alone.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from checkpoint.config import CheckpointConfig
from checkpoint.folder import find_steps
from checkpoint.manager import CheckpointManager
from checkpoint.weights import load_initial, open_initial
from model.config import ModelConfig
from model.costs import train_flops_per_token
from model.kernels import Requested
from sharding.devices import device_kind, num_devices
from sharding.partition import local_rows
from training.config import TrainConfig
from training.display import Display
from training.loop import Checkpoints, Loop
from training.schedule import BatchPlan
from training.step import State, Trainer
from training.throughput import Throughput

Say = Callable[[str], None]
"""Takes a line for people."""


class Run(Protocol):
    """What this file reads of a run's configuration, a frozen dataclass (configs/schema.py)."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def kernels(self) -> Requested: ...
    @property
    def seed(self) -> int: ...
    @property
    def run_dir(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Session:
    """What the command line decides beside the configuration: how this process takes part."""

    say: Say
    started: float
    """When the process started, by time.monotonic."""
    init_from: str = ""
    """Folder that a new run takes its weights from; '' for random ones."""
    profile: range = range(0)
    """Steps to trace, counted from the first that runs."""


class Loader(Protocol):
    """Batches of rows (data/loader.py, rl/examples/packing.py)."""

    def batches(
        self, span: Callable[[int], tuple[int, int]], start: int, stop: int
    ) -> Iterator[Mapping[str, np.ndarray]]: ...


class AnyLoop(Protocol):
    """What is common to the loops of all stages."""

    state: State
    first_step: int
    checkpoints: Checkpoints

    @property
    def complete(self) -> bool: ...


# ---- Open ----------------------------------------------------------------------------------------


def check_initial_weights(run: Run, init_from: str) -> None:
    """Raise what `open_state` would, but before data is prepared."""
    if init_from and not find_steps(Path(run.run_dir) / "checkpoints"):
        open_initial(Path(init_from), run.model)


def open_state(run: Run, trainer: Trainer, session: Session) -> tuple[CheckpointManager, State]:
    """The run's checkpoints, and its state: of the newest good one, or a new one."""
    checkpoints = CheckpointManager(Path(run.run_dir) / "checkpoints", run.checkpoint)
    state = checkpoints.restore(trainer.abstract_state)
    if state is None:
        state = initial_state(run, trainer, session)
    return checkpoints, state


def initial_state(run: Run, trainer: Trainer, session: Session) -> State:
    """Random weights, or those of `session.init_from`, with fresh optimizer state."""
    session.say("compiling the first weights …")
    state = trainer.init(jax.random.key(run.seed))
    if not session.init_from:
        return state
    for tree in ("params", "router_bias"):  # make room; only MTP modules may be missing elsewhere
        state[tree] = {name: x for name, x in state[tree].items() if name == "mtp"}
    averaged = state.pop("ema", None) is not None
    loaded, note = load_initial(Path(session.init_from), run.model, trainer.abstract_state)
    session.say(note)
    for tree in ("params", "router_bias"):
        state[tree] |= loaded[tree]
    if averaged:
        state["ema"] = jax.tree.map(lambda x: x.copy(), state["params"])
    return state


def write_settings(run: Run, tokenizer: str) -> None:
    """Write config.json and tokenizer.json (`tokenizer`, as JSON) of the run; process 0 alone."""
    if jax.process_index() > 0:
        return
    folder = Path(run.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(run), indent=1))  # pyright: ignore[reportArgumentType]
    (folder / "tokenizer.json").write_text(tokenizer)


# ---- Train ---------------------------------------------------------------------------------------


def open_loop(
    run: Run,
    trainer: Trainer,
    session: Session,
    evaluate: Callable[[State], dict[str, float]] | None,
    read_first: Callable[[dict[str, jax.Array]], dict[str, jax.Array]] = lambda batch: batch,
) -> Loop:
    """The loop over batches of rows, from the newest checkpoint or a new state.

    Args:
      evaluate: held-out metrics of a state, or None.
      read_first: adds to a placed batch what the step needs in addition.
    """
    checkpoints, state = open_state(run, trainer, session)
    flops = train_flops_per_token(run.model, run.train.seq_len)
    return Loop(
        trainer=trainer,
        plan=BatchPlan(run.train),
        state=state,
        run_dir=Path(run.run_dir),
        config=dataclasses.asdict(run),  # pyright: ignore[reportArgumentType]
        checkpoints=checkpoints,
        save_every=run.checkpoint.every,
        evaluate=evaluate,
        throughput=Throughput(flops, num_devices(trainer.layout), device_kind(trainer.layout)),
        display=Display(run.train.steps),
        read_first=read_first,
        profile=session.profile,
        started=session.started,
    )


def train_on(loop: Loop, make_loader: Callable[[int, range], Loader]) -> str:
    """Train on the loader's batches; the name of the signal that ended it early, or ''.

    make_loader: from sequences per micro batch, and those of them that this process holds.
    """
    plan = loop.plan
    rows = local_rows(loop.trainer.layout, plan.micro_batch_size)

    def span(step: int) -> tuple[int, int]:
        batch = plan.at(step)
        return batch.first_sequence, batch.batch_size

    loader = make_loader(plan.micro_batch_size, rows)
    return loop.run(loader.batches(span, loop.first_step, loop.trainer.train.steps), rows)


def to_end(
    loop: AnyLoop, run: Run, say: Say, train: Callable[[], str], finish: Callable[[], None]
) -> int:
    """Train what is left to train, then `finish`; 0, the status that a process exits with.

    Args:
      train: trains; the name of the signal that ended it early, or ''.
      finish: says and writes what came of the whole run.
    """
    stopped, done = "", f"{loop.first_step} of {run.train.steps} steps are done"
    if loop.complete:
        say(f"the run is complete: {done}")
    else:
        if loop.first_step >= run.train.steps:
            say(f"{done}; the evaluation after them is missing and comes now")
        elif loop.first_step:
            say(f"resuming at step {loop.first_step} of {run.train.steps}")
        stopped = train()
    loop.checkpoints.wait()
    if stopped:
        step = int(loop.state["step"])
        say(f"{stopped}: stopped and saved at step {step} in {run.run_dir}; run again to go on")
    else:
        finish()
    return 0
