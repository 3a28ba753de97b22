"""Stage rl in several processes: the run of one, with experts replayed across hosts."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.xla_flags import QUICK_XLA
from training.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
OPTIONS = [
    "--config", "r1_zero", "--model.hidden-size", "32", "--model.num-layers", "1",
    "--model.num-heads", "2", "--model.expert-ffn-size", "16", "--model.num-experts", "4",
    "--model.init-std", "0.15", "--task.options", "length=2", "held_out=0.3", "--train.steps", "3",
    "--train.seq-len", "12", "--train.batch-size", "8", "--rl.prompts-per-step", "2",
    "--rl.objective.group-size", "4", "--rl.max-new-tokens", "6", "--rl.eval-prompts", "4",
    "--rl.replay-routing", "--train.eval-every", "3", "--mesh.data", "1", "--mesh.fsdp", "2",
    "--mesh.expert", "2", "--compilation-cache", "",
]  # fmt: skip


def run(folder: pathlib.Path, processes: int) -> list[dict[str, float]]:
    """Records of a run over four devices, evenly over the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "train.py", *OPTIONS, "--run-dir", str(folder)]
    command += ["--emulate", str(4 // processes)]
    together = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(processes)]
    running = [
        subprocess.Popen(
            [*command, *(together if processes > 1 else ()),
             *(("--process-id", str(i)) if processes > 1 else ())],
            cwd=ROOT, env=os.environ | {"XLA_FLAGS": QUICK_XLA}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(processes)
    ]  # fmt: skip
    said = [process.communicate(timeout=600)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes, "\n".join(said)
    return read_metrics(folder)


@pytest.mark.slow
def test_two_processes_reinforce_like_one(tmp_path):
    """Rewards, lengths, losses and norms of every step, and held-out accuracy."""
    one, two = run(tmp_path / "one", 1), run(tmp_path / "two", 2)
    assert len(one) == len(two) == 4
    compared = 0
    for ours, theirs in zip(two, one, strict=True):
        for name, value in theirs.items():
            if name.startswith(("policy/", "train/", "eval/")):
                np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
                compared += 1
    assert compared > 40
    assert one[0]["policy/sampler_gap_max"] < 1e-4
    lines = [(tmp_path / name / "samples.jsonl").read_text() for name in ("one", "two")]
    assert [line.count("\n") for line in lines] == [12, 12]
