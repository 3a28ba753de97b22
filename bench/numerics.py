"""Where the errors of BF16 and FP8 come from: gradients of one trained model against fp32's.

    python -m bench.numerics [--quick] [--json FILE] [--figure FILE] [--write]

One model, one batch of held-out rows, one loss with MTP and balance term. Every variant's gradients
are compared with fp32's, parameter by parameter (relative L2 error): once with the experts that it
chooses itself ("free"), once with those that fp32 chose, in main layers and MTP modules
("replayed"). What is left with replayed experts is arithmetic; the rest are choices that flip.
Recomputation is compared to the bit with none, meshes with one device of the same types.

`--quick` has a smaller model, trained shortly, and less optimised machine code; its figures are of
the same kind, not the same. `--emulated` adds the kernels for Hopper, emulated, on few tokens.
"""

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from runtime.devices import emulate_devices
from runtime.host_memory import keep_freed_memory

keep_freed_memory()  # before jax starts threads, as train.py does

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from bench.command import Command  # noqa: E402
from bench.fp8_runs import options_of  # noqa: E402
from bench.report import ROOT, commit  # noqa: E402
from bench.runs import train_once  # noqa: E402
from configs import preset  # noqa: E402
from configs.command import parse  # noqa: E402
from configs.schema import RunConfig  # noqa: E402
from data.evaluation import held_out_reader  # noqa: E402
from data.loader import train_loader  # noqa: E402
from data.prepare import prepare  # noqa: E402
from model.kernels import choose  # noqa: E402
from model.recipe import Recipe  # noqa: E402
from model.transformer import Embedding  # noqa: E402
from rl.examples.teacher import load_policy  # noqa: E402
from sharding.config import MeshConfig  # noqa: E402
from sharding.devices import EXACT  # noqa: E402
from sharding.mesh import make_layout  # noqa: E402
from sharding.partition import batch_sharding, use_layout  # noqa: E402
from training.check import gradients_and_routes  # noqa: E402
from training.gradients import loss_weights  # noqa: E402
from training.step import ROWS, Trainer  # noqa: E402

FP32, BF16 = Recipe(), Recipe("bfloat16")
FP8 = Recipe("bfloat16", fp8=True, stash="e5m6")
"""As `--train.fp8` trains, V3's E5M6 included."""
MTP_WEIGHT, BALANCE_WEIGHT = 0.3, 1e-4
KINDS = {
    "embedding": ("embed",), "head": ("head",), "experts": ("moe",), "router": ("router",),
    "shared experts": ("shared",), "dense FFN": ("mlp",), "MLA": ("attn",), "MTP": ("proj",),
    "norms": ("scale",),
}  # fmt: skip
"""Kinds of parameters by a part of their path; the last that fits counts."""


class Case(NamedTuple):
    """One variant."""

    name: str
    recipe: Recipe
    mesh: MeshConfig = MeshConfig()
    like: str = ""
    """The variant that it must equal: to the bit where the layout is the same."""


def cases(quick: bool) -> list[Case]:
    """All variants but fp32, those that others are compared with first."""
    found = [Case("BF16", BF16), Case("FP8", FP8)]
    meshes = {"tensor": MeshConfig(tensor=2), "expert": MeshConfig(expert=2)}
    meshes |= {"fsdp": MeshConfig(fsdp=2)}
    for name, recipe in (("BF16", BF16), ("FP8", FP8)):
        for remat in ("full",) if quick else ("selective", "full"):
            again = dataclasses.replace(recipe, remat=remat)
            found.append(Case(f"{name}, recomputation {remat}", again, like=name))
    if quick:
        return [*found, Case("BF16, tensor 2", BF16, meshes["tensor"], "BF16")]
    for stash in ("e5m6", "e4m3"):
        held = dataclasses.replace(BF16, stash=stash)
        found.append(Case(f"BF16, attention's output in {stash}", held, like="BF16"))
    for name, recipe in (("BF16", BF16), ("FP8", FP8)):
        found += [Case(f"{name}, {axis} 2", recipe, mesh, name) for axis, mesh in meshes.items()]
    return found


