"""Summaries of finished runs: the comparison table, rank tables, and compact records."""

import statistics
from typing import Any

from lib.columns import mean_of, statistics_of
from lib.console import markdown, mean_and_deviation
from lib.presets import WITHOUT_EFFECT
from lib.runs import Run, Runs, per_layer, rank_keys
from lib.tasks import task_of


def header_of(runs: Runs) -> list[str]:
    """The header of the comparison table of these runs: the columns of their task."""
    return ["condition", *(column.title for column in task_of(runs).columns), "ratio to none"]


def table_rows(runs: Runs) -> list[list[str]]:
    """The rows under the header, one for each condition: means over the seeds, with their standard deviations."""
    columns = task_of(runs).columns
    rows = []
    for condition, seeds in runs.items():
        cells = [mean_and_deviation([column.value(run) for run in seeds], column.digits) for column in columns]
        plain = baseline(runs, condition)
        ratio = f"{mean_of(seeds, 'ms / step') / mean_of(runs[plain], 'ms / step'):.3f}" if plain else "-"
        rows.append([condition, *cells, ratio])
    return rows


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
