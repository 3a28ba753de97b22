"""Train a DeepSeek-V3 family model: `python train.py --config tiny --emulate 8 --layout cube`.

Reads top to bottom: the command, the pre-training stage (data, loop, result), other stages, entry.
The stage of the configuration decides what is learned: text, examples, rewards, or a teacher's
answers. `--help` lists every option, `--print-config` shows what a run would be.
"""

from runtime.interpreter import check_interpreter

check_interpreter()  # in one line, before an import fails

import argparse
import difflib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from configs.command import Command, parse, print_config
from configs.schema import RunConfig

if TYPE_CHECKING:
    import numpy as np

    from data.prepare import Prepared
    from data.tokenizer import Tokenizer
    from model.recipe import Recipe
    from sharding.partition import Layout
    from training.loop import Loop
    from training.run import Say, Session
    from training.step import State, Trainer

STARTED = time.monotonic()
SAMPLE_LENGTH = 128
LAST_EVALUATION = 1 << 20
"""Tokens that the evaluation at the end of a run scores at most."""
OWN_OPTIONS = ("run-dir", "data.cache-dir", "profile")
"""Options that may differ between processes: names of places, which are compared as places."""
RECIPES = Path(__file__).resolve().parent / "runs"
"""Folder of the scripts that --recipe runs."""


class Stage(Protocol):
    """What train.py asks of a stage: this file for pretrain, else a module of rl/."""

    def make_trainer(self, run: RunConfig, recipe: "Recipe", layout: "Layout") -> "Trainer":
        """The trainer; ValueError for a configuration that cannot work."""
        ...

    def describe(self, run: RunConfig) -> list[str]:
        """What follows from the configuration of the stage, one line each."""
        ...

    def run_stage(self, run: RunConfig, trainer: "Trainer", session: "Session") -> int:
        """Train to the end, or to a signal; the status that a process exits with."""
        ...


def stage_of(run: RunConfig) -> Stage:
    """The stage that a configuration names."""
    if run.stage == "pretrain":
        return Pretraining()
    if run.stage == "images":
        from vision import stage

        return stage
    from rl import stage_rl, stage_sft

    return stage_rl if run.stage == "rl" else stage_sft


# ---- Configuration -------------------------------------------------------------------------------


def make_trainer(run: RunConfig) -> "Trainer":
    """Check everything that can be checked before data is read or an array exists."""
    from data.prepare import check_config
    from model.kernels import choose
    from sharding.mesh import make_layout
    from training.recipe import recipe_of
    from training.run import make_check, plan_of
    from training.schedule import check_schedules

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
    check_schedules(run.train, plan_of(run))
    layout = make_layout(run.mesh)
    choice = choose(run.kernels, run.model, run.train.dtype, layout, run.train.fp8)
    recipe = recipe_of(run.train, choice.kernels)
    trainer = stage_of(run).make_trainer(run, recipe, layout)
    _ = trainer.abstract_state  # names any weight that does not divide over the mesh
    make_check(trainer)  # refuses what it cannot check
    return trainer


# ---- Pre-training --------------------------------------------------------------------------------


def prepare_data(run: RunConfig, say: "Say", init_from: str = "") -> "Prepared":
    """Tokenizer and token stores; process 0 builds what the others then find."""
    import jax

    from data.prepare import prepare
    from rl.corpus import corpus_data
    from runtime.agreement import agree
    from runtime.processes import barrier

    if jax.process_index() > 0:
        barrier("data")
    data = corpus_data(run.task, run.data, run.seed, say) if run.task.name else run.data
    own = tokenizer_of_weights(run, data.tokenizer, init_from, say)
    prepared = prepare(data, run.train.seq_len, run.seed, say, own)
    if jax.process_index() == 0:
        barrier("data")
    if prepared.tokenizer.vocab_size > run.model.vocab_size:
        raise ValueError(
            f"tokenizer has {prepared.tokenizer.vocab_size} ids, model.vocab_size is "
            f"{run.model.vocab_size}; raise the model's to at least that"
        )
    stores = {
        f"{store.meta['source']} (names, sizes and times of files)": store.meta["fingerprint"]
        for store in prepared.stores
    }
    agree("data", lambda: {"tokenizer": prepared.tokenizer.sha256, **stores})
    return prepared


def tokenizer_of_weights(
    run: RunConfig, given: str, init_from: str, say: "Say"
) -> "Tokenizer | None":
    """The run's first tokenizer, or that of the weights it begins from; None for random weights.

    ValueError if `given` is another, or if nothing tells what the weights' ids mean.
    """
    from checkpoint.hf_reader import tokenizer_file
    from data.tokenizer import tokenizer_of
    from training.run import newest_meta

    folder = run.run_dir if newest_meta(run) else init_from
    if not folder:
        return None
    tokenizer = tokenizer_of(given, tokenizer_file(Path(folder)))
    if tokenizer is None:
        raise ValueError(
            f"{folder} has weights and no tokenizer.json; a new tokenizer would give their "
            "embeddings other meanings. Give theirs: --data.tokenizer FILE"
        )
    say(f"tokenizer: of the weights in {folder}, {tokenizer.vocab_size} ids")
    return tokenizer


