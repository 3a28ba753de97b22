"""Stages sft and distill from a configuration: answers are learned, prompts are not.

Both run the trainer, the loop and the checkpoints of pre-training over rows of packed examples.
Stage distill has a teacher, whose answers it samples as stage sft does, and whose distribution it
can learn besides (`rl/examples/teacher.py`).
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint.hf_reader import tokenizer_file
from configs.schema import RunConfig
from data.files import digests
from data.tokenizer import Tokenizer, load_tokenizer
from model.recipe import Recipe
from rl.corpus import configured_task
from rl.evaluate import Evaluation
from rl.examples.conversations import JoinedExamples
from rl.examples.demonstrations import read_examples, task_examples
from rl.examples.packing import PackedExamples, sft_batches
from rl.examples.sampled import sampled_traces, traces_place
from rl.examples.teacher import StudentTrainer, Teacher, load_policy
from rl.examples.traces import in_tokens_of, read_traces, told_traces
from rl.prompts import TaskPrompts, misfits, refuse
from rl.stage_rl import conventions_in_words, make_sampler, policy_tokenizer
from rl.stopping import RolloutStoppedError
from rl.verdict.scoring import TaskScorer
from runtime.agreement import agree
from runtime.processes import connect
from runtime.start import is_first_process
from sharding.partition import Layout, pipeline_ranks
from training.metrics import read_metrics
from training.plots import plot_run
from training.run import (
    Say,
    Session,
    check_stores,
    open_loop,
    plan_of,
    to_end,
    train_on,
    write_settings,
)
from training.step import State, Trainer


def make_trainer(run: RunConfig, recipe: Recipe, layout: Layout) -> Trainer:
    """The trainer of stages sft and distill. ValueError for a stage that has nothing to learn."""
    sft = run.sft
    if not (sft.examples or sft.demonstrations or sft.policy):
        raise ValueError(
            f"stage {run.stage} has nothing to learn; give --sft.examples FILE.jsonl, "
            "--sft.demonstrations 500 (of a task), or --sft.policy RUN, whose answers are sampled"
        )
    if (sft.demonstrations or sft.policy) and not run.task.name:
        raise ValueError(
            "sft.demonstrations and sft.policy need a task for their prompts; give one, such as "
            "--task.name permutations"
        )
    if run.task.name:
        configured_task(run.task)
    if run.stage == "distill" and not sft.policy:
        raise ValueError("stage distill has no teacher; give --sft.policy RUN")
    if run.stage == "sft" and sft.kl_weight:
        raise ValueError(f"sft.kl_weight is {sft.kl_weight}, which stage distill alone reads")
    if run.stage == "distill" and sft.kl_weight:
        return StudentTrainer(run.model, run.train, recipe, layout, sft.kl_weight)
    return Trainer(run.model, run.train, recipe, layout)


def describe(run: RunConfig) -> list[str]:
    """What stages sft and distill learn, one line each."""
    sft = run.sft
    lines = [f"examples     {place}" for place in sft.examples]
    if sft.demonstrations:
        lines.append(f"examples     {sft.demonstrations} demonstrations of {run.task.name}")
    if sft.policy:
        lines.append(
            f"examples     correct answers of {sft.policy}, at most {sft.per_prompt or 'all'} of "
            f"{sft.answers_per_prompt} to each of {sft.rounds * sft.prompts_per_round} prompts"
        )
    if run.stage == "distill" and sft.kl_weight:
        lines.append(f"teacher      {sft.policy}: {sft.kl_weight} KL over {sft.kl_top_k} tokens")
    return lines


def run_stage(run: RunConfig, trainer: Trainer, session: Session) -> int:
    """Stage sft or distill to its end, or to a signal; the status that a process exits with."""
    say = session.say
    # A student may have other tokens than its teacher, if it is told which.
    teacher = "" if run.data.tokenizer else run.sft.policy
    tokenizer = policy_tokenizer(run, session.init_from or teacher)
    taught = teacher_tokenizer(run, tokenizer)
    agree("data", lambda: {"tokenizer": tokenizer.sha256})
    say(conventions_in_words(tokenizer))
    connect(trainer.layout.mesh)
    evaluate = held_out_accuracy(run, trainer, tokenizer, say)
    policy = None
    if run.sft.policy:
        policy = load_policy(run.sft.policy, run.train, trainer.recipe, trainer.layout)
    texts = digests(run.sft.examples)
    check_stores(run, texts, say)
    write_settings(run, tokenizer.files, texts)
    try:
        examples = packed_examples(run, trainer, tokenizer, policy, say, taught)
    except RolloutStoppedError:
        return 0
    agree(
        "examples", lambda: {"lengths": hashlib.sha256(examples.lengths.tobytes()).hexdigest()[:12]}
    )
    read_first: Any = lambda batch: batch  # noqa: E731
    if isinstance(trainer, StudentTrainer):
        assert policy is not None
        read_first = make_teacher(run, trainer, policy).read
    loop = open_loop(run, trainer, session, evaluate, read_first)

    def train() -> str:
        return train_on(loop, functools.partial(sft_batches, examples))

    return to_end(loop, run, say, train, lambda: finish(loop.run_dir, say))


def make_teacher(run: RunConfig, trainer: Trainer, policy: Any) -> Teacher:
    """The policy as the teacher of stage distill, over ids that teacher and student have."""
    model, params, router_bias = policy
    shared = min(model.vocab_size, run.model.vocab_size)
    k = min(run.sft.kl_top_k, shared)
    return Teacher(model, params, router_bias, trainer.recipe, trainer.layout, k, shared)


# ---- What is learned -----------------------------------------------------------------------------


def teacher_tokenizer(run: RunConfig, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer of sft.policy: what its prompts and answers are in; this run's without one.

    Raises ValueError if it is another and the policy's distribution is to be learned.
    """
    found = tokenizer_file(Path(run.sft.policy)) if run.sft.policy else None
    own = load_tokenizer(found) if found else tokenizer
    if own.sha256 == tokenizer.sha256:
        return tokenizer
    if run.sft.kl_weight:
        raise ValueError(
            f"sft.policy {run.sft.policy} has another tokenizer than this run, so that the two "
            f"distributions (sft.kl_weight={run.sft.kl_weight}) are over other tokens. Set "
            "sft.kl_weight to 0: its texts are learned"
        )
    return own


