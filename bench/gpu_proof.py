"""Everything that one GPU can prove of this project in 8 minutes; without a GPU, its dry form.

    make gpu-proof
    python -m bench.gpu_proof [--minutes 8] [--json gpu_proof.json]

In order of worth, until the time is used up (what was left out is listed): every kernel against
fp32 on the device, at widths of V3, V2-Lite and `small`; the same kernels timed at full length,
beside the library, XLA and cuDNN or cuBLAS; train steps of `small` and of a stack of V3's layers,
in BF16 and FP8, with memory against what the compiler predicted. A failure is recorded, not raised:
the rest still runs, and the exit status is 1.

The JSON is a file of `plan.py --measured`: FLOP/s in `products`, `grouped` and `attention`, bytes a
second in `memory`; `device` holds all the rest. The dry form runs emulated kernels and tiny shapes
on CPU; its figures are marked and mean nothing.
"""

import argparse
import dataclasses
import json
import math
import operator
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.command import Command
from bench.hot_paths import EXPERTS, Work, arrays, backends, works
from bench.kernel_times import on_device
from configs import preset
from model.config import ModelConfig
from model.costs import train_flops_per_token
from model.kernels import choose
from model.recipe import Recipe
from pallas_kernels import library
from programs.step import lower
from runtime.devices import emulate_devices
from runtime.gpu_host import has_gpus, lines, preflight, this_host
from sharding.config import MeshConfig
from sharding.mesh import make_layout
from training.step import Trainer
from training.throughput import peak_bf16_tflops

MODELS = {"V3": "v3_671b", "V2-Lite": "v2_lite", "small": "small"}
RELATIVE, UNLIKE = 1e-2, 1e-3
"""Errors allowed: relative to fp32; of FP8, of two results of the same quantised operands."""
PRODUCTS = ((4096, 24576, 1536), (4096, 7168, 16384), (4096, 4096, 7168), (4096, 7168, 2048))
"""M, N, K of dense products."""


class Proof:
    """Results so far, and the time that is left."""

    def __init__(self, minutes: float, dry: bool):
        self.begin, self.dry = time.perf_counter(), dry
        self.limit = math.inf if dry else 60 * minutes
        self.kernels: list[dict[str, Any]] = []
        self.times: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self.left_out: list[str] = []

    def attempt(self, name: str, seconds: float, run: Callable[[], None]) -> None:
        """Run one item if `seconds` are left; what it raises is recorded."""
        left = self.limit - (time.perf_counter() - self.begin)
        if left < seconds:
            self.left_out.append(name)
            return print(f"{name}: left out, {left:.0f} s of {seconds:.0f} are left", flush=True)
        start = time.perf_counter()
        try:
            run()
        except Exception as error:  # whatever a kernel or the compiler raises
            said = f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
            self.failed.append(said)
            print(said, flush=True)
        print(f"  {name}: {time.perf_counter() - start:.0f} s", flush=True)

    def check(self, model: str, work: Work) -> None:
        """Each backend against fp32; FP8 against fp32 products of the same quantised operands."""
        operands = arrays(work)
        exact = [np.asarray(x, np.float64) for x in jax.jit(work.call("reference"))(*operands)]
        for backend in backends(work, self.dry):
            got = jax.jit(work.call(backend))(*operands)
            distance = unlikeness if work.fp8 else relative
            errors = [
                distance(np.asarray(g, np.float64), x) for g, x in zip(got, exact, strict=True)
            ]
            worst, allowed = max(errors), UNLIKE if work.fp8 else RELATIVE
            entry = {"model": model, "path": work.path, "backend": backend, "errors": errors}
            self.kernels.append(entry | {"allowed": allowed, "ok": bool(worst <= allowed)})
            print(f"{model}, {work.path}, {backend}: {worst:.1e} of {allowed:.0e}", flush=True)
            if not worst <= allowed:
                self.failed.append(f"{model}, {work.path}, {backend}: error {worst:.1e}")

    def time(self, model: str, work: Work) -> None:
        """Each backend and the rival, with gradients and alone."""
        operands = arrays(work)
        ways = backends(work, self.dry)[: 1 if self.dry else None]
        calls = {(b, "both"): (work.call(b), work.flops) for b in ways}
        if work.forward:
            alone, flops = work.forward
            calls |= {(b, "forward"): (alone(b), flops) for b in ways}
        if work.rival and not self.dry:
            calls[work.rival[0], "both"] = work.rival[1], work.flops
        for (name, passes), (call, flops) in calls.items():
            try:
                seconds = timed(call, operands, self.dry)
            except Exception as error:  # a rival may refuse the shape
                print(f"{model}, {work.path}, {name}: refused ({str(error)[:120]})", flush=True)
                continue
            entry = {"model": model, "path": work.path, "by": name, "passes": passes}
            self.times.append(entry | {"seconds": seconds, "flop_per_s": flops / seconds})
            print(
                f"{model}, {work.path}, {passes}, {name}: {seconds * 1e3:.3f} ms, "
                f"{flops / seconds / 1e12:.0f} TFLOP/s",
                flush=True,
            )

    def step(self, name: str, model: ModelConfig, train: Any, fp8: bool) -> None:
        """A train step: time, MFU, loss, and memory against the compiler's word."""
        train = dataclasses.replace(train, fp8=fp8, steps=3)
        layout = make_layout(MeshConfig(data=1), jax.devices()[:1])
        requested = "portable" if self.dry else "auto"
        choice = choose(requested, model, train.dtype, layout, fp8)
        recipe = Recipe(train.dtype, train.remat, choice.kernels, fp8=fp8)
        trainer = Trainer(model, train, recipe, layout)
        program = lower(trainer).compile()
        memory = program.memory_analysis()
        assert memory is not None
        state, losses, seconds = trainer.init(jax.random.key(0)), [], []
        rows = train.micro_batch_size or train.batch_size
        shape = (train.batch_size // rows, rows, train.seq_len + 1)
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, shape).astype(np.int32)
        knobs = {"learning_rate": 1e-4, "bias_update_rate": 1e-3, "mtp_weight": 0.3}
        for _ in range(3):
            start = time.perf_counter()
            state, metrics = program(state, {"tokens": tokens}, jax.tree.map(np.float32, knobs))
            losses.append(float(metrics["train/loss"]))
            seconds.append(time.perf_counter() - start)
        per_step = statistics.median(seconds[1:])
        count = train.batch_size * train.seq_len
        speed = count * train_flops_per_token(model, train.seq_len) / per_step
        stats = jax.devices()[0].memory_stats() or {}
        peak = 1e12 * (peak_bf16_tflops(device_kind()) or 0)
        entry = {
            "name": name, "fp8": fp8, "kernels": choice.describe(), "tokens": count,
            "seconds": per_step, "tokens_per_second": count / per_step, "flop_per_s": speed,
            "mfu": speed / peak if peak else None, "losses": losses,
            "memory_predicted": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
            "memory_measured": stats.get("peak_bytes_in_use"),
        }  # fmt: skip
        self.steps.append(entry)
        used = f"{entry['memory_measured'] / 2**30:.2f}" if entry["memory_measured"] else "unknown"
        print(
            f"{name}: {per_step * 1e3:.0f} ms, {entry['tokens_per_second']:,.0f} tokens/s, "
            f"MFU {entry['mfu'] or 0:.1%}, losses {losses}, predicted "
            f"{entry['memory_predicted'] / 2**30:.2f}, used {used} GiB",
            flush=True,
        )
        if not np.isfinite(losses).all():
            self.failed.append(f"{name}: losses {losses}")


