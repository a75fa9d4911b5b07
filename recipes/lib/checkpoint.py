"""Checkpoints: when to save the state of a run, how, and how to resume from it."""

import copy
import time
import uuid
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lib.files import atomic, read_json_lines
from lib.survival import Stopped

NAME = "checkpoint.pt"
PREVIOUS = "checkpoint.pt.previous"
DAMAGED = "checkpoint.pt.damaged"


class DamagedFileError(OSError):
    """Every checkpoint of a run is cut off, or was changed on the disk."""


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


class Checkpoints:
    """The checkpoints of a run. What the timer leaves out is kept in memory until the next epoch ends.

    One process `writes`. Where the states `are_sharded`, the others take part in making them whole.
    """

    def __init__(
        self,
        folder: Path,
        modules: dict[str, Any],
        progress: Progress,
        timer: CheckpointTimer,
        *,
        writes: bool = True,
        are_sharded: bool = False,
    ) -> None:
        self.folder, self.modules, self.progress, self.timer = folder, modules, progress, timer
        self.writes, self.are_sharded = writes, are_sharded
        self.saved_epoch = progress.epoch
        self._unsaved: dict[str, Any] | None = None

    def epoch_ended(self, epoch: int) -> None:
        """Write the states of this epoch if that is due, else keep a copy of them on their device."""
        self.progress.epoch = epoch
        if not self.writes:
            if self.are_sharded:
                self._states()
        elif self.timer.is_due(epoch):
            self._write(self._states())
            self.timer.restart()
        else:
            # Not two copies at a time.
            self._unsaved = None
            states = self._states()
            # Whole states of shards are copies already.
            self._unsaved = states if self.are_sharded else copy.deepcopy(states)

    @contextmanager
    def save_when_stopped(self) -> Iterator[None]:
        """Write the last epoch that has ended, if it is not written, where all processes stop."""
        try:
            yield
        except Stopped as stopped:
            stopped.state = self.save_last()
            raise

    def save_last(self) -> str:
        """Write what is kept in memory; returns which epoch is on the disk then."""
        try:
            if self._unsaved is not None:
                self._write(self._unsaved)
        except OSError as error:
            return f"{error}, {self._on_disk()}"
        return self._on_disk()

    def _on_disk(self) -> str:
        if not self.saved_epoch:
            return f"{self.folder} has no checkpoint yet"
        return f"{self.folder / NAME} holds epoch {self.saved_epoch}"

    def _states(self) -> dict[str, Any]:
        states = {name: module.state_dict() for name, module in self.modules.items()}
        return states | {"epoch": self.progress.epoch, "run_id": self.progress.run_id}

    def _write(self, states: dict[str, Any]) -> None:
        write_states(self.folder, states)
        self.saved_epoch, self._unsaved = states["epoch"], None

    def finish(self) -> None:
        """Delete the former checkpoint: the run needs it no longer."""
        if self.writes:
            delete_previous(self.folder)


def delete_previous(folder: Path) -> None:
    """Delete the former checkpoint of a run that is finished."""
    (folder / PREVIOUS).unlink(missing_ok=True)


def save_states(folder: Path, modules: dict[str, Any]) -> None:
    """Write the state of the `modules` (anything with a `state_dict`) to checkpoint.pt, atomically."""
    write_states(folder, {name: module.state_dict() for name, module in modules.items()})


def write_states(folder: Path, states: dict[str, Any]) -> None:
    """Write checkpoint.pt, atomically; the former one stays as checkpoint.pt.previous."""
    with atomic(folder / NAME, previous=folder / PREVIOUS) as part, part.open("wb") as file:
        torch.save(states, file)


def load_states(folder: Path, modules: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """Load the state of the `modules` from the last checkpoint, which is returned; without one, nothing changes.

    Raises:
        DamagedFileError: there are checkpoints, but none of them is whole.
    """
    checkpoint = read_states(folder, device)
    if checkpoint is not None:
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
    return checkpoint


def read_states(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """What checkpoint.pt holds, or else the one before it; None without any."""
    # Only the one before is there if a process died between the two renamings.
    paths = [path for path in (folder / NAME, folder / PREVIOUS) if path.exists()]
    for path in paths:
        if is_whole(path):
            if path != paths[0]:
                # Out of the way, so that the next one does not take the place of the whole one. Of several processes,
                # one is the first; the others then find the whole one alone, or find this one gone.
                with suppress(FileNotFoundError):
                    paths[0].rename(folder / DAMAGED)
                warnings.warn(f"{paths[0]} is damaged; going on from {path.name}", stacklevel=2)
            return torch.load(path, map_location=device)
    if paths:
        found = " and ".join(map(str, paths))
        raise DamagedFileError(
            f"no whole checkpoint in {found}: cut off, or changed on the disk; put back a copy, or delete what is "
            "damaged, and the run begins anew"
        )
    return None


def is_whole(path: Path) -> bool:
    """Whether a file of torch.save is as it was written, by the checksums in it; torch reads some damage as numbers."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return False
        # Whether torch finds its way, without reading any number again.
        torch.load(path, map_location="meta")
    except Exception:
        # A changed header may lead anywhere: to other compressions, names and sizes, or outside of the file.
        return False
    return True


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
