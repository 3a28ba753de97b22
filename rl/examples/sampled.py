"""Examples that a policy writes: its correct answers, kept as traces in the folder of the run."""

import contextlib
from pathlib import Path
from typing import Any

import jax

from configs.schema import RunConfig
from data.tokenizer import Tokenizer
from generation.config import Sampling
from rl.corpus import configured_task
from rl.examples.conversations import Examples
from rl.examples.rejection import Filter, Selection, sampled_round
from rl.examples.teacher import policy_version
from rl.examples.traces import count_rounds, write_traces
from rl.problems import Problem
from rl.prompts import TaskPrompts
from rl.rollout import PolicySampler
from rl.stopping import RolloutStoppedError
from rl.tasks.task import Task
from rl.verdict import rules as rewards
from rl.verdict.scoring import TaskScorer
from runtime.signals import StopRequest
from training.loop import anyone
from training.run import Say
from training.step import Trainer


def sampled_traces(
    run: RunConfig, trainer: Trainer, tokenizer: Tokenizer, policy: Any, say: Say
) -> Examples:
    """Correct answers of the policy to training prompts, as traces in the run's folder `traces`.

    Raises ValueError with several processes, unless all traces are there already, and
    RolloutStoppedError soon after SIGTERM or SIGINT, when it has said what is kept.
    """
    sft, place = run.sft, traces_place(run)
    if jax.process_count() > 1 and count_rounds(place) < sft.rounds:
        raise ValueError(
            f"sft.policy is sampled by one process, and {place} has {count_rounds(place)} of "
            f"sft.rounds={sft.rounds} rounds; start this run with one process, stop it (SIGTERM) "
            "when training begins, and start it again with all: they read these traces"
        )
    model, params, router_bias = policy
    task = configured_task(run.task)
    prompts, scorer = TaskPrompts(task, tokenizer, run.seed), TaskScorer(task, run.rl)
    sampler = PolicySampler(
        model, trainer.recipe, trainer.layout, Sampling(sft.temperature),
        rows=min(256, sft.prompts_per_round * sft.answers_per_prompt),
        max_new_tokens=sft.max_new_tokens, eos_ids=tokenizer.end_ids,
    )  # fmt: skip
    sampler.publish(params, router_bias)
    settings = trace_settings(run)

    request = StopRequest()

    def answer(number: int):
        return sampled_round(
            number, prompts, sampler, scorer, count=sft.prompts_per_round,
            group_size=sft.answers_per_prompt, step=settings.get("policy_step", 0),
            stop=lambda: request.requested,
        )  # fmt: skip

    selection = Selection(sft.per_prompt)
    filters = {"language": in_one_language(task, sft.language)} if sft.language else {}
    with request, contextlib.suppress(RolloutStoppedError):
        traces = write_traces(
            place, tokenizer, answer, sft.rounds, selection, filters, settings, say
        )
        if not anyone(request.requested):
            return traces.examples
    say(
        f"{request.signal_name or 'a signal to another process'}: stopped before training; "
        f"{count_rounds(place)} of {sft.rounds} rounds of traces are kept whole in {place}; run "
        "again to go on after these, to the same traces"
    )
    raise RolloutStoppedError


def traces_place(run: RunConfig) -> str:
    """The folder of a run's own traces."""
    return str(Path(run.run_dir) / "traces")


def trace_settings(run: RunConfig) -> dict[str, Any]:
    """What decides which answers `sampled_traces` gets, as traces keep it; JSON values."""
    sft, task = run.sft, run.task
    return {
        "policy": sft.policy, **policy_version(sft.policy), "temperature": sft.temperature,
        "options": list(task.options), "task_name": task.name, "run_seed": run.seed,
        "prompts_per_round": sft.prompts_per_round, "answers_per_prompt": sft.answers_per_prompt,
        "max_new_tokens": sft.max_new_tokens, "language": sft.language,
    }  # fmt: skip


def in_one_language(task: Task, share: float) -> Filter:
    """Filter: at least this share of the answer is in the prompt's language.

    A task that inspects its language is asked; others are judged by words (`rl/verdict/rules.py`).
    """

    def keep(problem: Problem, text: str) -> bool:
        found = task.inspect(problem, text).get("language")
        return (rewards.language(problem, text) if found is None else found) >= share

    return keep