def relative(got: np.ndarray, exact: np.ndarray) -> float:
    """|got - exact| / |exact|, Frobenius; NaN for what is not finite."""
    return float(np.linalg.norm(got - exact) / max(np.linalg.norm(exact), 1e-30))


def unlikeness(got: np.ndarray, exact: np.ndarray) -> float:
    """1 - 2<x, y> / (<x, x> + <y, y>): 0 for equal arrays."""
    return float(1 - 2 * np.vdot(got, exact) / (np.vdot(got, got) + np.vdot(exact, exact)))


def timed(call: Callable[..., Any], operands: tuple[Any, ...], dry: bool) -> float:
    """Seconds of a call on the device; in the dry form by the clock, once."""
    if not dry:
        return on_device(call, operands)
    run, start = jax.jit(call), time.perf_counter()
    jax.block_until_ready(run(*operands))
    return time.perf_counter() - start


def device_kind() -> str:
    """JAX's name of the device, such as NVIDIA H200."""
    return jax.devices()[0].device_kind


def measured(proof: Proof) -> dict[str, Any]:
    """The file of `plan.py --measured`: the fastest of ours or XLA's, never a rival's."""
    tables = {"products": {}, "grouped": {}, "attention": {}, "memory": {}}
    ours = ("mosaic", "library", "portable", "emulated")
    at_v3 = [t for t in proof.times if t["by"] in ours and t["model"] == "V3"]
    found_by = operator.itemgetter("path", "passes")

    def least(path: str, passes: str) -> float | None:
        return min((t["seconds"] for t in at_v3 if found_by(t) == (path, passes)), default=None)

    forward, both = least("attention", "forward"), least("attention", "both")
    flops = {found_by(t): t["seconds"] * t["flop_per_s"] for t in at_v3}
    if forward and both and both > forward:
        one = flops["attention", "forward"]
        tables["attention"] = {"forward": one / forward, "backward": 2.5 * one / (both - forward)}
    c = preset("v3_671b").model
    for path, suffix in (("experts", ""), ("experts, FP8", " fp8")):
        seconds = least(path, "both")
        if seconds:  # all nine products together, elementwise passes included
            speed = flops[path, "both"] / seconds
            D, F = c.hidden_size, c.expert_ffn_size
            tables["grouped"] |= {f"{size}{suffix}": speed for size in (f"{2 * F}x{D}", f"{D}x{F}")}
    for t in proof.times:
        if t["path"].startswith("product "):
            tables["products"][t["path"].removeprefix("product ")] = t["flop_per_s"]
        if t["path"] == "copy":
            tables["memory"]["bandwidth"] = t["flop_per_s"]
    host = lines(preflight(this_host())) if has_gpus() else []
    about = {
        "kind": device_kind(), "dry": proof.dry, "jax": jax.__version__, "host": host,
        "library": library.unusable(), "kernels": proof.kernels, "times": proof.times,
        "steps": proof.steps, "failed": proof.failed, "left_out": proof.left_out,
        "seconds": time.perf_counter() - proof.begin,
    }  # fmt: skip
    return tables | {"device": about}


