"""Every figure of the post, and those that it leaves out, from finished runs."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from runs import Run, layers

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

COLOURS = {"none": "#444444", "frobenius": "#1b7fbd", "spectral": "#d1495b", "clipped": "#3a8f5c"}
STROKES = {"described": "-", "published": "--", "channels": ":"}
Runs = dict[str, list[Run]]


def _grid(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    width, height = size
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * width, rows * height), squeeze=False, layout="constrained", **options
    )
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _style(run: Run) -> dict[str, Any]:
    return {"color": COLOURS[run.config["norm"]], "linestyle": STROKES[run.config["targets"]]}


def _by_epoch(axis: Axes, title: str) -> None:
    axis.set(title=title, xlabel="epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _series(run: Run, key: str) -> tuple[list[int], list[float]]:
    factor = 100 if key.endswith("accuracy") else 1
    return [line["epoch"] for line in run.epochs], [factor * line[key] for line in run.epochs]


def _unit(key: str) -> str:
    return "accuracy (%)" if key == "accuracy" else key


def _marker(run: Run) -> str:
    return "o" if len(run.epochs) < 10 else ""


def _shade(position: int, count: int) -> Any:
    """Darker for what comes earlier."""
    return plt.cm.viridis(0.9 * position / max(count - 1, 1))


def summary(runs: Runs, key: str, path: Path) -> None:
    """Accuracy or loss by epoch, training beside test, all conditions together."""
    figure, axes = _grid(1, 2, (5, 4), sharey=True)
    for axis, split in zip(axes[0], ("train", "test"), strict=True):
        for name, seeds in runs.items():
            for number, run in enumerate(seeds):
                label = None if number else name
                axis.plot(*_series(run, f"{split}/{key}"), label=label, marker=_marker(run), ms=4, **_style(run))
        _by_epoch(axis, split)
    axes[0][0].set_ylabel(_unit(key))
    axes[0][1].legend(frameon=False)
    _save(figure, path)


def family(presets: dict[str, Runs], path: Path) -> None:
    """Accuracy and loss of several models and all their conditions, training above test: the post's summaries."""
    figure, axes = _grid(2, 2, (5.5, 4))
    widths = dict(zip(presets, (1.2, 2.4, 3.2), strict=False))
    for row, split in zip(axes, ("train", "test"), strict=True):
        for axis, key in zip(row, ("accuracy", "loss"), strict=True):
            for preset, runs in presets.items():
                for name, seeds in runs.items():
                    style = _style(seeds[0]) | {"linewidth": widths[preset]}
                    axis.plot(*_series(seeds[0], f"{split}/{key}"), label=f"{preset}, {name}", **style)
            _by_epoch(axis, f"{split} {key}")
            axis.set_ylabel(_unit(key))
    axes[1][1].legend(frameon=False, fontsize="small")
    _save(figure, path)


def curves(runs: Runs, path: Path) -> None:
    """Training and test curves together, accuracy beside loss, a row for each condition: how far they part."""
    figure, axes = _grid(len(runs), 2, (5, 3.2), sharex=True, sharey="col")
    for row, (name, seeds) in zip(axes, runs.items(), strict=True):
        for axis, key in zip(row, ("accuracy", "loss"), strict=True):
            for split, colour in (("train", "#1b7fbd"), ("test", "#d1495b")):
                axis.plot(*_series(seeds[0], f"{split}/{key}"), color=colour, label=split, marker=_marker(seeds[0]))
            axis.set_ylabel(_unit(key))
            _by_epoch(axis, name)
    for axis in axes[:-1].flat:
        axis.set_xlabel("")
    axes[0][0].legend(frameon=False)
    _save(figure, path)


def _layers_by_epoch(
    runs: Runs, label: str, values: Callable[[Run], Iterable[tuple[int, dict[str, float]]]], path: Path, log: bool
) -> None:
    """A panel for each condition and a line for each layer, darker for earlier ones."""
    told = {name: list(values(seeds[0])) for name, seeds in runs.items()}
    told = {name: points for name, points in told.items() if points and points[0][1]}
    if not told:
        return
    figure, axes = _grid(1, len(told), (4.2, 4), sharey=True)
    for axis, (name, points) in zip(axes[0], told.items(), strict=True):
        names = list(points[0][1])
        for depth, layer in enumerate(names):
            colour = _shade(depth, len(names))
            marker = "o" if len(points) < 10 else ""
            axis.plot([e for e, _ in points], [v[layer] for _, v in points], color=colour, marker=marker, ms=4)
            axis.lines[-1].set_label(layer if len(names) <= 8 else "")
        _by_epoch(axis, name)
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
    axes[0][0].set_ylabel(label)
    if len(names) <= 8:
        axes[0][-1].legend(frameon=False, title="layer", fontsize="small")
    _save(figure, path)


def spectral_norms(runs: Runs, path: Path) -> None:
    """The spectral norm of every weight matrix."""
    values = lambda run: ((line["epoch"], layers(line, "spectral_norm")) for line in run.epochs)  # noqa: E731
    _layers_by_epoch(runs, "spectral norm", values, path, log=True)


def excess(runs: Runs, path: Path) -> None:
    """How far each spectral norm is above its target, where there is one."""

    def values(run: Run) -> Iterable[tuple[int, dict[str, float]]]:
        targets = run.summary["targets"] if run.config["norm"] in ("spectral", "clipped") else {}
        for line in run.epochs:
            norms = layers(line, "spectral_norm")
            yield line["epoch"], {name: norms[name] / target - 1 for name, target in targets.items()}

    _layers_by_epoch(runs, "||W|| / target - 1", values, path, log=False)


