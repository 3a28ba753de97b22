"""samples.jsonl: what a policy wrote, for people to read."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from rl.problems import Problem
from training.metrics import drop_records_from


class Transcripts:
    """Appends answers to `run_dir`/samples.jsonl; process 0 writes.

    A line: step, prompt, answer, tokens, truncated, reward, correct, advantage. Lines of
    `resume_step` and later, left by a run that went on after its last checkpoint, are dropped.
    """

    def __init__(self, run_dir: Path, resume_step: int, count: int):
        self._count = count if jax.process_index() == 0 else 0
        self._path = run_dir / "samples.jsonl"
        if self._count:
            run_dir.mkdir(parents=True, exist_ok=True)
            drop_records_from(self._path, resume_step)

    def write(
        self,
        step: int,
        problems: Sequence[Problem],
        texts: Sequence[str],
        numbers: dict[str, np.ndarray],
    ) -> None:
        """The first answers of a rollout, in its order; `numbers` by answer, [A] each."""
        if not self._count:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for a in range(min(self._count, len(texts))):
                line = {"step": step, "prompt": problems[a].prompt, "answer": texts[a]}
                line |= {name: values[a].item() for name, values in numbers.items()}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
