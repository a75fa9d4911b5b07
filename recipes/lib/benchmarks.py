"""The commands `benchmark.py solver` and `benchmark.py step`: their options, tables and figures."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

import torch

from lib.checkpoint import CheckpointTimer, load_states, save_states
from lib.console import format_cell, markdown, progress
from lib.files import write_atomically
from lib.post import POST_PRESETS
from lib.presets import Config, Norm, waits_for_device
from lib.provenance import provenance
from lib.solver_errors import SolverErrors
from lib.step_times import COLD_POWER, TORCH, copy_bandwidth, make_conditions, step_table, take_turns
from lib.workloads import OPTIMIZERS, WORKLOADS, Batch, Workload


@dataclass(frozen=True)
class Options:
    """The options of both benchmarks."""

    preset: Literal[POST_PRESETS] = "mlp-5x2000"
    """Model and hyperparameters."""
    width: int | None = None
    """Hidden units in each layer, for an MLP that is to be smaller than that of its preset."""
    data_root: Path | None = None
    """Folder that contains cifar-100-python; without it, synthetic images of the same shape."""
    batch_size: int | None = None
    """Images or sequences per step; None is the model's own: 512, for ViT-B 128, for the GPT 32."""
    lr: float | None = None
    """Learning rate; None is the model's own: 1e-3, for ViT-B and the GPT 3e-4."""
    optimizer: Literal[tuple(OPTIMIZERS)] = "adam"
    """Optimizer of the training steps."""
    amp: bool = False
    """Autocast to bfloat16; weights and norm scaling stay in float32."""
    channels_last: bool = False
    """Keep images and convolutions in the channels_last memory format."""
    fused: bool = False
    """Use the fused step of Adam or AdamW."""
    steps: int = 200
    """Training steps."""
    seed: int = 0
    """Seed of the init and of the order of the images."""
    num_threads: int | None = None
    """Threads of torch on the CPU; None is torch's default."""
    out: Path = Path("runs/benchmark")
    """Folder for the table, the JSON file and the figure."""

    def workload(self) -> Workload:
        if self.fused and self.optimizer == "nadam":
            raise SystemExit("--fused: torch has no fused step of nadam; choose adam or adamw")
        workload = WORKLOADS[self.preset]()
        config = replace(workload.config, seed=self.seed, amp=self.amp, channels_last=self.channels_last)
        given = {"batch_size": self.batch_size, "lr": self.lr, "width": self.width, "data_root": self.data_root}
        config = replace(config, **{name: value for name, value in given.items() if value is not None})
        return replace(workload, config=config, optimizer=self.optimizer, fused=self.fused)

    def batches(self, workload: Workload) -> Iterator[Batch]:
        """Endless batches on the device: preprocessed images of CIFAR-100, or synthetic ones."""
        if self.data_root is None:
            return workload.batches(device(), self.seed)
        if workload.name not in POST_PRESETS:
            raise SystemExit(f"--data-root has no data for {workload.name}, which trains on synthetic batches")
        return cifar_batches(workload.config)


@dataclass(frozen=True)
class SolverOptions(Options):
    """Compare every solver with an exact SVD in float64, on the weights of one run under the default solver."""

    every: int = 10
    """Steps between two comparisons."""
    checkpoint_minutes: float = 5.0
    """Minutes between two checkpoints, beside the one after the first step; 0 saves after every step."""
    resume: bool = False
    """Go on from the last checkpoint of an interrupted run."""
    overwrite: bool = False
    """Drop an interrupted run, and measure from the start."""


@dataclass(frozen=True)
class StepOptions(Options):
    """Time a training step under each norm, in turns, against no scaling."""

    preset: Literal[tuple(WORKLOADS)] = "mlp-5x2000"
    """Model and hyperparameters."""
    steps: int = 12
    """Timed turns of each condition, after two to warm up."""
    turn: int = 1
    """Steps that a condition takes in a row, as in training; on a GPU the host then runs ahead as it does there."""
    norms: tuple[Norm, ...] = Config.norms
    """Norms to time; with none, which the others are compared with."""
    capture: bool = False
    """Also time the norm scaling replayed from CUDA graphs."""
    reference: bool = True
    """Also time the post's 500 iterations, which are slow."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Precision of float32 matrix products in training: torch.set_float32_matmul_precision."""


