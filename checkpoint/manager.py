"""Checkpoints of a run: written in the background, restored onto any mesh.

    <folder>/step_00000200/state   arrays, one entry per leaf, named by its path in the state
                           meta    JSON: step, config, mesh, metrics, checksum of every array

Orbax does the storing: it copies arrays to the host, writes them while training goes on, and a
folder gets its name only when everything in it is on disk. This file decides what is kept, what
counts as good, and what people are told.
"""

import logging
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from checkpoint.checksum import checksums
from checkpoint.config import CheckpointConfig
from checkpoint.folder import (
    FORMAT,
    checkpoint_bytes,
    find_steps,
    no_room,
    read_meta,
    unfinished,
    unreadable_reason,
)
from checkpoint.retention import KeepNewestAndBest


def _is_news(record: logging.LogRecord) -> bool:
    """False for what Orbax says on every opening for reading, and for its tracebacks of a save that
    failed, of which one line is said here."""
    message = record.getMessage()
    told = record.exc_info and ("orbax" in record.pathname or "orbax" in message)
    return not (told or re.search("read.only", message, re.IGNORECASE))


def _unraisable(report: "sys.UnraisableHookArgs", before: Any = sys.unraisablehook) -> None:
    """Writes under way when a save failed find their event loop closed: no news either."""
    if str(report.exc_value) != "Event loop is closed":
        before(report)


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_is_news)
sys.unraisablehook = _unraisable

ELSEWHERE = "another process could not read it"


