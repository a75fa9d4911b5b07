"""Train a grid of presets, conditions, target rules and seeds: what is done is skipped, and one table comes out.

Example: python recipes/sweep.py --presets mlp-5x2000 resnet34 --seeds 0 1 2 -- --data-root data --download

What follows `--` goes to every run of recipes/train.py as it is.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import torch
import tyro
from compare import compare_all
from logs import say
from presets import PRESETS, Condition, Targets, condition

PRESETS_BY_NAME = {preset().preset: preset() for preset in PRESETS}


@dataclass(frozen=True)
class Options:
    """The grid, and how it runs."""

    presets: tuple[str, ...] = ("mlp-5x2000", "mlp-7x4000", "resnet34", "resnet50")
    """Which presets."""
    norms: tuple[Condition, ...] = ("none", "frobenius", "spectral")
    """Under which conditions."""
    targets: tuple[Targets, ...] = ("described", "published")
    """From which target rules; a run that two rules would make the same is made once."""
    seeds: tuple[int, ...] = (0,)
    """From which seeds."""
    processes: int = 1
    """Processes of each run, by torchrun."""
    jobs: int = 1
    """Runs side by side; GPUs are dealt out among them."""
    task: int | None = None
    """Do only this run of the grid, counted from 0, and draw no table: for an array of batch jobs."""
    list: bool = False
    """Tell the grid, one run a line, and which of them are finished; train nothing."""
    out: Path = Path("runs")
    """Folder for the results."""


@dataclass(frozen=True)
class Task:
    """One run."""

    preset: str
    norm: str
    targets: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.preset}/{condition(self.norm, self.targets)}-seed{self.seed}"

    def command(self, options: Options, rest: list[str]) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
        return [
            *(sys.executable, *launcher, str(Path(__file__).with_name("train.py")), self.preset),
            *("--norms", self.norm, "--targets", self.targets, "--seed", str(self.seed)),
            *("--out", str(options.out), "--resume", "--no-compare", *rest),
        ]


def grid(options: Options) -> list[Task]:
    """The runs, without those that another target rule of the grid makes too."""
    tasks = {}
    for preset in options.presets:
        for seed in options.seeds:
            for targets in options.targets:
                for norm in options.norms:
                    # An MLP has no maps: its activation sizes are its channel counts, and the published init is the
                    # described one. Only what is held to a published target differs.
                    is_mlp = PRESETS_BY_NAME[preset].model == "mlp"
                    differs = targets == "published" and norm in ("spectral", "clipped")
                    same = is_mlp and not differs
                    key = (preset, seed, norm, None if same else targets)
                    tasks.setdefault(key, Task(preset, norm, targets, seed))
    return list(tasks.values())


def is_finished(task: Task, options: Options) -> bool:
    return (options.out / task.name / "summary.json").exists()


def train(task: Task, options: Options, rest: list[str], slots: Queue[int]) -> bool:
    """One run in processes of its own, its lines told under its name; whether it went through."""
    slot = slots.get()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if options.jobs > 1 and torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        first = slot * options.processes
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[first : first + options.processes])
    process = subprocess.Popen(
        task.command(options, rest), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout or ():
        say(f"{task.name}: {line.rstrip()}")
    slots.put(slot)
    return process.wait() == 0


def find_problem(options: Options) -> str | None:
    """What is wrong with the options, as a sentence that says what would work."""
    if unknown := [name for name in options.presets if name not in PRESETS_BY_NAME]:
        return f"unknown preset {unknown[0]!r}; choose {', '.join(PRESETS_BY_NAME)}"
    if options.jobs < 1 or options.processes < 1:
        return f"--jobs and --processes must be at least 1, found {options.jobs} and {options.processes}"
    devices = torch.cuda.device_count()
    if devices and options.jobs * options.processes > devices:
        return f"{options.jobs} jobs of {options.processes} processes need more than the {devices} GPUs that are here"
    if options.task is not None and not 0 <= options.task < len(grid(options)):
        return f"--task must be from 0 to {len(grid(options)) - 1}, found {options.task}"
    return None


def main(options: Options, rest: list[str]) -> None:
    if problem := find_problem(options):
        sys.exit(f"sweep: {problem}")
    tasks = grid(options)
    if options.list:
        for number, task in enumerate(tasks):
            say(f"{number}  {task.name}  {'finished' if is_finished(task, options) else 'open'}")
        return
    chosen = tasks if options.task is None else [tasks[options.task]]
    todo = [task for task in chosen if not is_finished(task, options)]
    say(f"{len(chosen)} runs, {len(chosen) - len(todo)} finished already")
    slots: Queue[int] = Queue()
    for slot in range(options.jobs):
        slots.put(slot)
    with ThreadPoolExecutor(options.jobs) as pool:
        through = list(pool.map(lambda task: train(task, options, rest, slots), todo))
    if options.task is None and any(is_finished(task, options) for task in tasks):
        say(compare_all(options.out))
    if failed := [task.name for task, good in zip(todo, through, strict=True) if not good]:
        sys.exit(f"sweep: {', '.join(failed)} did not go through; the same command tries again")


def read_command_line() -> tuple[Options, list[str]]:
    """The sweep's own options, and what follows `--`."""
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return tyro.cli(Options, args=arguments[:end], description=__doc__), arguments[end + 1 :]


if __name__ == "__main__":
    main(*read_command_line())
