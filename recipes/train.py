"""Train a model without norm scaling and under several norm constraints, one after another, and compare the runs.

Example: torchrun --standalone --nproc-per-node=2 recipes/train.py modular-addition
"""

import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import nn
from tqdm import tqdm

from compare import compare, outcome
from lib.checkpoint import Checkpoints, CheckpointTimer, Progress, delete_previous, resume
from lib.clock import Clock, attach_timed
from lib.datasets import Data, Preprocessing, load_data, test_loader, train_loader
from lib.distributed import Processes, broadcast_batch_norm, data_parallel, destroy_process_group, init_process_group
from lib.models import CIFAR_RESNETS, build_model, init_and_scale, is_known_model
from lib.presets import PRESETS, WITHOUT_EFFECT, Config, needs_whole, waits_for_device
from lib.run_log import RunLog, WandbRun
from lib.runs import is_begun, is_finished, run_name
from lib.sharded import WholeModelState, WholeOptimizerState, shard
from lib.summaries import header_of, table_rows
from lib.survival import Stop, is_signed, require_finite, stopping
from specscale import NonFiniteWeightError, NormScaler, __version__


def main(config: Config) -> None:
    processes = init_process_group()
    exit_on_problem(config, processes)
    torch.set_float32_matmul_precision(config.matmul_precision)
    data = load_data(config, processes)
    if config.data_on_device:
        data = data.to(processes.device)
    with stopping(processes) as stop:
        for norm in config.norms:
            train(config, norm, data, processes, stop)
    if processes.is_main and config.compare:
        folder = config.out / config.preset
        runs = compare(folder)
        wandb_run = WandbRun(config, folder, "comparison")
        wandb_run.log_comparison(folder, header_of(runs), table_rows(runs))
        wandb_run.finish()
        print(f"\n{outcome(runs)}\n{folder}/: comparison.md, results.json and the figures", flush=True)
    destroy_process_group()


def exit_on_problem(config: Config, processes: Processes) -> None:
    """Exit all processes before anything is trained or deleted if the options cannot work; one prints why."""
    main_start = processes.broadcast_object(start_of(config))
    if processes.is_main:
        problem = find_problem(config, processes.world_size)
    else:
        # Another node may have been started otherwise, and may have other disks.
        problem = find_difference(start_of(config), main_start) or find_problem_of_data(config)
    problems = {rank: problem for rank, problem in enumerate(processes.all_gather_object(problem)) if problem}
    if problems:
        if processes.is_main:
            rank = min(problems)
            print(f"train: {f'rank {rank}: ' if rank else ''}{problems[rank]}", file=sys.stderr, flush=True)
        destroy_process_group()
        raise SystemExit(1)


def start_of(config: Config) -> dict[str, Any]:
    """What all processes must have been started with alike."""
    options = {name: value for name, value in config.as_json().items() if name == "norms" or name not in WITHOUT_EFFECT}
    return options | {"torch": torch.__version__, "specscale": __version__}


def find_difference(start: dict[str, Any], main_start: dict[str, Any]) -> str | None:
    """What this process was started with, and the main process was not; None if they are alike."""
    for name, value in start.items():
        if value != main_start.get(name):
            return (
                f"started with {name} = {value}, rank 0 with {main_start.get(name)}; give all nodes the same options "
                "and the same versions"
            )
    return None