class Pretraining:
    """Stage pretrain: next-token prediction over packed documents."""

    def make_trainer(self, run: RunConfig, recipe: "Recipe", layout: "Layout") -> "Trainer":
        """The trainer of pre-training."""
        from training.step import Trainer

        return Trainer(run.model, run.train, recipe, layout)

    def describe(self, run: RunConfig) -> list[str]:
        """Nothing in addition to what is said of every run."""
        return []

    def run_stage(self, run: RunConfig, trainer: "Trainer", session: "Session") -> int:
        """Data, loop and result; the status that a process exits with."""
        from data.loader import train_loader
        from runtime.processes import connect
        from training.run import check_stores, open_loop, to_end, train_on, write_settings

        prepared = prepare_data(run, session.say, session.init_from)
        check_sample(run, trainer, prepared)
        connect(trainer.layout.mesh)
        evaluate = held_out_evaluation(trainer, prepared, run.train.eval_batches, session.say)
        loop = open_loop(run, trainer, session, evaluate)
        stores = {store.meta["source"]: store.meta["fingerprint"] for store in prepared.stores}
        check_stores(run, stores, session.say)
        write_settings(run, prepared.tokenizer.of_documents().files, stores)

        def train() -> str:
            return train_on(
                loop, lambda micro, rows: train_loader(prepared, run.train.batch_size, micro, rows)
            )

        return to_end(
            loop, run, session.say, train, lambda: finish(loop, prepared, run, session.say)
        )


def held_out_evaluation(trainer: "Trainer", prepared: "Prepared", max_batches: int, say: "Say"):
    """A function from state to held-out metrics; None without held-out text; 0 batches: all."""
    from data.evaluation import held_out_reader
    from sharding.partition import local_rows
    from training.evaluate import evaluate

    if not all(store.held_out.tokens for store in prepared.stores):
        return None
    num_rows = trainer.train.micro_batch_size or trainer.train.batch_size
    rows = local_rows(trainer.layout, num_rows)
    reader = held_out_reader(prepared, num_rows, max_batches, rows)
    return lambda state: evaluate(trainer, state, reader, rows, num_rows, say)


