"""Train a model without norm scaling, with Frobenius and with spectral norm scaling, and compare the three.

torchrun --standalone --nproc-per-node=2 recipes/train.py digits
"""

import json
import os
import shutil
import statistics
import sys
import time
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from compare import HEADER, compare, markdown
from data import Data, Prepare, load, test_loader, train_loader
from logs import WandbRun, as_json, on_terminal, read_lines, say, write_atomically
from models import build, left_alone, start
from presets import PRESETS, Config
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from specscale import spectral_norms


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(values)
        return values


def join() -> Ranks:
    """Join the processes that torchrun started, or run alone."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Ranks(0, 1, device)
    dist.init_process_group("nccl" if cuda else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def check(config: Config, ranks: Ranks) -> None:
    """Refuse what cannot work before anything is trained or deleted."""
    if config.batch_size % ranks.world:
        raise SystemExit(f"train: batch size {config.batch_size} does not divide over {ranks.world} processes")
    if config.resume and config.overwrite:
        raise SystemExit("train: --resume and --overwrite exclude each other")
    for norm in config.norms:
        folder = run_folder(config, norm)
        if folder.exists() and not (config.resume or config.overwrite):
            state = "a finished" if (folder / "summary.json").exists() else "an unfinished"
            raise SystemExit(f"train: {folder} holds {state} run; --resume goes on, --overwrite trains again")


def run_folder(config: Config, norm: str) -> Path:
    return config.out / config.preset / f"{norm}-seed{config.seed}"


class Clock:
    """Time stamps without a sync: events on CUDA, the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: list[tuple[Any, Any]] = []

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def median_ms(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
            spans = [a.elapsed_time(b) for a, b in self.spans]
        else:
            spans = [1000 * (b - a) for a, b in self.spans]
        self.spans.clear()
        return statistics.median(spans) if spans else 0.0


def evaluate(model: nn.Module, data: Data, prepare: Prepare, config: Config, ranks: Ranks) -> tuple[float, float]:
    """Loss and accuracy on the test images."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    with torch.no_grad(), torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.amp):
        for images, labels, _ in test_loader(data, config, ranks.rank, ranks.world):
            labels = labels.to(ranks.device)
            output = model(prepare.test(images.to(ranks.device))).float()
            loss = nn.functional.cross_entropy(output, labels, reduction="sum")
            sums += torch.stack(
                [loss, (output.argmax(1) == labels).sum(), torch.tensor(len(labels), device=loss.device)]
            )
    loss, correct, count = ranks.total(sums).tolist()
    return loss / count, correct / count


def distribute(model: nn.Module) -> nn.Module:
    """The model with averaged gradients; its buffers stay each rank's own (`share_statistics`)."""
    with warnings.catch_warnings():
        # The option's new name is younger than the oldest torch that is supported.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False)


def share_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Give every rank the running statistics of rank 0; the scaling's buffers are equal by construction."""
    if ranks.world > 1:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for buffer in module.buffers():
                    dist.broadcast(buffer, 0)


def train(config: Config, norm: str, data: Data, ranks: Ranks) -> None:
    """One run: one condition, from its init or its checkpoint to its summary."""
    folder = run_folder(config, norm)
    if (folder / "summary.json").exists() and config.resume:
        return
    if ranks.leads and config.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    torch.manual_seed(config.seed)
    model = build(config, data.shape, data.num_classes)
    scaling = start(config, norm, model, data.shape)
    model.to(ranks.device, memory_format=memory_format)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    milestones = [round(fraction * config.epochs) for fraction in config.milestones]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, config.gamma)
    step_clock, scaling_clock = Clock(ranks.device), Clock(ranks.device)
    if scaling is not None:
        begun: list[Any] = [None]
        optimizer.register_step_post_hook(lambda *_: begun.__setitem__(0, scaling_clock.now()))
        scaling.attach(optimizer)
        optimizer.register_step_post_hook(lambda *_: scaling_clock.spans.append((begun[0], scaling_clock.now())))

    first, run_id, history = 1, uuid.uuid4().hex[:8], []
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists() and config.resume:
        saved = torch.load(checkpoint, map_location=ranks.device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first, run_id = saved["epoch"] + 1, saved["run_id"]
        # A line that was written after the checkpoint belongs to the epoch that is trained again.
        history = [line for line in read_lines(folder / "metrics.jsonl") if line["epoch"] < first]
    if ranks.world > 1:
        dist.barrier()
    parallel = distribute(model) if ranks.world > 1 else model
    prepare = Prepare(data, ranks.device, memory_format)
    if ranks.leads:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.json", json.dumps(as_json(config) | {"norm": norm}, indent=2))
        write_atomically(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))
        wandb_run = WandbRun(config, folder, "train", f"{config.preset}-{norm}", run_id)
        for line in history:
            wandb_run.log(line)

    for epoch in range(first, config.epochs + 1):
        lr = optimizer.param_groups[0]["lr"]
        torch.manual_seed(hash((config.seed, epoch, ranks.rank)) % 2**31)
        prepare.draw(config.seed, epoch)
        parallel.train()
        sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
        loader = train_loader(data, config, ranks.rank, ranks.world, epoch)
        bar = tqdm(loader, f"{norm} {epoch}/{config.epochs}", leave=False, disable=not (ranks.leads and on_terminal()))
        for images, labels, index in bar:
            begin = step_clock.now()
            images, labels, index = (tensor.to(ranks.device) for tensor in (images, labels, index))
            optimizer.zero_grad()
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.amp):
                output = parallel(prepare.train(images, index)).float()
                loss = nn.functional.cross_entropy(output, labels)
            loss.backward()
            optimizer.step()
            step_clock.spans.append((begin, step_clock.now()))
            count = torch.tensor(len(labels), device=ranks.device)
            sums += torch.stack([loss.detach() * count, (output.argmax(1) == labels).sum(), count])
        schedule.step()
        share_statistics(model, ranks)
        train_loss, train_correct, count = ranks.total(sums).tolist()
        test_loss, test_accuracy = evaluate(model, data, prepare, config, ranks)
        if ranks.leads:
            line = {
                "epoch": epoch,
                "train/loss": train_loss / count,
                "train/accuracy": train_correct / count,
                "test/loss": test_loss,
                "test/accuracy": test_accuracy,
                "lr": lr,
                **{
                    f"spectral_norm/{name}": value
                    for name, value in spectral_norms(model, exclude=left_alone(model)).items()
                },
                "time/step_ms": step_clock.median_ms(),
                "time/scaling_ms": scaling_clock.median_ms(),
            }
            history.append(line)
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            wandb_run.log(line)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            part = checkpoint.with_name("checkpoint.pt.part")
            torch.save(state | {"epoch": epoch, "run_id": run_id}, part)
            os.replace(part, checkpoint)
            say(
                f"{norm:>9}  epoch {epoch}/{config.epochs}  train {line['train/loss']:.4f} "
                f"{line['train/accuracy']:.2%}  test {test_loss:.4f} {test_accuracy:.2%}  "
                f"{line['time/step_ms']:.1f} ms/step"
            )
    if ranks.leads:
        metrics = scaling.metrics() if scaling is not None else {}
        targets = {key.removeprefix("target/"): value for key, value in metrics.items() if key.startswith("target/")}
        times = {key: statistics.median(e[key] for e in history) for key in ("time/step_ms", "time/scaling_ms")}
        final = {key: value for key, value in history[-1].items() if not key.startswith("time/")}
        write_atomically(folder / "summary.json", json.dumps(final | {"targets": targets} | times, indent=2))
        wandb_run.finish()


def main(config: Config) -> None:
    ranks = join()
    check(config, ranks)
    if ranks.world > 1:
        dist.barrier()
    data = load(config)
    for norm in config.norms:
        train(config, norm, data, ranks)
        if ranks.world > 1:
            dist.barrier()
    if ranks.leads:
        folder = config.out / config.preset
        rows = compare(folder)
        wandb_run = WandbRun(config, folder, "comparison", config.preset)
        wandb_run.log_comparison(folder, HEADER, rows)
        wandb_run.finish()
        say(f"\n{markdown(rows)}\n{folder}/: comparison.md, accuracy.png, loss.png, spectral_norms.png")
    if ranks.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    presets = {preset().preset: (preset.__doc__ or "", preset()) for preset in PRESETS}
    main(tyro.extras.overridable_config_cli(presets, description=__doc__))
    sys.exit(0)
