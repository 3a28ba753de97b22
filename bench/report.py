"""Sections of `bench/results.md`: figures with the commit, versions, device and command."""

import datetime
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results.md"


def write_section(title: str, lines: Sequence[str], path: pathlib.Path = RESULTS) -> None:
    """Append `## title` with its provenance and `lines` (Markdown), or replace the section.

    Raises:
        ValueError: a line would open a section of its own.
    """
    if any(line.startswith("## ") for line in lines):
        raise ValueError(f"section {title!r} holds a line that starts with '## '; use '### '")
    text = path.read_text() if path.exists() else "# Measured\n"
    head, *sections = text.split("\n## ")
    body = "\n".join([title, "", *provenance(), "", *lines]).rstrip()
    titles = [section.split("\n", 1)[0] for section in sections]
    if title in titles:
        sections[titles.index(title)] = body
    else:
        sections.append(body)
    path.write_text("\n\n## ".join(part.strip() for part in (head, *sections)) + "\n")


def provenance() -> list[str]:
    """Commit, versions, device and command of a measurement, as Markdown list items."""
    now = datetime.datetime.now(datetime.UTC)
    return [
        f"- commit {commit()}, {now:%Y-%m-%d %H:%M} UTC",
        f"- Python {platform.python_version()}, jax {jax.__version__}, numpy {np.__version__}",
        f"- {device()}",
        f"- `{command()}`",
    ]


def commit() -> str:
    """Short hash of the checkout, with "+dirty" when files differ from it."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "none"
    return head + ("+dirty" if git("status", "--porcelain") else "")


def device() -> str:
    """Kind and number of the devices jax uses, and the cores and load of the host."""
    devices = jax.devices()
    kind = devices[0].device_kind if devices[0].platform != "cpu" else cpu_model()
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{len(devices)} x {kind}, {os.cpu_count()} CPU cores{load}"


def cpu_model() -> str:
    """The processor's name."""
    info = pathlib.Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def command() -> str:
    """The command line, with the interpreter's name instead of its place."""
    return shlex.join(["python", *sys.orig_argv[1:]])
