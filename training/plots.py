"""Pictures of a run, from its metrics.jsonl."""

import os
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from training.metrics import LAYER_LOAD, read_metrics

_TRAIN, _SMOOTH, _MTP, _EVAL = "#9ecae1", "#08519c", "#969696", "#d94801"


def plot_run(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Draw loss.png and, for a run with experts, expert_load.png into `run_dir`.

    Returns the paths of the files drawn; a picture without data is not drawn.
    Errors: FileNotFoundError when the run has no metrics.jsonl.
    """
    records = read_metrics(run_dir)
    drawn = []
    for name, draw in (("loss.png", loss_figure), ("expert_load.png", expert_load_figure)):
        figure = draw(records)
        if figure is not None:
            drawn.append(Path(run_dir) / name)
            FigureCanvasAgg(figure)
            figure.savefig(drawn[-1], dpi=130)
    return drawn


def loss_figure(records: list[dict[str, float]]) -> Figure | None:
    """Training loss above, held-out bits per byte below, over tokens; None without a loss."""
    x, loss = _series(records, "train/loss")
    if not len(x):
        return None
    x_eval, bits = _series(records, "eval/bits_per_byte")
    x_mtp, mtp = _series(records, "train/mtp_loss")
    figure = Figure(figsize=(8, 6 if len(x_eval) else 4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(2 if len(x_eval) else 1, sharex=True))
    axes[0].plot(x, loss, color=_TRAIN, linewidth=1, label="next token, per step")
    axes[0].plot(x, _smooth(loss), color=_SMOOTH, linewidth=1.8, label="next token, smoothed")
    if len(x_mtp):
        axes[0].plot(x_mtp, _smooth(mtp), color=_MTP, linewidth=1.4, label="MTP, smoothed")
    axes[0].set_ylabel("training loss (nats/token)")
    axes[0].set_title("Training loss")
    axes[0].legend(frameon=False)
    if len(x_eval):
        axes[1].plot(x_eval, bits, color=_EVAL, marker="o", markersize=3.5, linewidth=1.5)
        axes[1].set_ylabel("held-out text (bits/byte)")
        last = f"Held-out text: {bits[-1]:.3f} bits/byte at the end"
        axes[1].set_title(last)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(_clock(records).removeprefix("train/"))
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def expert_load_figure(records: list[dict[str, float]]) -> Figure | None:
    """Heat map of each MoE layer's max/mean expert load over training; None without experts."""
    layers = sorted({int(m[1]) for r in records for m in map(LAYER_LOAD.fullmatch, r) if m})
    if not layers:
        return None
    name = "moe/load_max_over_mean/layer_{:02d}".format
    rows = [r for r in records if name(layers[0]) in r]
    x = np.array([r[_clock(records)] for r in rows])
    load = np.array([[r.get(name(layer), np.nan) for r in rows] for layer in layers])
    x, load = _binned(x, load)
    figure = Figure(figsize=(8, min(9.0, 2.2 + 0.25 * len(layers))), layout="constrained")
    axis = figure.subplots()
    top = max(2.0, float(np.nanpercentile(load, 99))) if np.isfinite(load).any() else 2.0
    image = axis.pcolormesh(
        _edges(x), np.arange(len(layers) + 1) - 0.5, np.ma.masked_invalid(load),
        cmap="YlOrRd", vmin=1.0, vmax=top, rasterized=True,
    )  # fmt: skip
    axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    if len(layers) > 16:
        axis.yaxis.set_major_locator(MaxNLocator(12, integer=True))
    axis.set_ylabel("layer")
    axis.set_xlabel(_clock(records).removeprefix("train/"))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_title("Load of the busiest expert, as a multiple of the mean (1 = balanced)")
    # Of one layer, the bar is an inch high.
    figure.colorbar(image, ax=axis, label="max / mean", extend="max")
    return figure


def _clock(records: list[dict[str, float]]) -> str:
    """Name of the horizontal axis: tokens when every record counts them, else the step."""
    return "train/tokens" if all("train/tokens" in r for r in records) else "step"


def _series(records: list[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    clock = _clock(records)
    points = [(r[clock], r[name]) for r in records if name in r]
    x, y = np.array(points, dtype=float).reshape(-1, 2).T
    return x, y


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about 2% of the points; non-finite points are left out of it."""
    width = min(max(1, len(values) // 50), (len(values) - 1) // 2)
    finite = np.isfinite(values)
    total = np.cumsum(np.append(0.0, np.where(finite, values, 0.0)))
    count = np.cumsum(np.append(0, finite))
    first = np.maximum(np.arange(len(values)) - width, 0)
    last = np.minimum(np.arange(len(values)) + width + 1, len(values))
    several = np.maximum(count[last] - count[first], 1)
    return np.where(count[last] > count[first], (total[last] - total[first]) / several, np.nan)


def _binned(x: np.ndarray, load: np.ndarray, most: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` columns, each the mean of neighbours: a screen shows no more."""
    if len(x) <= most:
        return x, load
    starts = np.linspace(0, len(x), most, endpoint=False).astype(int)
    width = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / width, np.add.reduceat(load, starts, axis=1) / width


def _edges(centres: np.ndarray) -> np.ndarray:
    """Borders of cells around increasing centres."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])
