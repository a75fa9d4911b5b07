"""What runs come to: their statistics, the tables that hold them, and which of the post's findings appear."""

import statistics
from typing import Any, NamedTuple

from runs import Run, layers
from tables import markdown

HEADER = ["condition", "test accuracy %", "test loss", "train accuracy %", "train loss", "accuracy gap", "loss gap"]
HEADER += ["spectral norm, mean", "spectral norm, deviation", "ms / step", "ratio to none"]

PUBLISHED = {
    "mlp-5x2000": {"none": (25.12, 10.86), "frobenius": (28.23, 4.47), "spectral": (23.21, 3.53)},
    "mlp-7x4000": {"none": (23.95, 11.00), "frobenius": (26.62, 6.10), "spectral": (36.25, 2.63)},
    "resnet34": {"none": (70.1, 2.03), "frobenius": (75.24, 1.46), "spectral": (71.79, 1.78)},
    "resnet50": {"none": (73.45, 1.72), "frobenius": (75.72, 1.40), "spectral": (73.29, 1.63)},
}
"""The post's test accuracy in percent and test loss after 200 epochs, by preset and condition."""

PUBLISHED_NORMS = {"mlp-5x2000": {"none": (35.4, 18.4), "frobenius": (7.8, 3.7), "spectral": (0.8, 0.02)}}
"""The post's mean spectral norm at the penultimate epoch, and its deviation over layers in the last 100 epochs."""


def statistics_of(run: Run) -> dict[str, float]:
    """The figures that the post reports of a run, from its epochs alone.

    Losses and accuracies at the last epoch; the gaps between training (while learning, on augmented images) and test;
    the mean over layers of the spectral norm at the penultimate epoch; its deviation over layers, averaged over the
    last half of the epochs, which are 100 of the post's 200; the median time of a step.
    """
    last, before = run.epochs[-1], run.epochs[max(len(run.epochs) - 2, 0)]
    late = run.epochs[len(run.epochs) // 2 :]
    return {
        "test accuracy %": 100 * last["test/accuracy"],
        "test loss": last["test/loss"],
        "train accuracy %": 100 * last["train/accuracy"],
        "train loss": last["train/loss"],
        "accuracy gap": 100 * (last["train/accuracy"] - last["test/accuracy"]),
        "loss gap": last["test/loss"] - last["train/loss"],
        "spectral norm, mean": statistics.mean(layers(before, "spectral_norm").values()),
        "spectral norm, deviation": statistics.mean(
            statistics.pstdev(layers(line, "spectral_norm").values()) for line in late
        ),
        "ms / step": run.summary["time/step_ms"],
    }


def mean_of(seeds: list[Run], key: str) -> float:
    return statistics.mean(statistics_of(run)[key] for run in seeds)


def baseline(runs: dict[str, list[Run]], condition: str) -> str | None:
    """The condition without scaling that this one is measured against: from the same init, or else of another rule."""
    targets = runs[condition][0].config["targets"]
    plain = [name for name, seeds in runs.items() if seeds[0].config["norm"] == "none"]
    same = [name for name in plain if runs[name][0].config["targets"] == targets]
    return next(iter(same or plain), None)


def rows(runs: dict[str, list[Run]]) -> list[list[str]]:
    """The cells under `HEADER`, one row a condition, each the mean over its seeds and their deviation."""
    found = []
    for condition, seeds in runs.items():
        every = [statistics_of(run) for run in seeds]
        row = [condition]
        for key in HEADER[1:-1]:
            digits = 3 if "norm" in key else 4 if "loss" in key else 2
            values = [one[key] for one in every]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.{digits}f}{spread}")
        plain = baseline(runs, condition)
        step = statistics.mean(one["ms / step"] for one in every)
        row.append(f"{step / mean_of(runs[plain], 'ms / step'):.3f}" if plain else "-")
        found.append(row)
    return found


