"""The engine of --compile: the real program of a plan, read before its machine code is made.

XLA cannot be stopped (`programs/scheduled.py`), so each program is compiled in a child process that
ends itself. Figures are kept on disk, by everything that decides them.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from planning.case import Case
from planning.report import GIB, Report
from planning.traffic import link_seconds
from training.step import Trainer

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMPILER = ".gpu-compiler"
SECONDS = 1800
"""Longest that a compilation may take."""


def with_compiled(
    report: Report, case: Case, cache: str = "", say: Callable[[str], None] | None = None
) -> Report:
    """The report with what the compiled program says beside it.

    Raises:
        ValueError: the compiler for GPUs is missing, or it failed, with its last lines.
    """
    found = figures(case, cache, say or _say)
    memory = {name: size / GIB for name, size in found["parts"].items()}
    memory |= {"total": sum(memory.values()), "limit": report.memory.limit / GIB}
    sent = []
    for op, axes, times, size in found["collectives"]:
        names = tuple(axis.strip("~?") for axis in axes.split("+"))
        link, seconds = link_seconds(case, op, names, size)
        sent.append(
            {
                "op": op,
                "axis": axes,
                "times": times,
                "gib": size / GIB,
                "link": link,
                "seconds": seconds,
                "exposed_seconds": seconds * _exposed(report, op, names),
            }
        )
    compiled = {
        "memory_gib": memory,
        "collectives": sent,
        "compile_seconds": found["seconds"],
        "closed_form_error": report.memory.total / GIB / memory["total"] - 1,
    }
    return dataclasses.replace(report, compiled=compiled)


def _exposed(report: Report, op: str, axes: tuple[str, ...]) -> float:
    """Share of such a collective that the closed form finds exposed."""
    alike = [one for one in report.collectives if one.axis == "+".join(axes) and one.seconds]
    whole = sum(one.seconds for one in alike)
    return sum(one.exposed_seconds for one in alike) / whole if whole else 1.0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def figures(case: Case, cache: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Parts of memory in bytes, and collectives, of a case's program."""
    kept = pathlib.Path(cache) / f"{key_of(case)}.json" if cache else None
    if kept is not None and kept.is_file():
        return json.loads(kept.read_text())
    if not (ROOT / os.environ.get("GPU_COMPILER", COMPILER) / "jax_plugins").is_dir():
        raise ValueError(
            "--compile needs XLA's compiler for GPUs; `make gpu-compiler` installs it. Everything "
            "else works without"
        )
    found = _compile(case, say)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
    return found


def key_of(case: Case) -> str:
    """Name of a program: by its configuration, its GPUs, the code and the compiler."""
    state = repr(
        (
            case.model,
            case.train,
            case.mesh,
            case.recipe,
            case.hardware.gpu_name,
            case.hardware.per_node,
            jax.__version__,
        )
    )
    digest = hashlib.sha256(state.encode())
    for folder in ("model", "sharding", "training", "pallas_kernels", "programs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _compile(case: Case, say: Callable[[str], None]) -> dict[str, Any]:
    started = time.monotonic()
    say(f"compiling the program for {case.gpus} GPUs until buffers are assigned …")
    with tempfile.TemporaryDirectory() as folder:
        given, taken = pathlib.Path(folder, "case"), pathlib.Path(folder, "figures.json")
        given.write_bytes(pickle.dumps(_plain(case)))
        environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
        compiler = str(ROOT / os.environ.get("GPU_COMPILER", COMPILER))
        environment |= {"PYTHONPATH": compiler, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "planning.compiled", str(given), str(taken)]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        ) as child:
            try:
                _, errors = child.communicate(timeout=SECONDS)
            except BaseException:
                child.kill()
                raise
        if child.returncode:
            last = " ".join(errors.strip().splitlines()[-1:])
            raise ValueError(f"the program does not compile: {last[:500]}")
        found = json.loads(taken.read_text())
    return found | {"seconds": time.monotonic() - started}


def _plain(case: Case) -> dict[str, Any]:
    """A case without what holds devices."""
    return {
        "model": case.model,
        "train": case.train,
        "recipe": case.recipe,
        "mesh": case.mesh,
        "gpu": case.hardware.gpu_name,
        "per_node": case.hardware.per_node,
        "gpus": case.gpus,
    }


def compile_here(plain: dict[str, Any]) -> dict[str, Any]:
    """Compile in this process, which alone sees the compiler; it must end with `os._exit`."""
    from programs.absent_gpus import GPUS, INSPECTION, absent_gpus
    from programs.scheduled import until_scheduled
    from programs.step import lower, read, rows_of
    from sharding.devices import schedule_options
    from sharding.mesh import make_layout

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    gpus, gpu = plain["gpus"], plain["gpu"]
    per_node = min(8, plain["per_node"])  # as hosts have them; links are the plan's own matter
    nodes = -(-gpus // per_node)
    if gpu not in GPUS:
        raise ValueError(f"no program can be compiled for {gpu}; there are {', '.join(GPUS)}")
    devices = absent_gpus(nodes, per_node, gpu)[:gpus]
    layout = make_layout(plain["mesh"], devices)
    trainer = Trainer(plain["model"], plain["train"], plain["recipe"], layout)
    flags = INSPECTION | schedule_options(layout.config)
    report = read(until_scheduled(lower(trainer), flags), layout.mesh, rows_of(trainer))
    return {"parts": report.parts, "collectives": report.collectives}


def main() -> None:
    """Child process: a pickled case in, figures out."""
    given, taken = map(pathlib.Path, sys.argv[1:])
    try:
        found = compile_here(pickle.loads(given.read_bytes()))
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    taken.write_text(json.dumps(found))
    os._exit(0)  # the compiler is still at work for nobody


if __name__ == "__main__":
    main()