class CheckpointManager:
    """Saves and restores the training state of one run. Every process of the run calls it alike.

    Args:
      folder: where checkpoints live; made when missing.
      config: retention and mode.
      read_only: never write, rename or clean up (generation, conversion).
    Errors: OSError when the folder cannot be made,
      because a run that could never save should not start.
    """

    def __init__(
        self, folder: str | os.PathLike[str], config: CheckpointConfig, read_only: bool = False
    ):
        self._folder = Path(folder).absolute()
        self._read_only = read_only
        self._asynchronous = config.asynchronous
        self._saving: int | None = None
        if not read_only:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove(unfinished(self._folder), "left by a save that did not finish; removed")
        self._retention = KeepNewestAndBest(config.keep, config.keep_best)
        for step, path in find_steps(self._folder):
            if unreadable_reason(path) is None:
                self._retention.note(step, _held_out_loss(read_meta(path)["metrics"]))
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                step_prefix="step",
                step_format_fixed_length=8,
                create=False,
                read_only=read_only,
                lightweight_initialize=True,  # metrics are in `meta`, read with care above
                enable_async_checkpointing=config.asynchronous,
                # A folder that cannot be made is then an error of `save`, instead of threads that
                # wait for it for minutes and keep the process from ending.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                preservation_policy=self._retention,
            ),
            handler_registry=_handlers(),
        )

    def steps(self) -> list[int]:
        """Steps with a checkpoint that looks whole, oldest first (arrays are not read)."""
        return [s for s, path in find_steps(self._folder) if unreadable_reason(path) is None]

    def meta(self, step: int) -> dict[str, Any]:
        """JSON saved with the arrays of `step`: step, config, mesh, metrics, checksums, batches."""
        return read_meta(self._path(step))

    def save(
        self,
        step: int,
        state: Any,
        config: Mapping[str, Any],
        mesh: Any,
        metrics: Mapping[str, float],
        batches: Any = (),
    ) -> bool:
        """Save `state`; returns when the arrays may be donated, usually before they are on disk.

        Args:
          step: steps done; names the folder.
          state: tree of jax arrays.
          config, mesh: what JSON can hold, for people and for a later check.
          metrics: numbers of this step. `eval/loss`, when there, is what "best" means.
          batches: the run's batch sizes so far (training/schedule.py:Plateau), as JSON can hold.
        Returns:
          False when it failed at once. A failure is a warning, not the end of the run, and leaves
          what was saved before; one that shows later is reported by the next `save` or `wait`. A
          step that is already saved stays as it is (the state is a function of the step): True.
        Errors: OSError in one of several processes that fails, for the others wait for it.
        """
        assert not self._read_only, "a read-only manager cannot save"
        self.wait()
        path = self._path(step)
        there = path.exists()
        if _everywhere(there and self._retention.knows(step) and unreadable_reason(path) is None):
            return True
        if not _everywhere(not there):
            self._set_aside(path)
        arrays = _named_leaves(state)
        meta = {
            "format": FORMAT,
            "step": step,
            "config": dict(config),
            "mesh": mesh,
            "metrics": {name: _to_json(float(value)) for name, value in metrics.items()},
            "checksums": checksums(arrays),
            "batches": batches,
        }
        self._saving = step
        reason = no_room(self._folder, checkpoint_bytes(state))
        if not _everywhere(reason is None):
            self._report_failure(reason or "another process finds the disk full")
            return False
        self._retention.note(step, _held_out_loss(meta["metrics"]))
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave(meta))
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:  # whatever the file system says, training goes on
            self._fail(error)
            return False
        return True if self._asynchronous else self.wait()

    def restore(self, abstract_state: Any, partial: bool = False) -> Any | None:
        """State of the newest good checkpoint, laid out as asked for; None when there is none yet.

        Args:
          abstract_state: tree of `jax.ShapeDtypeStruct` with shardings, on any mesh.
          partial: the tree may be a part of what was saved (the weights without the optimizer).
        A checkpoint that is cut, altered, or not this program's is passed over with a warning that
        names the folder and the reason, in favour of the next older one.
        Errors: ValueError when the newest readable checkpoint has other parameters, shapes or types
          than `abstract_state` (the model changed; an older checkpoint would not help), or when
          the folder holds things but nothing that can be restored.
        """
        self.wait()
        problems = []
        for step in _of_first([step for step, _ in reversed(find_steps(self._folder))]):
            path = self._path(step)
            state, reason = self._try_restore(step, abstract_state, partial)
            if reason is None:
                return state
            self._retention.forget(step)
            problems.append(f"{path}: {reason}")
            warnings.warn(
                f"checkpoint passed over: {problems[-1]}; trying the next older one", stacklevel=2
            )
        problems += [f"{path}: not a checkpoint of this program" for path in self._strangers()]
        if not problems:
            return None
        raise ValueError(
            "no checkpoint can be restored:\n  "
            + "\n  ".join(problems)
            + f"\nStart afresh with another run_dir, or move these out of {self._folder}"
        )

    def wait(self) -> bool:
        """Block until nothing is being written; False (and a warning) when the last save failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._fail(error)
            return False
        self._saving = None
        return True

    def close(self) -> None:
        """Wait for what is being written and end the background threads."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _try_restore(self, step: int, abstract: Any, partial: bool) -> tuple[Any, str | None]:
        """(state, None), or (None, why the checkpoint cannot be read); alike on every process.

        What each does alone (Orbax's handler, unlike its manager, waits for nobody) comes before
        what all decide.
        """
        path, wanted = self._path(step), _named_leaves(abstract)
        saved, noted, restored = {}, {}, {}
        reason = unreadable_reason(path)
        if reason is None:
            try:
                saved = self._manager.item_metadata(step)["state"].tree
                noted = self.meta(step)["checksums"]
            except Exception as error:
                reason = _first_line(error)
        if not _everywhere(reason is None):
            return None, reason or ELSEWHERE
        _check_same(path, saved, wanted, partial)
        args = ocp.args.PyTreeRestore(
            wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        try:
            place: Any = path / "state"
            restored = ocp.PyTreeCheckpointHandler().restore(place, args=args)
        except Exception as error:
            reason = _first_line(error)
        if not _everywhere(reason is None):
            return None, reason or ELSEWHERE
        found = checksums(restored)
        changed = [name for name in found if found[name] != noted[name]]
        if changed:
            return None, f"{changed[0]} and {len(changed) - 1} more changed since they were saved"
        leaves = [restored[name] for name in wanted]  # a dict comes back in another order
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves), None

    def _path(self, step: int) -> Path:
        return self._folder / f"step_{step:08d}"

    def _strangers(self) -> list[Path]:
        """Entries of the folder that are neither checkpoints, nor set aside, nor unfinished."""
        if not self._folder.is_dir():
            return []
        ours = re.compile(r"step_\d{8,}(\.unreadable.*|\.orbax-checkpoint-tmp.*)?")
        return sorted(path for path in self._folder.iterdir() if not ours.fullmatch(path.name))

    def _set_aside(self, path: Path) -> None:
        """Free a name for a new save without losing what somebody may want to look at."""
        if jax.process_index() == 0:
            number = 1
            while (aside := path.with_name(f"{path.name}.unreadable-{number}")).exists():
                number += 1
            path.rename(aside)
            warnings.warn(f"{path} could not be restored; renamed to {aside.name}", stacklevel=3)
        _everywhere(True)
        self._manager.reload()

    def _fail(self, error: Exception) -> None:
        """A save failed here; OSError in one of several processes, since the others wait for it."""
        if jax.process_count() > 1:
            raise OSError(
                f"checkpoint of step {self._saving} was not saved to {self._folder}: "
                f"{_first_line(error)}"
            ) from error
        self._report_failure(_first_line(error))

    def _report_failure(self, reason: str) -> None:
        """Warn, forget the step, and give back the space of the half-written folder."""
        step, self._saving = self._saving, None
        assert step is not None, "a save fails only after it began"
        warnings.warn(
            f"checkpoint of step {step} was not saved to {self._folder}: {reason}; "
            "training goes on, earlier checkpoints are untouched",
            RuntimeWarning,
            stacklevel=4,
        )
        self._retention.forget(step)
        if jax.process_index() == 0:
            for path in unfinished(self._folder):
                _give_back(path)
        self._manager.reload()

    def _remove(self, paths: list[Path], why: str) -> None:
        if jax.process_index() == 0:
            for path in paths:
                warnings.warn(f"{path}: {why}", stacklevel=3)
                shutil.rmtree(path)
        _everywhere(True)