def packed_examples(
    run: RunConfig,
    trainer: Trainer,
    tokenizer: Tokenizer,
    policy: Any,
    say: Say,
    taught: Tokenizer | None = None,
) -> PackedExamples:
    """All that the run learns, in rows; samples what has to be sampled. Says how much there is.

    `taught` is the tokenizer of the policy, where it is another: its texts are learned then.

    RolloutStoppedError as `sampled_traces`.
    """
    sft, sources = run.sft, []
    for place in sft.examples:
        path = Path(place)
        folder = "://" in place or path.is_dir()
        if not folder:
            sources.append(read_examples(path, tokenizer, say))
        elif in_tokens_of(place, tokenizer):
            sources.append(read_traces(place, tokenizer).examples)
        else:
            sources.append(told_traces(place, tokenizer, say))
    if sft.demonstrations:
        task = configured_task(run.task)
        shown = task_examples(task, tokenizer, run.seed, sft.demonstrations)
        say(f"demonstrations: {sft.demonstrations} are right, {shown.wrong} wrong ones left out")
        sources.append(shown.examples)
    if policy is not None:
        sampled = sampled_traces(run, trainer, taught or tokenizer, policy, say)
        other = taught is not None and taught.sha256 != tokenizer.sha256
        sources.append(told_traces(traces_place(run), tokenizer, say) if other else sampled)
    examples = JoinedExamples(sources)
    rows = PackedExamples(examples, run.train.seq_len, run.seed, tokenizer.pad_id, sft.too_long)
    say(
        f"{len(examples.lengths)} examples of {examples.lengths.mean():.1f} tokens in "
        f"{rows.rows_per_epoch} rows, {rows.fill:.0%} full: "
        f"{plan_of(run).at(run.train.steps).first_sequence / rows.rows_per_epoch:.1f} epochs"
    )
    if rows.left_out:
        say(f"left out as longer than a row: {', '.join(rows.left_out[:10])}")
    return rows


# ---- What comes of it ----------------------------------------------------------------------------


def held_out_accuracy(
    run: RunConfig, trainer: Trainer, tokenizer: Tokenizer, say: Say
) -> Callable[[State], dict[str, float]] | None:
    """Accuracy of a state on held-out prompts of the task, drawn and greedy; None without one.

    Raises ValueError if these prompts cannot be read, or not be answered in rl.max_new_tokens.
    """
    if not (run.train.eval_every and run.task.name and configured_task(run.task).held_out):
        return None
    if pipeline_ranks(trainer.layout) > 1 or trainer.layout.config.context > 1:
        say("no held-out accuracy: answers are not sampled over the mesh axes pipe and context")
        return None
    task = configured_task(run.task)
    prompts = TaskPrompts(task, tokenizer, run.seed)
    rl = dataclasses.replace(
        run.rl.uncut, replay_routing=False, server="", server_model="", server_reload=False
    )
    at_one = dataclasses.replace(run, rl=rl)
    drawn, greedy = (
        make_sampler(trainer, at_one, tokenizer, is_greedy, min(256, rl.eval_prompts))
        for is_greedy in (False, True)
    )
    _, asked = prompts.to_measure(0, rl.eval_prompts)
    rooms = {"model.max_position": run.model.max_position}
    refuse(misfits(tokenizer, asked, rl.max_new_tokens, rooms), len(asked))
    questions = prompts.held_out(rl.eval_prompts)
    evaluation = Evaluation(questions, prompts, TaskScorer(task, rl), drawn, greedy)

    def evaluate(state: State) -> dict[str, float]:
        drawn.publish(state["params"], state["router_bias"])
        return evaluation(int(state["step"]), drawn)

    return evaluate


def finish(run_dir: Path, say: Say) -> None:
    """The last figures in words, and the plots; process 0 alone."""
    if not is_first_process():
        return
    last = read_metrics(run_dir)[-1]
    words = f"loss: {last['train/loss']:.3f} nats per learned token"
    if "eval/accuracy" in last:
        words += (
            f"; held-out accuracy at temperature 1: {last['eval/accuracy']:.3f}, greedy: "
            f"{last['eval/accuracy_greedy']:.3f}; length: {last['eval/length']:.1f} tokens"
        )
    say(words)
    plots = ", ".join(path.name for path in plot_run(run_dir))
    say(f"plots: {plots}; run folder: {run_dir}")