def time_machine(proof: Proof) -> None:
    """Dense products by cuBLAS, and a copy: what the GPU gives to anyone."""
    array, work = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16), partial(Work, kernels=False)
    for M, N, K in [(64, 64, 64)] if proof.dry else PRODUCTS:
        operands, flops = (array((M, K)), array((K, N))), 2.0 * M * N * K
        proof.time("any", work(f"product {M}x{N}x{K}", lambda _: jnp.dot, operands, flops))
    copied = array((2**10 if proof.dry else 2**20, 1024))
    proof.time("any", work("copy", lambda _: lambda x: x + 1, (copied,), 4.0 * copied.size))


def prove(proof: Proof, dry: bool) -> None:
    """Everything, in order of worth."""
    narrow = dataclasses.replace(
        preset("tiny").model,
        hidden_size=64,
        num_heads=1,
        expert_ffn_size=64,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        vocab_size=1024,
    )
    models = {"V3": narrow} if dry else {k: preset(name).model for k, name in MODELS.items()}
    for name, model in models.items():
        for work in works(model, 64 if dry else 512, 1 if dry else 8, fp8=True):
            proof.attempt(f"check {name}, {work.path}", 5, partial(proof.check, name, work))
    proof.attempt("machine", 20, lambda: time_machine(proof))
    for name, model in models.items():
        for work in works(model, 64 if dry else 4096, 1 if dry else 128, fp8=True):
            if not dry or work.path == "attention":
                proof.attempt(f"time {name}, {work.path}", 20, partial(proof.time, name, work))
        if name == "V3":
            prove_steps(proof, dry)


def prove_steps(proof: Proof, dry: bool) -> None:
    """`small` as it is, and a stack of V3's widths, in BF16 and FP8."""
    run = preset("tiny" if dry else "small")
    train = dataclasses.replace(
        run.train,
        batch_size=2 if dry else 16,
        micro_batch_size=0,
        seq_len=64 if dry else 1024,
        batch_ramp_from=0,
        batch_ramp_tokens=0,
        dtype="bfloat16",
    )
    model = dataclasses.replace(run.model, num_layers=2, num_dense_layers=1) if dry else run.model
    proof.attempt("step of small", 90, lambda: proof.step("small", model, train, fp8=False))
    stack = model
    if not dry:
        stack = dataclasses.replace(
            preset("v3_671b").model,
            num_layers=3,
            num_dense_layers=1,
            num_experts=EXPERTS,
            num_expert_groups=1,
            groups_per_token=1,
            mtp_depth=0,
        )
        train = dataclasses.replace(train, batch_size=1, seq_len=4096, remat="selective")
    for fp8 in (True,) if dry else (False, True):
        name = f"V3's widths, 1 + 2 layers, {EXPERTS} experts{', FP8' * fp8}"
        proof.attempt(f"step of {name}", 90, partial(proof.step, name, stack, train, fp8=fp8))


def main(arguments: list[str] | None = None) -> None:
    """Prove what can be proven, and write it down."""
    command = Command(__doc__)
    command.add_argument("--minutes", type=float, default=8.0, help="time to use at most")
    command.add_argument("--json", default="gpu_proof.json", help="file for the planner")
    options: argparse.Namespace = command.options(arguments)
    if not has_gpus():
        emulate_devices(8)  # the emulator blocks a thread per warpgroup: two cores' would hang it
    dry = jax.default_backend() != "gpu"
    if dry:
        print("no GPU here: the dry form, emulated kernels and tiny shapes; its times mean nothing")
    proof = Proof(options.minutes, dry)
    prove(proof, dry)
    found = measured(proof)
    pathlib.Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    wrong = len(proof.failed)
    print(
        f"{len(proof.kernels)} checks, {len(proof.times)} times, {len(proof.steps)} steps, "
        f"{wrong} failed, {len(proof.left_out)} left out; {options.json}"
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