class Subject(NamedTuple):
    """Model, weights and batch that are measured."""

    run: RunConfig
    weights: dict[str, Any]
    tokens: np.ndarray
    """Held-out rows [1, sequences, T+1]."""
    options: dict[str, Any]
    """Compiler options."""


class Result(NamedTuple):
    """One pass of a variant, on the host."""

    loss: float
    grads: Any
    routes: np.ndarray


# ---- the subject ---------------------------------------------------------------------------------


def subject(quick: bool, steps: int) -> Subject:
    """The trained model and its batch: `tiny` and 8 x 256 tokens, or something smaller."""
    name, words = ("mini", options_of("mini", steps)) if quick else ("tiny", [])
    folder = ROOT / "cache" / "numerics" / f"{name}_{steps}"
    words += ["--train.steps", str(steps), "--train.eval-every", "0", "--kernels", "portable"]
    words += ["--seed", "0", "--data.cache-dir", str(ROOT / "cache")]
    train_once(folder, "tiny", *words)
    run = parse(["--config", "tiny", *words]).run
    layout = make_layout(MeshConfig(), jax.devices()[:1])
    _, params, bias = jax.device_get(load_policy(str(folder), run.train, FP32, layout))
    prepared = prepare(run.data, run.train.seq_len, run.seed)
    reader = held_out_reader(prepared, run.train.batch_size, 2)
    tokens = next(iter(reader))["tokens"]
    options = {"xla_backend_optimization_level": 0} if quick else {}
    weights = {"params": params, "router_bias": bias}
    return Subject(run, weights, np.asarray(tokens), EXACT | options)


# ---- measurements --------------------------------------------------------------------------------


def passes(subject: Subject, case: Case) -> Callable[[np.ndarray | None], Result]:
    """A function from experts (None: free) to a pass of the variant, compiled once for both."""
    run = subject.run
    layout = make_layout(case.mesh, jax.devices()[: 2 if case.mesh != MeshConfig() else 1])
    trainer = Trainer(run.model, run.train, case.recipe, layout)
    c = run.model
    rows, length = subject.tokens.shape[1], subject.tokens.shape[2] - 1
    free = np.full(
        (c.num_moe_layers + c.mtp_depth, rows, length, c.experts_per_token), -1, np.int32
    )
    placements = [trainer.shardings[name] for name in ("params", "router_bias")]

    def compute(params, bias, tokens, routes):
        with use_layout(layout):
            weights = loss_weights({"tokens": tokens}, jnp.float32(MTP_WEIGHT), BALANCE_WEIGHT)
            micro = {"tokens": tokens[0]}
            return gradients_and_routes(c, case.recipe, params, bias, micro, weights, routes)

    step = jax.jit(
        compute,
        in_shardings=(*placements, batch_sharding(layout, ROWS), None),
        compiler_options=subject.options,
    )

    def measure(routes: np.ndarray | None) -> Result:
        chosen = free if routes is None else routes
        weights = subject.weights["params"], subject.weights["router_bias"]
        loss, grads, taken = jax.device_get(step(*weights, subject.tokens, chosen))
        return Result(float(loss), grads, taken)

    return measure


def errors(got: Any, want: Any) -> dict[str, float]:
    """Relative L2 error of every parameter's gradient in percent, by path."""
    found = {}
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        a, b = np.float64(a), np.float64(b)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = float(100 * np.linalg.norm(a - b) / np.linalg.norm(b))
    return found


def kind_of(path: str) -> str:
    """Kind of a parameter."""
    parts = path.split("/")
    return [kind for kind, names in KINDS.items() if set(names) & set(parts)][-1]


def distance(got: Any, want: Any) -> dict[str, Any]:
    """Errors in percent: median, worst, per kind of parameter; and the median cosine."""
    each = errors(got, want)
    kinds: dict[str, list[float]] = {}
    for path, error in each.items():
        kinds.setdefault(kind_of(path), []).append(error)
    worst = max(each, key=lambda path: each[path])
    cosines = [
        np.vdot(np.float64(a), np.float64(b)) / np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    ]
    return {
        "median": float(np.median(list(each.values()))),
        "worst": each[worst],
        "worst_parameter": worst,
        "cosine": float(np.median(cosines)),
        "kinds": {kind: float(np.median(kinds[kind])) for kind in KINDS if kind in kinds},
    }


