"""Stage rl: its configuration checked, its parts wired together, its result reported."""

import contextlib
import dataclasses
import functools
from collections.abc import Generator, Sequence
from pathlib import Path

import jax

from checkpoint.hf_reader import tokenizer_file
from configs.schema import RunConfig
from data.files import digests
from data.tokenizer import Tokenizer, tokenizer_of
from generation.config import Sampling
from model.recipe import Recipe
from rl.corpus import configured_task
from rl.evaluate import Evaluation
from rl.loop import PolicyLoop
from rl.plots import plot_rl
from rl.prompts import (
    Prompts,
    TaskPrompts,
    file_prompts,
    judges_code,
    marks_in,
    misfits,
    refuse,
    rewards_of,
)
from rl.rollout import PolicySampler
from rl.server import SERVED, Server, ServerSampler, export_live
from rl.tasks.characters import character_tokenizer
from rl.trainer import PolicyTrainer
from rl.verdict.sandbox import described_isolation
from rl.verdict.scoring import Scorer, TaskScorer, judge_scorer
from runtime.agreement import agree
from runtime.processes import connect
from runtime.start import is_first_process
from sharding.partition import Layout
from training.display import Display
from training.loop import Checkpoints
from training.metrics import read_metrics
from training.run import Say, Session, check_stores, newest_meta, open_state, to_end, write_settings
from training.schedule import Plateau
from training.step import State, Trainer


def make_trainer(run: RunConfig, recipe: Recipe, layout: Layout) -> PolicyTrainer:
    """The trainer of stage rl.

    Raises ValueError for a task, a rollout, an answer's length or a mesh that cannot work.
    """
    rl, train = run.rl, run.train
    if bool(run.task.name) == bool(rl.prompts):
        both = f"both task.name={run.task.name} and rl.prompts" if rl.prompts else "no prompts"
        raise ValueError(
            f"stage rl has {both}; give a task, such as --task.name permutations, or a file of "
            "prompts, --rl.prompts FILE.jsonl with --task.name ''"
        )
    rewards_of(rl)
    task = configured_task(run.task) if run.task.name else None
    if task is not None and rl.template != "plain":
        raise ValueError(f"rl.template={rl.template} is for texts of rl.prompts, not for a task")
    if rl.language_weight and (
        task is None or "language" not in task.inspect(task.prompt(run.seed, 0), "")
    ):
        raise ValueError(
            f"rl.language_weight is {rl.language_weight}, but {run.task.name or 'the file'} does "
            "not tell languages apart; for permutations set --task.options scripts=2, for a file "
            "give --rl.rewards accuracy language, or set the weight to 0"
        )
    updates = rl.updates(train.batch_size)
    if train.steps % updates:
        raise ValueError(
            f"a rollout serves {updates} updates, which does not divide train.steps={train.steps}"
        )
    if train.batch_ramp_from:
        raise ValueError(
            f"train.batch_ramp_from is {train.batch_ramp_from}; stage rl has no ramp, set it to 0"
        )
    if rl.max_new_tokens > train.seq_len:
        raise ValueError(
            f"rl.max_new_tokens={rl.max_new_tokens} and a prompt do not fit into train.seq_len="
            f"{train.seq_len}; raise that (model.max_position is {run.model.max_position}), or "
            "lower max_new_tokens"
        )
    if rl.server and jax.process_count() > 1:
        raise ValueError("rl.server is asked by one process; run with one, or leave it out")
    if rl.speculate and not run.model.mtp_depth:
        raise ValueError(
            "rl.speculate needs an MTP module, and model.mtp_depth is 0; leave speculate off"
        )
    return PolicyTrainer(run.model, train, recipe, layout, rl.objective, rl.temperature)


def policy_tokenizer(run: RunConfig, init_from: str) -> Tokenizer:
    """The tokenizer that the run has used before; else that of the weights it starts from; else
    data.tokenizer; else the characters of the task. ValueError if data.tokenizer is another than
    that of the weights, or if it is larger than the model's."""
    folders = [Path(run.run_dir)] * bool(newest_meta(run)) + [Path(init_from)] * bool(init_from)
    own = next(filter(None, map(tokenizer_file, folders)), None)
    tokenizer = tokenizer_of(run.data.tokenizer, own)
    if tokenizer is None and run.task.name:
        tokenizer = character_tokenizer(configured_task(run.task).vocabulary)
    if tokenizer is None:
        raise ValueError(
            "there is no tokenizer for the prompts: give --init-from a folder with tokenizer.json, "
            "or --data.tokenizer FILE"
        )
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ValueError(
            f"tokenizer has {tokenizer.vocab_size} ids, model.vocab_size is "
            f"{run.model.vocab_size}; raise the model's to at least that"
        )
    return tokenizer


