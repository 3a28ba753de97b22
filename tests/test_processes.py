"""Several processes of train.py on one machine: the same run as one, and an end when one is lost.

A driver (DRIVER) stands in for `python train.py`: it runs it unchanged, notes the rows that the
loader reads, and lets one process do something at the start of a given step.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore

import runtime.processes
from tests.test_train import SMALL
from training.metrics import read_metrics

HERE = Path(__file__).resolve().parent.parent
STEPS, BATCH, SAVED, LOST_AT = 6, 8, 3, 4
ENDS_WITHIN_S = 30
"""Seconds in which the other processes must have ended; usually it takes 1 to 6."""

DRIVER = """
import json, os, signal, sys, time
import train

victim, step, action, run_dir = *sys.argv[1:4], sys.argv[4]
index = sys.argv[sys.argv.index("--process-id") + 1] if "--process-id" in sys.argv else "0"
PRELUDE
import training.run
original = training.run.train_on

def act():
    saved = os.path.join(run_dir, "checkpoints", "step_00000003")
    while step == "4" and not os.path.exists(saved):  # written in the background
        time.sleep(0.05)
    if action == "raise":
        raise ValueError("row 7 of this host is bad")
    os.kill(os.getpid(), getattr(signal, action))

def cannot(*args, **kwargs):
    raise OSError(5, "this host's disk does not answer")

if index == victim and action in ("no save", "no restore"):
    import orbax.checkpoint as ocp
    if action == "no save":
        ocp.CheckpointManager.save = cannot
    else:
        ocp.PyTreeCheckpointHandler.restore = cannot

def train_on(loop, make_loader):
    import data.loader, training.loop
    row, knobs_at, rows = data.loader.Loader._row, training.loop.knobs_at, []

    def noted_row(self, index):
        rows.append(index)
        return row(self, index)

    def noted_knobs_at(config, plan, at):
        if index == victim and at == int(step):
            act()
        return knobs_at(config, plan, at)

    data.loader.Loader._row, training.loop.knobs_at = noted_row, noted_knobs_at
    result = original(loop, make_loader)
    with open(os.path.join(run_dir, f"rows.{index}"), "w") as file:
        json.dump(sorted(rows), file)
    return result

training.run.train_on = train_on
sys.exit(train.main(sys.argv[5:]))
"""


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """A model of a few thousand weights, without MTP; data and programs are prepared once for all
    runs."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "corpus").mkdir()
    for i in range(40):
        lines = (f"def function_{i}_{j}(x):\n    return x + {j}\n" for j in range(20))
        (folder / "corpus" / f"{i:02}.py").write_text("\n".join(lines))
    small = [word for word in SMALL if word not in ("--layout", "cube")]
    return [
        *small, "--train.eval-every", "0", "--data.held-out", "0", "--checkpoint.every", str(SAVED),
        "--model.mtp-depth", "0",
        "--data.sources.0.path", str(folder / "corpus"), "--data.cache-dir", str(folder / "cache"),
        "--compilation-cache", str(folder / "xla"),
    ]  # fmt: skip


