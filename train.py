"""Train a DeepSeek-V3 family model: `python train.py --config tiny --emulate 8 --layout cube`.

Reads top to bottom: devices, configuration, data, model and state, loop, what is left behind.
`--help` lists every option, `--print-config` shows what a run would be.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.command import Command, parse
from configs.schema import RunConfig

if TYPE_CHECKING:
    import jax

    from checkpoint.manager import CheckpointManager
    from data.prepare import Prepared
    from sharding.partition import Layout
    from training.schedule import BatchPlan
    from training.step import Trainer

STARTED = time.monotonic()
SAMPLE_PROMPT = "def "


# ---- Devices -------------------------------------------------------------------------------------


def start_devices(command: Command) -> None:
    """Emulated devices, compilation cache, and the other processes of the run."""
    import jax

    from sharding.mesh import emulate_devices

    if command.emulate:
        emulate_devices(command.emulate)
    if command.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.abspath(command.compilation_cache))
    explicit = bool(command.coordinator)
    launched = any(name in os.environ for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    if command.distributed == "off" or not (explicit or launched or command.distributed == "on"):
        return
    if explicit and (command.num_processes < 1 or command.process_id < 0):
        raise ValueError(
            f"--coordinator {command.coordinator} needs --num-processes (is "
            f"{command.num_processes}) and --process-id (is {command.process_id})"
        )
    jax.distributed.initialize(
        command.coordinator or None,
        command.num_processes if explicit else None,
        command.process_id if explicit else None,
    )


# ---- Configuration -------------------------------------------------------------------------------


def make_trainer(run: RunConfig) -> "Trainer":
    """Everything that can be checked before data is read or an array exists."""
    from data.prepare import check_config
    from model.recipe import Recipe
    from sharding.mesh import make_mesh
    from sharding.partition import Layout
    from training.schedule import BatchPlan, check_schedules
    from training.step import Trainer

    check_config(run.data, run.train.seq_len, run.seed)
    if run.train.seq_len > run.model.max_position:
        raise ValueError(
            f"train.seq_len={run.train.seq_len} exceeds model.max_position="
            f"{run.model.max_position}; shorten the sequences or raise max_position"
        )
    if not run.data.tokenizer and run.data.vocab_size > run.model.vocab_size:
        raise ValueError(
            f"data.vocab_size={run.data.vocab_size} exceeds model.vocab_size="
            f"{run.model.vocab_size}; make the model's at least as large"
        )
    check_schedules(run.train, BatchPlan(run.train))
    layout = Layout(make_mesh(run.mesh), zero1=run.mesh.zero1)
    recipe = Recipe(run.train.dtype, run.train.remat, run.kernels)
    trainer = Trainer(run.model, run.train, recipe, layout)
    _ = trainer.abstract_state  # names any weight that does not divide over the mesh
    return trainer


def describe(run: RunConfig, trainer: "Trainer") -> list[str]:
    """What follows from a configuration, one line each."""
    import jax

    from model.costs import cache_bytes_per_token, count_parameters, train_flops_per_token
    from sharding.mesh import describe as describe_mesh
    from training.display import human
    from training.schedule import BatchPlan

    plan, train = BatchPlan(run.train), run.train
    count = count_parameters(run.model)
    flops = train_flops_per_token(run.model, train.seq_len)
    leaves = jax.tree.leaves(trainer.abstract_state)
    held = sum(
        leaf.dtype.itemsize * _size(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves
    )
    last = plan.at(train.steps - 1)
    return [
        f"devices      {describe_mesh(trainer.layout.mesh)}",
        f"parameters   {count.total:,} total, {count.active:,} active, {count.mtp:,} in MTP",
        f"compute      {human(flops)}FLOP/token (causal, without MTP), {train.dtype}, "
        f"remat {train.remat}, kernels {run.kernels}",
        f"state        {held / 2**30:.3g} GiB per device: weights, moments, biases",
        f"cache        {cache_bytes_per_token(run.model):,} bytes/token in bf16",
        f"batch        {last.batch_size} x {train.seq_len} tokens in {last.micro_batches} micro "
        f"batches",
        f"length       {train.steps:,} steps, {human(plan.tokens_before(train.steps))} tokens",
    ]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def print_config(run: RunConfig, derived: list[str]) -> None:
    """Every resolved field as key=value, then what follows from them."""

    def walk(prefix: str, value: Any) -> None:
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                walk(f"{prefix}.{field.name}" if prefix else field.name, getattr(value, field.name))
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for i, item in enumerate(value):
                walk(f"{prefix}.{i}", item)
        else:
            print(f"{prefix}={value!r}")

    walk("", run)
    print()
    print("\n".join(derived))


# ---- Data ----------------------------------------------------------------------------------------


def prepare_data(run: RunConfig, say) -> "Prepared":
    """Tokenizer and token stores; process 0 builds what the others then find."""
    import jax
    from jax.experimental import multihost_utils

    from data.prepare import prepare

    several = jax.process_count() > 1
    if several and jax.process_index() > 0:
        multihost_utils.sync_global_devices("data")
    prepared = prepare(run.data, run.train.seq_len, run.seed, say)
    if several and jax.process_index() == 0:
        multihost_utils.sync_global_devices("data")
    if prepared.tokenizer.vocab_size > run.model.vocab_size:
        raise ValueError(
            f"tokenizer has {prepared.tokenizer.vocab_size} ids, model.vocab_size is "
            f"{run.model.vocab_size}; raise the model's to at least that"
        )
    return prepared


# ---- Evaluation ----------------------------------------------------------------------------------


def evaluate(trainer: "Trainer", state: Any, prepared: "Prepared", max_batches: int) -> dict:
    """Held-out loss (nats/token), bits/byte and MTP acceptance; max_batches 0 takes everything."""
    import math

    from data.evaluation import held_out_reader
    from sharding.partition import local_rows, place_rows

    size = trainer.train.micro_batch_size or trainer.train.batch_size
    rows = local_rows(trainer.layout, size)
    reader = held_out_reader(prepared, size, max_batches, rows)
    totals: dict[str, float] = {}
    for batch in reader:
        placed = place_rows(trainer.layout, batch, rows, size)
        sums = trainer.evaluate(state["params"], state["router_bias"], placed)
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    result = {
        "eval/loss": totals["nats"] / totals["targets"],
        "eval/bits_per_byte": totals["nats"] / math.log(2) / reader.eval_bytes,
    }
    if "drafts" in totals:
        result["eval/mtp_acceptance"] = totals["accepted"] / max(totals["drafts"], 1.0)
    return result


def sample_text(trainer: "Trainer", state: Any, prepared: "Prepared") -> str:
    """One continuation of SAMPLE_PROMPT, as long as a training sequence."""
    import jax
    import numpy as np

    from sharding.partition import batch_shards

    tokenizer = prepared.tokenizer
    prompt = np.concatenate([[tokenizer.eos_id], tokenizer.encode(SAMPLE_PROMPT)])
    ids = np.zeros((batch_shards(trainer.layout), trainer.train.seq_len), np.int32)
    ids[:, : len(prompt)] = prompt
    key = jax.random.key(prepared.seed)
    state = state["params"], state["router_bias"]
    row = np.asarray(trainer.sample(*state, ids, np.int32(len(prompt)), key))[0, 1:]
    end = np.flatnonzero(row == tokenizer.eos_id)
    return tokenizer.decode(row[: end[0]] if len(end) else row)


# ---- Loop ----------------------------------------------------------------------------------------


class Loop:
    """Runs a trainer from the newest checkpoint to the last step, and records what happens."""

    def __init__(self, run: RunConfig, trainer: "Trainer", prepared: "Prepared"):
        import jax

        from checkpoint.manager import CheckpointManager
        from model.costs import train_flops_per_token
        from training.display import Display
        from training.schedule import BatchPlan
        from training.throughput import Throughput

        self.run, self.trainer, self.prepared = run, trainer, prepared
        self.plan: BatchPlan = BatchPlan(run.train)
        self.checkpoints: CheckpointManager = CheckpointManager(
            Path(run.run_dir) / "checkpoints", run.checkpoint
        )
        restored = self.checkpoints.restore(trainer.abstract_state)
        self.state = trainer.init(jax.random.key(run.seed)) if restored is None else restored
        self.first_step = int(self.state["step"])
        mesh = trainer.layout.mesh
        flops = train_flops_per_token(run.model, run.train.seq_len)
        self.throughput = Throughput(flops, mesh.size, mesh.devices.flat[0].device_kind)
        self.display = Display(run.train.steps)
        self.best: dict[str, float] = {}

    def train(self, profile: range) -> str:
        """Train to the last step. Returns the signal that stopped the run early, or ''."""
        import jax

        from data.loader import train_loader
        from sharding.partition import local_rows
        from training.metrics import MetricsWriter
        from training.signals import StopRequest

        train, micro = self.run.train, self.plan.micro_batch_size
        rows = local_rows(self.trainer.layout, micro)
        loader = train_loader(self.prepared, train.batch_size, micro, rows)
        batches = loader.batches(self._span, self.first_step, train.steps)
        stopped = ""
        with MetricsWriter(self.run.run_dir, self.first_step) as writer, StopRequest() as stop:
            with self.display:
                for step, batch in zip(
                    range(self.first_step, train.steps), batches, strict=False
                ):
                    if step - self.first_step == profile.start and profile:
                        jax.profiler.start_trace(str(Path(self.run.run_dir) / "profile"))
                    self._one_step(step, batch, rows, writer)
                    if profile and step - self.first_step == profile.stop - 1:
                        jax.profiler.stop_trace()
                        self.display.note(f"trace of {len(profile)} steps in {self.run.run_dir}/profile")
                    if _anyone(stop.requested):
                        stopped = stop.signal_name or "a signal to another process"
                        break
        self.save({})
        return stopped

    def _span(self, step: int) -> tuple[int, int]:
        batch = self.plan.at(step)
        return batch.first_sequence, batch.batch_size

    def _one_step(self, step: int, batch, rows: range, writer) -> None:
        """Advance by one step; log, evaluate and save when due."""
        import jax
        import numpy as np

        from sharding.partition import place_rows
        from training.schedule import knobs_at

        train = self.run.train
        knobs = knobs_at(train, self.plan, step)
        placed = place_rows(self.trainer.layout, batch, rows, self.plan.micro_batch_size)
        scalars = {name: np.float32(value) for name, value in knobs.items()}
        self.state, metrics = self.trainer.step(self.state, placed, scalars)
        self.throughput.add(self.plan.at(step).batch_size * train.seq_len)
        done = step + 1
        evaluated = train.eval_every and (done % train.eval_every == 0 or done == train.steps)
        saved = self.run.checkpoint.every and done % self.run.checkpoint.every == 0
        if not (evaluated or saved or done % train.log_every == 0 or done == train.steps):
            return
        metrics = jax.device_get(metrics)
        if step == self.first_step:
            self.display.note(f"first step done {time.monotonic() - STARTED:.1f} s after start")
        self._check_skipped(step, int(metrics.pop("skipped_in_row")))
        record = {f"train/{name}": value for name, value in knobs.items()}
        record |= self._expert_loads(metrics.pop("counts_LE"))
        record |= {name: float(value) for name, value in metrics.items()}
        record |= {"train/tokens": self.plan.tokens_before(done)}
        record |= self.throughput.lap() | _peak_memory()
        if evaluated and self.prepared.stores[0].held_out.tokens:
            with self.throughput.paused():
                held_out = evaluate(self.trainer, self.state, self.prepared, train.eval_batches)
            record |= held_out
        writer.write(step, record)
        self.display.show(step, record)
        if saved:
            with self.throughput.paused():
                self.save({k: v for k, v in record.items() if k.startswith("eval/")})

    def _expert_loads(self, counts_LE) -> dict[str, float]:
        """Busiest expert over the mean, by layer; dense layers come first in the numbering."""
        first = self.run.model.num_dense_layers
        return {
            f"moe/load_max_over_mean/layer_{first + i:02d}": float(row.max() / max(row.mean(), 1))
            for i, row in enumerate(counts_LE)
        }

    def _check_skipped(self, step: int, in_row: int) -> None:
        limit = self.run.train.max_skipped_in_row
        if in_row:
            self.display.note(
                f"step {step}: loss or gradient is not finite; update skipped ({in_row} in a row)"
            )
        if limit and in_row >= limit:
            self.checkpoints.wait()
            good = self.checkpoints.steps()
            last = f"step {good[-1]} in {self.run.run_dir}/checkpoints" if good else "none"
            raise FloatingPointError(
                f"{in_row} updates in a row were not finite, the last at step {step}; last good "
                f"checkpoint: {last}. Lower the learning rate or look at the data"
            )

    def save(self, metrics: dict[str, float]) -> bool:
        """Checkpoint the state; an existing checkpoint of this step is kept."""
        step = int(self.state["step"])
        config, mesh = dataclasses.asdict(self.run), self.trainer.layout.mesh
        return self.checkpoints.save(step, self.state, config, mesh, metrics)


def _anyone(flag: bool) -> bool:
    """True if any process of the run says so."""
    import jax

    if jax.process_count() == 1:
        return flag
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def _peak_memory() -> dict[str, float]:
    from training.throughput import peak_memory_gib

    return {"mem/peak_gib": peak_memory_gib()}


# ---- What is left behind -------------------------------------------------------------------------


def finish(loop: Loop, say) -> None:
    """Held-out result against gzip, a sample, plots, and where everything is."""
    from data.evaluation import gzip_bits_per_byte
    from training.plots import plot_run

    run_dir = Path(loop.run.run_dir)
    if all(store.held_out.tokens for store in loop.prepared.stores):
        result = evaluate(loop.trainer, loop.state, loop.prepared, 0)
        gzip = gzip_bits_per_byte(loop.prepared.stores)
        accepted = result.get("eval/mtp_acceptance")
        say(
            f"held-out text: {result['eval/bits_per_byte']:.3f} bits/byte (gzip -9: {gzip:.3f}), "
            f"{result['eval/loss']:.3f} nats/token"
            + (f", MTP acceptance {accepted:.0%}" if accepted is not None else "")
        )
    text = sample_text(loop.trainer, loop.state, loop.prepared)
    say(f"sample:\n{text}\n")
    if _is_first_process():
        (run_dir / "sample.txt").write_text(text)
        plots = ", ".join(path.name for path in plot_run(run_dir))
        say(f"plots: {plots}")
    say(f"run folder: {run_dir}")


def _is_first_process() -> bool:
    import jax

    return jax.process_index() == 0


def _profile_steps(text: str) -> range:
    if not text:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
        raise ValueError(f"--profile {text!r}: give FIRST:LAST, two step numbers, such as 5:7")
    return range(int(first), int(last) + 1)


# ---- Entry ---------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 when the run is complete or was stopped in an orderly way."""
    command = parse(arguments)
    run = command.run
    try:
        profile = _profile_steps(command.profile)
        start_devices(command)
        trainer = make_trainer(run)
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2

    def say(line: str) -> None:
        if _is_first_process():
            print(line, flush=True)

    derived = describe(run, trainer)
    if command.print_config:
        print_config(run, derived)
        return 0
    say("\n".join(derived))
    try:
        prepared = prepare_data(run, say)
        loop = Loop(run, trainer, prepared)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    if _is_first_process():
        (Path(run.run_dir) / "config.json").write_text(
            json.dumps(dataclasses.asdict(run), indent=1)
        )
        (Path(run.run_dir) / "tokenizer.json").write_text(prepared.tokenizer.json)
    if loop.first_step >= run.train.steps:
        say(f"the run is complete: {loop.first_step} of {run.train.steps} steps are done")
    else:
        if loop.first_step:
            say(f"resuming at step {loop.first_step} of {run.train.steps}")
        stopped = loop.train(profile)
        if stopped:
            loop.checkpoints.close()
            say(f"{stopped}: stopped and saved at step {int(loop.state['step'])}; run again to go on")
            return 0
    loop.checkpoints.close()
    finish(loop, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