def conventions_in_words(tokenizer: Tokenizer) -> str:
    """A line about how prompts begin, how answers end, and how conversations are laid out."""
    known = tokenizer.conventions
    ends = ", ".join(tokenizer.decode([i]) for i in tokenizer.end_ids)
    template = "the tokenizer's own template" if known.template else "the template of V3 and R1"
    return (
        f"tokenizer    {tokenizer.vocab_size} ids; texts begin with {known.begins or 'nothing'}, "
        f"answers end with {ends}; conversations by {template}"
    )


def check_prompts(run: RunConfig, prompts: Prompts) -> None:
    """Raise ValueError that lists the prompts that do not fit or have characters without a token.

    A file is measured whole; of a task what `rl/prompts.py:TaskPrompts.to_measure` says.
    """
    rl, evaluated = run.rl, bool(run.train.eval_every)
    asked = run.train.steps // rl.updates(run.train.batch_size) * rl.prompts_per_step
    train, held_out = prompts.to_measure(asked, rl.eval_prompts if evaluated else 0)
    model = {"model.max_position": run.model.max_position}
    both = {"train.seq_len": run.train.seq_len + 1, **model}
    known = prompts.tokenizer
    wrong = misfits(known, train, rl.max_new_tokens, both)
    wrong += misfits(known, held_out, rl.max_new_tokens, model)
    refuse(wrong, len(train) + len(held_out))


def make_prompts(run: RunConfig, tokenizer: Tokenizer) -> Prompts:
    """Prompts of task or file; ValueError if they cannot be read, judged or answered."""
    if run.task.name:
        prompts = TaskPrompts(configured_task(run.task), tokenizer, run.seed)
    else:
        prompts = file_prompts(run.rl, tokenizer, run.seed)
    check_prompts(run, prompts)
    return prompts


@contextlib.contextmanager
def open_scorer(run: RunConfig) -> Generator[Scorer]:
    """The task's verifier, or a judge's workers, which end with the context."""
    task = configured_task(run.task) if run.task.name else None
    if task is not None and not run.rl.rewards:
        yield TaskScorer(task, run.rl)
        return
    scorer = judge_scorer(run.rl, task)
    with scorer.judge:
        yield scorer


def make_sampler(trainer: Trainer, run: RunConfig, tokenizer: Tokenizer, greedy: bool, rows: int):
    """A sampler on the trainer's mesh and in its types, or a server; `greedy` for evaluation."""
    rl = run.rl
    temperature = 0.0 if greedy else rl.temperature
    if rl.server:
        write = None
        if rl.server_reload:
            write = functools.partial(export_live, trainer.model, Path(run.run_dir))
        return ServerSampler(
            Server(rl.server, rl.server_model), tokenizer, temperature, rl.max_new_tokens, write,
            Path(run.run_dir) / SERVED,
        )  # fmt: skip
    sampling = Sampling(temperature, top_k=rl.top_k, top_p=rl.top_p)
    return PolicySampler(
        trainer.model, trainer.recipe, trainer.layout, sampling,
        rows=rows, max_new_tokens=rl.max_new_tokens, eos_ids=tokenizer.end_ids,
        speculate=rl.speculate, replay=rl.replay_routing and not greedy,
    )  # fmt: skip


