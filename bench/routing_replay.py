"""Sampler against trainer in bf16, with the sampler's experts replayed and without.

    python -m bench.routing_replay [--weights runs/r1_base] [--prompts 16] [--write]

Answers of the base model of `make r1`, or of any run of its task: the gap between the sampler's
log-probability of each token and the trainer's.
"""

import argparse
from pathlib import Path

import jax
import numpy as np

from bench.report import write_section
from checkpoint.weights import open_weights
from configs import preset
from generation.config import Sampling
from model.recipe import Recipe
from rl.batches import make_batch
from rl.corpus import configured_task
from rl.rollout import PolicySampler
from rl.source import TaskPrompts
from rl.stages import policy_tokenizer
from rl.trainer import PolicyTrainer
from sharding.config import MeshConfig
from sharding.mesh import make_layout

GROUP = 16
PAIRS = (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"))
"""Types of sampler and trainer."""


def gaps(folder: Path, prompts: int, sampler_dtype, trainer_dtype) -> list[np.ndarray]:
    """|log p of the sampler - of the trainer| of every token written: without replay, with it."""
    run = preset("r1_zero")
    layout = make_layout(MeshConfig(data=1), jax.devices()[:1])
    trainer = PolicyTrainer(run.model, run.train, Recipe(trainer_dtype), layout)
    abstract = {tree: trainer.abstract_state[tree] for tree in ("params", "router_bias")}
    weights = open_weights(folder).load(abstract)
    tokenizer = policy_tokenizer(run, str(folder))
    questions = TaskPrompts(configured_task(run.task), tokenizer, 0).rollout(0, prompts)
    sampler = PolicySampler(
        run.model, Recipe(sampler_dtype), layout, Sampling(), rows=prompts * GROUP,
        max_new_tokens=run.rl.max_new_tokens, eos_ids=[tokenizer.eos_id], replay=True,
    )  # fmt: skip
    sampler.publish(weights["params"], weights["router_bias"])
    batch = make_batch(questions.ids, sampler(questions.ids, GROUP, 0), run.train.seq_len)
    found = []
    for names in (("tokens", "lengths"), ("tokens", "lengths", "routes")):
        inputs = {name: batch[name][None] for name in names}
        logp_AT = trainer.logps(weights["params"], weights["router_bias"], inputs)[0]
        found.append(np.abs(np.asarray(logp_AT) - batch["sampler_logp"])[batch["mask"] > 0])
    return found


def main() -> None:
    """Measure, print, and with --write put the table into results.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--weights", default="runs/r1_base", type=Path)
    parser.add_argument("--prompts", default=16, type=int)
    parser.add_argument("--write", action="store_true", help="write bench/results.md")
    options = parser.parse_args()
    lines = [
        "| sampler, trainer | mean gap, nats | with replay | largest | with replay |",
        "|---|---:|---:|---:|---:|",
    ]
    for pair in PAIRS:
        free, held = gaps(options.weights, options.prompts, *pair)
        lines.append(
            f"| {', '.join(pair)} | {free.mean():.1e} | {held.mean():.1e} | {free.max():.2g} | "
            f"{held.max():.2g} |"
        )
        print(lines[-1], flush=True)
    if options.write:
        write_section("Routing replay", lines)


if __name__ == "__main__":
    main()
