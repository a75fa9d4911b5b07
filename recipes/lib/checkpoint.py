"""Checkpoints: when to save the state of a run, how, and how to resume from it."""

import time
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


class CheckpointTimer:
    """Says after which epochs to save: the first, the last, and those that end long enough after the one before.

    The first epoch is that of this process: a run that is interrupted again and again still gets on. A benchmark counts
    steps in place of epochs.
    """

    def __init__(self, minutes: float, num_epochs: int) -> None:
        self.seconds, self.num_epochs = 60 * minutes, num_epochs
        self.due = time.monotonic()

    def is_due(self, epoch: int) -> bool:
        return epoch == self.num_epochs or time.monotonic() >= self.due

    def restart(self) -> None:
        """Count from now, after a checkpoint was saved."""
        self.due = time.monotonic() + self.seconds


def save_states(folder: Path, modules: dict[str, Any], **values: Any) -> None:
    """Write the state of the `modules` (anything with a `state_dict`) and the values to checkpoint.pt, atomically."""
    states = {name: module.state_dict() for name, module in modules.items()}
    with atomic(folder / "checkpoint.pt") as part:
        torch.save(states | values, part)


def load_states(folder: Path, modules: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """Load the state of the `modules` from checkpoint.pt, which is returned; without one, nothing changes."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    checkpoint = torch.load(path, map_location=device)
    for name, module in modules.items():
        module.load_state_dict(checkpoint[name])
    return checkpoint


def save_checkpoint(folder: Path, modules: dict[str, Any], progress: Progress) -> None:
    """Write the state of the `modules` and the progress of a run, atomically."""
    save_states(folder, modules, epoch=progress.epoch, run_id=progress.run_id)


def resume(folder: Path, modules: dict[str, Any], device: torch.device) -> Progress:
    """Load the state of the `modules` from the last checkpoint; without one, nothing changes and epoch 1 is next."""
    checkpoint = load_states(folder, modules, device)
    if checkpoint is None:
        return Progress()
    epoch = checkpoint["epoch"]

    def read_finished(name: str) -> list[dict[str, Any]]:
        # A line that was written after the checkpoint belongs to an epoch that is trained again.
        return [line for line in read_json_lines(folder / name) if line["epoch"] <= epoch]

    return Progress(epoch, checkpoint["run_id"], read_finished("metrics.jsonl"), read_finished("spectra.jsonl"))