def make_loop(
    run: RunConfig, trainer: PolicyTrainer, state: State, checkpoints: Checkpoints,
    prompts: Prompts, scorer: Scorer, session: Session, past: Sequence[Plateau] = (),
) -> PolicyLoop:  # fmt: skip
    """Wire the parts together; `state` is new or restored, with `past` batches behind it."""
    rl, tokenizer = run.rl, prompts.tokenizer
    if not int(state["step"]):  # weights may have been loaded since
        state = trainer.renew_reference(state)
    rows = rl.rollout_rows or rl.answers
    sampler = make_sampler(trainer, run, tokenizer, False, rows)
    evaluation = None
    held_out = prompts.held_out(rl.eval_prompts) if run.train.eval_every else None
    if held_out is not None and held_out.ids:
        drawn = sampler if rl == rl.uncut else make_sampler(
            trainer, dataclasses.replace(run, rl=rl.uncut), tokenizer, False, rows
        )  # fmt: skip
        greedy = make_sampler(trainer, run, tokenizer, True, rows)
        evaluation = Evaluation(held_out, prompts, scorer, drawn, greedy)
    return PolicyLoop(
        trainer=trainer, rl=rl, state=state, past=past, run_dir=Path(run.run_dir),
        config=dataclasses.asdict(run), prompts=prompts, scorer=scorer, sampler=sampler,
        evaluation=evaluation, checkpoints=checkpoints, save_every=run.checkpoint.every,
        display=Display(run.train.steps), profile=session.profile, started=session.started,
    )  # fmt: skip


def describe(run: RunConfig) -> list[str]:
    """What follows from the configuration of stage rl, one line each."""
    rl = run.rl
    updates = rl.updates(run.train.batch_size)
    return [
        f"rollout      {rl.prompts_per_step} prompts x {rl.objective.group_size} answers of at "
        f"most {rl.max_new_tokens} tokens, for {updates} update{'s' * (updates > 1)} of "
        f"{run.train.batch_size}",
        f"task         {configured_task(run.task) if run.task.name else rl.prompts}",
        f"objective    {rl.objective_of or 'own'}",
    ]


def run_stage(run: RunConfig, trainer: Trainer, session: Session) -> int:
    """Stage rl to its end, or to a signal; the status that a process exits with.

    Args:
      trainer: of `make_trainer`.
      session: its profile counts steps in whole rollouts with their updates.
    """
    assert isinstance(trainer, PolicyTrainer)
    say = session.say
    tokenizer = policy_tokenizer(run, session.init_from)
    agree("data", lambda: {"tokenizer": tokenizer.sha256})
    say(conventions_in_words(tokenizer))
    prompts = make_prompts(run, tokenizer)
    if letters := marks_in(prompts):
        say(f"warning: {', '.join(letters)} in prompts are read as letters")
    if judges_code(run.rl, prompts):
        say(f"code         runs {described_isolation(run.rl.unsafe_code)}")
    connect(trainer.layout.mesh)
    with open_scorer(run) as scorer:
        checkpoints, state, plan = open_state(run, trainer, session)
        past = plan.history(int(state["step"]))
        loop = make_loop(run, trainer, state, checkpoints, prompts, scorer, session, past)
        texts = digests([run.rl.prompts])
        check_stores(run, texts, say)
        write_settings(run, tokenizer.files, texts)
        return to_end(loop, run, say, loop.run, lambda: finish(loop, say))


def finish(loop: PolicyLoop, say: Say) -> None:
    """The first and the last evaluation in words, failed rewards, and the plot; process 0 alone."""
    if not is_first_process():
        return
    lines = read_metrics(loop.run_dir)
    if loop.evaluation and (text := compared([r for r in lines if "eval/length" in r])):
        say(f"held out, {len(loop.evaluation.questions.ids)} prompts: {text}")
    failed = [r["policy/failed_rewards"] for r in lines if r.get("policy/failed_rewards")]
    if failed:
        rollouts = sum("policy/failed_rewards" in r for r in lines)
        say(
            f"REWARDS FAILED, each counted as 0: {sum(failed) / rollouts:.3g} per answer, in "
            f"{len(failed)} of {rollouts} rollouts"
        )
    for (name, kind), message in loop.failures.items():
        say(f"  reward {name} ({kind}): {message}")
    plots = ", ".join(path.name for path in plot_rl(loop.run_dir))
    say(f"plots: {plots}; answers: samples.jsonl; run folder: {loop.run_dir}")


def compared(lines: list[dict[str, float]]) -> str:
    """The first evaluation and the last in words; '' for none."""
    names = {
        "accuracy": "accuracy at temperature 1", "accuracy_greedy": "greedy",
        "reward": "mean reward at temperature 1", "reward_greedy": "greedy", "length": "length",
    }  # fmt: skip
    return "; ".join(
        f"{title}: {lines[0][f'eval/{name}']:.3f} -> {lines[-1][f'eval/{name}']:.3f}"
        for name, title in names.items()
        if lines and all(f"eval/{name}" in line for line in (lines[0], lines[-1]))
    )
