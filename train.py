"""Train a DeepSeek-V3 family model: `python train.py --config tiny --emulate 8 --layout cube`.

Reads top to bottom: devices, configuration, data, model and state, loop, what is left behind. The
stage of the configuration decides what is learned: text, examples, rewards, or a teacher's answers.
`--help` lists every option, `--print-config` shows what a run would be.
"""

import dataclasses
import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.command import Command, parse, print_config
from configs.schema import RunConfig

if TYPE_CHECKING:
    from checkpoint.manager import CheckpointManager
    from data.prepare import Prepared
    from training.loop import Loop
    from training.step import Trainer

STARTED = time.monotonic()
SAMPLE_LENGTH = 128


# ---- Devices -------------------------------------------------------------------------------------


def start_devices(command: Command) -> None:
    """Emulated devices, compilation cache, and the other processes of the run."""
    import jax

    from checkpoint.folder import how_to_resume
    from runtime.devices import emulate_devices
    from runtime.host_memory import keep_freed_memory
    from runtime.processes import join_processes, when_lost

    if command.emulate or find_spec("jax_cuda13_plugin") is None:
        keep_freed_memory()
    if command.emulate:
        emulate_devices(command.emulate)
    if command.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.abspath(command.compilation_cache))
    when_lost(lambda: how_to_resume(Path(command.run.run_dir) / "checkpoints"))
    join_processes(
        command.distributed,
        command.coordinator,
        command.num_processes,
        command.process_id,
        command.join_within,
        command.lost_after,
    )


# ---- Configuration -------------------------------------------------------------------------------


def make_trainer(run: RunConfig) -> "Trainer":
    """Everything that can be checked before data is read or an array exists."""
    from data.prepare import check_config
    from model.kernels import choose
    from model.recipe import Recipe
    from sharding.mesh import make_layout
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
    layout = make_layout(run.mesh)
    choice = choose(run.kernels, run.model, run.train.dtype, layout, run.train.fp8)
    recipe = Recipe(run.train.dtype, run.train.remat, choice.kernels, fp8=run.train.fp8)
    if run.stage == "pretrain":
        trainer = Trainer(run.model, run.train, recipe, layout)
    else:
        trainer = stage_module(run).make_trainer(run, recipe, layout)
    _ = trainer.abstract_state  # names any weight that does not divide over the mesh
    return trainer


def stage_module(run: RunConfig) -> Any:
    """What knows the stages after pre-training: `make_trainer`, `describe` and `run_stage`."""
    from rl import stage_rl as stages
    from rl import stage_sft as tuning

    return stages if run.stage == "rl" else tuning


def describe(run: RunConfig, trainer: "Trainer") -> list[str]:
    """What follows from a configuration, one line each."""
    import jax

    from model.costs import cache_bytes_per_token, count_parameters, train_flops_per_token
    from model.kernels import choose
    from sharding.mesh import describe as describe_mesh
    from training.display import human
    from training.schedule import BatchPlan

    plan, train = BatchPlan(run.train), run.train
    choice = choose(run.kernels, run.model, train.dtype, trainer.layout, train.fp8)
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
        f"compute      {human(flops)}FLOP/token (causal, without MTP), "
        f"{train.dtype}{' with fp8 products' * train.fp8}, "
        f"remat {train.remat}",
        *(f"kernels      {line}" for line in choice.describe()),
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


# ---- Data ----------------------------------------------------------------------------------------


def prepare_data(run: RunConfig, say) -> "Prepared":
    """Tokenizer and token stores; process 0 builds what the others then find."""
    import jax

    from data.prepare import prepare
    from rl.corpus import corpus_data
    from runtime.processes import barrier

    if jax.process_index() > 0:
        barrier("data")
    data = corpus_data(run.task, run.data, run.seed, say) if run.task.name else run.data
    prepared = prepare(data, run.train.seq_len, run.seed, say)
    if jax.process_index() == 0:
        barrier("data")
    if prepared.tokenizer.vocab_size > run.model.vocab_size:
        raise ValueError(
            f"tokenizer has {prepared.tokenizer.vocab_size} ids, model.vocab_size is "
            f"{run.model.vocab_size}; raise the model's to at least that"
        )
    return prepared


# ---- Loop ----------------------------------------------------------------------------------------


