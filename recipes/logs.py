"""Where a run's metrics go: a JSONL file, W&B, the terminal."""

import dataclasses
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from presets import Config
from tqdm import tqdm


def write_atomically(path: Path, text: str) -> None:
    """Write the file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; one that was cut off in the middle is none."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append(path: Path, line: dict[str, Any]) -> None:
    """One more line of a JSONL file."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def as_json(config: Config) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


class WandbRun:
    """A W&B run that never stops a training run: whatever fails is said once, and training goes on without it."""

    def __init__(
        self, config: Config, folder: Path, job_type: str, condition: str | None = None, run_id: str | None = None
    ) -> None:
        self.run = None
        if config.wandb == "disabled":
            return
        try:
            import wandb

            # Without `resume`, the same id replaces an interrupted run; its earlier epochs are logged again.
            self.run = wandb.init(
                project=config.wandb_project,
                dir=folder,
                id=run_id,
                name=folder.name,
                group=f"{config.preset}-{condition}" if condition else config.preset,
                job_type=job_type,
                tags=[config.preset, config.model, config.data, config.targets],
                config=as_json(config) | {"condition": condition},
                mode=config.wandb,
                settings=wandb.Settings(silent=True, console="off"),
            )
            self.run.define_metric("*", step_metric="epoch")
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.run = None
        warnings.warn(f"W&B logging is off: {type(error).__name__}: {error}", stacklevel=3)

    def log(self, values: dict[str, Any]) -> None:
        if self.run is not None:
            try:
                self.run.log(values)
            except Exception as error:
                self._give_up(error)

    def log_comparison(self, folder: Path, header: list[str], rows: list[list[str]]) -> None:
        if self.run is not None:
            try:
                import wandb

                pictures = {path.stem: wandb.Image(str(path)) for path in sorted(folder.glob("*.png"))}
                self.run.log({"comparison": wandb.Table(columns=header, data=rows), **pictures})
            except Exception as error:
                self._give_up(error)

    def finish(self) -> None:
        if self.run is not None:
            try:
                self.run.finish()
            except Exception as error:
                self._give_up(error)


def say(text: str) -> None:
    print(text, flush=True)


def on_terminal() -> bool:
    return sys.stderr.isatty()


def progress(total: int, label: str) -> Iterator[int]:
    """1 to total, with a bar on a terminal and a line every half minute in a log."""
    said = time.monotonic()
    for count in tqdm(range(1, total + 1), label, disable=not on_terminal()):
        yield count
        if not on_terminal() and time.monotonic() - said > 30:
            said = time.monotonic()
            say(f"{label}: {count} of {total}")