def _give_back(folder: Path) -> None:
    """Delete a folder into which threads of the save that failed may still write for a moment."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _handlers() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    """Storage of each item, told up front so that a fresh process can read the metadata."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    state, meta = ocp.PyTreeCheckpointHandler(), ocp.JsonCheckpointHandler()
    registry.add("state", ocp.args.PyTreeSave, state)
    registry.add("state", ocp.args.PyTreeRestore, state)
    registry.add("meta", ocp.args.JsonSave, meta)
    registry.add("meta", ocp.args.JsonRestore, meta)
    return registry


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Flat {path: leaf}: names people can read, and no container type in the file format."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _check_same(path: Path, saved: Any, wanted: dict[str, Any], partial: bool) -> None:
    """Raise ValueError naming each parameter that is missing, extra, or of other shape or type."""
    show = lambda leaf: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"  # noqa: E731
    lines = [
        f"{name}: expected {show(wanted[name])}, found nothing" for name in wanted.keys() - saved
    ]
    if not partial:
        lines += [
            f"{name}: found {show(saved[name])}, expected nothing" for name in saved.keys() - wanted
        ]
    for name in wanted.keys() & saved:
        if show(wanted[name]) != show(saved[name]):
            lines.append(f"{name}: expected {show(wanted[name])}, found {show(saved[name])}")
    if lines:
        more = [f"... and {len(lines) - 8} more"] if len(lines) > 8 else []
        raise ValueError(
            f"{path} was saved with another model or optimizer than the config describes:\n  "
            + "\n  ".join(sorted(lines)[:8] + more)
            + "\nUse the config it was saved with (in its meta), or another run_dir"
        )


def _to_json(value: float) -> float | str:
    """JSON has no NaN: non-finite numbers become "nan", "inf" and "-inf", as in metrics.jsonl."""
    return value if math.isfinite(value) else str(value)


def _held_out_loss(metrics: Mapping[str, float | str]) -> float | None:
    loss = metrics.get("eval/loss")
    return None if loss is None else float(loss)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    line = lines[0] if len(lines[0]) <= 400 else f"{lines[0][:160]} ... {lines[0][-220:]}"
    return f"{type(error).__name__}: {line}"


def _everywhere(ok: bool) -> bool:
    """True when `ok` on every process of the run; waits for all of them."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def _of_first(numbers: list[int]) -> list[int]:
    """The numbers of process 0, which may see others in the folder; all of them ask."""
    if jax.process_count() == 1:
        return numbers
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    if not count:
        return []
    mine = np.resize(np.array([*numbers, 0], np.int32), count)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).tolist()
