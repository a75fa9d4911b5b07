"""Finished runs, read from their files alone."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logs import read_lines
from presets import condition

NORMS = ("none", "frobenius", "spectral", "clipped")
TARGETS = ("described", "published", "channels")


@dataclass(frozen=True)
class Run:
    """One condition and seed of a preset: its options, its epochs, its weights' spectra and what it ended on."""

    config: dict[str, Any]
    epochs: list[dict[str, Any]]
    snapshots: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def condition(self) -> str:
        return condition(self.config["norm"], self.config["targets"])


def read_run(folder: Path) -> Run:
    """The run of a folder that holds `summary.json`."""
    config, summary = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "summary"))
    return Run(config, read_lines(folder / "metrics.jsonl"), read_lines(folder / "spectra.jsonl"), summary)


def read(folder: Path) -> dict[str, list[Run]]:
    """The finished runs of a preset's folder, by condition, one for each seed."""
    return by_condition(read_run(path.parent) for path in folder.glob("*-seed*/summary.json"))


def by_condition(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs by condition, in the conditions' own order, each one's in the order of their seeds."""
    found: dict[str, list[Run]] = {}

    def place(run: Run) -> tuple[int, int, int]:
        return NORMS.index(run.config["norm"]), TARGETS.index(run.config["targets"]), run.config["seed"]

    for run in sorted(runs, key=place):
        found.setdefault(run.condition, []).append(run)
    return found


def layers(line: dict[str, Any], key: str) -> dict[str, Any]:
    """What a line tells under `key/<layer>`, by layer."""
    return {name.partition("/")[2]: value for name, value in line.items() if name.startswith(f"{key}/")}