def held_out_evaluation(trainer: "Trainer", prepared: "Prepared", max_batches: int):
    """A function from state to held-out metrics; None without held-out text; 0 batches: all."""
    from data.evaluation import held_out_reader
    from sharding.partition import local_rows
    from training.evaluate import evaluate

    if not all(store.held_out.tokens for store in prepared.stores):
        return None
    num_rows = trainer.train.micro_batch_size or trainer.train.batch_size
    rows = local_rows(trainer.layout, num_rows)
    reader = held_out_reader(prepared, num_rows, max_batches, rows)
    return lambda state: evaluate(trainer, state, reader, rows, num_rows)


def initial_state(run: RunConfig, trainer: "Trainer", init_from: str, say) -> Any:
    """Random weights, or those of `init_from`, with fresh optimizer state."""
    import jax

    if not init_from:
        return trainer.init(jax.random.key(run.seed))
    from checkpoint.weights import load_initial

    state = trainer.init(jax.random.key(run.seed))
    for tree in ("params", "router_bias"):  # make room; only MTP modules may be missing elsewhere
        state[tree] = {name: x for name, x in state[tree].items() if name == "mtp"}
    averaged = state.pop("ema", None) is not None
    loaded, note = load_initial(Path(init_from), run.model, trainer.abstract_state)
    say(note)
    for tree in ("params", "router_bias"):
        state[tree] |= loaded[tree]
    if averaged:
        state["ema"] = jax.tree.map(lambda x: x.copy(), state["params"])
    return state


def check_initial_weights(run: RunConfig, init_from: str) -> None:
    """Raise what `initial_state` would, but before data is prepared."""
    from checkpoint.folder import find_steps
    from checkpoint.weights import open_initial

    if init_from and not find_steps(Path(run.run_dir) / "checkpoints"):
        open_initial(Path(init_from), run.model)


def open_state(
    run: RunConfig, trainer: "Trainer", init_from: str, say
) -> tuple["CheckpointManager", Any]:
    """The run's checkpoints, and its state: of the newest good one, or a new one."""
    from checkpoint.manager import CheckpointManager

    checkpoints = CheckpointManager(Path(run.run_dir) / "checkpoints", run.checkpoint)
    state = checkpoints.restore(trainer.abstract_state)
    if state is None:
        state = initial_state(run, trainer, init_from, say)
    return checkpoints, state


def make_loop(
    run: RunConfig, trainer: "Trainer", prepared: "Prepared", profile: range, init_from: str, say
) -> "Loop":
    """Restore the newest good checkpoint or initialise, and wire the parts together."""
    from model.costs import train_flops_per_token
    from training.display import Display
    from training.loop import Loop
    from training.schedule import BatchPlan
    from training.throughput import Throughput

    checkpoints, state = open_state(run, trainer, init_from, say)
    mesh = trainer.layout.mesh
    flops = train_flops_per_token(run.model, run.train.seq_len)
    return Loop(
        trainer=trainer,
        plan=BatchPlan(run.train),
        state=state,
        run_dir=Path(run.run_dir),
        config=dataclasses.asdict(run),
        checkpoints=checkpoints,
        save_every=run.checkpoint.every,
        evaluate=held_out_evaluation(trainer, prepared, run.train.eval_batches),
        throughput=Throughput(flops, mesh.size, mesh.devices.flat[0].device_kind),
        display=Display(run.train.steps),
        profile=profile,
        started=STARTED,
    )


def run_loop(loop: "Loop", prepared: "Prepared") -> str:
    """Train; the name of the signal that ended it early, or ''."""
    from data.loader import train_loader
    from sharding.partition import local_rows

    train, plan = loop.trainer.train, loop.plan
    rows = local_rows(loop.trainer.layout, plan.micro_batch_size)
    loader = train_loader(prepared, train.batch_size, plan.micro_batch_size, rows)

    def span(step: int) -> tuple[int, int]:
        batch = plan.at(step)
        return batch.first_sequence, batch.batch_size

    return loop.run(loader.batches(span, loop.first_step, train.steps), rows)


# ---- What is left behind -------------------------------------------------------------------------