def find_problem(config: Config, world_size: int) -> str | None:
    """What is wrong with the options, and what would work; None if they are fine."""
    if config.epochs < 1:
        return f"--epochs must be at least 1, found {config.epochs}"
    if config.batch_size % world_size:
        return f"batch size {config.batch_size} does not divide over {world_size} processes"
    if config.parallel == "fsdp" and not dist.is_initialized():
        return "--parallel fsdp shards over the processes of torchrun; start it by torchrun --standalone"
    whole = [norm for norm in config.norms if config.parallel == "fsdp" and needs_whole(norm, config.solver)]
    if whole:
        return f"--parallel fsdp has no {whole[0]} with the solver {config.solver}: it needs whole matrices"
    if config.num_workers and config.data_on_device:
        return f"--num-workers {config.num_workers} has no effect on data on the device; give --no-data-on-device too"
    if not config.checkpoint_minutes >= 0:
        return f"--checkpoint-minutes must be 0 (every epoch) or more, found {config.checkpoint_minutes}"
    if not is_known_model(config.model):
        return f"unknown model {config.model!r}; choose mlp, {', '.join(CIFAR_RESNETS)}, or one of timm.list_models()"
    if (config.model == "pair-mlp") != (config.data == "modular-addition"):
        return f"--model pair-mlp and --data modular-addition go together, found {config.model} with {config.data}"
    if config.model == "pair-mlp" and config.init != "model" and config.targets != "channels":
        return f"--model pair-mlp needs --init model or --targets channels, found {config.init} and {config.targets}"
    if config.init == "model" and config.targets != Config.targets:
        return f"--targets {config.targets} has no effect with --init model: targets are the norms of that init"
    if config.steps_per_epoch is not None and config.steps_per_epoch < 1:
        return f"--steps-per-epoch must be at least 1, found {config.steps_per_epoch}"
    if config.resume and config.overwrite:
        return "--resume and --overwrite exclude each other"
    if problem := find_problem_of_data(config):
        return problem
    problems = (find_problem_of_folder(config, run_folder(config, norm)) for norm in config.norms)
    return next(filter(None, problems), None)


def find_problem_of_data(config: Config) -> str | None:
    """Why this process finds no data."""
    if config.data == "cifar100" and not config.download and not (config.data_root / "cifar-100-python").is_dir():
        return f"{config.data_root} holds no cifar-100-python; give --data-root DIR, or --download to fetch it there"
    return None


def find_problem_of_folder(config: Config, folder: Path) -> str | None:
    """Why a run cannot go to this folder: one is there already, or was begun with other options."""
    if not is_begun(folder) or config.overwrite:
        return None
    if not goes_on(config, folder):
        state = "a finished" if is_finished(folder) else "an unfinished"
        return f"{folder} holds {state} run; --resume goes on, --overwrite trains again"
    previous = json.loads((folder / "config.json").read_text())
    for name, value in config.as_json().items():
        if name not in WITHOUT_EFFECT and previous.get(name, value) != value:
            return (
                f"{folder} was begun with {name} = {previous[name]}, found {value}; --resume with the same options, "
                "or give another --out"
            )
    return None


def run_folder(config: Config, norm: str) -> Path:
    return config.out / config.preset / run_name(norm, config.targets, config.seed)


def goes_on(config: Config, folder: Path) -> bool:
    """Whether a run in this folder is continued: on demand, or since torchrun has restarted the processes."""
    return config.resume or is_signed(folder)