def flips(got: np.ndarray, want: np.ndarray) -> float:
    """Share of choices of experts in percent that the other does not have."""
    same = (got[..., :, None] == want[..., None, :]).any(-1)
    return float(100 * (1 - same.mean()))


def measure(subject: Subject, wanted: list[Case]) -> list[dict[str, Any]]:
    """A row of figures per variant."""
    plain = passes(subject, Case("fp32", FP32))(None)
    kept: dict[str, tuple[Result, Result]] = {}
    rows = []
    for case in wanted:
        began = time.process_time()
        run = passes(subject, case)
        free, replayed = run(None), run(plain.routes)
        row = {
            "name": case.name,
            "loss_error": 100 * (free.loss / plain.loss - 1),
            "flips": flips(free.routes, plain.routes),
            "free": distance(free.grads, plain.grads),
            "replayed": distance(replayed.grads, plain.grads),
        }
        if not case.like:
            kept[case.name] = free, replayed
        else:
            same, again = kept[case.like]
            row["like"] = case.like
            row["from_like"] = distance(replayed.grads, again.grads)["median"]
            pairs = zip(jax.tree.leaves(free), jax.tree.leaves(same), strict=True)
            row["bits_equal"] = all(np.array_equal(a, b) for a, b in pairs)
        print(
            f"{case.name}: replayed {row['replayed']['median']:.2f}%, free "
            f"{row['free']['median']:.2f}% ({time.process_time() - began:.0f} s)",
            flush=True,
        )
        rows.append(row)
    return rows


def embedding_errors(ids: np.ndarray, size: int, width: int) -> dict[str, float]:
    """Error of the table's gradient in percent, bf16 rows of gradients, for real token ids.

    Gradients are drawn, with a common mean or without: sums that do not cancel are the hard case.
    """
    model = dataclasses.replace(preset("tiny").model, vocab_size=size, hidden_size=width)
    embedding = Embedding(model, nnx.Rngs(0))
    graph, weights = nnx.split(embedding)

    @partial(jax.jit, compiler_options=EXACT)
    def gradient(ids_BT, dy_BTD):
        def look_up(weights):
            return nnx.merge(graph, weights)(ids_BT, BF16)

        return jax.vjp(look_up, weights)[1](dy_BTD)[0]

    found = {}
    for name, mean in (("mean 0", 0.0), ("common mean", 1.0)):
        dy = np.random.default_rng(0).standard_normal((1, ids.size, width), np.float32)
        dy = jnp.asarray(dy + np.float32(mean), jnp.bfloat16)
        exact = np.zeros((size, width))
        np.add.at(exact, ids, np.float64(dy[0]))
        got = jax.tree.leaves(gradient(jnp.asarray(ids)[None], dy))[0]
        found[name] = float(100 * np.linalg.norm(np.float64(got) - exact) / np.linalg.norm(exact))
    return found


