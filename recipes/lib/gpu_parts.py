"""The parts of `benchmark.py gpu`, and the worker that runs them one after another."""

import argparse
import functools
import gc
import importlib
import importlib.metadata
import math
import os
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from lib import scaling_checks, sharded_checks
from lib.gpu_benchmark import NEEDS_NEW_WORKER, RAISED, RAN, ROOT, SKIPPED, WAITING, Record
from lib.provenance import cpu_name, provenance
from lib.scaling_checks import Setting
from lib.step_times import Condition, copy_bandwidth, make_conditions, step_table, synchronize, take_turns
from lib.workloads import WORKLOADS, Workload, tiny

Results = dict[str, Any]
"""`tables`: rows by title; `notes`: sentences; `traceback`: of what has raised without ending the part."""


@dataclass(frozen=True)
class Context:
    """What a part needs to know."""

    device: torch.device
    tiny: bool
    deadline: float
    """On `time.monotonic`: when the part should come to its end."""
    say: Callable[[str], None]

    def workload(self, name: str) -> Workload:
        """The workload as it is trained on a GPU."""
        workload = WORKLOADS[name]()
        config = replace(workload.config, amp=name != "mlp-5x2000", channels_last=name.startswith("resnet"))
        workload = replace(workload, config=config, fused=True)
        if self.tiny:
            return tiny(workload)
        is_small = self.device.type == "cuda" and torch.cuda.get_device_properties(self.device).total_memory < 100e9
        if is_small and name == "gpt-24x2048":
            # Three models and the activations of four sequences take about 75 GB.
            workload = replace(workload, micro_batches=2 * workload.micro_batches)
        return workload


class Skipped(Exception):
    """Why a part cannot run here."""


class Part(NamedTuple):
    run: Callable[[Context], Results]
    expected_s: float
    """Its seconds on an H100, about."""