def sample_text(trainer: "Trainer", state: Any, prepared: "Prepared", text: str) -> str:
    """One continuation of `text`, to SAMPLE_LENGTH tokens or the length of a sequence."""
    import jax
    import numpy as np

    from sharding.partition import batch_shards

    tokenizer = prepared.tokenizer
    prompt = np.concatenate([[tokenizer.eos_id], tokenizer.encode(text)])
    length = min(SAMPLE_LENGTH, trainer.train.seq_len)
    ids = np.zeros((batch_shards(trainer.layout), length), np.int32)
    ids[:, : len(prompt)] = prompt
    key = jax.random.key(prepared.seed)
    weights = state["params"], state["router_bias"]
    row = np.asarray(trainer.sample(*weights, ids, np.int32(len(prompt)), key))[0, 1:]
    end = np.flatnonzero(row == tokenizer.eos_id)
    return tokenizer.decode(row[: end[0]] if len(end) else row)


def finish(loop: "Loop", prepared: "Prepared", run: RunConfig, say) -> None:
    """Held-out result against gzip, a sample, plots, and where everything is."""
    from data.evaluation import gzip_bits_per_byte
    from rl.corpus import sample_prompt
    from training.plots import plot_run

    evaluate = held_out_evaluation(loop.trainer, prepared, 0)
    if evaluate is not None:
        result, gzip = evaluate(loop.state), gzip_bits_per_byte(prepared.stores)
        accepted = result.get("eval/mtp_acceptance")
        say(
            f"held-out text: {result['eval/bits_per_byte']:.3f} bits/byte (gzip -9: {gzip:.3f}), "
            f"{result['eval/loss']:.3f} nats/token"
            + (f", MTP acceptance {accepted:.0%}" if accepted is not None else "")
        )
    prompt = run.sample_prompt or sample_prompt(run.task, run.seed)
    text = sample_text(loop.trainer, loop.state, prepared, prompt)
    say(f"sample:\n{text}\n")
    if _is_first_process():
        (loop.run_dir / "sample.txt").write_text(text)
        plots = ", ".join(path.name for path in plot_run(loop.run_dir))
        say(f"plots: {plots}")
    say(f"run folder: {loop.run_dir}")


def _is_first_process() -> bool:
    import jax

    return jax.process_index() == 0


# ---- Entry ---------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    0: complete, or stopped in an orderly way. 1: an error of the program. 2: refused or given up,
    for the reason on stderr. 3: another process of the run was lost or failed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    named = {argument.partition("=")[0] for argument in arguments}
    if "--recipe" in named and not {"-h", "--help"} & named:
        from rl.recipe import run_recipe

        return run_recipe(arguments)
    command = parse(arguments)
    from runtime.processes import together  # --help needs no JAX

    return together("train.py", lambda: train(command), (ValueError, OSError, FloatingPointError))


def train(command: Command) -> int:
    """Check, print what the run is, and run it."""
    if command.recipe:
        raise ValueError(f"recipe {command.recipe} is no single run; only main() starts one")
    run, profile = command.run, command.profile_steps
    start_devices(command)
    trainer = make_trainer(run)

    def say(line: str) -> None:
        if _is_first_process():
            print(line, flush=True)

    derived = describe(run, trainer)
    if run.stage != "pretrain":
        derived += stage_module(run).describe(run)
    if command.print_config:
        print_config(run, derived)
        return 0
    say("\n".join(derived))
    check_initial_weights(run, command.init_from)
    if run.stage != "pretrain":
        run_stage = stage_module(run).run_stage
        return run_stage(run, trainer, profile, command.init_from, open_state, STARTED, say)
    return run_to_end(run, trainer, profile, command.init_from, say)


def run_to_end(run: RunConfig, trainer: "Trainer", profile: range, init_from: str, say) -> int:
    """Data, loop, and what is left behind."""
    from runtime.processes import connect

    prepared = prepare_data(run, say)
    connect(trainer.layout.mesh)
    loop = make_loop(run, trainer, prepared, profile, init_from, say)
    if _is_first_process():
        settings = json.dumps(dataclasses.asdict(run), indent=1)
        (loop.run_dir / "config.json").write_text(settings)
        (loop.run_dir / "tokenizer.json").write_text(prepared.tokenizer.json)
    stopped = ""
    if loop.first_step >= run.train.steps:
        say(f"the run is complete: {loop.first_step} of {run.train.steps} steps are done")
    else:
        if loop.first_step:
            say(f"resuming at step {loop.first_step} of {run.train.steps}")
        stopped = run_loop(loop, prepared)
    loop.checkpoints.wait()
    if stopped:
        step = int(loop.state["step"])
        say(f"{stopped}: stopped and saved at step {step} in {run.run_dir}; run again to go on")
    else:
        finish(loop, prepared, run, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
