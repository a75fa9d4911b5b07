"""What the main process writes about a run while it trains: JSON files in the run's folder, and W&B."""

import json
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.checkpoint import Progress
from lib.distributed import Processes
from lib.files import append_json_line, write_atomically, write_json_lines
from lib.models import excluded_pattern
from lib.presets import Config, condition_name
from lib.provenance import command, provenance
from lib.spectra import excesses, snapshot, spectral_norms
from lib.survival import sign
from specscale import NormScaler


class WandbRun:
    """A W&B run that cannot stop the training: at the first error, W&B is switched off with a warning."""

    def __init__(
        self, config: Config, folder: Path, job_type: str, condition: str | None = None, run_id: str | None = None
    ) -> None:
        self.run = None
        if config.wandb == "disabled":
            return
        with self._switched_off_by_errors():
            import wandb

            # Without `resume`, the same id replaces an interrupted run; its earlier epochs are logged again.
            self.run = wandb.init(
                project=config.wandb_project,
                # Not relative: the process that writes the files may be that of a parent, which has another directory.
                dir=folder.resolve(),
                id=run_id,
                name=folder.name,
                group=f"{config.preset}-{condition}" if condition else config.preset,
                job_type=job_type,
                tags=[config.preset, config.model, config.data, config.targets],
                config=config.as_json() | {"condition": condition},
                mode=config.wandb,
                settings=wandb.Settings(silent=True, console="off"),
            )
            self.run.define_metric("*", step_metric="epoch")

    @contextmanager
    def _switched_off_by_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.run = None
            # The warning names the line that uses this class.
            warnings.warn(f"W&B logging is off: {type(error).__name__}: {error}", stacklevel=4)

    def log(self, values: dict[str, Any]) -> None:
        if self.run is not None:
            with self._switched_off_by_errors():
                self.run.log(values)

    def log_comparison(self, folder: Path, header: list[str], rows: list[list[str]]) -> None:
        if self.run is not None:
            with self._switched_off_by_errors():
                import wandb

                images = {path.stem: wandb.Image(str(path)) for path in sorted(folder.glob("*.png"))}
                self.run.log({"comparison": wandb.Table(columns=header, data=rows), **images})

    def finish(self) -> None:
        if self.run is not None:
            with self._switched_off_by_errors():
                self.run.finish()


class RunLog:
    """Writes config.json, metrics.jsonl, spectra.jsonl and summary.json, and sends the same numbers to W&B.

    The main process does so. The others may have to take part in measuring, where parameters are sharded.
    """

    def __init__(self, config: Config, norm: str, folder: Path, progress: Progress, processes: Processes) -> None:
        self.folder, self.progress, self.world_size = folder, progress, processes.world_size
        self.snapshot_epochs = {round(fraction * config.epochs) for fraction in config.spectra}
        self.writes = processes.is_main
        if not self.writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        sign(folder)
        run = {"norm": norm, "processes": processes.world_size, "device": str(processes.device)}
        config_json = config.as_json() | run | {"torch": torch.__version__}
        write_atomically(folder / "config.json", json.dumps(config_json, indent=2))
        write_json_lines(folder / "metrics.jsonl", progress.history)
        write_json_lines(folder / "spectra.jsonl", progress.snapshots)
        self.wandb_run = WandbRun(config, folder, "train", condition_name(norm, config.targets), progress.run_id)
        for metrics in progress.history:
            self.wandb_run.log(metrics)

    def record(
        self, epoch: int, model: nn.Module, scaling: NormScaler | None, image_shape: tuple[int, int, int]
    ) -> dict[str, float]:
        """The norms for the metrics of an epoch, and how long it took to record them and the spectra."""
        started = time.perf_counter()
        norms = spectral_norms(model, excluded_pattern(model))
        found = {f"spectral_norm/{name}": values.max().item() for name, values in norms.items()}
        if scaling is not None:
            found |= {f"excess/{name}": value for name, value in excesses(scaling, norms).items()}
        self.log_spectra(epoch, model, image_shape)
        return found | {"time/recording_s": time.perf_counter() - started}

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        """Log the metrics of an epoch."""
        self.progress.history.append(metrics)
        if not self.writes:
            return
        append_json_line(self.folder / "metrics.jsonl", metrics)
        self.wandb_run.log(metrics)

    def log_spectra(self, epoch: int, model: nn.Module, image_shape: tuple[int, int, int]) -> None:
        """Log singular values and ranks of every weight, after the epochs that the options ask for, each once."""
        logged = {line["epoch"] for line in self.progress.snapshots}
        if epoch not in self.snapshot_epochs - logged:
            return
        spectra = {"epoch": epoch} | snapshot(model, image_shape, excluded_pattern(model))
        self.progress.snapshots.append(spectra)
        if not self.writes:
            return
        append_json_line(self.folder / "spectra.jsonl", spectra)
        self.wandb_run.log({key: value for key, value in spectra.items() if not isinstance(value, list)})

    def finish(self, scaling: NormScaler | None) -> None:
        """Write the summary: the last epoch, the target norms, the median times, and the provenance."""
        history = self.progress.history
        metrics = scaling.metrics() if scaling is not None else {}
        targets = {key.removeprefix("target/"): value for key, value in metrics.items() if key.startswith("target/")}
        if not self.writes:
            return
        times = {key: statistics.median(line[key] for line in history) for key in ("time/step_ms", "time/scaling_ms")}
        last = {key: value for key, value in history[-1].items() if not key.startswith("time/")}
        origin = provenance() | {"processes": self.world_size, "command": command()}
        summary = last | {"targets": targets} | times | {"provenance": origin}
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2))
        self.wandb_run.finish()