@dataclasses.dataclass
class Ended:
    """What is left of a run: exit status, standard error and end of every process."""

    folder: Path
    status: list[int]
    errors: list[str]
    seconds: list[float]
    """From the end of the first process to that of each."""

    def rows(self, index: int) -> list[int]:
        return json.loads((self.folder / f"rows.{index}").read_text())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def started(commands: list[list[str]], folder: Path):
    """Processes, which do not outlive the block; their standard errors go to files."""
    flags = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")
    env = {**os.environ, "XLA_FLAGS": " ".join(flags)}
    running = []
    try:
        for i, command in enumerate(commands):
            with open(folder.with_name(f"{folder.name}.err{i}"), "w") as err:
                running.append(
                    subprocess.Popen(
                        command, cwd=HERE, env=env, stdout=subprocess.DEVNULL, stderr=err,
                        start_new_session=True,
                    )
                )  # fmt: skip
        yield running
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def train(
    options: list[str], folder: Path, processes: int, *more: str,
    devices: int = 4, action: tuple[int, int, str] = (-1, -1, ""), own: tuple[str, ...] = (),
    prelude: str = "",
) -> Ended:  # fmt: skip
    """Run to the end of all processes. `own`: further options of the last one only.

    action: (process, step, what it does before this step). prelude: code that every one runs first.
    """
    coordinator = f"localhost:{free_port()}"
    commands = []
    for i in range(processes):
        command = [
            sys.executable,
            "-c",
            DRIVER.replace("PRELUDE", prelude),
            *map(str, action),
            str(folder),
            *options,
            *more,
        ]
        command += ["--emulate", str(devices // processes), "--run-dir", str(folder)]
        if processes > 1:
            command += ["--coordinator", coordinator, "--num-processes", str(processes)]
            command += ["--process-id", str(i)]
        commands.append(command + (list(own) if i == processes - 1 else []))
    ends: dict[int, float] = {}
    with started(commands, folder) as running:
        deadline = time.monotonic() + 300
        while len(ends) < processes and time.monotonic() < deadline:
            for i, process in enumerate(running):
                if i not in ends and process.poll() is not None:
                    ends[i] = time.monotonic()
            if action[2] == "SIGSTOP" and len(ends) == processes - 1:
                ends[action[0]] = time.monotonic()
                running[action[0]].kill()
            time.sleep(0.05)
    errors = [folder.with_name(f"{folder.name}.err{i}").read_text() for i in range(processes)]
    status = [process.returncode for process in running]
    assert len(ends) == processes, errors
    first = min(ends.values())
    return Ended(folder, status, errors, [ends[i] - first for i in range(processes)])


SHARDED = ("--mesh.fsdp", "2", "--mesh.expert", "2")


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    """A complete run of so many processes with one or four of the four devices; run once."""

    @functools.cache
    def complete(processes: int) -> Ended:
        folder = tmp_path_factory.mktemp("complete") / "run"
        ended = train(options, folder, processes, *SHARDED)
        assert ended.status == [0] * processes, ended.errors
        return ended

    return complete


def numbers(folder: Path) -> dict[int, dict[str, float]]:
    """What a run measured, by step; not how long it took, nor where it ran."""
    return {
        record["step"]: {k: v for k, v in record.items() if k.split("/")[0] in ("train", "moe")}
        for record in read_metrics(folder)
    }


def state(folder: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    """Arrays of a checkpoint."""
    path = folder / "checkpoints" / f"step_{step:08d}" / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(path, restore_args=how)


def assert_same(folder: Path, expected_folder: Path):
    """Losses, gradient norms and expert loads of every step, and the last checkpoint."""
    expected, found = numbers(expected_folder), numbers(folder)
    assert list(found) == list(expected) == list(range(STEPS))
    for step in range(STEPS):
        assert found[step] == pytest.approx(expected[step], rel=1e-5)
    arrays, others = state(expected_folder), state(folder)
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        # Sums in another order differ in their last bits. AdamW makes more of that where gradients
        # are next to nothing; moments in bf16 may round the other way, to a neighbour 2^-7 away.
        one, other = (np.asarray(x, np.float64) for x in (array, others[name]))
        unit = 2.0**-7 if array.dtype == jax.numpy.bfloat16 else 1e-3
        limit = unit * np.abs(one).max()
        np.testing.assert_allclose(other, one, rtol=0, atol=limit, err_msg=name)


# ---- The same run --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("processes", [4])
def test_processes_train_to_the_same_numbers_as_one(run, processes):
    assert_same(run(processes).folder, run(1).folder)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_each_process_reads_its_rows_and_no_others(run, processes):
    """Of each batch, the rows of its own devices, each once; together they are the batch."""
    share = BATCH // processes
    for i in range(processes):
        mine = [BATCH * step + share * i + row for step in range(STEPS) for row in range(share)]
        assert run(processes).rows(i) == mine


def written(folder: Path, part: str = "") -> dict[str, int]:
    """Chunks of arrays that a checkpoint, or one process's part of it, holds: name and bytes."""
    path = folder / "checkpoints" / f"step_{STEPS:08d}" / "state" / part
    base = {"driver": "file", "path": f"{path}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = [key for key in store.list().result() if not key.endswith(b".zarray")]
    return {key.decode(): len(store.read(key).result().value) for key in keys}


@pytest.mark.slow
def test_each_process_writes_its_shards_and_no_others(run):
    """Every chunk is written once, and by the process whose devices hold it.

    Devices 0 to 3 belong to process 0 of one, and to processes 0 to 3 of four.
    """
    parts = {n: [written(run(n).folder, f"ocdbt.process_{i}") for i in range(n)] for n in (1, 4)}
    for n, of_process in parts.items():
        times = collections.Counter(key for part in of_process for key in part)
        assert set(times.values()) == {1}
        assert times.keys() == written(run(n).folder).keys()
        whole = sum(sum(part.values()) for part in of_process)
        for part in of_process:
            assert sum(part.values()) == pytest.approx(whole / n, rel=0.1)
    assert any(key.startswith("params/moe_layers") for key in parts[4][1])
    assert parts[1][0].keys() == {key for part in parts[4] for key in part}


@pytest.mark.slow
def test_an_axis_inside_the_batch_spans_processes(options, run, tmp_path):
    """Both processes then hold, and read, the same rows."""
    two = train(options, tmp_path / "two", 2, "--mesh.tensor", "2", devices=2)
    assert two.status == [0, 0], two.errors
    assert two.rows(0) == two.rows(1) == list(range(STEPS * BATCH))
    assert_same(two.folder, run(1).folder)


# ---- Stopped and lost ----------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_with_a_checkpoint(options, tmp_path):
    ended = train(options, tmp_path / "run", 2, *SHARDED, action=(1, 1, "SIGTERM"))
    assert ended.status == [0, 0], ended.errors
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000002"]


@pytest.fixture(scope="module")
def broken(options, tmp_path_factory) -> Ended:
    """Process 1 of 2 was killed one step after the checkpoint."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    return train(options, folder, 2, *SHARDED, action=(1, LOST_AT, "SIGKILL"))


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_a_message(broken):
    assert broken.status == [runtime.processes.LOST, -signal.SIGKILL]
    assert broken.seconds[0] < ENDS_WITHIN_S
    said = broken.errors[0]
    assert "train.py: process 1 of 2 was lost" in said
    assert f"last checkpoint is step {SAVED} in {broken.folder}/checkpoints; run again" in said
    assert f"resume from step {SAVED}" in said


@pytest.mark.slow
def test_it_resumes_with_another_number_of_processes(options, run, broken, tmp_path):
    """And goes on to the numbers of a run that was never interrupted."""
    folder = tmp_path / "run"
    shutil.copytree(broken.folder, folder)
    ended = train(options, folder, 1, *SHARDED)
    assert ended.status == [0], ended.errors
    assert ended.rows(0)[0] == SAVED * BATCH
    assert_same(folder, run(1).folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "says"),
    [
        ((0, 1, "SIGKILL"), "process 0 of 2 was lost"),  # the one that coordinates
        ((1, 1, "SIGSTOP"), "process 1 of 2 was lost"),  # hangs, as a dead host with NCCL would
        ((0, 1, "raise"), "process 0 of 2 failed: row 7 of this host is bad"),
    ],
)
def test_whatever_ends_one_process_ends_the_other(options, tmp_path, action, says):
    lost_after = ("--lost-after", "6")
    ended = train(options, tmp_path / "run", 2, *SHARDED, *lost_after, action=action)
    victim, other = action[0], 1 - action[0]
    assert ended.status[other] == runtime.processes.LOST, ended.errors
    assert abs(ended.seconds[other] - ended.seconds[victim]) < ENDS_WITHIN_S
    assert f"train.py: {says}" in ended.errors[other]
    assert "there is no checkpoint in" in ended.errors[other]
    if action[2] == "raise":
        assert ended.status[victim] == 2
        assert "train.py: row 7 of this host is bad" in ended.errors[victim]


@pytest.mark.slow
def test_data_missing_on_one_host_ends_all(options, tmp_path):
    """While the others wait for a device, not for data."""
    prelude = (
        "import data.prepare, data.sources, dataclasses\n"
        "def find_source(config, *more):\n"
        "    place = '/nowhere/at/all' if index == '1' else config.path\n"
        "    return data.sources.find_source(dataclasses.replace(config, path=place), *more)\n"
        "data.prepare.find_source = find_source"
    )
    ended = train(options, tmp_path / "run", 2, *SHARDED, prelude=prelude)
    assert ended.status == [runtime.processes.LOST, 2], ended.errors
    assert "/nowhere/at/all" in ended.errors[1]
    assert "process 1 of 2 failed" in ended.errors[0]


@pytest.mark.slow
def test_what_all_refuse_is_said_by_all(options, tmp_path):
    """Status 2 everywhere, as in one process."""
    ended = train(options, tmp_path / "run", 2, "--mesh.fsdp", "3")
    assert ended.status == [2, 2], ended.errors
    assert all("fsdp=3" in error for error in ended.errors)


# ---- Started apart -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "says"),
    [
        (("--train.learning-rate.0.value", "1"), "--train.learning-rate.0.value: "),
        (("--seed", "1"), "--seed: 0 in process 0, 1 in process 1"),
        (("--print-config",), "--print-config: False in process 0, True in process 1"),
        (("--emulate", "1"), "process 1 has 1, the others 2"),
    ],
)
def test_processes_started_apart_are_refused_by_all(options, tmp_path, own, says):
    ended = train(options, tmp_path / "run", 2, *SHARDED, own=own)
    assert ended.status == [2, 2], ended.errors
    assert all(says in error for error in ended.errors)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_folder_that_is_not_shared_is_refused_by_all(options, tmp_path):
    ended = train(options, tmp_path / "run", 2, *SHARDED, own=("--run-dir", str(tmp_path / "own")))
    assert ended.status == [2, 2], ended.errors
    for error in ended.errors:
        assert f"what process 0 writes to {tmp_path}/run on" in error
        assert f"process 1 ({tmp_path}/own on" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_find_other_data_under_one_name(options, tmp_path):
    """Each in a working folder of its own, with a corpus of another size."""
    place = options.index("--data.sources.0.path") + 1
    other = tmp_path / "corpus"
    shutil.copytree(options[place], other)
    (other / "00.py").write_text("x = 1\n" * 30)
    moving = (
        "import os, shutil\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        f"own = {str(tmp_path)!r} + '/' + str(os.getpid())\n"
        "os.mkdir(own)\n"
        f"shutil.copytree({options[place]!r} if index == '0' else {str(other)!r}, own + '/text')\n"
        "os.chdir(own)\n"
        "import train"
    )
    here = [*options[:place], "text", *options[place + 1 :]]
    here += ["--data.cache-dir", str(tmp_path / "cache")]
    ended = train(here, tmp_path / "run", 2, *SHARDED, prelude=moving)
    assert ended.status == [2, 2], ended.errors
    assert all("the processes of this run differ in their data" in e for e in ended.errors)


# ---- What one process alone cannot do ------------------------------------------------------------


@pytest.mark.slow
def test_a_save_that_fails_in_one_process_ends_all(options, tmp_path):
    ended = train(options, tmp_path / "run", 2, *SHARDED, action=(1, -1, "no save"))
    assert ended.status == [runtime.processes.LOST, 2], ended.errors
    assert ended.seconds[0] < ENDS_WITHIN_S
    assert "this host's disk does not answer" in ended.errors[0]
    assert "there is no checkpoint in" in ended.errors[1].splitlines()[-1]


@pytest.mark.slow
def test_a_restore_that_fails_in_one_process_is_no_restore_for_any(options, broken, tmp_path):
    """They agree that nothing can be restored, and none waits for the other."""
    folder = tmp_path / "run"
    shutil.copytree(broken.folder, folder)
    ended = train(options, folder, 2, *SHARDED, action=(1, -1, "no restore"))
    assert ended.status == [2, 2], ended.errors
    assert max(ended.seconds) < ENDS_WITHIN_S
    assert "another process could not read it" in ended.errors[0]
    assert "this host's disk does not answer" in ended.errors[1]