def last_batches(trainer: "Trainer", prepared: "Prepared", say: "Say") -> int:
    """Batches of the evaluation at the end: 0, all, or as many as LAST_EVALUATION has."""
    total = sum(store.held_out.tokens for store in prepared.stores)
    if total <= LAST_EVALUATION or not all(store.meta["byte_exact"] for store in prepared.stores):
        return 0
    num_rows = trainer.train.micro_batch_size or trainer.train.batch_size
    say(f"evaluating {LAST_EVALUATION:,} of {total:,} held-out tokens, evenly spaced")
    return max(1, LAST_EVALUATION // (num_rows * trainer.train.seq_len))


def sample_start(trainer: "Trainer", prepared: "Prepared", text: str) -> "np.ndarray":
    """Ids that a sample begins with, int32 [n]: of `text`, cut where a sequence has no room."""
    ids = prepared.tokenizer.of_documents().encode_prompt(text)
    return ids[: max(trainer.train.seq_len, 2) - 1]


def check_sample(run: RunConfig, trainer: "Trainer", prepared: "Prepared") -> None:
    """Raise, before training, what the sample would after it, and ValueError for a prompt that
    would be cut."""
    from generation.engine import Generator
    from rl.corpus import sample_prompt

    text = run.sample_prompt or sample_prompt(run.task, run.seed)
    prompt = sample_start(trainer, prepared, text)
    needed = len(prepared.tokenizer.of_documents().encode_prompt(text))
    if run.sample_prompt and needed > len(prompt):
        raise ValueError(
            f"--sample-prompt takes {needed} tokens, one at its start included, and a sequence has "
            f"room for {len(prompt)} (--train.seq-len {run.train.seq_len}, and one to come); "
            "shorten it"
        )
    Generator(trainer.model, trainer.recipe, trainer.layout).check([prompt], 1, False)


def sample_text(trainer: "Trainer", state: "State", prepared: "Prepared", text: str) -> str:
    """`text` continued by generation/, to SAMPLE_LENGTH tokens, half as many after a long text, or
    the length of a sequence."""
    from generation.config import Sampling
    from generation.engine import Generator

    tokenizer = prepared.tokenizer.of_documents()
    prompt = sample_start(trainer, prepared, text)
    longest = max(SAMPLE_LENGTH, len(prompt) + SAMPLE_LENGTH // 2)
    room = max(1, min(longest, trainer.train.seq_len) - len(prompt))
    generator = Generator(trainer.model, trainer.recipe, trainer.layout)
    weights = generator.prepare({tree: state[tree] for tree in ("params", "router_bias")})
    sampling = Sampling(temperature=0.8, seed=prepared.seed)
    session = generator.start(weights, [prompt], sampling, room, (tokenizer.eos_id,))
    ids = prompt.tolist()
    while not session.done:
        ids += session.advance()[0].tolist()
    return tokenizer.decode(i for i in ids if i != tokenizer.eos_id)


def finish(loop: "Loop", prepared: "Prepared", run: RunConfig, say: "Say") -> None:
    """Held-out result against gzip, a sample, plots, and where everything is."""
    from data.evaluation import gzip_bits_per_byte
    from rl.corpus import sample_prompt
    from runtime.start import is_first_process
    from training.plots import plot_run

    batches = last_batches(loop.trainer, prepared, say)
    evaluate = held_out_evaluation(loop.trainer, prepared, batches, say)
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
    if is_first_process():
        (loop.run_dir / "sample.txt").write_text(text)
        plots = ", ".join(path.name for path in plot_run(loop.run_dir))
        say(f"plots: {plots}")
    say(f"run folder: {loop.run_dir}")


# ---- Entry ---------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    0: complete, or stopped in an orderly way. 1: an error of the program. 2: refused or given up,
    for the reason on stderr. 3: another process of the run was lost or failed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    named = {argument.partition("=")[0] for argument in arguments}
    if "--recipe" in named and not {"-h", "--help"} & named:
        return run_recipe(arguments)
    command = parse(arguments)
    from runtime.processes import together  # --help needs no JAX

    return together("train.py", lambda: train(command), (ValueError, OSError, FloatingPointError))


def run_recipe(arguments: list[str]) -> int:
    """Become the script of `--recipe NAME [--run-dir DIR] [options of every stage]`; 2: no such."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--run-dir", "--run_dir", default="")
    ours, others = parser.parse_known_args(arguments)
    scripts = {path.stem: path for path in sorted(RECIPES.glob("*.sh")) if path.stem != "stage"}
    if ours.recipe not in scripts:
        near = difflib.get_close_matches(ours.recipe, scripts, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        print(f"--recipe {ours.recipe!r}: {hint}Known: {', '.join(scripts)}", file=sys.stderr)
        return 2
    folder = ours.run_dir or f"runs/{ours.recipe}"
    words = ["bash", str(scripts[ours.recipe]), folder, *others]
    os.execvpe("bash", words, os.environ | {"PYTHON": sys.executable})


def train(command: Command) -> int:
    """Check, print what the run is, and run it."""
    if command.recipe:
        raise ValueError(f"recipe {command.recipe} is no single run; only main() starts one")
    from checkpoint.folder import how_to_resume
    from checkpoint.weights import version_of
    from runtime.agreement import agree, agree_on_command
    from runtime.processes import when_lost
    from runtime.start import is_first_process, start
    from training.run import Session, check_initial_weights, check_resumed, run_folder
    from training.summary import summary

    run = command.run
    when_lost(lambda: how_to_resume(Path(run.run_dir) / "checkpoints"))
    start(command, idle=command.print_config)
    agree_on_command(command, ("run",), OWN_OPTIONS)
    agree(
        "weights",
        lambda: {place: version_of(place) for place in (command.init_from, run.sft.policy)},
    )
    trainer, stage = make_trainer(run), stage_of(run)

    def say(line: str) -> None:
        if is_first_process():
            print(line, flush=True)

    derived = summary(run, trainer, command.gpu) + stage.describe(run)
    derived += check_memory(command, trainer)
    if command.print_config:
        print_config(command, derived)
        return 0
    session = Session(say, STARTED, command.init_from, command.profile_steps)
    say("\n".join(derived))
    with run_folder(run, trainer, say):
        check_resumed(run, say)
        check_initial_weights(run, command.init_from)
        return stage.run_stage(run, trainer, session)


def check_memory(command: Command, trainer: "Trainer") -> list[str]:
    """A line about a step's memory on GPUs, those that are there or that --gpu names; none on CPU.

    ValueError for a run that cannot fit, unless --no-memory-check says to go on.
    """
    from planning.guard import gpu_of_kind, memory_line
    from sharding.devices import device_kind, num_devices, on_platform

    run, gpu = command.run, command.gpu
    if on_platform(trainer.layout, "cuda", "gpu"):
        gpu = gpu_of_kind(device_kind(trainer.layout)) or gpu
    if not gpu or run.stage != "pretrain":
        return []
    line, refusal = memory_line(run, gpu, num_devices(trainer.layout))
    if refusal and command.memory_check and not command.print_config:
        raise ValueError(refusal)
    return [line, *([f"warning      {refusal}"] if refusal else [])]


if __name__ == "__main__":
    sys.exit(main())