def iterations(runs: Runs, path: Path) -> None:
    """How many iterations an adaptive solver takes a step; nothing is drawn where none does."""

    def values(run: Run) -> Iterable[tuple[int, dict[str, float]]]:
        told = [(line["epoch"], layers(line, "iterations")) for line in run.epochs]
        counted = {name for _, counts in told for name, count in counts.items() if count}
        # In the model's order, not in that of the solver's batches.
        names = [name for name in layers(run.epochs[0], "spectral_norm") if name in counted]
        return [(epoch, {name: counts[name] for name in names}) for epoch, counts in told]

    _layers_by_epoch(runs, "iterations a step", values, path, log=False)


def ranks(runs: Runs, path: Path) -> None:
    """Stable, numerical and effective rank of every weight matrix, over its full rank."""
    runs = {name: seeds for name, seeds in runs.items() if seeds[0].snapshots}
    if not runs:
        return
    figure, axes = _grid(len(runs), 3, (4, 3), sharex=True, sharey=True)
    for row, (name, seeds) in zip(axes, runs.items(), strict=True):
        snapshots = seeds[0].snapshots
        epochs = [snapshot["epoch"] for snapshot in snapshots]
        for axis, key in zip(row, ("stable_rank", "numerical_rank", "effective_rank"), strict=True):
            names = list(layers(snapshots[0], key))
            for depth, layer in enumerate(names):
                shares = [one[f"{key}/{layer}"] / len(one[f"singular_values/{layer}"]) for one in snapshots]
                axis.plot(epochs, shares, color=_shade(depth, len(names)), marker="o", ms=3)
                axis.lines[-1].set_label(layer if len(names) <= 8 else "")
            _by_epoch(axis, f"{name}: {key.replace('_', ' ')}")
            axis.label_outer()
        row[0].set_ylabel("share of full rank")
    if len(names) <= 8:
        axes[0][-1].legend(frameon=False, title="layer", fontsize="small")
    _save(figure, path)


def spectra(runs: Runs, path: Path) -> None:
    """Every singular value of up to six weight matrices, darker for earlier epochs: a row for each condition."""
    runs = {name: seeds for name, seeds in runs.items() if seeds[0].snapshots}
    if not runs:
        return
    names = list(layers(next(iter(runs.values()))[0].snapshots[0], "singular_values"))
    chosen = sorted({round(i * (len(names) - 1) / 5) for i in range(6)}) if len(names) > 6 else range(len(names))
    figure, axes = _grid(len(runs), len(chosen), (3.2, 2.8), sharex=True, sharey=True)
    for row, (condition, seeds) in zip(axes, runs.items(), strict=True):
        snapshots = seeds[0].snapshots
        for axis, position in zip(row, chosen, strict=True):
            for number, snapshot in enumerate(snapshots):
                values = snapshot[f"singular_values/{names[position]}"]
                shares = [(index + 0.5) / len(values) for index in range(len(values))]
                axis.plot(shares, values, color=_shade(number, len(snapshots)), label=f"epoch {snapshot['epoch']}")
            axis.set(title=f"{condition}: {names[position]}", yscale="log")
            # What lies below a thousandth of a norm of one is of no account.
            axis.set_ylim(bottom=1e-3)
        row[0].set_ylabel("singular value")
    for axis in axes[-1]:
        axis.set_xlabel("share of the singular values")
    axes[0][-1].legend(frameon=False, fontsize="x-small")
    _save(figure, path)


def operator_norms(runs: Runs, path: Path) -> None:
    """Each convolution's own norm over that of its flattened weight, darker for earlier epochs."""
    runs = {n: s for n, s in runs.items() if s[0].snapshots and layers(s[0].snapshots[0], "operator_norm")}
    if not runs:
        return
    figure, axes = _grid(1, len(runs), (5, 4), sharey=True)
    for axis, (name, seeds) in zip(axes[0], runs.items(), strict=True):
        snapshots = seeds[0].snapshots
        for number, snapshot in enumerate(snapshots):
            norms = layers(snapshot, "operator_norm")
            ratios = [norm / snapshot[f"singular_values/{layer}"][0] for layer, norm in norms.items()]
            colour = _shade(number, len(snapshots))
            axis.plot(range(1, len(ratios) + 1), ratios, "o-", ms=3, color=colour, label=f"epoch {snapshot['epoch']}")
        axis.set(title=name, xlabel="convolution, first to last")
    axes[0][0].set_ylabel("operator norm / flattened spectral norm")
    axes[0][-1].legend(frameon=False, fontsize="small")
    _save(figure, path)


def draw(runs: Runs, folder: Path) -> list[Path]:
    """All the figures of a preset's runs, into its folder; returns those that there is something to draw in."""
    summary(runs, "accuracy", folder / "accuracy.png")
    summary(runs, "loss", folder / "loss.png")
    figures = (curves, spectral_norms, excess, spectra, ranks, iterations, operator_norms)
    for figure in figures:
        figure(runs, folder / f"{figure.__name__}.png")
    names = ["accuracy", "loss", *(figure.__name__ for figure in figures)]
    return [path for name in names if (path := folder / f"{name}.png").exists()]