def beside_published(presets: dict[str, dict[str, list[Run]]]) -> str:
    """Our test accuracy, test loss and spectral norms beside the post's, of every preset that the post has."""
    header = ["preset", "condition", "epochs", "seeds", "test accuracy %", "published", "test loss", "published"]
    header += ["spectral norm, mean", "published", "deviation", "published"]
    lines = []
    for preset, runs in presets.items():
        for condition, seeds in runs.items():
            norm = seeds[0].config["norm"]
            if norm not in PUBLISHED.get(preset, {}):
                continue
            accuracy, loss = PUBLISHED[preset][norm]
            norms = [str(value) for value in PUBLISHED_NORMS.get(preset, {}).get(norm, ("-", "-"))]
            ours = [mean_of(seeds, key) for key in (*HEADER[1:3], *HEADER[7:9])]
            lines.append([preset, condition, str(len(seeds[0].epochs)), str(len(seeds))])
            lines[-1] += [f"{ours[0]:.2f}", f"{accuracy}", f"{ours[1]:.2f}", f"{loss}"]
            lines[-1] += [f"{ours[2]:.3g}", norms[0], f"{ours[3]:.2g}", norms[1]]
    return markdown(header, lines) if lines else ""


class Finding(NamedTuple):
    """A statement of the post, whether it holds of these runs, and the figures that say so."""

    claim: str
    holds: bool
    figures: str

    def __str__(self) -> str:
        return f"{'Seen' if self.holds else 'Not seen'}: {self.claim} ({self.figures})."


def findings(runs: dict[str, list[Run]]) -> list[Finding]:
    """Which of the post's findings appear: those for which there are the runs, each spectral condition by itself."""
    plain, frobenius = (
        next((name for name, seeds in runs.items() if seeds[0].config["norm"] == norm), None)
        for norm in ("none", "frobenius")
    )
    found = []
    for spectral in (name for name, seeds in runs.items() if seeds[0].config["norm"] == "spectral"):
        if plain is None or frobenius is None:
            continue
        compared = (plain, frobenius, spectral)

        def told(key: str, digits: int, names: tuple[str, ...] = compared) -> tuple[list[float], str]:
            values = [mean_of(runs[name], key) for name in names]
            return values, ", ".join(f"{name} {value:.{digits}f}" for name, value in zip(names, values, strict=True))

        gaps, text = told("loss gap", 3)
        claim = f"train and test curves stay together: the smallest loss gap at the end is that of {spectral}"
        found.append(Finding(claim, abs(gaps[2]) < min(gaps[:2]), text))
        norms, text = told("spectral norm, mean", 3)
        claim = f"the spectral norms are in the order none > Frobenius > {spectral}"
        found.append(Finding(claim, norms[0] > norms[1] > norms[2], text))
        deviations, _ = told("spectral norm, deviation", 3)
        relative = deviations[2] / norms[2]
        claim = f"the spectral norms collapse to one value over all layers under {spectral}"
        found.append(Finding(claim, relative < 0.05, f"deviation over layers {relative:.1%} of the mean"))
        rises = [statistics.mean(rise(run) for run in runs[name]) for name in compared]
        text = ", ".join(f"{name} {value:.3f}" for name, value in zip(compared, rises, strict=True))
        claim = f"the test loss ends above its lowest value by the least under {spectral}"
        found.append(Finding(claim, rises[2] < min(rises[:2]), text))
    return found


def rise(run: Run) -> float:
    """How far the last test loss lies above the lowest."""
    losses = [line["test/loss"] for line in run.epochs]
    return losses[-1] - min(losses)


def findings_text(runs: dict[str, list[Run]]) -> str:
    return "".join(f"- {one}\n" for one in findings(runs))


def ranks(runs: dict[str, list[Run]]) -> str:
    """Mean over layers of each rank at the first and the last snapshot, as a table; nothing where there are none."""
    header = ["condition", "epoch", "stable rank", "numerical rank", "effective rank"]
    lines = []
    for condition, seeds in runs.items():
        snapshots = seeds[0].snapshots
        for snapshot in [snapshots[0], snapshots[-1]] if len(snapshots) > 1 else snapshots:
            means = [statistics.mean(layers(snapshot, key.replace(" ", "_")).values()) for key in header[2:]]
            lines.append([condition, str(snapshot["epoch"]), *(f"{mean:.1f}" for mean in means)])
    return markdown(header, lines) if lines else ""


def record(run: Run) -> dict[str, Any]:
    """A run as a small file holds it: options, where it was made, statistics, and epochs to five digits."""

    def short(line: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in line.items() if not isinstance(value, list)}
        return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in kept.items()}

    summary = {key: run.summary[key] for key in ("targets", "time/step_ms", "provenance")}
    return {
        "condition": run.condition,
        "config": run.config,
        "statistics": short(statistics_of(run)),
        "summary": summary,
        "epochs": [short(line) for line in run.epochs],
        "snapshots": [short(line) for line in run.snapshots],
    }
