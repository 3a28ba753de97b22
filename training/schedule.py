"""Schedules and batch sizes on the host, in Python floats (float64): no JAX, no tracing.

A run's clock has two hands: steps and tokens. The batch plan ties them together, so a schedule may
mix units (warm-up in steps, the rest in tokens) and still be a pure function of the step. 14.8e12
tokens and 7.3e-6 do not fit fp32 arithmetic, which is why the step receives the finished numbers.
"""

import bisect
import dataclasses
import math
from typing import NamedTuple

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


class _Plateau(NamedTuple):
    """Consecutive steps with the same number of micro batches."""

    first_step: int
    first_sequence: int
    micro_batches: int


class BatchPlan:
    """Batch size, micro batches and data position of every step.

    The batch grows linearly in tokens from `batch_ramp_from` to `batch_size` sequences over
    `batch_ramp_tokens` and is rounded to the nearest whole number of micro batches (V3 report,
    section 4.2, publishes the end points, not the shape). The ramp is a table of plateaus, built
    once; every question after that is one bisection, whatever the length of the run. The last
    plateau has no end, so steps beyond `train.steps` can be asked for too.

    Errors: ValueError when a batch is not a whole number of micro batches or the ramp falls.
    """

    def __init__(self, train: TrainConfig):
        _check_batches(train)
        self.micro_batch_size = train.micro_batch_size or train.batch_size
        self.seq_len = train.seq_len
        self._plateaus = _plateaus(train, self.micro_batch_size)
        self._first_steps = [plateau.first_step for plateau in self._plateaus]
        self._first_sequences = [plateau.first_sequence for plateau in self._plateaus]

    def at(self, step: int) -> StepBatch:
        """Batch of `step` (counted from 0)."""
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        plateau = self._plateaus[bisect.bisect_right(self._first_steps, step) - 1]
        batch_size = plateau.micro_batches * self.micro_batch_size
        first_sequence = plateau.first_sequence + (step - plateau.first_step) * batch_size
        return StepBatch(
            batch_size, plateau.micro_batches, first_sequence, first_sequence * self.seq_len
        )

    def tokens_before(self, step: int) -> int:
        """Tokens trained on when `step` steps are done."""
        return self.at(step).tokens_before

    def steps_at(self, tokens: float) -> float:
        """Steps done, with fraction, when `tokens` tokens have been trained on."""
        sequences = tokens / self.seq_len
        index = max(0, bisect.bisect_right(self._first_sequences, sequences) - 1)
        plateau = self._plateaus[index]
        batch_size = plateau.micro_batches * self.micro_batch_size
        return plateau.first_step + (sequences - plateau.first_sequence) / batch_size

    def steps_for(self, tokens: float) -> int:
        """Fewest steps that train on `tokens` tokens or more: a run's length from its budget."""
        return math.ceil(self.steps_at(tokens))

    def micro_batch_counts(self) -> tuple[int, ...]:
        """Numbers of micro batches the run goes through: one compiled step each."""
        return tuple(plateau.micro_batches for plateau in self._plateaus)


def _check_batches(train: TrainConfig) -> None:
    """Raise ValueError unless start and end of the ramp are whole numbers of micro batches."""
    start, end = train.batch_ramp_from, train.batch_size
    least = dict.fromkeys(("steps", "seq_len", "batch_size", "log_every"), 1)
    least |= dict.fromkeys(("eval_every", "eval_batches", "max_skipped_in_row"), 0)
    least |= dict.fromkeys(("balance_weight", "ema_decay"), 0)
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


def _plateaus(train: TrainConfig, micro_batch_size: int) -> list[_Plateau]:
    """Table of the ramp: one plateau per number of micro batches that gets at least one step."""
    last = train.batch_size // micro_batch_size
    if not train.batch_ramp_from:
        return [_Plateau(0, 0, last)]
    first, added = train.batch_ramp_from // micro_batch_size, train.batch_ramp_step
    plateaus, step, sequence = [], 0, 0
    for micro_batches in range(first, last, added):
        # The nearest of the plateaus changes where the line crosses the half between two.
        share = (micro_batches + added / 2 - first) / (last - first)
        until_sequence = share * train.batch_ramp_tokens / train.seq_len
        batch_size = micro_batches * micro_batch_size
        steps = max(0, math.ceil((until_sequence - sequence) / batch_size))
        if steps:
            plateaus.append(_Plateau(step, sequence, micro_batches))
        step, sequence = step + steps, sequence + steps * batch_size
    return [*plateaus, _Plateau(step, sequence, last)]


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
    whole = math.floor(phase.until)
    batch = plan.at(whole)
    return batch.tokens_before + (phase.until - whole) * batch.batch_size * plan.seq_len


def check_schedules(train: TrainConfig, plan: BatchPlan) -> None:
    """Raise ValueError when any schedule of the run is malformed; call once, before training."""
    peak = train.peak_learning_rate
    if not (0 <= peak < math.inf) or (peak and not any(p.value for p in train.learning_rate)):
        raise ValueError(
            f"train.peak_learning_rate is {peak}; give a number above 0, for a train.learning_rate "
            "that is not 0 throughout, or 0 to keep the phases' own values"
        )
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
