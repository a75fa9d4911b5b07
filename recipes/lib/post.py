"""The results of the post: its published numbers beside ours, and whether its findings hold for our runs."""

import statistics

from lib.columns import mean_of
from lib.console import markdown
from lib.findings import Finding
from lib.runs import Run, Runs

PUBLISHED = {
    "mlp-5x2000": {"none": (25.12, 10.86), "frobenius": (28.23, 4.47), "spectral": (23.21, 3.53)},
    "mlp-7x4000": {"none": (23.95, 11.00), "frobenius": (26.62, 6.10), "spectral": (36.25, 2.63)},
    "resnet34": {"none": (70.1, 2.03), "frobenius": (75.24, 1.46), "spectral": (71.79, 1.78)},
    "resnet50": {"none": (73.45, 1.72), "frobenius": (75.72, 1.40), "spectral": (73.29, 1.63)},
}
"""The post's test accuracy in percent and test loss after 200 epochs, by preset and norm."""
POST_PRESETS = tuple(PUBLISHED)

PUBLISHED_NORMS = {"mlp-5x2000": {"none": (35.4, 18.4), "frobenius": (7.8, 3.7), "spectral": (0.8, 0.02)}}
"""The post's mean spectral norm at the penultimate epoch, and its deviation over layers in the last 100 epochs."""


def published_table(presets: dict[str, Runs]) -> str:
    """Our test accuracy, test loss and spectral norms beside the post's, for the presets that the post has."""
    header = ["preset", "condition", "epochs", "seeds", "test accuracy %", "published", "test loss", "published"]
    header += ["spectral norm, mean", "published", "deviation", "published"]
    rows = []
    for preset, runs in presets.items():
        for condition, seeds in runs.items():
            norm = seeds[0].config["norm"]
            if norm not in PUBLISHED.get(preset, {}):
                continue
            accuracy, loss = PUBLISHED[preset][norm]
            mean, deviation = PUBLISHED_NORMS.get(preset, {}).get(norm, ("-", "-"))
            row = [preset, condition, str(len(seeds[0].epochs)), str(len(seeds))]
            row += [f"{mean_of(seeds, 'test accuracy %'):.2f}", f"{accuracy}"]
            row += [f"{mean_of(seeds, 'test loss'):.2f}", f"{loss}"]
            row += [f"{mean_of(seeds, 'spectral norm, mean'):.3g}", f"{mean}"]
            row += [f"{mean_of(seeds, 'spectral norm, deviation'):.2g}", f"{deviation}"]
            rows.append(row)
    return markdown(header, rows) if rows else ""


def findings(runs: Runs) -> list[Finding]:
    """The post's findings for each spectral condition; none without runs under the norms none and frobenius."""
    conditions: dict[str, list[str]] = {}
    for condition, seeds in runs.items():
        conditions.setdefault(seeds[0].config["norm"], []).append(condition)
    if not {"none", "frobenius"} <= conditions.keys():
        return []
    plain, frobenius = conditions["none"][0], conditions["frobenius"][0]
    return [
        finding
        for spectral in conditions.get("spectral", [])
        for finding in _findings_of({name: runs[name] for name in (plain, frobenius, spectral)})
    ]


def _findings_of(runs: Runs) -> list[Finding]:
    """The findings for three conditions: unconstrained, Frobenius and spectral, in this order."""
    spectral = list(runs)[2]

    def means(title: str) -> list[float]:
        return [mean_of(seeds, title) for seeds in runs.values()]

    def by_condition(values: list[float]) -> str:
        return ", ".join(f"{name} {value:.3f}" for name, value in zip(runs, values, strict=True))

    gaps, norms = means("loss gap"), means("spectral norm, mean")
    deviation = means("spectral norm, deviation")[2] / norms[2]
    rises = [statistics.mean(map(loss_rise, seeds)) for seeds in runs.values()]
    return [
        Finding(
            f"train and test curves stay together: the smallest loss gap at the end is that of {spectral}",
            abs(gaps[2]) < min(gaps[:2]),
            by_condition(gaps),
        ),
        Finding(
            f"the spectral norms are in the order none > Frobenius > {spectral}",
            norms[0] > norms[1] > norms[2],
            by_condition(norms),
        ),
        Finding(
            f"the spectral norms collapse to one value over all layers under {spectral}",
            deviation < 0.05,
            f"deviation over layers {deviation:.1%} of the mean",
        ),
        Finding(
            f"the test loss ends above its lowest value by the least under {spectral}",
            rises[2] < min(rises[:2]),
            by_condition(rises),
        ),
    ]


def loss_rise(run: Run) -> float:
    """How far the last test loss is above the lowest."""
    losses = [metrics["test/loss"] for metrics in run.epochs]
    return losses[-1] - min(losses)
