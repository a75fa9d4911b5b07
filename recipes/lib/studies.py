"""Studies: many short runs on a CPU, several at a time, each recorded when it ends, so that an interruption costs one.

A study says which runs it wants (cells, from what is known so far), how one is measured, and what its table and figure
show of all of them. Its record holds every cell with its result, the command, the commit and the machine.
"""

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from lib.console import interruption_message
from lib.files import append_json_line, read_json_lines, write_atomically
from lib.provenance import command, provenance

Cell = TypeVar("Cell")
"""A frozen dataclass of plain values: all that one run depends on."""
Result = dict[str, Any]


@dataclass(frozen=True)
class Study(Generic[Cell]):
    """What is run, and what is shown of it."""

    name: str
    """Name of the files."""
    cell: type[Cell]
    """The dataclass of the cells."""
    plan: Callable[[dict[Cell, Result]], Iterable[Cell]]
    """All cells that are wanted, from the results that are known: first the grid, then more seeds at its best."""
    measure: Callable[[Cell], Result]
    """Run one cell, in a process of its own with one thread, and return plain values."""
    table: Callable[[dict[Cell, Result]], str]
    """The results in Markdown."""
    draw: Callable[[dict[Cell, Result], Path], None]
    """Draw the results into a PNG file."""


@dataclass(frozen=True)
class StudyOptions:
    """Where a study goes, and how fast."""

    out: Path = Path("runs/studies")
    """Folder for the record, the table and the figure. Cells that are in the record already are kept."""
    jobs: int = max(1, (os.cpu_count() or 1) // 2)
    """Runs at a time, each on one thread."""


def run_study(study: Study[Cell], options: StudyOptions) -> None:
    """Measure what the record lacks, then write the record, the table and the figure, and print the table."""
    options.out.mkdir(parents=True, exist_ok=True)
    lines = options.out / f"{study.name}.jsonl"
    results = {study.cell(**line["cell"]): line["result"] for line in read_json_lines(lines)}
    with interruption_message(f"{study.name}: interrupted; the same command measures what {lines} lacks"):
        measure_all(study, results, lines, options.jobs)
    wanted = {cell: results[cell] for cell in study.plan(results)}
    write_record(study, wanted, options.out)
    print(f"{study.table(wanted)}\n{options.out / study.name}: .md, .json, .png", flush=True)


def measure_all(study: Study[Cell], results: dict[Cell, Result], lines: Path, jobs: int) -> None:
    """Measure cells until the plan asks for no other; `results` and the file grow by one with each that ends."""
    # Spawned, not forked: torch's threads do not survive a fork.
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,))
    running: dict[Future[Result], Cell] = {}

    def record(future: Future[Result]) -> None:
        cell = running.pop(future)
        results[cell] = future.result()
        append_json_line(lines, {"cell": asdict(cell), "result": results[cell]})

    try:
        while True:
            missing = [cell for cell in study.plan(results) if cell not in results and cell not in running.values()]
            for cell in missing:
                running[pool.submit(study.measure, cell)] = cell
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running[future]
                record(future)
                print(f"{study.name}: {len(results)} done, {len(running)} to go: {cell}", flush=True)
    finally:
        # Where one has failed, the others that run end first, and count.
        pool.shutdown(cancel_futures=True)
        for future in list(running):
            if not future.cancelled() and future.exception() is None:
                record(future)


def write_record(study: Study[Cell], results: dict[Cell, Result], folder: Path) -> None:
    """Write NAME.json with all cells and where they come from, the table NAME.md, and the figure NAME.png."""
    cells = [{"cell": asdict(cell), "result": result} for cell, result in results.items()]
    record = {"command": command()} | provenance() | {"threads": 1}
    text = json.dumps(record, indent=1)[:-2] + ',\n "cells": [\n  ' + ",\n  ".join(map(json.dumps, cells)) + "\n ]\n}\n"
    write_atomically(folder / f"{study.name}.json", text)
    write_atomically(folder / f"{study.name}.md", study.table(results))
    study.draw(results, folder / f"{study.name}.png")


def read_record(study: Study[Cell], path: Path) -> dict[Cell, Result]:
    """The results in a record, by cell."""
    return {study.cell(**line["cell"]): line["result"] for line in json.loads(path.read_text())["cells"]}
