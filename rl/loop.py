"""The loop of stage rl: sample, verify, compare, update, publish.

A rollout serves one update or several; every update is a step. Everything random is a function of
(seed, step), and the state is saved between rollouts only, so that a run that was stopped goes on
as if it had not been. Metrics of answers describe the policy that wrote them, before the updates of
their step.

Letters: A answers of a rollout, T positions, P rewards of an answer.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rl.advantages import filtered_mask, group_advantages
from rl.batches import Batch, cut, make_batch
from rl.config import GRPOConfig, RLConfig
from rl.evaluate import Evaluation, Transcripts, describe, failed_rewards, lengths
from rl.metrics import Metrics, merge, numbers
from rl.plots import plot_rl
from rl.prompts import SAMPLE, Prompts, Questions, sampler_seed
from rl.resample import Asked, choose, differing, reward_arrays
from rl.rollout import Publishable
from rl.stopping import RolloutStoppedError, Stop, never
from rl.trainer import REFERENCE, PolicyTrainer
from rl.verdict.scoring import Scorer, Scores
from runtime.signals import StopRequest
from sharding.devices import mesh_shape
from sharding.partition import local_rows, place_rows
from training.display import Display
from training.loop import Checkpoints, Pictures, anyone, check_skipped
from training.metrics import MetricsWriter, read_metrics
from training.schedule import BatchPlan, Plateau, knobs_at
from training.step import State
from training.throughput import peak_memory_gib
from training.trace import Trace

Line = dict[str, float]
"""Metrics of a step by name, a line of metrics.jsonl."""


@functools.partial(jax.jit, static_argnames="config")
def compare(
    rewards_PA: jax.Array,
    weights_P: jax.Array,
    mask_AT: jax.Array,
    truncated_A: jax.Array,
    config: GRPOConfig,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Advantages [A], the mask of tokens that take part in the loss [A, T], and metrics of both."""
    advantages_A, metrics = group_advantages(rewards_PA, weights_P, config)
    mask_AT, of_filters = filtered_mask(mask_AT, advantages_A, truncated_A, config)
    return advantages_A, mask_AT, metrics | of_filters