WITHOUT_EFFECT = ("data_root", "out", "checkpoint_minutes", "resume", "overwrite")
"""Options that change no result; whether there is a `data_root` is recorded as the data."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cifar_batches(config: Config) -> Iterator[Batch]:
    from lib.datasets import Preprocessing, load_data, train_loader
    from lib.distributed import Processes

    data = load_data(config, Processes(0, 1, device()))
    preprocessing = Preprocessing(
        data, device(), torch.channels_last if config.channels_last else torch.contiguous_format
    )
    for epoch in count(1):
        preprocessing.draw_augmentation(config.seed, epoch)
        for images, labels, index in train_loader(data, config, 0, 1, epoch):
            yield preprocessing.train(images.to(device()), index.to(device())), labels.to(device())


def begin_or_resume(options: SolverOptions, folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder for the checkpoint, or see that an interrupted run in it can go on."""
    if options.resume and options.overwrite:
        raise SystemExit("--resume and --overwrite exclude each other")
    if options.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    path = folder / "config.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(settings, indent=2))
        return
    if not options.resume:
        raise SystemExit(f"{folder} holds an unfinished run; --resume goes on, --overwrite measures again")
    previous = json.loads(path.read_text())
    for name, value in settings.items():
        if previous.get(name) != value:
            raise SystemExit(
                f"{folder} was begun with {name} = {previous.get(name)}, found {value}; --resume with the same "
                "options, or give another --out"
            )


def measure_solvers(options: SolverOptions, folder: Path) -> dict[str, Any]:
    """Relative errors of the first singular value, by candidate; the checkpoint is in the folder."""
    workload = options.workload()
    model = workload.build(device())
    scaling = workload.scale(model, "spectral")
    optimizer = workload.make_optimizer(model)
    solver_errors = SolverErrors(scaling, options.every)
    # Registered before the norm scaling, so that the candidates see the weights that it is about to scale.
    optimizer.register_step_post_hook(solver_errors.measure)
    scaling.attach(optimizer)
    stateful = {"model": model, "optimizer": optimizer, "solver_errors": solver_errors}
    if load_states(folder, stateful, device()):
        print(f"goes on after step {solver_errors.step} of {options.steps}", flush=True)
    done = solver_errors.step
    # Those of the steps that are done are drawn again: a batch depends on the ones before it.
    batches = islice(options.batches(workload), done, None)
    timer = CheckpointTimer(options.checkpoint_minutes, options.steps)
    for step, batch in zip(progress(options.steps, "steps", done), batches, strict=False):
        workload.train_step(model, optimizer, batch)
        solver_errors.measure_targets()
        if timer.is_due(step):
            save_states(folder, stateful)
            timer.restart()
    worst = solver_errors.worst_target_error
    return {"worst |u^T W' v / t - 1|": worst, "solvers": solver_errors.table(options.steps)}


def measure_steps(options: StepOptions) -> dict[str, Any]:
    """Median times of a training step and of its scaling, by condition, and their ratios to an unconstrained step."""
    if "none" not in options.norms:
        raise SystemExit("--norms must hold none, whose step the others are compared with")
    torch.set_float32_matmul_precision(options.matmul_precision)
    workload, batches = options.workload(), options.batches(options.workload())
    norms = [*options.norms, TORCH] + [COLD_POWER] * options.reference
    captured = (
        [norm for norm in options.norms if norm != "none" and not waits_for_device(norm)] if options.capture else []
    )
    conditions = make_conditions(workload, device(), norms, captured)
    take_turns(conditions, batches, progress(options.steps + 2, "rounds"), warmup=2, turn=options.turn)
    for condition in conditions:
        condition.count_launches(next(batches))
    bandwidth = copy_bandwidth(device(), 2**30 if device().type == "cuda" else 2**28)
    return {"copy, GB/s": bandwidth / 1e9, "conditions": step_table(conditions, bandwidth)}


