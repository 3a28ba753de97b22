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
from planning.report import GIB, Report, collective_json
from planning.traffic import Collective, link_seconds
from programs.plan import plan_of
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
        exposed = seconds * _exposed(report, names)
        one = Collective(op, axes, times, size, link, seconds, exposed, "")
        sent.append(collective_json(one))
    compiled = {
        "memory_gib": memory,
        "collectives": sent,
        "compile_seconds": found["seconds"],
        "closed_form_error": report.memory.total / GIB / memory["total"] - 1,
    }
    return dataclasses.replace(report, compiled=compiled)


def _exposed(report: Report, axes: tuple[str, ...]) -> float:
    """Share of such a collective that the closed form finds exposed."""
    alike = [one for one in report.collectives if one.axis == "+".join(axes) and one.seconds]
    whole = sum(one.seconds for one in alike)
    return sum(one.exposed_seconds for one in alike) / whole if whole else 1.0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def figures(
    case: Case, cache: str, say: Callable[[str], None], whole: bool = False
) -> dict[str, Any]:
    """Parts of memory in bytes, and collectives, of a case's program.

    whole: every kind of pass of a pipeline, not only the one that decides (`programs/plan.py`).
    """
    kept = pathlib.Path(cache) / f"{key_of(case, whole)}.json" if cache else None
    if kept is not None and (found := _kept(kept)):
        return _with_left_out(found, case, whole)
    if not (ROOT / os.environ.get("GPU_COMPILER", COMPILER) / "jax_plugins").is_dir():
        raise ValueError(
            "--compile needs XLA's compiler for GPUs; `make gpu-compiler` installs it. Everything "
            "else works without"
        )
    found = _compile(case, say, whole)
    if kept is not None:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(found))
        except OSError as error:
            say(f"these figures are not kept: {error}")
    return _with_left_out(found, case, whole)


def _with_left_out(found: dict[str, Any], case: Case, whole: bool) -> dict[str, Any]:
    """The figures with what kinds of ticks carry that were not compiled where it belongs."""
    left_out = 0 if whole else plan_of(case.trainer)[1]
    parts = found["parts"]
    moved = {"stash": parts["stash"] + left_out, "workspace": parts["workspace"] - left_out}
    return found | {"parts": parts | moved}


def key_of(case: Case, whole: bool) -> str:
    """Name of a program: by its configuration, its GPUs, the code and the compiler."""
    digest = hashlib.sha256(repr((*_plain(case, whole), jax.__version__)).encode())
    for folder in ("model", "sharding", "training", "pallas_kernels", "programs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _kept(path: pathlib.Path) -> dict[str, Any]:
    """Figures of an earlier compilation; none from a file that was not written to its end."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _compile(case: Case, say: Callable[[str], None], whole: bool) -> dict[str, Any]:
    started = time.monotonic()
    say(f"compiling the program for {case.gpus} GPUs until buffers are assigned …")
    with tempfile.TemporaryDirectory() as folder:
        given, taken = pathlib.Path(folder, "case"), pathlib.Path(folder, "figures.json")
        given.write_bytes(pickle.dumps(_plain(case, whole)))
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


def _plain(case: Case, whole: bool) -> tuple[Any, ...]:
    """What `compile_here` takes: a case without what holds devices."""
    hardware = case.hardware
    of_run = case.model, case.train, case.recipe, case.mesh
    return (*of_run, hardware.gpu_name, hardware.per_node, case.gpus, whole)


def compile_here(
    model: Any, train: Any, recipe: Any, mesh: Any, gpu: str, per_node: int, gpus: int, whole: bool
) -> dict[str, Any]:
    """Compile in this process, which alone sees the compiler; it must end with `os._exit`."""
    from programs.absent_gpus import GPUS, absent_gpus, inspection_options
    from programs.scheduled import until_scheduled
    from programs.step import lower, read, rows_of
    from sharding.mesh import make_layout

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    per_node = min(8, per_node)  # as hosts have them; links are the plan's own matter
    if gpu not in GPUS:
        raise ValueError(f"no program can be compiled for {gpu}; there are {', '.join(GPUS)}")
    layout = make_layout(mesh, absent_gpus(-(-gpus // per_node), per_node, gpu)[:gpus])
    trainer = Trainer(model, train, recipe, layout)
    planned, left_out = (trainer, 0) if whole else plan_of(trainer)
    program = until_scheduled(lower(planned), inspection_options(layout.config))
    program = program._replace(temporaries=program.temporaries + left_out)
    report = read(program, layout.mesh, rows_of(trainer))
    return {"parts": report.parts, "collectives": report.collectives}


def main() -> None:
    """Child process: a pickled case in, figures out."""
    given, taken = map(pathlib.Path, sys.argv[1:])
    try:
        found = compile_here(*pickle.loads(given.read_bytes()))
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    taken.write_text(json.dumps(found))
    os._exit(0)  # the compiler is still at work for nobody


if __name__ == "__main__":
    main()
