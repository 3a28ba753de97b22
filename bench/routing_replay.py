"""Sampler against trainer in bf16, with the sampler's experts replayed and without.

    python -m bench.routing_replay [--weights runs/r1_base,runs/search_zero] [--write]

Answers of trained models of a task, from random prompts: the gap between the sampler's
log-probability of each token and the trainer's, of all tokens and of those for which the trainer
would choose other experts than the sampler did. One model more, made where it is missing, is
`r1_base` with twice the layers and finer experts: nearer to V3, where a token passes 58 layers with
8 of 256 experts, and has more choices that are close.

Letters: L layers, B answers, T positions, K experts of a token.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.command import FEW_STEPS, Command
from bench.runs import train_once
from configs import preset
from data.tokenizer import load_tokenizer
from generation.config import Sampling
from model.blueprint import bind
from model.recipe import Recipe
from model.transformer import Tokens
from rl.batches import Batch, make_batch
from rl.config import TaskConfig
from rl.corpus import configured_task
from rl.examples.teacher import load_policy
from rl.prompts import TaskPrompts
from rl.rollout import PolicySampler
from rl.trainer import PolicyTrainer
from sharding.config import MeshConfig
from sharding.mesh import make_layout
from sharding.partition import use_layout

GROUP = 16
PAIRS = (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32"))
"""Types of sampler and trainer."""
FINER = (
    "--model.num-layers", "8", "--model.num-experts", "32", "--model.experts-per-token", "4",
    "--model.expert-ffn-size", "32",
)  # fmt: skip
"""Of `r1_base`'s command line, for the finer model."""
PRESETS = {"permutations": "r1_zero", "search": "search_zero"}
"""Preset whose answer length serves each task."""


def gaps(folder: Path, prompts: int, sampler_dtype, trainer_dtype) -> dict[str, Any]:
    """For every token written: |log p of the sampler - of the trainer| without replay (free) and
    with it (held), and whether the trainer alone chooses other experts somewhere (flipped)."""
    run = preset("r1_zero")
    layout = make_layout(MeshConfig(data=1), jax.devices()[:1])
    model, params, bias = load_policy(str(folder), run.train, Recipe(), layout)
    settings = json.loads((folder / "config.json").read_text())["task"]
    task = TaskConfig(settings["name"], tuple(settings["options"]))
    run = preset(PRESETS[task.name])
    trainer = PolicyTrainer(model, run.train, Recipe(trainer_dtype), layout)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    questions = TaskPrompts(configured_task(task), tokenizer, 0).rollout(0, prompts)
    sampler = PolicySampler(
        model, Recipe(sampler_dtype), layout, Sampling(), rows=prompts * GROUP,
        max_new_tokens=run.rl.max_new_tokens, eos_ids=tokenizer.end_ids, replay=True,
    )  # fmt: skip
    sampler.publish(params, bias)
    batch = make_batch(questions.ids, sampler(questions.ids, GROUP, 0), run.train.seq_len)
    written = batch["mask"] > 0

    def gap(*names: str) -> np.ndarray:
        logp_BT = trainer.logps(params, bias, {name: batch[name][None] for name in names})[0]
        return np.abs(np.asarray(logp_BT) - batch["sampler_logp"])[written]

    return {
        "free": gap("tokens", "lengths"),
        "held": gap("tokens", "lengths", "routes"),
        "flipped": flips(trainer, params, bias, batch)[written],
    }


def flips(trainer: PolicyTrainer, params, bias, batch: Batch) -> np.ndarray:
    """Tokens whose experts the trainer chooses otherwise in some layer, bool [B, T]."""

    @jax.jit
    def experts(params, bias, ids_BT, lengths_B):
        with use_layout(trainer.layout):
            positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
            segments_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
            recipe = dataclasses.replace(trainer.recipe, routes=True)
            tokens = Tokens(ids_BT, positions_BT, segments_BT)
            output = bind(trainer.model, params, bias).forward(tokens, recipe, None, None)
            assert output.stats is not None
            return output.stats.ids_BTK

    ids_LBTK = np.asarray(experts(params, bias, batch["tokens"][:, :-1], batch["lengths"]))
    ours_BTLK = np.sort(np.moveaxis(ids_LBTK, 0, 2), axis=-1)
    theirs_BTLK = np.sort(batch["routes"].reshape(ours_BTLK.shape), axis=-1)
    return (ours_BTLK != theirs_BTLK).any((-1, -2))


def row(name: str, tokens: str, free: np.ndarray, held: np.ndarray) -> str:
    """A row of the table."""

    def pair(reduce, form: str) -> str:
        a, b = float(reduce(free)), float(reduce(held))
        return f"{a:{form}} → {b:{form}} ({a / b:.1f}x)"

    return f"| {name} | {tokens} | {pair(np.mean, '.1e')} | {pair(np.max, '.2g')} |"


def main() -> None:
    """Measure, print, and with --write put the table into results.md."""
    parser = Command(__doc__, prompts=1, weights="", steps=FEW_STEPS)
    parser.add_argument("--weights", default="runs/r1_base,runs/search_zero")
    parser.add_argument("--finer", default="runs/r1_base_finer", help="run folder; may be missing")
    parser.add_argument("--prompts", default=16, type=int)
    parser.set_defaults(steps=())
    options = parser.options()
    lines = [
        f"Answers to {options.prompts} prompts x {GROUP}. Gap in nats, without replay → with it; "
        "flipped: tokens for",
        "which the trainer alone chooses other experts than the sampler in some layer.",
        "",
        "| model; sampler, trainer | tokens | mean gap | largest |",
        "|---|---|---|---|",
    ]
    train_once(Path(options.finer).absolute(), "r1_base", *FINER, *options.steps)
    for folder in map(Path, [*filter(None, options.weights.split(",")), options.finer]):
        for pair in PAIRS:
            found = gaps(folder, options.prompts, *pair)
            free, held, flipped = found["free"], found["held"], found["flipped"]
            name = f"`{folder.name}`; {', '.join(pair)}"
            lines.append(row(name, f"all {len(free):,}", free, held))
            if flipped.any():
                share = f"flipped, {flipped.mean():.1%}"
                lines.append(row("", share, free[flipped], held[flipped]))
            print("\n".join(lines[-2:]), flush=True)
    parser.keep("Routing replay", lines)


if __name__ == "__main__":
    main()