def run_tests(context: Context) -> Results:
    """The tests that are marked cuda, in a process of their own."""
    for module in ("pytest", "hypothesis"):
        try:
            importlib.import_module(module)
        except ImportError:
            raise Skipped(f"{module} is not installed") from None
    # Other test files may import what is not installed.
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.cuda" in path.read_text()]
    if not files:
        raise Skipped("no test is marked cuda")
    # The project's filters of warnings name packages that may be missing.
    options = ["-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda and not slow", *options]
    limit = context.deadline - time.monotonic()
    # Plugins that happen to be installed are not needed.
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    try:
        done = subprocess.run([*command, *files], cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as error:
        # Bytes, in spite of text=True.
        output = bytes(error.stdout or b"").decode(errors="replace")
        raise RuntimeError(f"the tests still ran after {limit:.0f} s:\n{last_lines(output)}") from None
    if done.returncode:
        raise RuntimeError(f"pytest ended with status {done.returncode}:\n{last_lines(done.stdout + done.stderr)}")
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (\w+)", done.stdout.rstrip().splitlines()[-1])}
    table = [{"outcome": word, "tests": counts[word]} for word in ("passed", "skipped") if word in counts]
    return {"tables": {"Tests that are marked cuda": table}}


def last_lines(text: str, count: int = 40) -> str:
    return "\n".join(text.rstrip().splitlines()[-count:])


class Pace(NamedTuple):
    """How a workload is timed."""

    rounds: int
    turn: int
    """The steps that a condition takes in a row."""
    expected_s: float


PACES = {
    "mlp-5x2000": Pace(20, 10, 15),
    "resnet50": Pace(10, 4, 25),
    "resnet34": Pace(10, 5, 20),
    "mlp-7x4000": Pace(20, 10, 20),
    "vit-b": Pace(8, 3, 25),
    "gpt-24x2048": Pace(4, 1, 100),
}
"""In the order in which they are timed: the cheapest and most important ones first."""

AIMS = {
    "mlp-5x2000": {"spectral": 1.3},
    "resnet50": {"frobenius": 1.01, "spectral": 1.015},
    "resnet34": {"frobenius": 1.01, "spectral": 1.03},
    "mlp-7x4000": {"spectral": 1.5},
    "vit-b": {"spectral": 1.03},
    "gpt-24x2048": {"spectral": 1.01},
}
"""The largest ratios of whole steps to steps without scaling that are aimed at, eager or captured."""


def time_steps(context: Context, name: str) -> Results:
    """The times of whole steps under each condition, beside the aims, and a profile of each scaling step."""
    workload, pace = context.workload(name), PACES[name]
    # The largest model leaves no memory for another copy.
    norms = ("none", "frobenius", "spectral", *(["cap"] if name != "gpt-24x2048" else []))
    conditions = make_conditions(workload, context.device, norms, ("spectral",))
    batches = workload.batches(context.device)
    # A captured step is replayed from the third step of a number of iterations on, which settles in the first few.
    rounds, turn = (1, 1) if context.tiny else (pace.rounds, pace.turn)
    warmup = 1 if context.tiny else max(2, math.ceil(6 / turn))
    take_turns(conditions, batches, range(1, warmup + rounds + 1), warmup=warmup, turn=turn, deadline=context.deadline)
    tracebacks: list[str] = []
    for condition in conditions:
        with scaling_checks.recorded(tracebacks):
            condition.count_launches(next(batches))
    bandwidth = copy_bandwidth(context.device, 2**22 if context.tiny else 2**30)
    table = step_table(conditions, bandwidth)
    for row, condition in zip(table, conditions, strict=True):
        norm = condition.name.partition(",")[0]
        aim = None if context.tiny else AIMS[name].get(norm)
        row["launches, at most"] = allowed_launches(norm, condition)
        row |= {"aim": aim, "met": None if aim is None else row["ratio to none"] <= aim}
        context.say(f"  {name}, {condition.name}: {row['ratio to none']:.3f}")
    tables = {"Median times": table}
    for condition in conditions:
        if condition.scaling is not None:
            iterations = f"{condition.launched_iterations} iterations"
            tables[f"One scaling step, {condition.name}, {iterations}"] = [
                {"kernel": one.name[:90], "launches": one.count, "microseconds": one.microseconds}
                for one in condition.launched
            ]
    config = workload.config
    options = ["fused"] * workload.fused + ["bfloat16 autocast"] * config.amp + ["channels_last"] * config.channels_last
    note = f"Batch {config.batch_size}"
    if workload.micro_batches > 1:
        note += f" in {workload.micro_batches} micro-batches"
    num_rounds = len(conditions[0].step_ms)
    note += f", {', '.join([workload.optimizer, *options])}; {num_rounds} rounds of {turn} steps a condition. "
    note += f"A copy on the device moves {bandwidth / 1e9:.0f} GB/s, read and written."
    return {"tables": tables, "notes": [note], "copy, GB/s": bandwidth / 1e9, "traceback": "\n".join(tracebacks)}


def allowed_launches(norm: str, condition: Condition) -> int | None:
    """The launches that a scaling step is to keep to, however many layers there are."""
    if condition.scaling is None:
        return None
    return 3 if norm == "frobenius" else 2 + 6 * max(condition.launched_iterations, 1)


def all_parts() -> dict[str, Part]:
    """The parts by name, in order: what shows that the step is right, then its times, the longest last."""
    times = {f"step {name}": Part(functools.partial(time_steps, name=name), p.expected_s) for name, p in PACES.items()}
    first = ("step mlp-5x2000", "step resnet50")
    return {
        "tests": Part(run_tests, 150),
        "syncs": Part(check(scaling_checks.syncs), 15),
        "replay": Part(check(scaling_checks.replay), 15),
        "repeats": Part(check(scaling_checks.repeats), 15),
        "shards": Part(check(sharded_checks.shards), 30),
        **{name: times[name] for name in first},
        "errors": Part(check(scaling_checks.errors), 60),
        **{name: part for name, part in times.items() if name not in first},
    }


def check(function: Callable[[Setting], Results]) -> Callable[[Context], Results]:
    return lambda context: function(Setting(context.device, context.workload, context.tiny, context.deadline))


def work(options: argparse.Namespace, record: Record) -> int:
    """Run the parts that wait; the worker's exit status."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmark.py gpu: no CUDA device; --device cpu --tiny tries the parts on a CPU", file=sys.stderr)
        return 1
    device, parts = torch.device(options.device), all_parts()
    if options.tiny:
        torch.set_num_threads(1)
    if options.only:
        parts = {name: part for name, part in parts.items() if name.startswith(tuple(options.only))}
    if not record.parts:
        facts = provenance() | {"triton": version_of("triton")}
        if device.type == "cpu":
            facts["hardware"] = cpu_name()
        record.values |= {**facts, "parts": {name: {"status": WAITING} for name in parts}}
        record.save()
    # What is imported stays: the collections after each part need not look at it.
    gc.freeze()
    for name, part in parts.items():
        if record.parts[name]["status"] != WAITING:
            continue
        if not run_part(record, name, part, device, options.tiny) and not is_usable(device):
            return NEEDS_NEW_WORKER
    return 0


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def run_part(record: Record, name: str, part: Part, device: torch.device, use_tiny: bool) -> bool:
    """Run a part if there is time for it, and record what it finds; whether it did not raise."""
    left = record.seconds_left()
    if part.expected_s > left and not use_tiny:
        budget = record.values["budget, s"]
        note = f"It takes about {part.expected_s:.0f} s, and {max(left, 0):.0f} s are left of {budget:.0f}."
        record.end(name, SKIPPED, notes=[note])
        return True
    record.begin(name, 2 * part.expected_s + 60)
    context = Context(device, use_tiny, time.monotonic() + min(1.5 * part.expected_s, left), record.say)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results = part.run(context)
            synchronize(device)
        results["notes"] = [*results.get("notes", []), *dict.fromkeys(f"Warning: {one.message}" for one in caught)]
        if not results.get("traceback"):
            results.pop("traceback", None)
            record.end(name, RAN, **results)
            return True
        record.end(name, RAISED, **results)
        return False
    except Skipped as skipped:
        record.end(name, SKIPPED, notes=[f"{skipped}."])
        return True
    except Exception:
        record.end(name, RAISED, traceback=traceback.format_exc())
        return False
    finally:
        # The next part needs the memory; models are in cycles, by their hooks.
        gc.collect()
        if is_usable(device):
            torch.cuda.empty_cache()


def is_usable(device: torch.device) -> bool:
    """Whether the device still works: after an illegal memory access, it does not in this process."""
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False