def token_ids(run: RunConfig, count: int) -> np.ndarray:
    """The first tokens of training."""
    prepared = prepare(run.data, run.train.seq_len, run.seed)
    rows = -(-count // run.train.seq_len)
    loader = train_loader(prepared, rows)
    return loader.batch_at(0, rows)["tokens"][0, :, :-1].reshape(-1)[:count]


def emulated_rows(subject: Subject) -> list[dict[str, Any]]:
    """The kernels for Hopper by their emulator on 128 tokens, with fp32 and XLA beside them."""
    layout = make_layout(MeshConfig(), jax.devices()[:1])
    few = subject._replace(tokens=subject.tokens[:, :1, :129])
    found = []
    for name, recipe in (("BF16", BF16), ("FP8", FP8)):
        kernels = choose("emulated", subject.run.model, "bfloat16", layout, recipe.fp8).kernels
        emulated = dataclasses.replace(recipe, kernels=kernels)
        found += [Case(name, recipe), Case(f"{name}, emulated kernels", emulated, like=name)]
    return measure(few, found)


# ---- report --------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Figures of all variants, then errors by kind of parameter."""
    lines = [
        "| against fp32 | free | replayed | cosine, replayed | worst, replayed | choices flipped "
        "| loss | from the same on one device |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        like = "-"
        if "like" in row:
            like = "bit-equal" if row["bits_equal"] else f"{row['from_like']:.2f}%"
        free, replayed = row["free"], row["replayed"]
        lines.append(
            f"| {row['name']} | {free['median']:.2f}% | {replayed['median']:.2f}% "
            f"| {replayed['cosine']:.5f} | {replayed['worst']:.1f}%: {replayed['worst_parameter']} "
            f"| {row['flips']:.2f}% | {row['loss_error']:+.3f}% | {like} |"
        )
    plain = [row for row in rows if "like" not in row]
    kinds = list(plain[0]["replayed"]["kinds"])
    lines += ["", "| by kind, replayed | " + " | ".join(kinds) + " |"]
    lines.append("|---" * (len(kinds) + 1) + "|")
    for row in plain:
        each = (f"{row['replayed']['kinds'][kind]:.2f}%" for kind in kinds)
        lines.append(f"| {row['name']} | " + " | ".join(each) + " |")
    return lines


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Errors by kind of parameter, replayed as bars and free as marks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plain = [row for row in rows if "like" not in row]
    kinds = list(plain[0]["replayed"]["kinds"])
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for i, (row, color) in enumerate(zip(plain, ("#08519c", "#d94801"), strict=False)):
        x = np.arange(len(kinds)) + 0.4 * i - 0.2
        replayed, free = (
            [row[way]["kinds"][kind] for kind in kinds] for way in ("replayed", "free")
        )
        axis.bar(x, replayed, 0.36, color=color, label=f"{row['name']}, experts replayed")
        axis.plot(x, free, "_", color=color, markersize=14, label=f"{row['name']}, free")
    axis.set_xticks(np.arange(len(kinds)), kinds, rotation=20)
    axis.set_yscale("log")
    axis.set_ylabel("gradient's error against fp32 (%)")
    axis.legend(frameon=False)
    axis.grid(alpha=0.25, axis="y")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    """Train or read the weights, measure, print, and keep what is asked for."""
    parser = Command(__doc__, steps=100)
    parser.add_argument("--steps", type=int, default=400, help="of the training before")
    parser.add_argument("--json", default="", help="file for all figures")
    parser.add_argument("--figure", default="", help="file for the picture")
    parser.add_argument(
        "--emulated",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="the kernels too, by their emulator: minutes",
    )
    parser.add_argument("--variants", type=int, default=0, help="the first so many; 0: all")
    options = parser.options(arguments)
    if options.steps < 1 or options.variants < 0:
        parser.error("--steps must be at least 1, and --variants not negative")
    with contextlib.suppress(RuntimeError):  # devices are there already, in a test
        emulate_devices(2)

    began = time.process_time()
    of = subject(options.quick, options.steps)
    wanted = cases(options.quick)
    rows = measure(of, wanted[: options.variants or len(wanted)])
    emulated = emulated_rows(of) if options.emulated else []
    tokens = 4096 if options.quick else 65536
    embedding = embedding_errors(token_ids(of.run, tokens), 4096, 64 if options.quick else 256)
    lines = table(rows)
    if emulated:
        lines += ["", "128 tokens, kernels emulated:", "", *table(emulated)]
    lines += [
        "",
        f"Gradient of the embedding, {tokens} tokens: "
        + ", ".join(f"{error:.3f}% ({name})" for name, error in embedding.items())
        + f". {time.process_time() - began:.0f} s of processor time.",
    ]
    if options.json:
        found = {
            "commit": commit(), "steps": options.steps, "quick": options.quick, "rows": rows,
            "emulated": emulated, "embedding": {"tokens": tokens, "error": embedding},
        }  # fmt: skip
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    if options.figure:
        draw(rows, Path(options.figure))
    parser.show("Errors of small number fields", lines)


if __name__ == "__main__":
    main()
