"""Train a grid of presets, norms, target sources and seeds, skip finished runs, and compare all of them in one table.

Example: python recipes/sweep.py --presets mlp-5x2000 resnet34 --seeds 0 1 2 -- --data-root data --download

Options after `--` are passed to every run of recipes/train.py.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import torch
import tyro

from compare import compare_all
from lib.console import interruption_message
from lib.post import POST_PRESETS
from lib.presets import PRESETS, SPECTRAL_NORMS, Config, Norm, TargetSource
from lib.runs import is_finished, run_name


@dataclass(frozen=True)
class Options:
    """The grid, and how it is run."""

    presets: tuple[str, ...] = POST_PRESETS
    """Presets to train."""
    norms: tuple[Norm, ...] = Config.norms
    """Norms to constrain."""
    targets: tuple[TargetSource, ...] = ("described", "published")
    """Target sources; two sources that give the same run are trained once."""
    seeds: tuple[int, ...] = (0,)
    """Seeds to train from."""
    processes: int = 1
    """Processes of each run, started by torchrun."""
    jobs: int = 1
    """Runs in parallel. The GPUs are divided among them; runs of one process share them in turn if there are more runs
    than GPUs, for models too small to fill one. Each run needs memory of its own: 28 bytes per parameter with
    gradients, Adam's moments and a copy of the last epoch's states, its activations, its data set (0.2 GB), and about
    0.5 GB for CUDA."""
    task: int | None = None
    """Train only this run of the grid, counted from 0, without a comparison: for array jobs of a cluster."""
    list: bool = False
    """List the runs of the grid and which of them are finished; train nothing."""
    out: Path = Path("runs")
    """Folder for the results."""


@dataclass(frozen=True)
class Task:
    """A run of the grid."""

    preset: str
    norm: str
    targets: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.preset}/{run_name(self.norm, self.targets, self.seed)}"

    def is_finished(self, options: Options) -> bool:
        return is_finished(options.out / self.name)

    def log(self, options: Options) -> Path:
        """The file for the run's warnings and errors, beside its folder, which the run may delete."""
        return options.out / f"{self.name}.log"

    def command(self, options: Options, train_options: list[str]) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
        return [
            *(sys.executable, *launcher, str(Path(__file__).with_name("train.py")), self.preset),
            *("--norms", self.norm, "--targets", self.targets, "--seed", str(self.seed)),
            *("--out", str(options.out), "--resume", "--no-compare", *train_options),
        ]


def grid(options: Options) -> list[Task]:
    """The runs of the grid, without duplicates: those that are the same under two target sources."""
    tasks = {}
    for preset in options.presets:
        is_mlp = PRESETS[preset]().model == "mlp"
        for seed in options.seeds:
            for targets in options.targets:
                for norm in options.norms:
                    # The activations of an MLP have no height and width: its sizes are its channels, and the published
                    # init is the described one. Only the published targets of the spectral norm differ.
                    depends_on_source = not is_mlp or (targets == "published" and norm in SPECTRAL_NORMS)
                    key = (preset, seed, norm, targets if depends_on_source else None)
                    tasks.setdefault(key, Task(preset, norm, targets, seed))
    return list(tasks.values())


def visible_devices(slot: int, processes: int, devices: list[str]) -> list[str]:
    """The devices of the run in a slot: as many as it has processes, its own if there are enough; in turn if not."""
    return [devices[(slot * processes + process) % len(devices)] for process in range(processes)]


def train(task: Task, options: Options, train_options: list[str], slots: Queue[int]) -> bool:
    """Train one run in its own processes and print its progress, each line after its name; whether it succeeded.

    Its warnings and errors go to its log. Of a failure, one line is printed: the reason, and where the log is.
    """
    slot = slots.get()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if options.jobs > 1 and torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        devices = visible_devices(slot, options.processes, visible.split(","))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    command = task.command(options, train_options)
    log = task.log(options)
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w") as errors,
        subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        for line in process.stdout or ():
            print(f"{task.name}: {line.rstrip()}", flush=True)
    slots.put(slot)
    said = log.read_text(errors="replace")
    if process.returncode:
        reason = failure_reason(said) or f"exit status {process.returncode}"
        print(f"{task.name}: failed: {reason} (see {log})", flush=True)
    elif said:
        print(f"{task.name}: finished; its warnings are in {log}", flush=True)
    else:
        log.unlink()
    return process.returncode == 0


def failure_reason(said: str) -> str:
    """The last line of the error that ended a run, from all that its processes and torchrun have said of it.

    torchrun's own report and traceback come behind those of the processes, and tell of one that was killed.
    """
    if killed := re.search(r"Root Cause.*?(Signal \d+.*?)$", said, re.DOTALL | re.MULTILINE):
        return killed[1]
    of_processes, *_ = re.split(r"^[A-Z]\d{4} .*torch/distributed/elastic/", said, maxsplit=1, flags=re.MULTILINE)
    lines = (of_processes.strip() or said.strip()).splitlines()
    # A rank's lines begin with its name.
    return re.sub(r"^\[rank\d+\]: ", "", lines[-1]) if lines else ""


def find_problem(options: Options) -> str | None:
    """What is wrong with the options, and what would work; None if they are fine."""
    if unknown := [name for name in options.presets if name not in PRESETS]:
        return f"unknown preset {unknown[0]!r}; choose {', '.join(PRESETS)}"
    if options.jobs < 1 or options.processes < 1:
        return f"--jobs and --processes must be at least 1, found {options.jobs} and {options.processes}"
    devices = torch.cuda.device_count()
    needed = options.jobs * options.processes if options.processes > 1 else 1
    if devices and needed > devices:
        return (
            f"{options.jobs} jobs of {options.processes} processes need {needed} GPUs, found {devices}; "
            "give fewer, or --processes 1: runs of one process can share a GPU"
        )
    if options.task is not None and not 0 <= options.task < len(grid(options)):
        return f"--task must be from 0 to {len(grid(options)) - 1}, found {options.task}"
    return None


def main(options: Options, train_options: list[str]) -> None:
    if problem := find_problem(options):
        sys.exit(f"sweep: {problem}")
    tasks = grid(options)
    if options.list:
        for number, task in enumerate(tasks):
            print(f"{number}  {task.name}  {'finished' if task.is_finished(options) else 'open'}")
        return
    chosen = tasks if options.task is None else [tasks[options.task]]
    unfinished = [task for task in chosen if not task.is_finished(options)]
    print(f"{len(chosen)} runs, {len(chosen) - len(unfinished)} finished already", flush=True)
    slots: Queue[int] = Queue()
    for slot in range(options.jobs):
        slots.put(slot)
    pool = ThreadPoolExecutor(options.jobs)
    with interruption_message("sweep: interrupted; the same command goes on"):
        try:
            succeeded = list(pool.map(lambda task: train(task, options, train_options, slots), unfinished))
        finally:
            # The runs that have not begun. Ctrl-C has reached those that have.
            pool.shutdown(cancel_futures=True)
    if options.task is None and any(task.is_finished(options) for task in tasks):
        print(compare_all(options.out), flush=True)
    if failed := [task.name for task, success in zip(unfinished, succeeded, strict=True) if not success]:
        sys.exit(f"sweep: {', '.join(failed)} did not go through; the same command tries again")


def read_command_line() -> tuple[Options, list[str]]:
    """The options of the sweep, and those after `--` for the training."""
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return tyro.cli(Options, args=arguments[:end], description=__doc__), arguments[end + 1 :]


if __name__ == "__main__":
    main(*read_command_line())
