"""Summaries of finished runs: the columns of the comparison table, rank tables, and compact records."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lib.console import markdown
from lib.presets import WITHOUT_EFFECT
from lib.runs import Run, Runs, excess_by_epoch, per_layer, rank_keys


def _last(run: Run, key: str) -> float:
    return run.epochs[-1][key]


def _mean_spectral_norm(run: Run) -> float:
    """Mean over layers at the penultimate epoch, as in the post."""
    penultimate = run.epochs[max(len(run.epochs) - 2, 0)]
    return statistics.mean(per_layer(penultimate, "spectral_norm").values())


def _spectral_norm_deviation(run: Run) -> float:
    """Standard deviation over layers, averaged over the last half of the epochs: the last 100 of the post's 200."""
    late = run.epochs[len(run.epochs) // 2 :]
    return statistics.mean(statistics.pstdev(per_layer(line, "spectral_norm").values()) for line in late)


def _worst_ratio(run: Run) -> float | None:
    """The largest norm of any weight over its target, after any epoch; None where no norm is constrained or known."""
    worst = [max(by_layer.values()) for _, by_layer in excess_by_epoch(run) if by_layer]
    return 1 + max(worst) if worst else None


class Column(NamedTuple):
    """A column of the comparison table: one number for each run, or none."""

    title: str
    digits: int
    value: Callable[[Run], float | None]


# Training metrics are those of the batches as they were trained on: augmented, and before the epoch's last step.
COLUMNS = (
    Column("test accuracy %", 2, lambda run: 100 * _last(run, "test/accuracy")),
    Column("test loss", 4, lambda run: _last(run, "test/loss")),
    Column("train accuracy %", 2, lambda run: 100 * _last(run, "train/accuracy")),
    Column("train loss", 4, lambda run: _last(run, "train/loss")),
    Column("accuracy gap", 2, lambda run: 100 * (_last(run, "train/accuracy") - _last(run, "test/accuracy"))),
    Column("loss gap", 4, lambda run: _last(run, "test/loss") - _last(run, "train/loss")),
    Column("spectral norm, mean", 3, _mean_spectral_norm),
    Column("spectral norm, deviation", 3, _spectral_norm_deviation),
    Column("worst norm / target", 4, _worst_ratio),
    Column("ms / step", 2, lambda run: run.summary["time/step_ms"]),
)
HEADER = ["condition", *(column.title for column in COLUMNS), "ratio to none"]


def statistics_of(run: Run) -> dict[str, float | None]:
    """The numbers of the comparison table for one run, by column title."""
    return {column.title: column.value(run) for column in COLUMNS}


def mean_of(seeds: list[Run], title: str) -> float:
    """The mean of one column over the seeds."""
    return statistics.mean(statistics_of(run)[title] for run in seeds)


def table_rows(runs: Runs) -> list[list[str]]:
    """The rows under `HEADER`, one for each condition: means over the seeds, with their standard deviations."""
    rows = []
    for condition, seeds in runs.items():
        cells = [_mean_and_deviation([column.value(run) for run in seeds], column.digits) for column in COLUMNS]
        plain = baseline(runs, condition)
        ratio = f"{mean_of(seeds, 'ms / step') / mean_of(runs[plain], 'ms / step'):.3f}" if plain else "-"
        rows.append([condition, *cells, ratio])
    return rows


def _mean_and_deviation(values: Sequence[float | None], digits: int) -> str:
    if None in values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def baseline(runs: Runs, condition: str) -> str | None:
    """The unconstrained condition to compare step times with: of the same target source if there is one, else any."""
    targets = runs[condition][0].config["targets"]
    plain = [name for name, seeds in runs.items() if seeds[0].config["norm"] == "none"]
    same_source = [name for name in plain if runs[name][0].config["targets"] == targets]
    return next(iter(same_source or plain), None)


def differing_options(runs: Runs) -> str:
    """A sentence on the options in which the runs differ beyond condition and seed; empty if there are none."""
    configs = [run.config for seeds in runs.values() for run in seeds]
    names = [name for name in configs[0] if name not in (*WITHOUT_EFFECT, "norm", "targets", "seed")]
    values = {name: sorted({str(config.get(name)) for config in configs}) for name in names}
    differences = [f"{name} ({', '.join(options)})" for name, options in values.items() if len(options) > 1]
    return f"\nThe runs differ in {'; '.join(differences)}.\n" if differences else ""


def rank_table(runs: Runs) -> str:
    """The ranks of the weight matrices at the first and last snapshot, mean over layers; empty without snapshots."""
    header: list[str] = []
    rows = []
    for condition, seeds in runs.items():
        snapshots = seeds[0].snapshots
        for snapshot in [snapshots[0], snapshots[-1]] if len(snapshots) > 1 else snapshots:
            keys = rank_keys(snapshot)
            header = ["condition", "epoch", *(key.replace("_", " ") for key in keys)]
            means = [statistics.mean(per_layer(snapshot, key).values()) for key in keys]
            rows.append([condition, str(snapshot["epoch"]), *(f"{mean:.1f}" for mean in means)])
    return markdown(header, rows) if rows else ""


def record(run: Run) -> dict[str, Any]:
    """A run as one compact JSON object: options, provenance, statistics, and metrics rounded to five digits."""

    def compact(values: dict[str, Any]) -> dict[str, Any]:
        scalars = {name: value for name, value in values.items() if not isinstance(value, list)}
        return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in scalars.items()}

    return {
        "condition": run.condition,
        "config": run.config,
        "statistics": compact(statistics_of(run)),
        "summary": {key: run.summary[key] for key in ("targets", "time/step_ms", "provenance")},
        "epochs": [compact(metrics) for metrics in run.epochs],
        "snapshots": [compact(snapshot) for snapshot in run.snapshots],
    }
