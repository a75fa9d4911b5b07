"""The figures of finished runs: those of the post, and more."""

from collections.abc import Callable, Iterable
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import matplotlib

from lib.presets import NORMS, TARGET_SOURCES
from lib.runs import Run, Runs, excess_by_epoch, per_layer, rank_keys

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

# A new norm or target source takes the next style, from the first one again when they run out.
FIRST = ("none", "frobenius", "spectral", "clipped")
PALETTE = ("#444444", "#1b7fbd", "#d1495b", "#3a8f5c", "#8e6bb0", "#d98e04", "#00a5a5", "#e377c2", "#8c564b", "#9db100")
COLORS = dict(zip(dict.fromkeys((*FIRST, *NORMS)), cycle(PALETTE)))
LINE_STYLES = dict(zip(TARGET_SOURCES, cycle(("-", "--", ":", "-."))))


MOST_COLUMNS = 4
"""Panels of conditions in a row."""


def grid(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes `(rows, columns)`; `size` is the width and height of each."""
    width, height = size
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * width, rows * height), squeeze=False, layout="constrained", **options
    )
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write the figure to a file, and let go of it."""
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _style(run: Run) -> dict[str, Any]:
    return {"color": COLORS[run.config["norm"]], "linestyle": LINE_STYLES[run.config["targets"]]}


def _set_epoch_axis(axis: Axes, title: str, run: Run) -> None:
    """Label an axis of epochs; where the epochs of the run are numbers of steps, with the steps."""
    steps = run.config.get("steps_per_epoch")
    axis.set(title=title, xlabel="step" if steps else "epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
    if steps:
        axis.xaxis.set_major_formatter(lambda epoch, _: f"{epoch * steps:g}")


def _by_epoch(run: Run, key: str) -> tuple[list[int], list[float]]:
    """The epochs and the values of a metric, accuracies in percent."""
    factor = 100 if key.endswith("accuracy") else 1
    return [line["epoch"] for line in run.epochs], [factor * line[key] for line in run.epochs]


def _axis_label(key: str) -> str:
    return "accuracy (%)" if key == "accuracy" else key


def _marker(num_points: int) -> str:
    return "o" if num_points < 10 else ""


def shade(position: int, count: int) -> Any:
    """A color, darker for earlier positions."""
    return plt.cm.viridis(0.9 * position / max(count - 1, 1))


def accuracy(runs: Runs, path: Path) -> None:
    """Accuracy by epoch: training (while learning, on augmented images) and test."""
    _train_beside_test(runs, "accuracy", path)


def loss(runs: Runs, path: Path) -> None:
    """Cross entropy by epoch."""
    _train_beside_test(runs, "loss", path)


def _train_beside_test(runs: Runs, key: str, path: Path) -> None:
    """A panel for each split, with all conditions."""
    figure, axes = grid(1, 2, (5, 4), sharey=True)
    for axis, split in zip(axes[0], ("train", "test"), strict=True):
        for name, seeds in runs.items():
            for number, run in enumerate(seeds):
                style = _style(run) | {"marker": _marker(len(run.epochs)), "ms": 4}
                axis.plot(*_by_epoch(run, f"{split}/{key}"), label=None if number else name, **style)
        _set_epoch_axis(axis, split, run)
    axes[0][0].set_ylabel(_axis_label(key))
    axes[0][1].legend(frameon=False)
    save(figure, path)


def model_family(presets: dict[str, Runs], path: Path) -> None:
    """Accuracy and loss of several models and all their conditions, training above test, as in the post."""
    figure, axes = grid(2, 2, (5.5, 4))
    widths = dict(zip(presets, (1.2, 2.4, 3.2), strict=False))
    for row, split in zip(axes, ("train", "test"), strict=True):
        for axis, key in zip(row, ("accuracy", "loss"), strict=True):
            for preset, runs in presets.items():
                for name, seeds in runs.items():
                    style = _style(seeds[0]) | {"linewidth": widths[preset]}
                    axis.plot(*_by_epoch(seeds[0], f"{split}/{key}"), label=f"{preset}, {name}", **style)
            _set_epoch_axis(axis, f"{split} {key}", seeds[0])
            axis.set_ylabel(_axis_label(key))
    axes[1][1].legend(frameon=False, fontsize="small")
    save(figure, path)


def curves(runs: Runs, path: Path) -> None:
    """Training and test together, by condition: how far they part."""
    figure, axes = grid(len(runs), 2, (5, 3.2), sharex=True, sharey="col")
    for row, (name, seeds) in zip(axes, runs.items(), strict=True):
        for axis, key in zip(row, ("accuracy", "loss"), strict=True):
            for split, color in (("train", "#1b7fbd"), ("test", "#d1495b")):
                points = _by_epoch(seeds[0], f"{split}/{key}")
                axis.plot(*points, color=color, label=split, marker=_marker(len(seeds[0].epochs)))
            axis.set_ylabel(_axis_label(key))
            _set_epoch_axis(axis, name, seeds[0])
    for axis in axes[:-1].flat:
        axis.set_xlabel("")
    axes[0][0].legend(frameon=False)
    save(figure, path)


def _layers_by_epoch(
    runs: Runs, label: str, values: Callable[[Run], Iterable[tuple[int, dict[str, float]]]], path: Path, log: bool
) -> None:
    """A panel for each condition and a line for each layer, darker for earlier layers; nothing without values.

    `values` returns the epochs of a run, each with its values by layer.
    """
    panels = {name: list(values(seeds[0])) for name, seeds in runs.items()}
    panels = {name: points for name, points in panels.items() if points and points[0][1]}
    if not panels:
        return
    columns = min(len(panels), MOST_COLUMNS)
    figure, axes = grid(-(-len(panels) // columns), columns, (4.2, 4), sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, points) in zip(axes.flat, panels.items(), strict=False):
        names = list(points[0][1])
        for depth, layer in enumerate(names):
            color = shade(depth, len(names))
            marker = _marker(len(points))
            axis.plot([e for e, _ in points], [v[layer] for _, v in points], color=color, marker=marker, ms=4)
            axis.lines[-1].set_label(layer if len(names) <= 8 else "")
        _set_epoch_axis(axis, name, runs[name][0])
        if log:
            axis.set_yscale("log")
            axis.grid(alpha=0.25, which="both")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        rates = [line["lr"] for line in runs[name][0].epochs]
        for epoch, (old, new) in enumerate(pairwise(rates), 1):
            if new < old:
                axis.axvline(epoch + 0.5, color="#999999", linewidth=0.8, linestyle=":")
    for row in axes:
        row[0].set_ylabel(label)
    if len(names) <= 8:
        axes.flat[len(panels) - 1].legend(frameon=False, title="layer", fontsize="small")
    save(figure, path)


def spectral_norms(runs: Runs, path: Path) -> None:
    """The spectral norm of every weight matrix; darker lines are earlier layers."""

    def values(run: Run) -> Iterable[tuple[int, dict[str, float]]]:
        return ((line["epoch"], per_layer(line, "spectral_norm")) for line in run.epochs)

    _layers_by_epoch(runs, "spectral norm", values, path, log=True)


def excess(runs: Runs, path: Path) -> None:
    """How far the norm of each weight is above its target; dotted lines are drops of the learning rate."""
    _layers_by_epoch(runs, "||W|| / target - 1", excess_by_epoch, path, log=False)


def iterations(runs: Runs, path: Path) -> None:
    """The solver's iterations a step, mean over the epoch, of layers that are not solved exactly."""

    def values(run: Run) -> Iterable[tuple[int, dict[str, float]]]:
        by_epoch = [(line["epoch"], per_layer(line, "iterations")) for line in run.epochs]
        iterative = {name for _, counts in by_epoch for name, count in counts.items() if count}
        # Spectral norms are logged in the order of the model, iterations in that of the solver's batches.
        names = [name for name in per_layer(run.epochs[0], "spectral_norm") if name in iterative]
        return [(epoch, {name: counts[name] for name in names}) for epoch, counts in by_epoch]

    _layers_by_epoch(runs, "iterations a step", values, path, log=False)


def ranks(runs: Runs, path: Path) -> None:
    """Stable, numerical (above a hundredth of the largest) and effective rank, over the full rank."""
    runs = {name: seeds for name, seeds in runs.items() if seeds[0].snapshots}
    if not runs:
        return
    keys = rank_keys(next(iter(runs.values()))[0].snapshots[0])
    figure, axes = grid(len(runs), len(keys), (4, 3), sharex=True, sharey=True)
    for row, (name, seeds) in zip(axes, runs.items(), strict=True):
        snapshots = seeds[0].snapshots
        epochs = [snapshot["epoch"] for snapshot in snapshots]
        for axis, key in zip(row, keys, strict=True):
            names = list(per_layer(snapshots[0], key))
            for depth, layer in enumerate(names):
                shares = [one[f"{key}/{layer}"] / len(one[f"singular_values/{layer}"]) for one in snapshots]
                axis.plot(epochs, shares, color=shade(depth, len(names)), marker="o", ms=3)
                axis.lines[-1].set_label(layer if len(names) <= 8 else "")
            _set_epoch_axis(axis, f"{name}: {key.replace('_', ' ')}", seeds[0])
            axis.label_outer()
        row[0].set_ylabel("share of full rank")
    if len(names) <= 8:
        axes[0][-1].legend(frameon=False, title="layer", fontsize="small")
    save(figure, path)


def spectra(runs: Runs, path: Path) -> None:
    """All singular values of a weight matrix, largest first; darker lines are earlier epochs."""
    runs = {name: seeds for name, seeds in runs.items() if seeds[0].snapshots}
    if not runs:
        return
    names = list(per_layer(next(iter(runs.values()))[0].snapshots[0], "singular_values"))
    chosen = sorted({round(i * (len(names) - 1) / 5) for i in range(6)}) if len(names) > 6 else range(len(names))
    figure, axes = grid(len(runs), len(chosen), (3.2, 2.8), sharex=True, sharey=True)
    for row, (condition, seeds) in zip(axes, runs.items(), strict=True):
        snapshots = seeds[0].snapshots
        for axis, position in zip(row, chosen, strict=True):
            for number, snapshot in enumerate(snapshots):
                values = snapshot[f"singular_values/{names[position]}"]
                shares = [(index + 0.5) / len(values) for index in range(len(values))]
                axis.plot(shares, values, color=shade(number, len(snapshots)), label=f"epoch {snapshot['epoch']}")
            axis.set(title=f"{condition}: {names[position]}", yscale="log")
        row[0].set_ylabel("singular value")
    for axis in axes[-1]:
        axis.set_xlabel("share of the singular values")
    # Targets are of the order of one: smaller singular values do not matter. All panels share the axis.
    axes[0][0].set_ylim(bottom=max(1e-3, axes[0][0].get_ylim()[0]))
    axes[0][-1].legend(frameon=False, fontsize="x-small")
    save(figure, path)


def operator_norms(runs: Runs, path: Path) -> None:
    """Each convolution's norm as an operator over that of its flattened weight."""
    runs = {
        name: seeds
        for name, seeds in runs.items()
        if seeds[0].snapshots and per_layer(seeds[0].snapshots[0], "operator_norm")
    }
    if not runs:
        return
    figure, axes = grid(1, len(runs), (5, 4), sharey=True)
    for axis, (name, seeds) in zip(axes[0], runs.items(), strict=True):
        snapshots = seeds[0].snapshots
        for number, snapshot in enumerate(snapshots):
            norms = per_layer(snapshot, "operator_norm")
            ratios = [norm / snapshot[f"singular_values/{layer}"][0] for layer, norm in norms.items()]
            color = shade(number, len(snapshots))
            axis.plot(range(1, len(ratios) + 1), ratios, "o-", ms=3, color=color, label=f"epoch {snapshot['epoch']}")
        axis.set(title=name, xlabel="convolution, first to last")
    axes[0][0].set_ylabel("operator norm / flattened spectral norm")
    axes[0][-1].legend(frameon=False, fontsize="small")
    save(figure, path)


FIGURES = {
    figure.__name__: figure
    for figure in (accuracy, loss, curves, spectral_norms, excess, spectra, ranks, iterations, operator_norms)
}
"""The figures of one preset, by file name; the docstring of each is its caption in reports."""


def draw(runs: Runs, folder: Path) -> list[Path]:
    """Draw all figures of a preset's runs into its folder; returns the files of those that have values to draw."""
    for name, figure in FIGURES.items():
        figure(runs, folder / f"{name}.png")
    return [path for name in FIGURES if (path := folder / f"{name}.png").exists()]
