"""Metrics of a run: the table of names, and the files they are written to.

`metrics.jsonl` holds one JSON object per log record, `{"step": 12, "train/loss": 3.1, ...}`, with
each step once. JSON has no NaN, so non-finite numbers are written as the strings "nan", "inf" and
"-inf"; `read_metrics` turns them back. The same numbers go to TensorBoard event files under
`tensorboard/`.
"""

import difflib
import json
import math
import os
import re
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tensorboard.compat.proto.event_pb2 import (  # generated: the type checker sees no names
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboard.compat.proto.summary_pb2 import (
    Summary,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class Metric(NamedTuple):
    """Unit and meaning of a name."""

    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "train/loss": Metric("nats/token", "next-token loss, mean over the batch's valid tokens"),
    "train/mtp_loss": Metric("nats/token", "multi-token-prediction loss, mean over modules"),
    "train/kl": Metric("nats/token", "KL(teacher, student) over learned tokens; stage distill"),
    "train/text_loss": Metric("nats/token", "next-token loss of text; stage images"),
    "train/code_loss": Metric("nats/code", "next-code loss of drawn images; stage images"),
    "train/pixel_error": Metric("1", "mean squared error of pixels through their codes"),
    "train/commitment_loss": Metric("1", "mean squared distance of encodings from their codes"),
    "train/codes_used": Metric("1", "share of the codebook that the step's images used"),
    "train/balance_loss": Metric("1", "sequence-wise balance loss summed over layers, unweighted"),
    "train/grad_norm": Metric("1", "global gradient norm before clipping"),
    "train/param_norm": Metric("1", "global norm of the weights"),
    "train/update_norm": Metric("1", "global norm of the step's change of the weights"),
    "train/learning_rate": Metric("1", "learning rate of the step"),
    "train/bias_update_rate": Metric("1", "speed of the router-bias update, gamma"),
    "train/mtp_weight": Metric("1", "weight of the multi-token-prediction loss, lambda"),
    "train/skipped_steps": Metric(
        "steps", "updates skipped for a non-finite loss or gradient, total"
    ),
    "train/tokens": Metric("tokens", "tokens trained on, total"),
    "eval/loss": Metric("nats/token", "next-token loss on held-out text"),
    "eval/bits_per_byte": Metric("bits/byte", "held-out loss per byte of text"),
    "eval/mtp_acceptance": Metric("1", "share of MTP predictions equal to the main model's"),
    "perf/step_s": Metric("s", "wall time of a step, mean since the last record"),
    "perf/tokens_per_s": Metric("tokens/s", "throughput of all devices"),
    "perf/tokens_per_s_per_device": Metric("tokens/s", "throughput of one device"),
    "perf/tflops_per_device": Metric("TFLOP/s", "model FLOPs, causal attention counted as half"),
    "perf/mfu": Metric("1", "share of the device's BF16 peak; absent when the peak is unknown"),
    "eval/accuracy": Metric("1", "share of held-out prompts answered rightly at temperature 1"),
    "eval/accuracy_greedy": Metric("1", "the same, taking the most probable token each time"),
    "eval/reward": Metric("1", "mean reward of held-out prompts at temperature 1, parts weighted"),
    "eval/reward_greedy": Metric("1", "the same, taking the most probable token each time"),
    "eval/format": Metric("1", "share of the answers at temperature 1 in the form asked for"),
    "eval/step_accuracy": Metric("1", "share of the steps written there that are right"),
    "eval/length": Metric("tokens", "mean length of these answers, end token included"),
    "eval/length_correct": Metric("tokens", "the same of the right ones"),
    "eval/truncated": Metric("1", "share of these answers cut at the length limit"),
    "eval/failed_rewards": Metric("1", "rewards that failed in the evaluation, per answer"),
    "policy/reward": Metric("1", "mean reward of a rollout's answers, parts weighted"),
    "policy/accuracy": Metric("1", "share of a rollout's answers that are right"),
    "policy/format": Metric("1", "share of them in the form asked for"),
    "policy/step_accuracy": Metric("1", "share of the steps of reasoning written that are right"),
    "policy/length": Metric("tokens", "mean length of a rollout's answers, end token included"),
    "policy/length_correct": Metric("tokens", "the same of the right ones"),
    "policy/truncated": Metric("1", "share of answers cut at the length limit"),
    "policy/entropy": Metric("nats/token", "entropy of the policy where it wrote"),
    "policy/zero_variance_groups": Metric("1", "share of groups whose answers teach nothing"),
    "policy/rounds": Metric("1", "rounds of prompts that the rollout asked (rl.resample)"),
    "policy/failed_rewards": Metric("1", "rewards that raised, hung or gave no number, per answer"),
    "policy/unscorable_answers": Metric("1", "share of answers whose reward is not a number"),
    "policy/advantage_abs": Metric("1", "mean absolute advantage"),
    "policy/truncated_answers": Metric(
        "1", "share of answers cut at the limit, as the filter sees it"
    ),
    "policy/filtered_answers": Metric("1", "share of answers left out of the loss"),
    "policy/policy_loss": Metric("1", "policy term of the loss; watch its gradient, not its value"),
    "policy/kl_loss": Metric("nats", "KL term of the loss, before its weight"),
    "policy/kl": Metric("nats/token", "KL to the reference, k3"),
    "policy/old_kl": Metric("nats/token", "KL to the policy of the rollout, k3"),
    "policy/ratio": Metric("1", "mean of policy / policy of the rollout"),
    "policy/clip_low": Metric("1", "share of tokens clipped below"),
    "policy/clip_high": Metric("1", "share of tokens clipped above"),
    "policy/answer_nll": Metric("nats/token", "mean of -log p of the answers' tokens"),
    "policy/answer_length": Metric(
        "tokens", "mean length of the answers that take part in the loss"
    ),
    "policy/zero_advantage": Metric("1", "share of these answers whose advantage is 0"),
    "policy/sampler_gap": Metric("nats", "mean of |log p of the sampler - of the trainer|"),
    "policy/sampler_gap_max": Metric("nats", "largest of these"),
    "policy/sampler_gap_share": Metric("1", "share of tokens beyond objective.gap_threshold"),
    "policy/sampler_kl": Metric("nats/token", "mean of log(sampler / trainer)"),
    "policy/mismatch_weight": Metric("1", "mean weight against the sampler's numbers"),
    "policy/mismatch_limited": Metric("1", "share of tokens whose weight was limited"),
    "policy/off_policy_masked": Metric("1", "share of answers left out as too far off"),
    "perf/rollout_tokens_per_s": Metric("tokens/s", "tokens written, all devices"),
    "perf/update_tokens_per_s": Metric("tokens/s", "tokens of prompts and answers trained on"),
    "perf/rollout_share": Metric("1", "share of a step's time spent in the rollout"),
    "perf/reward_share": Metric("1", "share spent in rewards"),
    "perf/update_share": Metric("1", "share spent in updates and handing weights over"),
    "check/loss": Metric("nats", "loss of the step's first micro batch, all terms, as it trains"),
    "check/loss_plain": Metric("nats", "the same by the plain path in fp32, experts as they were"),
    "check/grad_norm": Metric("1", "norm of that micro batch's gradient, as it trains"),
    "check/grad_norm_plain": Metric("1", "the same by the plain path in fp32"),
    "moe/load_max_over_mean": Metric("1", "busiest expert's tokens over the mean, worst layer"),
    "moe/dropped_tokens": Metric("tokens", "token-expert pairs that no expert computed; must be 0"),
    "moe/further_rounds": Metric("rounds", "that buffers of expert rows took beyond one per layer"),
    "mem/peak_gib": Metric("GiB", "peak memory of the fullest local device, or of the process"),
}
"""Fixed names. Each MoE layer has one more, `moe/load_max_over_mean/layer_NN`; so has each part of
a reward, `policy/reward/NAME`."""

LAYER_LOAD = re.compile(r"moe/load_max_over_mean/layer_(\d{2,})")
"""Names of the load of a single layer; the number is the layer's index in the model."""

REWARD_PART = re.compile(r"policy/reward/\w+")
"""Names of the mean of one part of the reward, before its weight."""


def check_names(names: Any) -> None:
    """Raise ValueError for a name that is not in METRICS, with the nearest names that are."""
    for name in names:
        patterns = LAYER_LOAD.fullmatch(name) or REWARD_PART.fullmatch(name)
        if name not in METRICS and not patterns:
            near = difflib.get_close_matches(name, METRICS, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(METRICS)}"
            raise ValueError(f"unknown metric {name!r}; {hint} New ones go into METRICS first.")


class MetricsWriter:
    """Appends log records to `run_dir`/metrics.jsonl and to TensorBoard; process 0 writes.

    Args:
      run_dir: folder of the run; made when missing.
      resume_step: first step this process will run. Records of that step and later ones, left by a
        run that went further than its last checkpoint, are dropped, in one atomic replacement.
    """

    def __init__(self, run_dir: str | os.PathLike[str], resume_step: int = 0):
        self._is_writer = jax.process_index() == 0
        self._last_step = resume_step - 1
        if not self._is_writer:
            return
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        drop_records_from(path, resume_step)
        self._jsonl = path.open("a", encoding="utf-8")
        self._events = EventFileWriter(str(folder / "tensorboard"))
        # TensorBoard forgets events of this step and later ones from files written before.
        start = SessionLog(status=SessionLog.START)
        self._events.add_event(Event(wall_time=time.time(), step=resume_step, session_log=start))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one record.

        Args:
          step: index of the step (from 0); larger than in the record before.
          metrics: name -> number (anything `float` takes, such as a scalar array).
        Errors: ValueError for an unknown name or a step that is already written.
        """
        check_names(metrics)
        if step <= self._last_step:
            raise ValueError(
                f"step {step} is already written (last record: step {self._last_step}); "
                "put everything about a step into one record"
            )
        self._last_step = step
        if not self._is_writer:
            return
        values = {name: float(value) for name, value in metrics.items()}
        record = {"step": step} | {name: _to_json(value) for name, value in values.items()}
        self._jsonl.write(json.dumps(record, allow_nan=False) + "\n")
        self._jsonl.flush()  # a killed run keeps its last record
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._events.add_event(
            Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))
        )

    def close(self) -> None:
        """Flush and close both files."""
        if self._is_writer:
            self._jsonl.close()
            self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Records of `run_dir`/metrics.jsonl in order, with "nan", "inf" and "-inf" as floats again.

    Errors: FileNotFoundError without the file. A line cut short by a killed process is left out
    with a warning.
    """
    path = Path(run_dir) / "metrics.jsonl"
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            warnings.warn(f"{path}:{number} is not a whole record; left out", stacklevel=2)
            continue
        records.append({k: float(v) if isinstance(v, str) else v for k, v in record.items()})
    return records


def drop_records_from(path: Path, step: int) -> None:
    """Remove the records of `step` and later ones, and lines cut short, from a metrics file.

    The new content is written to a second file that takes its place in one rename, so that a crash
    leaves either the old file or the new one.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            keep = json.loads(line)["step"] < step
        except json.JSONDecodeError:
            keep = False  # the write a kill interrupted; its step runs again
        if keep:
            kept.append(line + "\n")
    beside = path.with_suffix(".jsonl.new")
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
