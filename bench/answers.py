"""Answers of a trained model to held-out problems of a task, inspected."""

from pathlib import Path

import jax
import numpy as np

from configs import preset
from data.tokenizer import load_tokenizer
from generation.config import Sampling
from model.recipe import Recipe
from rl.config import TaskConfig
from rl.corpus import configured_task
from rl.examples.teacher import load_policy
from rl.prompts import EVALUATE, TaskPrompts, sampler_seed
from rl.rollout import PolicySampler
from rl.tasks.task import Inspection
from sharding.mesh import make_layout


def inspected(
    place: Path, task_config: TaskConfig, problems: int, draws: int, budget: int, seed: int
) -> tuple[list[Inspection], np.ndarray]:
    """Answers of the run in `place`, at temperature 1, `draws` to each of `problems` held-out ones.

    Returns what the task says of each answer, of at most `budget` tokens, and how many it has.
    """
    run, task = preset("r1_zero"), configured_task(task_config)
    layout, recipe = make_layout(run.mesh, jax.devices()[:1]), Recipe("float32")
    model, params, router_bias = load_policy(str(place), run.train, recipe, layout)
    tokenizer = load_tokenizer(place / "tokenizer.json")
    sampler = PolicySampler(
        model, recipe, layout, Sampling(1.0), rows=128, max_new_tokens=budget,
        eos_ids=tokenizer.end_ids,
    )  # fmt: skip
    sampler.publish(params, router_bias)
    prompts = TaskPrompts(task, tokenizer, seed)
    questions = prompts.held_out(problems)
    rollout = sampler(questions.ids, draws, sampler_seed(seed, EVALUATE, 0))
    asked = [problem for problem in questions.problems for _ in range(draws)]
    texts = prompts.texts(rollout.tokens)
    found = [task.inspect(problem, text) for problem, text in zip(asked, texts, strict=True)]
    return found, np.array([len(ids) for ids in rollout.tokens])
