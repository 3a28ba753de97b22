"""A run in its folder: opened or resumed, trained to its end or to a signal, and reported.

Every stage goes through here: pre-training, sft, distill and rl. A stage says what it trains and
what it leaves in the folder; when a run is complete, resumes or was stopped is said here alone.
"""

import contextlib
import dataclasses
import json
import socket
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from checkpoint.config import CheckpointConfig
from checkpoint.folder import (
    checkpoint_bytes,
    find_steps,
    how_to_resume,
    no_room,
    read_meta,
    unreadable_reason,
)
from checkpoint.manager import CheckpointManager
from checkpoint.weights import load_initial, open_initial
from model.config import ModelConfig
from model.costs import train_flops_per_token
from model.kernels import Requested
from runtime.lock import hold, holds
from runtime.processes import exchange
from sharding.devices import device_kind, num_devices
from sharding.partition import local_rows
from training.check import Check
from training.config import TrainConfig
from training.display import Display
from training.loop import Checkpoints, Loop
from training.resume import ANOTHER_ORDER, check_changes
from training.schedule import BatchPlan, Plateau, check_schedules, past_batches
from training.step import State, Trainer
from training.throughput import Throughput

LOCK = ".lock"
"""File of a run folder that says which process is at work in it; gone when none is."""
SEEN_WITHIN_S = 10.0
"""Time in which a file that one process wrote must be there for all."""

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
    """Interface that the loops of all stages share."""

    state: State
    first_step: int
    checkpoints: Checkpoints

    @property
    def complete(self) -> bool: ...


# ---- Folder --------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_folder(run: Run, trainer: Trainer, say: Say) -> Generator[None]:
    """The run's folder, for this run alone until the block ends; made when missing.

    Every process of the run calls it. Raises ValueError, before anything is prepared, if the folder
    cannot be written, is in use by another run, is not one folder for all processes, or if its disk
    has no room for a checkpoint.
    """
    folder = Path(run.run_dir)
    lock = folder / LOCK
    if jax.process_index() > 0:
        token = exchange("holder of the run folder", "")[0]
        _check_shared(folder, _comes(lambda: holds(lock, token)))
        yield
        return
    try:
        _check_writable(folder)
        with hold(lock, f"--run-dir {folder}", say) as token:
            exchange("holder of the run folder", token)
            _check_shared(folder, True)
            _check_room(run, trainer, say)
            yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing came of the run


def _check_writable(folder: Path) -> None:
    """Make the folder; ValueError for what cannot be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (".", "checkpoints", "tensorboard"):
            if (folder / name).exists():
                tempfile.TemporaryFile(dir=folder / name).close()
        for name in ("config.json", "tokenizer.json", "metrics.jsonl"):
            if (folder / name).exists():
                (folder / name).open("a").close()
    except OSError as error:
        raise ValueError(
            f"--run-dir {folder} cannot be written ({error.strerror}: {error.filename}); give "
            "another folder"
        ) from None


def _comes(condition: Callable[[], bool]) -> bool:
    """Whether something becomes true within SEEN_WITHIN_S, as files on a shared disk may late."""
    end = time.monotonic() + SEEN_WITHIN_S
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.2)
    return found


def _check_shared(folder: Path, seen: bool) -> None:
    """Raise ValueError, on every process, unless all of them see what process 0 wrote."""
    place = f"{folder.absolute()} on {socket.gethostname()}"
    places = exchange("run folder", json.dumps([place, seen]))
    said = [(i, *json.loads(text)) for i, text in enumerate(places)]
    if apart := [f"process {i} ({place})" for i, place, seen in said if not seen]:
        more = f" and {len(apart) - 8} more" if len(apart) > 8 else ""
        raise ValueError(
            f"--run-dir is not one folder: what process 0 writes to {said[0][1]} is not seen by "
            f"{', '.join(apart[:8])}{more}. Give all processes the same folder on a shared disk"
        )


def _check_room(run: Run, trainer: Trainer, say: Say) -> None:
    """Raise ValueError if the disk has no room for one checkpoint; say if it has for too few."""
    folder, done = Path(run.run_dir), find_steps(Path(run.run_dir) / "checkpoints")
    left = run.train.steps - (done[-1][0] if done else 0)
    size = checkpoint_bytes(trainer.abstract_state)
    if left < 1:
        return
    if reason := no_room(folder, size):
        raise ValueError(f"a checkpoint's {reason}; make room, or give another --run-dir")
    config = run.checkpoint
    saves = 1 + (left - 1) // config.every if config.every else 1
    most = min(saves, config.keep + config.keep_best + 1 - len(done))
    if reason := no_room(folder, most * size):
        say(
            f"warning: {most} more checkpoints will lie there at a time, and their {reason}; make "
            "room, or lower --checkpoint.keep and --checkpoint.keep-best"
        )


# ---- Open ----------------------------------------------------------------------------------------


def newest_meta(run: Run) -> dict[str, Any] | None:
    """What the newest checkpoint of the run's folder says of itself; None for a new run."""
    for _, path in reversed(find_steps(Path(run.run_dir) / "checkpoints")):
        if unreadable_reason(path) is None:
            return read_meta(path)
    return None


def past_of(meta: Mapping[str, Any] | None) -> list[Plateau]:
    """Batch sizes so far, of a checkpoint; of an old one those that its configuration says."""
    if meta is None:
        return []
    if "batches" in meta:
        return [Plateau(*plateau) for plateau in meta["batches"]]
    trained = meta["config"].get("train")
    return past_batches(trained, meta["step"]) if trained else []