@dataclasses.dataclass
class PolicyLoop:
    """Runs a policy from the step of its state to the last one."""

    trainer: PolicyTrainer
    rl: RLConfig
    state: State
    run_dir: Path
    config: dict[str, Any]
    """The run's configuration as plain data, stored with every checkpoint."""
    prompts: Prompts
    scorer: Scorer
    sampler: Publishable
    evaluation: Evaluation | None
    checkpoints: Checkpoints
    save_every: int
    """Steps between checkpoints; 0 saves at the end and on a signal only."""
    display: Display
    profile: range = range(0)
    """Steps to trace, counted from the first that runs, with the whole of their rollouts."""
    started: float = dataclasses.field(default_factory=time.monotonic)
    """When the process started, by time.monotonic."""
    past: Sequence[Plateau] = ()
    """Batches of the steps that the state has behind it."""

    def __post_init__(self):
        train = self.trainer.train
        self.updates = self.rl.updates(train.batch_size)
        self.first_step = int(self.state["step"])
        self.plan = BatchPlan(train, self.past, self.first_step)
        if train.steps % self.updates or self.first_step % self.updates:
            raise ValueError(
                f"a rollout serves {self.updates} updates (answers per rollout over "
                f"train.batch_size), which does not divide train.steps={train.steps} or the "
                f"checkpoint's step {self.first_step}; change train.steps, or start in another "
                "run_dir"
            )
        self.failures: dict[tuple[str, str], str] = {}  # of rewards: name, kind -> first message
        self.pictures = Pictures(self.run_dir, plot_rl)
        self._rows = local_rows(self.trainer.layout, self.plan.micro_batch_size)

    @property
    def complete(self) -> bool:
        """Whether `run` has nothing left to do: the last step was done, and so was the evaluation
        after it, which a signal prevents."""
        if self.first_step < self.trainer.train.steps:
            return False
        measured = True
        if self.evaluation is not None and jax.process_index() == 0:
            found = (self.run_dir / "metrics.jsonl").is_file()
            lines = read_metrics(self.run_dir) if found else []
            measured = any("eval/length" in x for x in lines if x["step"] >= self.first_step)
        return not anyone(not measured)

    def run(self) -> str:
        """Train to the last step, and evaluate; SIGTERM or SIGINT ends it soon, wherever it is.

        An interrupted rollout or evaluation is lost, and nothing else. Saves after the last rollout
        either way, and before an error is raised. Returns the signal's name, or "" when nothing is
        left to do.
        """
        last, stopped, step = self.trainer.train.steps, "", self.first_step
        transcripts = Transcripts(self.run_dir, step, self.rl.transcripts)
        self.sampler.publish(self.state["params"], self.state["router_bias"])
        trace = Trace(self.profile, self.run_dir, self.display)
        writer, stop = MetricsWriter(self.run_dir, step), StopRequest(self.display.note)
        with writer, stop, self.display, trace:
            # Processes of one run agree between rollouts; one alone need not wait for that.
            alone = jax.process_count() == 1
            asked: Stop = (lambda: stop.requested) if alone else never
            if step < last:
                self.display.note("compiling the rollout and the step …")
            while step < last and not stopped:
                begun = step - self.first_step
                trace.before(range(begun, begun + self.updates), self.state)
                try:
                    with self._saved():
                        line = self.advance(step, transcripts, asked)
                except RolloutStoppedError:
                    stopped = stop.signal_name
                    break
                step += self.updates
                writer.write(step - 1, line)
                self.display.show(step - 1, line)
                if "eval/accuracy" in line:
                    self.pictures.draw()
                if self._due(step, self.save_every):
                    self.save()
                if anyone(stop.requested):
                    stopped = stop.signal_name or "a signal to another process"
            self.save()
            if stopped and (self.run_dir / "metrics.jsonl").is_file():
                self.pictures.draw(last=True)
            if not stopped and self.evaluation is not None:
                try:
                    with self._saved():
                        line = self.evaluation(step, self.sampler, asked, self._failed)
                except RolloutStoppedError:
                    return stop.signal_name
                writer.write(step, line)
                self.display.show(step - 1, line)
        return stopped

    def advance(self, step: int, transcripts: Transcripts, stop: Stop) -> Line:
        """One rollout with its updates; the metrics. RolloutStoppedError leaves the state alone."""
        line: Line = {}
        if self.evaluation is not None and self._due(step, self.trainer.train.eval_every):
            line |= self.evaluation(step, self.sampler, stop, self._failed)
        clock = _Clock()
        rounds = self._ask(step // self.updates, clock, stop)
        line["policy/rounds"] = len(rounds)
        line["policy/failed_rewards"] = float(np.mean([self._failed(r.scores) for r in rounds]))
        if step == self.first_step:
            refuse_failures([r.scores for r in rounds])
        asked, objective = rounds[0], self.rl.objective
        if len(rounds) > 1:
            asked = choose(rounds, objective, self.rl.prompts_per_step)
        batch, metrics = self._batch(asked)
        line |= self._update(step, batch, metrics)
        with contextlib.suppress(RolloutStoppedError):  # whoever goes on publishes again
            self.sampler.publish(self.state["params"], self.state["router_bias"], stop)
        clock.lap("update")
        if step == self.first_step:
            self.display.note(f"first step: {time.monotonic() - self.started:.1f} s after start")
        # Chosen groups would say less of the policy than all that it wrote.
        line |= _described(rounds[0])
        line |= self._speeds(sum(r.rollout.num_tokens for r in rounds), batch, clock)
        seen = {
            "tokens": lengths(asked.rollout),
            "truncated": asked.rollout.truncated,
            "reward": asked.scores.rewards,
            "advantage": batch["advantages"],
        }
        if asked.scores.correct is not None:
            seen["correct"] = asked.scores.correct
        problems = _per_answer(asked.questions, asked.group_size)
        transcripts.write(step, problems, asked.texts, seen, asked.scores.parts)
        return line

    def _ask(self, number: int, clock: "_Clock", stop: Stop) -> list[Asked]:
        """Scored rounds of rollout `number`: one, and up to rl.resample more until there are enough
        groups to learn from. Each round has prompts and draws of its own."""
        rounds, useful = [], 0
        size, most = self.rl.objective.group_size, 1 + self.rl.resample
        for place in range(number * most, (number + 1) * most):
            questions = self.prompts.rollout(place, self.rl.prompts_per_step)
            seed = sampler_seed(self.prompts.seed, SAMPLE, place)
            rollout = self.sampler(questions.ids, size, seed, stop)
            clock.lap("rollout", rollout.seconds)
            texts = self.prompts.texts(rollout.tokens)
            scores = self.scorer(_per_answer(questions, size), texts, lengths(rollout), stop)
            rounds.append(Asked(questions, rollout, texts, scores))
            useful += differing(rounds[-1], self.rl.objective).sum() if most > 1 else 0
            clock.lap("reward")
            if useful >= self.rl.prompts_per_step:
                break
        return rounds

    def _failed(self, scores: Scores) -> float:
        """Failed rewards per answer; each kind is named once, when it first happens."""
        for name, kinds in scores.messages.items():
            for kind, message in kinds.items():
                if (name, kind) not in self.failures:
                    self.failures[name, kind] = message
                    self.display.note(f"reward {name} failed ({kind}), counted as 0: {message}")
        return failed_rewards(scores)

    @contextlib.contextmanager
    def _saved(self) -> Generator[None]:
        """Save the rollouts before an error, and raise it again.

        No save for numbers that are not finite, nor by one of several processes, which would wait
        for the others.
        """
        try:
            yield
        except (RolloutStoppedError, FloatingPointError):
            raise
        except Exception:
            if jax.process_count() == 1:
                with contextlib.suppress(Exception):  # an update that failed has taken the state
                    self._save_between_rollouts()
            raise

    def _save_between_rollouts(self) -> None:
        step = int(self.state["step"])
        learned = step > self.first_step and step % self.updates == 0
        if learned and self.save() and self.checkpoints.wait():
            self.display.note(f"saved at step {step} before the error; run again to go on")

    def save(self) -> bool:
        """Checkpoint the state, which no rollout is under way from."""
        mesh, step = mesh_shape(self.trainer.layout), int(self.state["step"])
        past = self.plan.history(step)
        return self.checkpoints.save(step, self.state, self.config, mesh, {}, past)

    def _due(self, step: int, every: int) -> bool:
        """Whether a multiple of `every` lies in the rollout that ends (or 0: begins) at `step`."""
        return every > 0 and step % every < self.updates

    def _batch(self, asked: Asked) -> tuple[Batch, Metrics]:
        batch = make_batch(asked.questions.ids, asked.rollout, self.trainer.train.seq_len)
        if not self.rl.replay_routing:
            batch.pop("routes", None)
        if np.isnan(batch["sampler_logp"]).any():  # a server that does not tell them
            del batch["sampler_logp"]
        rewards_PA, weights_P = reward_arrays(asked.scores)
        compared = compare(
            rewards_PA, weights_P, batch["mask"], asked.rollout.truncated, config=self.rl.objective
        )
        advantages_A, mask_AT, metrics = jax.device_get(compared)
        return batch | {"advantages": advantages_A, "mask": mask_AT}, metrics

    def _update(self, step: int, batch: Batch, metrics: Metrics) -> Line:
        """All updates of a rollout; means of their metrics, and the rollout's own."""
        pieces = cut(batch, self.updates, self.plan.micro_batch_size)
        parts = [self._placed(part) for part in pieces]
        parts = [self._with_logps(part) for part in parts]
        totals: list[Line] = []
        merged: Metrics = {}
        for i, part in enumerate(parts):
            knobs = knobs_at(self.trainer.train, self.plan, step + i)
            del knobs["mtp_weight"]
            scalars = {name: np.float32(value) for name, value in knobs.items()}
            self.state, out = self.trainer.step(self.state, part, scalars)
            out = jax.device_get(out)
            check_skipped(
                self, step + i, int(out.pop("skipped_in_row")), "or look at samples.jsonl"
            )
            objective = out.pop("objective")
            merged = merge(merged, objective) if merged else objective
            knobs = {f"train/{name}": value for name, value in knobs.items()}
            totals.append(knobs | {name: float(value) for name, value in out.items()})
            every = self.rl.reference_every
            if every and (step + i + 1) % every == 0:
                self.state = self.trainer.renew_reference(self.state)
        means = {name: float(np.mean([part[name] for part in totals])) for name in totals[0]}
        return means | {
            f"policy/{name}": value for name, value in numbers({**metrics, **merged}).items()
        }

    def _placed(self, part: Batch) -> dict[str, jax.Array]:
        """The part on the mesh; every process has all rows and places its own."""
        low, high = self._rows.start, self._rows.stop
        own = {name: rows[:, low:high] for name, rows in part.items()}
        return place_rows(self.trainer.layout, own, self._rows, self.plan.micro_batch_size)

    def _with_logps(self, part: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The part with log-probabilities of the policy as it is now, and of the reference.

        A single update starts from this policy itself: its ratio is 1 without old numbers. The
        reference chooses its own experts.
        """
        names = ("tokens", "lengths", "kept", "routes")
        inputs = {name: part[name] for name in names if name in part}
        added = {}
        if self.updates > 1:
            weights = self.state["params"], self.state["router_bias"]
            added["old_logp"] = self.trainer.logps(*weights, inputs)
        if REFERENCE in self.state:
            reference = self.state[REFERENCE]
            inputs.pop("routes", None)
            added["ref_logp"] = self.trainer.logps(
                reference["params"], reference["router_bias"], inputs
            )
        return part | added

    def _speeds(self, written: int, batch: Batch, clock: "_Clock") -> Line:
        total = sum(clock.seconds.values())
        read = float(batch["lengths"].sum())
        return {
            "perf/step_s": total / self.updates,
            "perf/rollout_tokens_per_s": written / clock.seconds["rollout"],
            "perf/update_tokens_per_s": read / clock.seconds["update"],
            **{f"perf/{name}_share": s / total for name, s in clock.seconds.items()},
            "mem/peak_gib": peak_memory_gib(),
        }


class _Clock:
    """Seconds of the phases of a step."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str, seconds: float | None = None) -> None:
        """End a phase; `seconds` where it knows its time better (without compilation)."""
        now = time.perf_counter()
        spent = now - self._last if seconds is None else seconds
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        self._last = now


def refuse_failures(rounds: Sequence[Scores]) -> None:
    """Raise ValueError, on all processes, if a reward failed on every answer of these rounds."""
    answers, said = sum(scores.answers for scores in rounds), ""
    for name in rounds[0].parts:
        failed = sum(sum(scores.failures.get(name, {}).values()) for scores in rounds)
        if failed == answers:
            said = f"reward {name}: {next(iter(rounds[0].messages[name].values()))}"
    if anyone(bool(said)):
        raise ValueError(
            f"a reward failed on all {answers} answers of the first rollout, which teaches "
            f"nothing; correct it and run again. {said or 'Process 0 says which'}"
        )


def _per_answer(questions: Questions, group_size: int) -> list[Any]:
    return [problem for problem in questions.problems for _ in range(group_size)]


def _described(asked: Asked) -> Line:
    """Length, accuracy and rewards of the answers."""
    scores = asked.scores
    line = {f"policy/{name}": x for name, x in describe(asked.rollout, scores).items()}
    return line | {f"policy/reward/{name}": float(x.mean()) for name, x in scores.parts.items()}
