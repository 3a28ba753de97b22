"""A plan as one HTML file that opens from disk without a network; its numbers are the JSON's.

Matplotlib draws the figures as SVG, whose parts carry their numbers as titles, which browsers show
where the pointer rests; jinja2 makes the page. The JSON lies in it.
"""

import io
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe

from planning.report import axes_of, plain, scaled

COLORS = {
    "weights": "#2f5d8a", "gradients": "#5b8db8", "optimizer": "#9dbfd9", "stash": "#d08c38",
    "exchange": "#7a5aa6", "workspace": "#a9b0bd",
}  # fmt: skip
PARTS = {
    "products": "#2f5d8a", "experts": "#5b8db8", "attention": "#3c8d5a", "memory": "#9dbfd9",
    "exchange": "#7a5aa6", "tensor": "#b48ad6", "pipe": "#c65f8a", "weights": "#d08c38",
    "gradients": "#e0b26b", "optimizer": "#8a6d3b", "bubble": "#d9dde6",
}  # fmt: skip
KINDS = {"F": "#5b8db8", "B": "#d08c38", "FB": "#2f5d8a", "I": "#c65f8a", "W": "#e0b26b"}
NAMES = {
    "F": "forward", "B": "backward", "FB": "a forward and a backward pass together",
    "I": "gradient of the input", "W": "gradient of the weights",
}  # fmt: skip
CENTRE: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}
MOST = 24
"""Layouts that are drawn."""


def write_page(path: str, plans: Sequence[Mapping[str, Any]]) -> None:
    """Write the page of one plan, or of several, the first of which is shown whole.

    plans: what `Report.to_json` returns.
    """
    pathlib.Path(path).write_text(page_of(plans), encoding="utf-8")


def page_of(plans: Sequence[Mapping[str, Any]]) -> str:
    """The page's text."""
    shown: list[dict[str, Any]] = [{**plan, "words": words(plan)} for plan in plans[:MOST]]
    folder = pathlib.Path(__file__).with_name("templates")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined
    )
    data = json.dumps(list(plans)).replace("</", "<\\/")
    memory = [{k: v for k, v in p["memory_gib"].items() if k in COLORS} for p in shown]
    limits = [p["memory_gib"]["limit"] for p in shown]
    return environment.get_template("page.html.jinja").render(
        plans=shown,
        plain=plain,
        scaled=scaled,
        colors=COLORS,
        parts=PARTS,
        kinds=KINDS,
        names=NAMES,
        data=markupsafe.Markup(data),
        memory_bars=stacked(memory, COLORS, "GiB", limits),
        time_bars=stacked([p["parts_seconds"] for p in shown], PARTS, "seconds"),
        timeline=timeline(shown[0]["timeline"]),
        traffic_bars=traffic(shown[0]["collectives"]),
    )


def words(plan: Mapping[str, Any]) -> str:
    """A layout in words."""
    sizes = plan["layout"]
    more = f"remat {sizes['remat']}, {sizes['micro_batches']} micro batches of "
    more += f"{sizes['sequences_per_gpu']} x {sizes['seq_len']}"
    return ", ".join([*axes_of(sizes), more])


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _svg(figure: Any, tips: Mapping[str, str]) -> markupsafe.Markup:
    """The figure as SVG, with the texts of `tips` as titles of the parts of these ids."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "plan"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for name, tip in tips.items():
        title = f'<g id="{name}" data-tip="1"><title>{markupsafe.escape(tip)}</title>'
        text = text.replace(f'<g id="{name}">', title)
    return markupsafe.Markup(text)


def stacked(
    rows: Sequence[Mapping[str, float]],
    colors: Mapping[str, str],
    unit: str,
    limits: Sequence[float] = (),
) -> markupsafe.Markup:
    """Bars of parts, one for each plan; `limits` are lines that they should not pass."""
    figure, axes = _figure(10, 0.7 + 0.42 * len(rows))
    tips = {}
    for row, parts in enumerate(rows):
        left = 0.0
        for name, color in colors.items():
            size = parts.get(name, 0.0)
            if size <= 0:
                continue
            bar = axes.barh(row, size, left=left, color=color, height=0.7)[0]
            bar.set_gid(f"{unit}-{row}-{name}")
            tips[f"{unit}-{row}-{name}"] = f"{name}: {size:.4g} {unit}"
            if size > 0.06 * sum(parts.values()):
                ink = "white" if name != "bubble" else "black"
                axes.text(left + size / 2, row, f"{size:.3g}", color=ink, **CENTRE)
            left += size
        if limits:
            line = axes.plot([limits[row]] * 2, [row - 0.42, row + 0.42], color="#b3261e", lw=2)[0]
            line.set_gid(f"limit-{row}")
            tips[f"limit-{row}"] = f"limit: {limits[row]:.4g} {unit}"
    axes.set_yticks(range(len(rows)), [str(n + 1) for n in range(len(rows))])
    axes.set_xlabel(unit)
    axes.invert_yaxis()
    return _svg(figure, tips)


def timeline(ticks: Sequence[Mapping[str, Any]]) -> markupsafe.Markup | None:
    """What one rank of a pipeline does, from left to right; white is waiting."""
    if not ticks:
        return None
    figure, axes = _figure(10, 1.3)
    tips = {}
    for number, tick in enumerate(ticks):
        seconds = tick["end"] - tick["start"]
        bar = axes.barh(0, seconds, left=tick["start"], color=KINDS[tick["kind"]], height=0.8)[0]
        bar.set_gid(f"tick-{number}")
        tips[f"tick-{number}"] = (
            f"{NAMES[tick['kind']]}: {tick['start']:.4g} to {tick['end']:.4g} s ({seconds:.4g} s)"
        )
    axes.set_yticks([])
    axes.set_xlabel("seconds")
    return _svg(figure, tips)


def traffic(collectives: Sequence[Mapping[str, Any]]) -> markupsafe.Markup:
    """Seconds of the collectives, and of them those that nothing else fills."""
    shown = sorted(collectives, key=lambda one: -one["seconds"])[:12]
    figure, axes = _figure(10, 0.8 + 0.32 * max(1, len(shown)))
    tips = {}
    links = {"nvlink": "#3c8d5a", "network": "#7a5aa6"}
    for row, one in enumerate(shown):
        whole = axes.barh(row, one["seconds"], color=links[one["link"]], height=0.7, alpha=0.35)[0]
        open_ = axes.barh(row, one["exposed_seconds"], color=links[one["link"]], height=0.7)[0]
        for kind, bar in (("whole", whole), ("exposed", open_)):
            bar.set_gid(f"sent-{row}-{kind}")
            tips[f"sent-{row}-{kind}"] = (
                f"{one['op']} over {one['axis']}: {one['gib']:.4g} GiB by {one['link']}, "
                f"{one['seconds']:.4g} s, exposed {one['exposed_seconds']:.4g} s"
            )
    axes.set_yticks(range(len(shown)), [f"{one['op']}, {one['axis']}" for one in shown], fontsize=8)
    axes.set_xlabel("seconds; dark: exposed; green: NVLink, violet: network")
    axes.invert_yaxis()
    return _svg(figure, tips)