def train(config: Config, norm: str, data: Data, processes: Processes, stop: Stop) -> None:
    """Train under one norm, from the init or the last checkpoint to the summary."""
    folder = run_folder(config, norm)
    # The main process says what is on the disk: another may see it later.
    resumes, finished = processes.broadcast_object((goes_on(config, folder), is_finished(folder)))
    if resumes and finished:
        if processes.is_main:
            delete_previous(folder)
        return
    if processes.is_main and config.overwrite and not resumes:
        shutil.rmtree(folder, ignore_errors=True)

    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    torch.manual_seed(config.seed)
    model = build_model(config, data.image_shape, data.num_classes)
    scaling = init_and_scale(config, norm, model, data.image_shape)
    model.to(processes.device, memory_format=memory_format)
    is_sharded = config.parallel == "fsdp"
    if is_sharded:
        shard(model, processes)
    is_cuda = processes.device.type == "cuda"
    # On a CPU the default: the fused kernel rounds otherwise.
    options = {"lr": config.lr, "fused": is_cuda or None}
    if norm == "decay":
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay, **options)
    else:
        optimizer = torch.optim.Adam(model.parameters(), **options)
    schedule = learning_rate_schedule(config, optimizer)

    costs = StepCosts(scaling, processes.device)
    if scaling is not None:
        if is_cuda and not is_sharded and not waits_for_device(norm, config.solver):
            scaling.capture()
        attach_timed(scaling, optimizer, costs.scaling_clock)
        optimizer.register_step_post_hook(costs.count_iterations)

    states = (WholeModelState(model), WholeOptimizerState(model, optimizer)) if is_sharded else (model, optimizer)
    stateful = {"model": states[0], "optimizer": states[1], "schedule": schedule}
    progress = Progress()
    with stop.share(OSError):
        if resumes:
            progress = resume(folder, stateful, processes.device)
    stop.check()
    main_epoch = processes.broadcast_object(progress.epoch)
    with stop.share(OSError):
        if progress.epoch != main_epoch:
            raise OSError(
                f"{folder} is at epoch {main_epoch} for rank 0 and at {progress.epoch} here; give an --out that "
                "all processes see"
            )
    stop.check()
    log = None
    with stop.share(OSError):
        # The main process writes and saves, when its own clock says so; the others help it where they have shards.
        if processes.is_main or is_sharded:
            log = RunLog(config, norm, folder, progress, processes)
    if is_sharded:
        stop.check()
    with stop.share(OSError):
        if log is not None:
            log.log_spectra(0, model, data.image_shape)
    timer = CheckpointTimer(config.checkpoint_minutes, config.epochs)
    checkpoints = Checkpoints(folder, stateful, progress, timer, writes=processes.is_main, are_sharded=is_sharded)
    stop.check()

    parallel_model = model if is_sharded else data_parallel(model, processes)
    preprocessing = Preprocessing(data, processes.device, memory_format)
    with checkpoints.save_when_stopped():
        for epoch in range(progress.epoch + 1, config.epochs + 1):
            lr = optimizer.param_groups[0]["lr"]
            label = f"{norm} {epoch}/{config.epochs}"
            started = time.perf_counter()
            train_metrics = train_epoch(
                config, parallel_model, optimizer, preprocessing, processes, epoch, costs.step_clock, label, stop
            )
            schedule.step()
            broadcast_batch_norm(model, processes)
            with stop.share(NonFiniteWeightError):
                require_finite(model, f"epoch {epoch}")
            stop.check()
            test_metrics = evaluate(config, model, preprocessing, processes)
            is_logged = False
            if log is not None:
                with stop.share(OSError):
                    times = {"time/epoch_s": time.perf_counter() - started, **costs.take()}
                    recorded = log.record(epoch, model, scaling, data.image_shape)
                    metrics = {"epoch": epoch, **train_metrics, **test_metrics, "lr": lr, **recorded, **times}
                    log.log_metrics(metrics)
                    is_logged = True
            if is_sharded:
                # All take part in a checkpoint, or none: one that could not write its log would be waited for.
                stop.check()
            # No checkpoint of an epoch that is not in the log.
            if is_logged:
                with stop.share(OSError):
                    checkpoints.epoch_ended(epoch)
                    if processes.is_main:
                        print(epoch_message(config, norm, metrics), flush=True)
            stop.check()

        if log is not None:
            with stop.share(OSError):
                log.finish(scaling)
                checkpoints.finish()
        stop.check()


def learning_rate_schedule(config: Config, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.MultiStepLR:
    # Every run has at least one epoch at the initial learning rate, however few epochs it has.
    milestones = [max(1, round(fraction * config.epochs)) for fraction in config.milestones]
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, config.gamma)


