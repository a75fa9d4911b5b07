"""A picture of the norms of one model or several: spectral norm, target and stable rank, layer by layer."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specscale.constraints import CONSTRAINTS
from specscale.errors import Refusal
from specscale.inspection import Found
from specscale.spectra import WeightNorms

COLORS = ("#1b7fbd", "#d1495b", "#3a8f5c", "#8e6bb0", "#d98e04", "#444444")
MARKERS = "ox+"
MOST_LABELS = 80
"""More layers than this are not all named below the axis."""


def require_matplotlib() -> None:
    """Refuse where there is no matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise Refusal("--plot needs the package matplotlib: pip install matplotlib") from error


def draw(found: Sequence[Found], path: Path) -> None:
    """Write the picture.

    Raises:
        Refusal: it cannot be written, or its name says no format.
    """
    try:
        figure_of(found).savefig(path, dpi=130)
    except (ValueError, OSError) as error:
        raise Refusal(f"{str(path)!r} cannot be written: {type(error).__name__}: {error}") from error


def figure_of(found: Sequence[Found]) -> Any:
    """The picture: a panel for each number, and in it a point for each weight."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    names = list(dict.fromkeys(one.name for each in found for one in each.norms.weights))
    place = {name: number for number, name in enumerate(names)}
    weights = [one for each in found for one in each.norms.weights]
    # The Frobenius norms tell little where no target is one.
    panels = {"spectral": "spectral norm", "frobenius": "Frobenius norm", "stable_rank": "stable rank"}
    if "frobenius" not in map(_norm_of, weights):
        del panels["frobenius"]
    width = min(max(7.0, 0.19 * len(names) + 1.5), 24.0)
    figure = Figure(figsize=(width, 2.3 * len(panels) + 1.5), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True)
    labels: dict[str, Any] = {}
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for number, each in enumerate(found):
            points = [(place[one.name], getattr(one, key)) for one in each.norms.weights]
            style = f"{MARKERS[number % len(MARKERS)]}-"
            color = COLORS[number % len(COLORS)]
            (dots,) = _plot(axis, points, style, color=color, markersize=4, linewidth=0.6, alpha=0.8)
            labels.setdefault(each.title, dots)
        if targets := [(place[one.name], one.target or 0) for one in weights if _norm_of(one) == key]:
            (ticks,) = _plot(axis, targets, "_", color="black", markersize=12, markeredgewidth=1.4)
            labels["target"] = ticks
        if key == "stable_rank":
            ranks = [(place[one.name], min(one.shape)) for one in weights]
            (labels["full rank"],) = _plot(axis, ranks, "_", color="#999999", markersize=10)
        axis.set_ylabel(title)
        axis.grid(alpha=0.25)
        low, high = axis.dataLim.intervaly
        if high > 20 * low > 0:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_ylim(bottom=0)
    figure.legend(labels.values(), labels.keys(), fontsize=8, frameon=False, ncols=4, loc="outside upper left")
    every = math.ceil(len(names) / MOST_LABELS)
    axes[-1].set_xticks(range(0, len(names), every), names[::every], rotation=90, fontsize=7)
    axes[-1].set_xlim(-0.7, len(names) - 0.3)
    return figure


def _norm_of(one: WeightNorms) -> str | None:
    """Which norm the weight's target is of."""
    return CONSTRAINTS[one.constraint].norm_type.name if one.constraint in CONSTRAINTS else None


def _plot(axis: Any, points: Sequence[tuple[int, float]], style: str, **options: Any) -> Any:
    """Draw the points that a logarithmic axis can show."""
    shown = [(x, y) for x, y in points if math.isfinite(y) and y > 0]
    return axis.plot([x for x, _ in shown], [y for _, y in shown], style, **options)
