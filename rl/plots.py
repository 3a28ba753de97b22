"""rl.png: accuracy, reward, length, correctness of steps and format, to be read together.

Rising length alone is no learning: with a base that has not learned the single step, answers grow
longer while accuracy and steps fall.
"""

import os
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.metrics import read_metrics

_PANELS = {
    "accuracy": [
        ("policy/accuracy", "#9ecae1", "rollout"),
        ("eval/accuracy", "#08519c", "held out, T = 1"),
        ("eval/accuracy_greedy", "#d94801", "held out, greedy"),
    ],
    "reward": [
        ("policy/reward", "#9ecae1", "rollout"),
        ("eval/reward", "#08519c", "held out, T = 1"),
        ("eval/reward_greedy", "#d94801", "held out, greedy"),
    ],
    "length (tokens)": [
        ("policy/length", "#08519c", "all answers"),
        ("policy/length_correct", "#31a354", "right ones"),
    ],
    "steps that are right (share)": [("policy/step_accuracy", "#08519c", "rollout")],
    "form asked for (share)": [("policy/format", "#08519c", "rollout")],
    "entropy (nats/token)": [("policy/entropy", "#08519c", "rollout")],
    "groups without variance (share)": [("policy/zero_variance_groups", "#08519c", "rollout")],
}
"""Title of a panel, and its curves: metric, colour, label. A panel without numbers is left out."""
_PART = "policy/reward/"


def plot_rl(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Draw rl.png into `run_dir`; the paths drawn, none for a run without metrics of stage rl.

    Errors: FileNotFoundError when the run has no metrics.jsonl.
    """
    figure = rl_figure(read_metrics(run_dir))
    if figure is None:
        return []
    path = Path(run_dir) / "rl.png"
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)
    return [path]


def rl_figure(lines: list[dict[str, float]]) -> Figure | None:
    """Panels of two columns over steps; None without metrics of stage rl."""
    if not any("policy/reward" in line for line in lines):
        return None
    names = dict.fromkeys(name for line in lines for name in line if name.startswith(_PART))
    parts = [(name, f"C{i}", name.removeprefix(_PART)) for i, name in enumerate(names)]
    points = {
        name: [(x["step"], x[name]) for x in lines if np.isfinite(x.get(name, np.nan))]
        for name, *_ in sum(_PANELS.values(), parts)
    }
    panels = {
        title: [curve for curve in curves if points[curve[0]]]
        for title, curves in ({**_PANELS, "parts of the reward": parts}).items()
    }
    panels = {title: curves for title, curves in panels.items() if curves}
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(9, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, sharex=True, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        for name, colour, label in curves:
            x, y = np.array(points[name], float).T
            marker = "o" if name.startswith("eval/") else None
            axis.plot(x, y, color=colour, label=label, linewidth=1.6, marker=marker, markersize=3.5)
        if "share" in title or title == "accuracy":
            axis.set_ylim(-0.03, 1.03)
        axis.set_title(title)
        axis.legend(frameon=False)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[: len(panels)][-2:]:
        axis.set_xlabel("step")
        axis.tick_params(labelbottom=True)
    return figure
