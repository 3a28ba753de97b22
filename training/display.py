"""Progress for a person: one live line in a terminal, a few plain lines anywhere else."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

import jax
from rich.console import Console
from rich.live import Live
from rich.text import Text


class Display:
    """Shows the newest record; process 0 speaks.

    In a terminal one line is rewritten in place, in as many rows as its width asks for. Otherwise
    (a file, a CI log) a line is printed for the first record, then at most one per `plain_every_s`
    seconds, and always for a record with an evaluation and for the last step, so that a log stays
    short and complete where it matters.

    Args:
      total_steps: length of the run.
      stream: where to write.
      plain_every_s: least seconds between plain lines.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        stream: TextIO | None = None,
        plain_every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total_steps = total_steps
        self._plain_every_s = plain_every_s
        self._clock = clock
        self._next_plain = clock()
        self._speaks = jax.process_index() == 0
        self._latest: dict[str, float] = {}
        self._shown = False
        self._console = Console(file=stream or sys.stdout, highlight=False)
        self._live = None
        if self._speaks and self._console.is_terminal:
            # No refresh thread: the line changes when there is news.
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the record of `step` (from 0). Numbers a record lacks keep their last value."""
        if not self._speaks:
            return
        # The first step waited for the compiler; the time that is left is of the others.
        self._latest |= metrics
        if not self._shown:
            self._latest.pop("perf/step_s", None)
        self._shown = True
        line = status_line(step + 1, self._total_steps, self._latest)
        if self._live is not None:
            self._live.update(Text(wrapped(line, self._console.width)), refresh=True)
            return
        evaluated = "eval/bits_per_byte" in metrics or "eval/length" in metrics
        matters = evaluated or step + 1 >= self._total_steps
        if matters or self._clock() >= self._next_plain:
            self._next_plain = self._clock() + self._plain_every_s
            print(line, file=self._console.file, flush=True)

    def note(self, text: str) -> None:
        """Print a message above the live line, or as a line of its own."""
        if self._speaks:
            if self._live is not None:
                self._console.print(Text(text))
            else:
                print(text, file=self._console.file, flush=True)

    def close(self) -> None:
        """Leave the last line in place and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_FIELDS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss", "train/loss", lambda x: f"{x:.3f}"),
    ("eval", "eval/bits_per_byte", lambda x: f"{x:.3f} bits/byte"),
    ("reward", "policy/reward", lambda x: f"{x:.3f}"),
    ("REWARDS FAILED", "policy/failed_rewards", lambda x: f"{x:.0%}" if x else ""),
    ("held-out", "eval/accuracy", lambda x: f"{x:.1%}"),
    ("greedy", "eval/accuracy_greedy", lambda x: f"{x:.1%}"),
    ("held-out reward", "eval/reward", lambda x: f"{x:.3f}"),
    ("length", "policy/length", lambda x: f"{x:.1f}"),
    ("entropy", "policy/entropy", lambda x: f"{x:.3f}"),
    ("gap", "policy/sampler_gap", lambda x: f"{x:.1e}"),
    ("rollout", "perf/rollout_share", lambda x: f"{x:.0%}"),
    ("update", "perf/update_share", lambda x: f"{x:.0%}"),
    ("lr", "train/learning_rate", lambda x: f"{x:.2e}"),
    ("grad", "train/grad_norm", lambda x: f"{x:.2f}"),
    ("", "perf/tokens_per_s", lambda x: f"{human(x)} tok/s"),
    ("", "perf/tokens_per_s_per_device", lambda x: f"{human(x)} tok/s/device"),
    ("MFU", "perf/mfu", lambda x: f"{100 * x:.1f}%"),
    ("load", "moe/load_max_over_mean", lambda x: f"{x:.2f}x" if x else ""),  # 0: no experts
    ("skipped", "train/skipped_steps", lambda x: f"{x:.0f}" if x else ""),
)
"""Label, metric, format, in the order of a reader's interest."""


def status_line(steps_done: int, total_steps: int, metrics: Mapping[str, float]) -> str:
    """One line about a run; fields whose metric is absent are left out."""
    parts = [f"step {steps_done}/{total_steps}"]
    if "perf/step_s" in metrics:
        parts.append(f"ETA {duration(metrics['perf/step_s'] * (total_steps - steps_done))}")
    for label, name, form in _FIELDS:
        text = form(metrics[name]) if name in metrics else ""
        if text:
            parts.append(f"{label} {text}".strip())
    return "  ".join(parts)


def wrapped(line: str, width: int) -> str:
    """A status line in rows of at most `width` characters; a field stays whole where it fits."""
    rows: list[str] = []
    for field in line.split("  "):
        if rows and len(rows[-1]) + 2 + len(field) <= width:
            rows[-1] += f"  {field}"
        else:
            rows.append(field)
    return "\n".join(rows)


def human(x: float) -> str:
    """Three significant digits with a suffix: 950, 12.3k, 1.25M, 14.8T."""
    for suffix in ("", "k", "M", "G", "T"):
        if abs(x) < 999.5 or suffix == "T":
            digits = 0 if abs(x) >= 99.95 or not suffix else 1 if abs(x) >= 9.995 else 2
            return f"{x:.{digits}f}{suffix}"
        x /= 1000
    raise AssertionError("unreachable: the last suffix takes everything")


def duration(seconds: float) -> str:
    """Two units are enough: 8s, 3m05s, 2h07m, 12d04h."""
    whole = round(max(0.0, seconds))
    days, hours, minutes, rest = whole // 86400, whole // 3600, whole // 60, whole % 60
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