def plan_of(run: Run) -> BatchPlan:
    """Batches of the run, from its newest checkpoint on where there is one."""
    meta = newest_meta(run)
    return BatchPlan(run.train, past_of(meta), meta["step"] if meta else 0)


def check_resumed(run: Run, say: Say) -> None:
    """Say what has changed since the newest checkpoint; ValueError if that would rewrite the
    past (training/resume.py)."""
    meta = newest_meta(run)
    if meta is None or not meta["config"].get("train"):
        return
    today = dataclasses.asdict(run)  # pyright: ignore[reportArgumentType]
    for line in check_changes(meta["config"], today, meta["step"], run.run_dir):
        say(line)
    past = past_of(meta)
    then, now = (plan.at(meta["step"]) for plan in (plan_of(run), BatchPlan(run.train)))
    length = run.train.seq_len
    if (then.first_sequence, then.tokens_before) != (now.first_sequence, now.tokens_before):
        of = f" of {length} tokens" if past and past[-1].seq_len != length else ""
        say(f"  goes on from {then.tokens_before:,} tokens and {then.first_sequence:,} rows{of}")


def check_stores(run: Run, stores: Mapping[str, str], say: Say) -> None:
    """Say of which sources the text has changed since the run's folder was written; `stores` has
    what stands for the text of each."""
    file = Path(run.run_dir) / "config.json"
    try:
        recorded = json.loads(file.read_text()).get("stores", {}) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); delete it, it is written anew") from None
    changed = [name for name in stores if recorded.get(name, stores[name]) != stores[name]]
    if changed and newest_meta(run):
        say(f"changed since this run began: the text of {', '.join(changed)}")
        say(f"  {ANOTHER_ORDER}")


def check_initial_weights(run: Run, init_from: str) -> None:
    """Raise what `open_state` would, but before data is prepared."""
    if init_from and not find_steps(Path(run.run_dir) / "checkpoints"):
        open_initial(Path(init_from), run.model)


def open_state(
    run: Run, trainer: Trainer, session: Session
) -> tuple[CheckpointManager, State, BatchPlan]:
    """The run's checkpoints; its state, of the newest good one or new; and its batches from there.

    ValueError if the schedules do not fit to what the run has behind it.
    """
    checkpoints = CheckpointManager(Path(run.run_dir) / "checkpoints", run.checkpoint)
    state = checkpoints.restore(trainer.abstract_state)
    if state is None:
        return checkpoints, initial_state(run, trainer, session), BatchPlan(run.train)
    step = int(state["step"])
    plan = BatchPlan(run.train, past_of(checkpoints.meta(step)), step)
    check_schedules(run.train, plan)
    return checkpoints, state, plan


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


def write_settings(
    run: Run, tokenizer: Mapping[str, str], stores: Mapping[str, str] | None = None
) -> None:
    """Write config.json of the run, and the files of its tokenizer (name -> text); process 0 alone.

    stores: what stands for the text of each source, which `check_stores` compares.
    """
    if jax.process_index() > 0:
        return
    folder = Path(run.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(run)  # pyright: ignore[reportArgumentType]
    if stores:
        settings["stores"] = dict(stores)
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    for name, text in tokenizer.items():
        (folder / name).write_text(text, "utf-8")


# ---- Train ---------------------------------------------------------------------------------------


def make_check(trainer: Trainer) -> Check | None:
    """The check that `train.check_every` asks for.

    Raises:
        ValueError: another loss than pre-training's, or a pipeline.
    """
    if not trainer.train.check_every:
        return None
    if type(trainer) is not Trainer:
        raise ValueError(
            f"train.check_every={trainer.train.check_every} compares the loss of pre-training; "
            "this stage has another. Set it to 0"
        )
    return Check(trainer.model, trainer.train, trainer.recipe, trainer.layout)


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
    checkpoints, state, plan = open_state(run, trainer, session)
    flops = train_flops_per_token(run.model, run.train.seq_len)
    return Loop(
        trainer=trainer,
        plan=plan,
        state=state,
        run_dir=Path(run.run_dir),
        config=dataclasses.asdict(run),  # pyright: ignore[reportArgumentType]
        checkpoints=checkpoints,
        save_every=run.checkpoint.every,
        evaluate=evaluate,
        throughput=Throughput(flops, num_devices(trainer.layout), device_kind(trainer.layout)),
        display=Display(run.train.steps),
        read_first=read_first,
        check=make_check(trainer),
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
    done = f"{loop.first_step} of {run.train.steps} steps are done"
    if loop.complete:
        say(f"the run is complete: {done}")
    elif loop.first_step >= run.train.steps:
        say(f"{done}; the evaluation after them is missing and comes now")
    elif loop.first_step:
        say(f"resuming at step {loop.first_step} of {run.train.steps}")
    try:
        stopped = "" if loop.complete else train()
        loop.checkpoints.wait()
        step = int(loop.state["step"])
        if step not in loop.checkpoints.steps():
            raise OSError(f"step {step} is reached, but could not be saved; see above")
    except OSError as error:  # a full disk, as a rule
        last = how_to_resume(Path(run.run_dir) / "checkpoints")
        raise OSError(f"{error}\n{last}") from error
    if stopped:
        say(f"{stopped}: stopped and saved at step {step} in {run.run_dir}; run again to go on")
    else:
        finish()
    return 0
