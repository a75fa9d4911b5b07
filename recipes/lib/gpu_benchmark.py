"""`benchmark.py gpu`: all that needs a GPU in one command; what is known is on disk after every part.

The parts run in a worker process. A part that raises is recorded with its traceback, and the next one runs. Where the
worker dies or hangs, or the device is unusable after a part (as after an illegal memory access), a new worker goes on
with the parts that wait.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.console import format_cell, markdown
from lib.files import write_atomically

ROOT = Path(__file__).parents[2]
WAITING, RUNNING, RAN, SKIPPED, RAISED = "waiting", "running", "ran", "skipped", "raised"
NEEDS_NEW_WORKER = 3
"""The exit status of a worker that has left parts waiting for a new one."""
GRACE = 45.0
"""Seconds after the time budget at which a part that still runs is stopped."""
MOST_ROWS = 16
"""The rows of a table in `gpu.md`; `gpu.json` has all of them."""


@dataclass
class Record:
    """What is known, in `gpu.json` and `gpu.md`."""

    folder: Path
    values: dict[str, Any]
    """The settings, and under `parts` each part's status and results."""

    @classmethod
    def read(cls, folder: Path) -> "Record":
        return cls(folder, json.loads((folder / "gpu.json").read_text()))

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        return self.values["parts"]

    def save(self) -> None:
        write_atomically(self.folder / "gpu.json", json.dumps(self.values, indent=2))
        write_atomically(self.folder / "gpu.md", self.summary() + self.details())

    def elapsed(self) -> float:
        return time.time() - self.values["began"]

    def seconds_left(self) -> float:
        return self.values["budget, s"] - self.elapsed()

    def begin(self, name: str, limit: float) -> None:
        """Record that a part runs, and after how many seconds it is to be stopped."""
        limit = min(limit, self.seconds_left() + GRACE)
        self.parts[name] = {"status": RUNNING, "began": time.time(), "limit, s": limit}
        self.say(f"{name} ...")
        self.save()

    def end(self, name: str, status: str, **results: Any) -> None:
        began = self.parts[name].get("began")
        seconds = None if began is None else time.time() - began
        self.parts[name] = {"status": status, "seconds": seconds, **results}
        self.say(f"{name}: {status}{'' if seconds is None else f' in {seconds:.1f} s'}")
        self.save()

    def say(self, text: str) -> None:
        print(f"[{self.elapsed():6.1f} s] {text}", flush=True)

    def running(self) -> str | None:
        """The part that runs now, or ran when its worker ended."""
        return next((name for name, part in self.parts.items() if part["status"] == RUNNING), None)

    def summary(self) -> str:
        """The settings, and of each part how many of its aims are met; the ratios of whole steps beside their aims."""
        settings = [f"{name}: {value}" for name, value in self.values.items() if name not in ("parts", "began")]
        parts, ratios = [], []
        for name, part in self.parts.items():
            rows = [row for table in part.get("tables", {}).values() for row in table]
            met = [row["met"] for row in rows if row.get("met") is not None]
            parts.append(
                [name, part["status"], format_cell(part.get("seconds")), f"{sum(met)} of {len(met)}" if met else "-"]
            )
            for row in rows:
                if row.get("aim") is not None:
                    values = (row["ratio to none"], row["aim"], row["met"])
                    ratios.append([f"{name}, {row['condition']}", *map(format_cell, values)])
        text = f"# GPU benchmark\n\n{', '.join(settings)}\n\n"
        text += markdown(["part", "status", "seconds", "aims met"], parts)
        return text + ("\n" + markdown(["whole steps", "ratio to none", "aim", "met"], ratios) if ratios else "")

    def details(self) -> str:
        """What each part has found."""
        text = ""
        for name, part in self.parts.items():
            if part["status"] in (RAN, RAISED, SKIPPED):
                text += f"\n## {name}\n" + "".join(f"\n{note}\n" for note in part.get("notes", []))
                for title, table in part.get("tables", {}).items():
                    cells = [[format_cell(value) for value in row.values()] for row in table[:MOST_ROWS]]
                    text += f"\n{title}:\n\n" + (markdown(list(table[0]), cells) if table else "nothing\n")
                    if len(table) > MOST_ROWS:
                        text += f"\nand {len(table) - MOST_ROWS} more in gpu.json\n"
            if "traceback" in part:
                text += f"\n```\n{part['traceback'].rstrip()}\n```\n"
        return text


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmark.py gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models: to try the parts, on a CPU too")
    parser.add_argument("--budget", type=float, default=420, help="seconds; a part that would take longer is skipped")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run the parts whose names begin so")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the command; its exit status is 0 if every part has run or was skipped."""
    options = parse(arguments)
    if options.worker:
        from lib.gpu_parts import work

        return work(options, Record.read(options.out))
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {"device": options.device, "tiny": options.tiny, "budget, s": options.budget}
    Record(options.out, {"benchmark": "gpu", "began": time.time(), **settings, "parts": {}}).save()
    is_complete = supervise(options.out, [sys.executable, sys.argv[0], "gpu", *arguments, "--worker"])
    record = Record.read(options.out)
    if record.parts:
        # The summary comes last: of a long output, often only the end is kept.
        print(f"{record.details()}\n{record.summary()}\n{options.out}/gpu: .json, .md", flush=True)
    return 0 if is_complete and all(part["status"] in (RAN, SKIPPED) for part in record.parts.values()) else 1


def supervise(folder: Path, command: list[str]) -> bool:
    """Run workers until no part waits; whether the last one ended well."""
    # The checkout itself is measured, whether or not it is installed.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    while True:
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
        try:
            reason = wait_or_stop(process, folder)
        finally:
            process.kill()
        record = Record.read(folder)
        if (name := record.running()) is not None:
            record.end(name, RAISED, traceback=reason or f"The worker ended in this part, status {process.returncode}.")
        elif process.returncode != NEEDS_NEW_WORKER:
            return process.returncode == 0


def wait_or_stop(process: subprocess.Popen, folder: Path) -> str | None:
    """Wait for the worker, and stop it if a part exceeds its limit; the reason if it was stopped."""
    while True:
        try:
            process.wait(timeout=0.5)
            return None
        except subprocess.TimeoutExpired:
            record = Record.read(folder)
        name = record.running()
        if name is not None and time.time() > record.parts[name]["began"] + record.parts[name]["limit, s"]:
            process.kill()
            process.wait()
            return f"Stopped: it still ran after {record.parts[name]['limit, s']:.0f} s."
