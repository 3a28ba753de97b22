"""Answers of a policy in numbers and as text: held-out accuracy, lengths, samples.jsonl.

Accuracy is measured at temperature 1 and greedily: neither alone tells enough.

Letters: A answers.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from rl.problems import Problem
from rl.prompts import EVALUATE, EVALUATE_GREEDY, Prompts, Questions, sampler_seed
from rl.rollout import Publishable, Rollout
from rl.stopping import Stop, never
from rl.verdict.scoring import Scorer, Scores
from training.metrics import drop_records_from


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Accuracy on the same prompts every time, answered once by each sampler.

    Draws at temperature 1 depend on (seed, step): a resumed run measures the same as one that was
    not stopped.
    """

    questions: Questions
    prompts: Prompts
    scorer: Scorer
    drawn: Publishable
    """Sampler at temperature 1."""
    greedy: Publishable
    """Greedy sampler."""

    def __call__(
        self,
        step: int,
        policy: Publishable,
        stop: Stop = never,
        failed: Callable[[Scores], float] | None = None,
    ) -> dict[str, float]:
        """Metrics of the policy that was published last; see `training/metrics.py`, eval/.

        failed: counts failed rewards per answer, and may report them; None: `failed_rewards`.
        RolloutStoppedError soon after `stop()` says true.
        """
        metrics = {"eval/failed_rewards": 0.0}
        for sampler, purpose in ((self.drawn, EVALUATE), (self.greedy, EVALUATE_GREEDY)):
            sampler.borrow(policy)
            seed = sampler_seed(self.prompts.seed, purpose, step)
            rollout = sampler(self.questions.ids, 1, seed, stop)
            texts = self.prompts.texts(rollout.tokens)
            scores = self.scorer(self.questions.problems, texts, lengths(rollout), stop)
            metrics["eval/failed_rewards"] += (failed or failed_rewards)(scores) / 2
            if purpose == EVALUATE_GREEDY:
                metrics["eval/accuracy_greedy"] = float(scores.correct.mean())
            else:
                metrics |= {
                    f"eval/{name}": value for name, value in describe(rollout, scores).items()
                }
        return metrics


def failed_rewards(scores: Scores) -> float:
    """Failed rewards per answer."""
    total = sum(count for kinds in scores.failures.values() for count in kinds.values())
    return total / len(scores.correct)


def lengths(rollout: Rollout) -> np.ndarray:
    """Tokens of every answer, its end token included, int64 [A]."""
    return np.array([len(answer) for answer in rollout.tokens])


def describe(rollout: Rollout, scores: Scores) -> dict[str, float]:
    """accuracy, format and step_accuracy, length and length_correct (tokens, mean over answers and
    over correct ones; NaN for none), truncated (share)."""
    tokens_A = lengths(rollout)
    correct = scores.correct
    return {
        **scores.quality,
        "length": float(tokens_A.mean()),
        "length_correct": float(tokens_A[correct].mean()) if correct.any() else float("nan"),
        "truncated": float(rollout.truncated.mean()),
    }


class Transcripts:
    """Samples of answers for people to read, in `run_dir`/samples.jsonl; process 0 writes.

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