def train_epoch(
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    preprocessing: Preprocessing,
    processes: Processes,
    epoch: int,
    clock: Clock,
    label: str,
    stop: Stop,
) -> dict[str, float]:
    """Train for one epoch; returns the loss and accuracy of the batches as they were trained on."""
    # The model's own random numbers (dropout) depend only on seed, epoch and rank: a resumed run draws the same.
    torch.manual_seed((config.seed * 100_003 + epoch) * 10_007 + processes.rank)
    preprocessing.draw_augmentation(config.seed, epoch)
    model.train()
    average = Average(processes)
    loader = train_loader(preprocessing.data, config, processes.rank, processes.world_size, epoch)
    show_progress = processes.is_main and sys.stderr.isatty()
    for images, labels, index in tqdm(loader, label, leave=False, disable=not show_progress):
        stop.check(wait=False)
        with clock.span():
            images, labels, index = (
                tensor.to(processes.device, non_blocking=True) for tensor in (images, labels, index)
            )
            optimizer.zero_grad()
            with torch.autocast(processes.device.type, torch.bfloat16, enabled=config.amp):
                output = model(preprocessing.train(images, index)).float()
                loss = nn.functional.cross_entropy(output, labels)
            loss.backward()
            with stop.share(NonFiniteWeightError):
                optimizer.step()
        average.add(loss.detach() * len(labels), output, labels)
    return average.metrics("train")


@torch.no_grad()
def evaluate(config: Config, model: nn.Module, preprocessing: Preprocessing, processes: Processes) -> dict[str, float]:
    """Loss and accuracy on the test images."""
    model.eval()
    average = Average(processes)
    for images, labels, _ in test_loader(preprocessing.data, config, processes.rank, processes.world_size):
        images, labels = (tensor.to(processes.device, non_blocking=True) for tensor in (images, labels))
        with torch.autocast(processes.device.type, torch.bfloat16, enabled=config.amp):
            output = model(preprocessing.test(images)).float()
        average.add(nn.functional.cross_entropy(output, labels, reduction="sum"), output, labels)
    return average.metrics("test")


def epoch_message(config: Config, norm: str, metrics: dict[str, Any]) -> str:
    splits = (
        f"{split} {metrics[f'{split}/loss']:.4f} {metrics[f'{split}/accuracy']:.2%}" for split in ("train", "test")
    )
    time = f"{metrics['time/step_ms']:.1f} ms/step"
    return "  ".join([f"{norm:>9}", f"epoch {metrics['epoch']}/{config.epochs}", *splits, time])


class StepCosts:
    """The cost of training steps: their time, that of the norm scaling in them, and the solver's iterations."""

    def __init__(self, scaling: NormScaler | None, device: torch.device) -> None:
        self.scaling = scaling
        self.step_clock, self.scaling_clock = Clock(device), Clock(device)
        self.num_steps = 0
        self.iterations: Counter[str] = Counter()

    def count_iterations(self, *_: Any) -> None:
        """Add up the iterations by layer; the host knows them without synchronizing with the device."""
        if counts := self.scaling.num_iterations:
            self.num_steps += 1
            self.iterations.update(counts)

    def take(self) -> dict[str, float]:
        """Mean iterations and median times since the last call."""
        means = {f"iterations/{name}": total / self.num_steps for name, total in self.iterations.items()}
        self.num_steps = 0
        self.iterations.clear()
        times = {"time/step_ms": self.step_clock.median_ms(), "time/scaling_ms": self.scaling_clock.median_ms()}
        return means | times


class Average:
    """Mean loss and accuracy over batches and ranks, summed on the device."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.sums = torch.zeros(3, dtype=torch.float64, device=processes.device)

    def add(self, loss_sum: torch.Tensor, output: torch.Tensor, labels: torch.Tensor) -> None:
        correct = (output.argmax(1) == labels).sum()
        self.sums += torch.stack([loss_sum, correct, torch.full_like(correct, len(labels))])

    def metrics(self, split: str) -> dict[str, float]:
        loss, correct, count = self.processes.all_reduce_sum(self.sums).tolist()
        return {f"{split}/loss": loss / count, f"{split}/accuracy": correct / count}


if __name__ == "__main__":
    presets: dict[str, Any] = {name: (preset.__doc__ or "", preset()) for name, preset in PRESETS.items()}
    main(tyro.extras.overridable_config_cli(presets, description=__doc__))
