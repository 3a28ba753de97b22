"""Schedules and batch sizes on the host, in Python floats (float64): no JAX, no tracing.

A run's clock has two hands: steps and tokens. The batch plan ties them together, so a schedule may
mix units (warm-up in steps, the rest in tokens) and still be a pure function of the step. 14.8e12
tokens and 7.3e-6 do not fit fp32 arithmetic, which is why the step receives the finished numbers.
"""

import bisect
import dataclasses
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from training.config import Phase, TrainConfig


class StepBatch(NamedTuple):
    """Data of one step."""

    batch_size: int
    """Sequences of this step, over all devices."""
    micro_batches: int
    """Forward passes whose gradients accumulate; batch_size = micro_batches * micro batch size."""
    first_sequence: int
    """Index of the step's first sequence in the run's order of data."""
    tokens_before: int
    """Tokens trained on before this step (sequences * seq_len)."""


class Plateau(NamedTuple):
    """Consecutive steps with batches of the same size."""

    first_step: int
    first_sequence: int
    first_token: int
    batch_size: int
    seq_len: int


class BatchPlan:
    """Batch size, micro batches and data position of every step.

    The batch grows linearly in tokens from `batch_ramp_from` to `batch_size` sequences over
    `batch_ramp_tokens` and is rounded to the nearest whole number of micro batches (V3 report,
    section 4.2, publishes the end points, not the shape). The ramp is a table of plateaus, built
    once; every question after that is one bisection, whatever the length of the run. The last
    plateau has no end, so steps beyond `train.steps` can be asked for too.

    A run that was resumed after `done` steps has a past that no configuration changes: its plateaus
    (`history`), from whose end the plan goes on in the sizes of `train`: at its token, and at the
    row that this token lies in or ends before, if rows have another length now.

    Errors: ValueError when a batch is not a whole number of micro batches or the ramp falls.
    """

    def __init__(self, train: TrainConfig, past: Iterable[Sequence[int]] = (), done: int = 0):
        _check_batches(train)
        self.micro_batch_size = train.micro_batch_size or train.batch_size
        self._done = done
        self._plateaus = _plateaus(train, [Plateau(*plateau) for plateau in past], done)
        self._first_steps = [plateau.first_step for plateau in self._plateaus]
        self._first_tokens = [plateau.first_token for plateau in self._plateaus]

    def at(self, step: int) -> StepBatch:
        """Batch of `step` (counted from 0)."""
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        plateau = self._plateau(step)
        sequences = (step - plateau.first_step) * plateau.batch_size
        return StepBatch(
            plateau.batch_size,
            plateau.batch_size // self.micro_batch_size,
            plateau.first_sequence + sequences,
            plateau.first_token + sequences * plateau.seq_len,
        )

    def history(self, done: int) -> list[Plateau]:
        """What `done` steps have had, for a plan that goes on from there under other settings."""
        return [plateau for plateau in self._plateaus if plateau.first_step < done]

    def _plateau(self, step: int) -> Plateau:
        return self._plateaus[bisect.bisect_right(self._first_steps, step) - 1]

    def tokens_before(self, step: int) -> int:
        """Tokens trained on when `step` steps are done."""
        return self.at(step).tokens_before

    def steps_at(self, tokens: float) -> float:
        """Steps done, with fraction, when `tokens` tokens have been trained on."""
        index = max(0, bisect.bisect_right(self._first_tokens, tokens) - 1)
        plateau = self._plateaus[index]
        length = plateau.seq_len
        sequences = tokens / length - plateau.first_token / length
        return plateau.first_step + sequences / plateau.batch_size

    def tokens_at(self, steps: float) -> float:
        """Tokens trained on when `steps` steps are done, linear within a step."""
        whole = math.floor(steps)
        plateau = self._plateau(whole)
        return self.tokens_before(whole) + (steps - whole) * plateau.batch_size * plateau.seq_len

    def micro_batch_counts(self) -> tuple[int, ...]:
        """Numbers of micro batches the run still goes through: one compiled step each."""
        ends = [*self._first_steps[1:], math.inf]
        ahead = [p for p, end in zip(self._plateaus, ends, strict=True) if end > self._done]
        return tuple(plateau.batch_size // self.micro_batch_size for plateau in ahead)


def past_batches(trained: dict[str, Any], done: int) -> list[Plateau]:
    """Plateaus of `done` steps under one configuration, as plain data: of a run that kept none."""
    names = "steps", "seq_len", "batch_size", "micro_batch_size"
    ramp = "batch_ramp_from", "batch_ramp_tokens", "batch_ramp_step"
    train = TrainConfig(**{name: trained[name] for name in (*names, *ramp) if name in trained})
    return BatchPlan(train).history(done)


def _check_batches(train: TrainConfig) -> None:
    """Raise ValueError unless start and end of the ramp are whole numbers of micro batches."""
    start, end = train.batch_ramp_from, train.batch_size
    least = dict.fromkeys(("steps", "seq_len", "batch_size", "log_every", "unroll"), 1)
    least |= dict.fromkeys(("micro_batch_size", "eval_every", "eval_batches", "check_every"), 0)
    least |= dict.fromkeys(("max_skipped_in_row", "ema_decay"), 0)
    for name, low in least.items():
        if not low <= getattr(train, name) < math.inf:
            raise ValueError(f"train.{name} is {getattr(train, name)}; it must be {low} or more")
    if train.ema_decay >= 1:
        raise ValueError(f"train.ema_decay is {train.ema_decay}; it must be below 1")
    if start > end or start < 0:
        raise ValueError(
            f"train.batch_ramp_from={start} is outside 0..batch_size={end}: the batch only grows; "
            "lower batch_ramp_from or set it to 0 for no ramp"
        )
    if (start > 0) != (train.batch_ramp_tokens > 0):
        raise ValueError(
            f"train.batch_ramp_from={start} with batch_ramp_tokens={train.batch_ramp_tokens:g}: "
            "a ramp needs both, a run without a ramp neither (set both to 0)"
        )
    micro = train.micro_batch_size or end
    if train.batch_ramp_step < 1 or (start and (end - start) // micro % train.batch_ramp_step):
        raise ValueError(
            f"train.batch_ramp_step={train.batch_ramp_step} does not lead from batch_ramp_from="
            f"{start} to batch_size={end} in micro batches of {micro}: give a divisor of "
            f"{(end - start) // micro}"
        )
    for name, size in (("batch_size", end), ("batch_ramp_from", start)):
        if micro < 1 or size % micro:
            common = math.gcd(start, end)
            raise ValueError(
                f"train.{name}={size} is not a whole number of micro batches of {micro} sequences; "
                f"set train.micro_batch_size to a divisor of {common}"
            )


def _plateaus(train: TrainConfig, past: list[Plateau], done: int) -> list[Plateau]:
    """The past, and one plateau per batch size of the ramp that gets at least one more step."""
    micro = train.micro_batch_size or train.batch_size
    plateaus, step, sequence, token = list(past), 0, 0, 0
    if past:
        first_step, first_sequence, first_token, batch_size, seq_len = past[-1]
        sequences = (done - first_step) * batch_size
        step, sequence, token = done, first_sequence + sequences, first_token + sequences * seq_len
        if seq_len != train.seq_len:  # the same tokens behind it, in rows of today's length
            sequence = -(-token // train.seq_len)

    def add(batch_size: int) -> None:
        # The size of the steps before goes on: no border where nothing changes.
        if not plateaus or plateaus[-1][3:] != (batch_size, train.seq_len):
            plateaus.append(Plateau(step, sequence, token, batch_size, train.seq_len))

    first, last = train.batch_ramp_from // micro, train.batch_size // micro
    added = train.batch_ramp_step
    for micro_batches in range(first or last, last, added):
        # The nearest of the plateaus changes where the line crosses the half between two.
        share = (micro_batches + added / 2 - first) / (last - first)
        # Exact, so that a plan from the middle of the ramp is the rest of the whole one.
        until_sequence = Fraction(share * train.batch_ramp_tokens / train.seq_len)
        batch_size = micro_batches * micro
        before = Fraction(token, train.seq_len)
        steps = max(0, math.ceil((until_sequence - before) / batch_size))
        if steps:
            add(batch_size)
        sequences = steps * batch_size
        step, sequence, token = (
            step + steps,
            sequence + sequences,
            token + sequences * train.seq_len,
        )
    add(train.batch_size)
    return plateaus


def check_phases(name: str, phases: tuple[Phase, ...], plan: BatchPlan) -> None:
    """Raise ValueError unless `phases` is a schedule: not empty, each phase ending after the last.

    Ends in steps and in tokens are compared on the plan's clock; `name` is the field to blame.
    """
    if not phases:
        raise ValueError(f"train.{name} has no phases; give at least one, e.g. (Phase(0, 1e-3),)")
    if phases[0].until < 0 or (phases[0].until == 0 and phases[0].shape != "constant"):
        raise ValueError(
            f"train.{name}: phase 1 ({phases[0].shape}) ends at {phases[0].until:g}; "
            "give it a length"
        )
    if bad := [phase.value for phase in phases if not 0 <= phase.value < math.inf]:
        raise ValueError(f"train.{name}: a phase has the value {bad[0]}; it must be 0 or more")
    ends = [_in_steps(phase, plan) for phase in phases]
    for index in range(1, len(phases)):
        if ends[index] <= ends[index - 1]:
            before, after = phases[index - 1], phases[index]
            raise ValueError(
                f"train.{name}: phase {index + 1} ends at {after.until:g} {after.unit} (step "
                f"{ends[index]:,.1f}), not after phase {index}, which ends at {before.until:g} "
                f"{before.unit} (step {ends[index - 1]:,.1f}); order the phases by their ends"
            )


def value_at(phases: tuple[Phase, ...], plan: BatchPlan, steps_done: int) -> float:
    """Value of a schedule when `steps_done` steps are done.

    Before the first phase the value is 0 (so a first linear phase is a warm-up from 0); after the
    last phase its value holds. A phase owns its end point. `linear` and `cosine` move in the
    phase's own unit from the end of the phase before, whatever unit that one was written in.
    """
    tokens_done = plan.tokens_before(steps_done)
    start_value, previous = 0.0, None
    for phase in phases:
        now = steps_done if phase.unit == "steps" else tokens_done
        if now <= phase.until:
            if phase.shape == "constant":
                return phase.value
            start = 0.0 if previous is None else _end_in(previous, phase.unit, plan)
            progress = (now - start) / (phase.until - start)
            if phase.shape == "cosine":
                progress = 0.5 - 0.5 * math.cos(math.pi * progress)
            return start_value + (phase.value - start_value) * progress
        start_value, previous = phase.value, phase
    return phases[-1].value


def _in_steps(phase: Phase, plan: BatchPlan) -> float:
    return phase.until if phase.unit == "steps" else plan.steps_at(phase.until)


def _end_in(phase: Phase, unit: str, plan: BatchPlan) -> float:
    """End of `phase` in `unit`: steps (with fraction) or tokens (linear within a step)."""
    if phase.unit == unit:
        return phase.until
    if unit == "steps":
        return plan.steps_at(phase.until)
    return plan.tokens_at(phase.until)


def check_schedules(train: TrainConfig, plan: BatchPlan) -> None:
    """Raise ValueError when any schedule of the run is malformed; call once, before training."""
    peak = train.peak_learning_rate
    if not (0 <= peak < math.inf) or (peak and not any(p.value for p in train.learning_rate)):
        raise ValueError(
            f"train.peak_learning_rate is {peak}; give a number above 0, for a train.learning_rate "
            "that is not 0 throughout, or 0 to keep the phases' own values"
        )
    if not 0 <= train.balance_weight < math.inf:
        raise ValueError(f"train.balance_weight is {train.balance_weight}; it must be 0 or more")
    for name, phases in schedules(train).items():
        check_phases(name, phases, plan)


def schedules(train: TrainConfig) -> dict[str, tuple[Phase, ...]]:
    """Phases of every scheduled number by the name of its field, the learning rate at its peak."""
    rates = train.learning_rate
    highest = max((phase.value for phase in rates), default=0.0)
    if train.peak_learning_rate and highest:
        factor = train.peak_learning_rate / highest
        rates = tuple(dataclasses.replace(phase, value=phase.value * factor) for phase in rates)
    return {
        "learning_rate": rates,
        "bias_update_rate": train.bias_update_rate,
        "mtp_weight": train.mtp_weight,
    }


def describe(phases: tuple[Phase, ...], plan: BatchPlan) -> str:
    """A schedule in words: linear to 0.003 until step 20, 0.003 until step 200."""

    def words(phase: Phase) -> str:
        moves = "" if phase.shape == "constant" else f"{phase.shape} to "
        until = f" until step {_in_steps(phase, plan):,.0f}" if phase.until else ""
        return f"{moves}{phase.value:.3g}{until}"

    return ", ".join(map(words, phases))


def ends_elsewhere(train: TrainConfig, plan: BatchPlan) -> list[str]:
    """What is odd about each schedule that does not end with the run, and the remedy.

    Phases at the end that only hold the value before them may end anywhere.
    """
    found = []
    for name, phases in schedules(train).items():
        values = [phase.value for phase in phases]
        moving = [
            phase.shape != "constant" or i == 0 or phase.value != values[i - 1]
            for i, phase in enumerate(phases)
        ]
        last = max(i for i, moves in enumerate(moving) if moves)
        holds = last < len(phases) - 1
        end = _in_steps(phases[last], plan)
        constant = len(phases) == 1 and phases[0].shape == "constant"
        if constant or abs(end - train.steps) <= 1 or (holds and end < train.steps):
            continue
        ratio = train.steps / end
        option = f"--train.{name.replace('_', '-')}"
        remedy = (f"{option}.{i}.until {p.until * ratio:.6g}" for i, p in enumerate(phases))
        odd = "is not reached" if end > train.steps else "holds from there on"
        found.append(
            f"train.{name} ends at step {end:,.0f} of train.steps={train.steps:,}: its last value, "
            f"{values[-1]:.3g}, {odd}; to end with the run: {' '.join(remedy)}"
        )
    return found


def knobs_at(train: TrainConfig, plan: BatchPlan, step: int) -> dict[str, float]:
    """The step's scheduled numbers: learning_rate, bias_update_rate, mtp_weight.

    A step takes the value at its end: the first warm-up step already moves, and the last step of a
    decay reaches the value the schedule names.
    """
    named = schedules(train).items()
    return {name: value_at(phases, plan, step + 1) for name, phases in named}
