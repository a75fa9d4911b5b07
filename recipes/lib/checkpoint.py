"""Checkpoints: save the state of a run, and resume from it."""

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lib.files import atomic, read_json_lines


@dataclass
class Progress:
    """The last epoch that a run has finished, the id of its W&B run, and what was logged up to then."""

    epoch: int = 0
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    history: list[dict[str, Any]] = field(default_factory=list)
    snapshots: list[dict[str, Any]] = field(default_factory=list)


def save_checkpoint(folder: Path, modules: dict[str, Any], progress: Progress) -> None:
    """Write the state of the `modules` (anything with a `state_dict`) and the progress, atomically."""
    states = {name: module.state_dict() for name, module in modules.items()}
    with atomic(folder / "checkpoint.pt") as part:
        torch.save(states | {"epoch": progress.epoch, "run_id": progress.run_id}, part)


def resume(folder: Path, modules: dict[str, Any], device: torch.device) -> Progress:
    """Load the state of the `modules` from the last checkpoint; without one, nothing changes and epoch 1 is next."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return Progress()
    checkpoint = torch.load(path, map_location=device)
    for name, module in modules.items():
        module.load_state_dict(checkpoint[name])
    epoch = checkpoint["epoch"]

    def read_finished(name: str) -> list[dict[str, Any]]:
        # A line that was written after the checkpoint belongs to an epoch that is trained again.
        return [line for line in read_json_lines(folder / name) if line["epoch"] <= epoch]

    return Progress(epoch, checkpoint["run_id"], read_finished("metrics.jsonl"), read_finished("spectra.jsonl"))
