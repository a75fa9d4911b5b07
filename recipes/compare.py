"""Compare finished runs from their files alone: a table and three figures in each preset's folder.

Example: python recipes/compare.py runs
"""

import statistics
import sys
from pathlib import Path

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from logs import write_atomically
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from presets import HOUSEKEEPING
from runs import Run, layers, read
from tables import markdown

COLOURS = {"none": "#444444", "frobenius": "#1b7fbd", "spectral": "#d1495b"}
HEADER = ["condition", "test accuracy %", "test loss", "train accuracy %", "train loss"]
HEADER += ["spectral norm, mean", "spectral norm, deviation", "ms / step", "ratio to none"]


def _mean(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(runs: dict[str, list[Run]]) -> list[list[str]]:
    """One row a condition, averaged over seeds."""
    rows = []
    steps = {name: statistics.mean(run.summary["time/step_ms"] for run in seeds) for name, seeds in runs.items()}
    for name, seeds in runs.items():
        last = [run.epochs[-1] for run in seeds]
        norms = [list(layers(line, "spectral_norm").values()) for line in last]
        row = [name]
        for split in ("test", "train"):
            for key, factor, digits in (("accuracy", 100, 2), ("loss", 1, 4)):
                row.append(_mean([factor * line[f"{split}/{key}"] for line in last], digits))
        row.append(_mean([statistics.mean(values) for values in norms], 3))
        row.append(_mean([statistics.pstdev(values) for values in norms], 3))
        row.append(f"{steps[name]:.2f}")
        row.append(f"{steps[name] / steps['none']:.3f}" if "none" in steps else "-")
        rows.append(row)
    return rows


def _curves(runs: dict[str, list[Run]], key: str, factor: float, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, split in zip(axes, ("train", "test"), strict=True):
        for norm, seeds in runs.items():
            for number, run in enumerate(one.epochs for one in seeds):
                values = [factor * line[f"{split}/{key}"] for line in run]
                label = norm if number == 0 else None
                marker = "o" if len(run) < 10 else ""
                axis.plot([e["epoch"] for e in run], values, color=COLOURS.get(norm), label=label, marker=marker, ms=4)
        axis.set(title=split, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"{key}{' (%)' if factor == 100 else ''}")
    axes[1].legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _norms(runs: dict[str, list[Run]], path: Path) -> None:
    figure, axes = plt.subplots(
        1, len(runs), figsize=(4.2 * len(runs), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (norm, seeds) in zip(axes[0], runs.items(), strict=True):
        run = seeds[0].epochs
        names = [name for name in run[0] if name.startswith("spectral_norm/")]
        for depth, name in enumerate(names):
            # Darker lines are earlier layers.
            colour = plt.cm.viridis(0.9 * depth / max(len(names) - 1, 1))
            marker = "o" if len(run) < 10 else ""
            label = name.partition("/")[2] if len(names) <= 8 else None
            axis.plot([e["epoch"] for e in run], [e[name] for e in run], color=colour, label=label, marker=marker, ms=4)
        axis.set(title=norm, xlabel="epoch", yscale="log")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.25, which="both")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    axes[0][0].set_ylabel("spectral norm")
    if len(names) <= 8:
        axes[0][-1].legend(frameon=False, title="layer", fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def differences(folder: Path) -> str:
    """The options in which the runs differ, which no table should hide; nothing where the conditions alone do."""
    configs = [run.config for seeds in read(folder).values() for run in seeds]
    names = [name for name in configs[0] if name not in (*HOUSEKEEPING, "norm", "targets", "seed")]
    found = {name: sorted({str(config.get(name)) for config in configs}) for name in names}
    told = [f"{name} ({', '.join(values)})" for name, values in found.items() if len(values) > 1]
    return f"\nThe runs differ in {'; '.join(told)}.\n" if told else ""


def compare(folder: Path) -> list[list[str]]:
    """Write `comparison.md` and the figures into the folder of one preset's runs; returns the table's rows."""
    runs = read(folder)
    rows = table(runs)
    write_atomically(
        folder / "comparison.md", f"# {folder.resolve().name}\n\n{markdown(HEADER, rows)}{differences(folder)}"
    )
    _curves(runs, "accuracy", 100, folder / "accuracy.png")
    _curves(runs, "loss", 1, folder / "loss.png")
    _norms(runs, folder / "spectral_norms.png")
    return rows


def main(folder: tyro.conf.Positional[Path]) -> None:
    """Compare the runs in a folder.

    Args:
        folder: a preset's folder, or the one above it, for every preset's.
    """
    found = sorted(
        {path.parent.parent for path in [*folder.glob("*-seed*/summary.json"), *folder.glob("*/*-seed*/summary.json")]}
    )
    if not found:
        sys.exit(f"compare: no finished run in {folder}; a run's folder is called NORM-seedK and holds summary.json")
    for one in found:
        print(f"{one}\n{markdown(HEADER, compare(one))}{differences(one)}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