def draw_errors(axis: Any, table: list[dict[str, Any]]) -> None:
    """The errors of each solver, mean to max, by what a step costs."""
    axis.set(xscale="log", yscale="log", xlabel="reads of W per step", ylabel="relative error of s, mean to max")
    axis.set(xlim=(2, 100), xticks=[2, 3, 5, 10, 20, 50, 100])
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.minorticks_off()
    for index, row in enumerate(table):
        x, mean, largest = row["reads of W"], row["mean error"], row["max error"]
        if x is None:
            # Without a number of reads: a horizontal line.
            axis.axhline(largest, ls=":", color="gray")
            axis.annotate(f"{row['solver']}, max", (95, largest), fontsize="small", va="bottom", ha="right")
        else:
            axis.plot([x, x], [mean, largest], "-", color="#1b7fbd")
            axis.plot([x], [mean], "o", color="#1b7fbd")
            # Names alternate between the two ends: neighbors have similar errors, and would overlap.
            at, side = (largest, "bottom") if index % 2 == 0 else (mean, "top")
            axis.annotate(row["solver"], (x, at), (7, 0), textcoords="offset points", fontsize="small", va=side)


def draw_times(axis: Any, table: list[dict[str, Any]]) -> None:
    """The time of a step under each condition, as a ratio to the unconstrained one."""
    axis.barh([row["condition"] for row in table], [row["ratio to none"] for row in table], color="#1b7fbd")
    for row in table:
        axis.annotate(f" {row['ratio to none']:.3f}", (row["ratio to none"], row["condition"]), va="center")
    axis.axvline(1, color="gray", lw=1)
    axis.set(xlabel="time of a step, ratio to none", xscale="log")


def draw(
    path: Path, title: str, table: list[dict[str, Any]], draw_on: Callable[[Any, list[dict[str, Any]]], None]
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    draw_on(axis, table)
    axis.set_title(title, fontsize="medium")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(options: SolverOptions | StepOptions) -> None:
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    config = options.workload().config
    kind = "solver" if isinstance(options, SolverOptions) else "step"
    model = options.preset if options.width is None else f"{options.preset}-width-{options.width}"
    name = f"{kind}-{model}-{options.optimizer}-{config.lr:g}"
    data = "synthetic data" if options.data_root is None else "CIFAR-100"
    title = f"{model}, {data}, {options.optimizer} {config.lr:g}, batch {config.batch_size}"
    for option in ("amp", "channels_last", "fused"):
        title += f", {option}" if getattr(options, option) else ""
    settings = {key: value for key, value in asdict(options).items() if key not in WITHOUT_EFFECT}
    settings |= {"data": data, "lr": config.lr, "batch_size": config.batch_size}
    folder = options.out / name
    if isinstance(options, SolverOptions):
        begin_or_resume(options, folder, settings)
        results, draw_on = measure_solvers(options, folder), draw_errors
        table = results["solvers"]
    else:
        results, draw_on = measure_steps(options), draw_times
        table = results["conditions"]

    options.out.mkdir(parents=True, exist_ok=True)
    numbers = {"benchmark": kind, "data": data} | settings | provenance() | results
    write_atomically(options.out / f"{name}.json", json.dumps(numbers, indent=2))
    draw(options.out / f"{name}.png", title, table, draw_on)

    text = markdown(list(table[0]), [[format_cell(value) for value in row.values()] for row in table])
    text += "".join(f"\n{key}: {format_cell(value)}\n" for key, value in results.items() if isinstance(value, float))
    write_atomically(options.out / f"{name}.md", f"# {title}\n\n{text}")
    if kind == "solver":
        # The run is finished: there is nothing to go on with.
        shutil.rmtree(folder)
    print(f"{title}\n\n{text}\n{options.out}/{name}: .md, .json, .png", flush=True)


def run_command(description: str | None) -> None:
    import tyro

    commands = {"solver": SolverOptions, "step": StepOptions}
    main(tyro.extras.subcommand_cli_from_dict(commands, description=description))
