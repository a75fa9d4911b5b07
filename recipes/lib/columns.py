"""The columns of the comparison table: what is said of a finished run in one number each."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

from lib.runs import Run, excess_by_epoch, per_layer


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


def _steps_to_generalize(run: Run) -> int | None:
    """The first step at which the test accuracy was at least 99 %; None if it never was."""
    epochs = (line["epoch"] for line in run.epochs if line["test/accuracy"] >= 0.99)
    steps, epoch = run.config["steps_per_epoch"], next(epochs, None)
    return None if steps is None or epoch is None else steps * epoch


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
"""The columns of every task."""
STEPS_TO_GENERALIZE = Column("steps to 99 % in test", 0, _steps_to_generalize)
"""For runs whose epochs are numbers of steps."""


def statistics_of(run: Run) -> dict[str, float | None]:
    """The numbers of every task's table for one run, by column title."""
    return {column.title: column.value(run) for column in COLUMNS}


def mean_of(seeds: list[Run], title: str) -> float:
    """The mean of one column over the seeds."""
    return statistics.mean(statistics_of(run)[title] for run in seeds)
