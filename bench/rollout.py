"""128 answers from the policy's own sampler, against one call of the generator per prompt.

    python -m bench.rollout [--weights runs/r1_base] [--rounds 3] [--write]

The model is `r1_base`'s, with the weights of a run, or random ones, whose answers have all lengths
up to the limit. Prompts are 8 x 16 answers (a group shares its prompt's pass) or 128 x 1. The other
side is what `generate.py` does, one prompt at a time, its compiled programs warm. Compilation is
left out on both sides. The sides take turns, as the speed of these machines changes by the minute.
"""

import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from bench.command import Command, numbers
from configs import preset
from data.tokenizer import Tokenizer, load_tokenizer
from generation.config import Sampling
from generation.engine import Generator
from model.recipe import Recipe
from rl.corpus import configured_task
from rl.examples.teacher import load_policy
from rl.prompts import TaskPrompts
from rl.rollout import PolicySampler
from rl.tasks.characters import character_tokenizer
from sharding.mesh import make_layout
from training.step import Trainer

ANSWERS = 128


class Bench:
    """Model, weights and prompts of all cases."""

    def __init__(self, weights: str):
        run = preset("r1_zero")
        self.layout, self.recipe = make_layout(run.mesh, jax.devices()[:1]), Recipe("float32")
        task = configured_task(run.task)
        if weights:
            policy = load_policy(weights, run.train, self.recipe, self.layout)
            self.model, self.params, self.bias = policy
            self.tokenizer: Tokenizer = load_tokenizer(Path(weights) / "tokenizer.json")
        else:
            self.model = run.model
            state = Trainer(run.model, run.train, self.recipe, self.layout).init(jax.random.key(0))
            self.params, self.bias = state["params"], state["router_bias"]
            self.tokenizer = character_tokenizer(task.vocabulary)
        self.prompts = TaskPrompts(task, self.tokenizer, 0).rollout(0, ANSWERS).ids

    def rollout(self, prompts: int, rows: int, budget: int) -> "Side":
        """128 answers, `rows` written at a time."""
        sampler = PolicySampler(
            self.model, self.recipe, self.layout, Sampling(1.0), rows=rows, max_new_tokens=budget,
            eos_ids=self.tokenizer.end_ids,
        )  # fmt: skip
        sampler.publish(self.params, self.bias)

        def run(seed: int) -> tuple[int, float]:
            found = sampler(self.prompts[:prompts], ANSWERS // prompts, seed)
            return found.num_tokens, found.seconds

        return run

    def one_by_one(self, budget: int, answers: int = 32) -> "Side":
        """One generation per prompt."""
        generator = Generator(self.model, self.recipe, self.layout)
        weights = generator.prepare({"params": self.params, "router_bias": self.bias})

        def run(seed: int) -> tuple[int, float]:
            began, tokens = time.perf_counter(), 0
            for i in range(answers):
                sampling = Sampling(1.0, seed=seed * answers + i)
                session = generator.start(
                    weights, [self.prompts[i]], sampling, budget, eos_ids=self.tokenizer.end_ids
                )
                while not session.done:
                    session.advance()
                tokens += int(session.stats.decoded_tokens) + 1  # the prefill draws the first
            return tokens, time.perf_counter() - began

        return run


Side = Callable[[int], tuple[int, float]]
"""`tokens, seconds = side(seed)`."""


def measure(bench: Bench, budget: int, rounds: int) -> list[str]:
    """Rows of the table for one limit of tokens. Every round runs all sides, one after another."""
    cases = [(8, 128), (8, 32), (128, 128), (128, 32)]
    sides = [bench.one_by_one(budget), *(bench.rollout(*case, budget) for case in cases)]
    found = np.array([[side(seed) for side in sides] for seed in range(rounds + 1)])
    tokens, seconds = np.moveaxis(found[1:], -1, 0)  # the first round compiles
    speeds = tokens / seconds
    times = np.median(speeds / speeds[:, :1], axis=0)
    names = ["one prompt at a time"]
    names += [f"{P} prompts x {ANSWERS // P}, {rows} rows" for P, rows in cases]
    answers = [32, *[ANSWERS] * len(cases)]
    return [
        f"| {budget} | {name} | {tokens[:, i].mean() / answers[i]:.1f} | "
        f"{np.median(speeds[:, i]):,.0f} | {times[i]:.1f}x |"
        for i, name in enumerate(names)
    ]


def main() -> None:
    """Measure, print, and with --write put the table into results.md."""
    parser = Command(__doc__, rounds=1, budgets="4")
    parser.add_argument(
        "--budgets", type=numbers, default="28,128", help="longest answers, in tokens"
    )
    parser.add_argument("--weights", default="", help="a run folder; empty: random weights")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.options()
    bench = Bench(options.weights)
    lines = [
        f"128 answers of {'trained' if options.weights else 'random'} weights in `r1_base`'s shape",
        "at temperature 1; medians, of the ratios too, which are taken within each round.",
        "",
        "| longest answer | answers | mean length | tokens/s | against one at a time |",
        "|---:|---|---:|---:|---:|",
        *(row for budget in options.budgets for row in measure(bench, budget, options.rounds)),
    ]
    parser.show("Rollouts", lines)


if __name__ == "__main__":
    main()
