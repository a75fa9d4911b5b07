"""Runs on disk: the names of their folders, and finished runs read from their files."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.files import read_json_lines
from lib.presets import NORMS, SPECTRAL_NORMS, TARGET_SOURCES, condition_name


@dataclass(frozen=True)
class Run:
    """A finished run, of one condition and one seed."""

    config: dict[str, Any]
    """The options, as in config.json."""
    epochs: list[dict[str, Any]]
    """The metrics of each epoch, as in metrics.jsonl."""
    snapshots: list[dict[str, Any]]
    """Singular values and ranks of the weights, as in spectra.jsonl."""
    summary: dict[str, Any]
    """As in summary.json."""

    @property
    def condition(self) -> str:
        return condition_name(self.config["norm"], self.config["targets"])


Runs = dict[str, list[Run]]
"""Runs of a preset by condition, one for each seed."""


def run_name(norm: str, targets: str, seed: int) -> str:
    """The name of a run's folder inside the folder of its preset."""
    return f"{condition_name(norm, targets)}-seed{seed}"


def is_begun(folder: Path) -> bool:
    return (folder / "config.json").exists()


def is_finished(folder: Path) -> bool:
    return (folder / "summary.json").exists()


def finished_runs(preset_folder: Path) -> list[Path]:
    """The folders of a preset's finished runs."""
    return [path.parent for path in preset_folder.glob("*-seed*/summary.json")]


def preset_folders(root: Path) -> list[Path]:
    """The folders in `root` that contain finished runs."""
    return sorted(folder for folder in root.glob("*") if finished_runs(folder))


def read_run(folder: Path) -> Run:
    config, summary = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "summary"))
    return Run(config, read_json_lines(folder / "metrics.jsonl"), read_json_lines(folder / "spectra.jsonl"), summary)


def read_runs(preset_folder: Path) -> Runs:
    """The finished runs of a preset."""
    return group_by_condition(map(read_run, finished_runs(preset_folder)))


def group_by_condition(runs: Iterable[Run]) -> Runs:
    """The runs by condition, in the order of the norms and target sources, then of the seeds."""
    groups: Runs = {}

    def order(run: Run) -> tuple[int, int, int]:
        return NORMS.index(run.config["norm"]), TARGET_SOURCES.index(run.config["targets"]), run.config["seed"]

    for run in sorted(runs, key=order):
        groups.setdefault(run.condition, []).append(run)
    return groups


def per_layer(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The values logged under `key/<layer>`, by layer."""
    return {name.partition("/")[2]: value for name, value in values.items() if name.startswith(f"{key}/")}


def excess_by_epoch(run: Run) -> list[tuple[int, dict[str, float]]]:
    """The epochs, each with every layer's norm over its target less 1; without layers for an unconstrained run.

    Runs of versions before 0.5.0 have recorded spectral norms alone.
    """
    found = [(line["epoch"], per_layer(line, "excess")) for line in run.epochs]
    if any(by_layer for _, by_layer in found) or run.config["norm"] not in SPECTRAL_NORMS:
        return found
    targets = run.summary["targets"].items()
    return [
        (line["epoch"], {name: line[f"spectral_norm/{name}"] / target - 1 for name, target in targets})
        for line in run.epochs
    ]


def rank_keys(snapshot: dict[str, Any]) -> list[str]:
    """The kinds of matrix rank in a snapshot, such as `stable_rank`."""
    keys = [name.partition("/")[0] for name in snapshot]
    return list(dict.fromkeys(key for key in keys if key.endswith("_rank")))
