"""Answers of a policy in numbers and as text: held-out reward and accuracy, lengths, samples.jsonl.

Both are measured at temperature 1 and greedily: neither alone tells enough.

Letters: A answers.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np

from rl.problems import Problem
from rl.prompts import EVALUATE, EVALUATE_GREEDY, Prompts, Questions, sampler_seed
from rl.rollout import Publishable, Rollout
from rl.stopping import Stop, never
from rl.verdict.scoring import Scorer, Scores
from training.metrics import drop_records_from

GREEDY = ("accuracy", "reward")
"""Measured greedily too."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Reward and accuracy on the same prompts every time, answered once by each sampler.

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
            found = describe(rollout, scores)
            if {name for name, weight in scores.weights.items() if weight} == {"accuracy"}:
                del found["reward"]  # it is the accuracy
            if purpose == EVALUATE_GREEDY:
                found = {f"{name}_greedy": found[name] for name in GREEDY if name in found}
            metrics |= {f"eval/{name}": value for name, value in found.items()}
        return metrics


def failed_rewards(scores: Scores) -> float:
    """Failed rewards per answer."""
    total = sum(count for kinds in scores.failures.values() for count in kinds.values())
    return total / scores.answers


def lengths(rollout: Rollout) -> np.ndarray:
    """Tokens of every answer, its end token included, int64 [A]."""
    return np.array([len(answer) for answer in rollout.tokens])


def describe(rollout: Rollout, scores: Scores) -> dict[str, float]:
    """accuracy, format and step_accuracy, reward, length and length_correct (tokens, mean over
    answers and over correct ones, where it is known; NaN for none), truncated (share)."""
    tokens_A = lengths(rollout)
    found = {
        **scores.quality,
        "reward": float(scores.rewards.mean()),
        "length": float(tokens_A.mean()),
        "truncated": float(rollout.truncated.mean()),
    }
    if (right := scores.correct) is not None:
        found["length_correct"] = float(tokens_A[right].mean()) if right.any() else float("nan")
    return found


class Transcripts:
    """Samples of answers for people to read, in `run_dir`/samples.jsonl; process 0 writes.

    A line: step, prompt, answer, tokens, truncated, reward and its parts before their weights,
    correct where that is known, advantage. Lines of
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
        parts: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> None:
        """The first answers of a rollout, in its order; `numbers` and `parts` of the reward by
        answer, [A] each."""
        if not self._count:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for a in range(min(self._count, len(texts))):
                line = {"step": step, "prompt": problems[a].prompt, "answer": texts[a]}
                line |= {name: values[a].item() for name, values in numbers.items()}
                line["parts"] = {name: values[a].item() for name, values in parts.items()}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
